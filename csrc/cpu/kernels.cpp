// The loops of a step. This file is compiled once per instruction set, with FUSED_OPT_ISA naming it; everything but the
// function at the end is in an unnamed namespace, so that no two copies are ever merged.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../noise.h"
#include "../pass.h"
#include "../types.h"
#include "convert.h"
#include "step.h"
#include "vectors.h"

namespace fused_opt::cpu {
namespace {

// Elements that are worked on at once where there is more to do than one loop does, and how many elements before its
// turn a block is asked for: what lies between stays in the L1 cache.
constexpr int64_t kBlock = 128, kAhead = 768;
// Normal numbers that are drawn at once; chunks begin at multiples of it.
constexpr int64_t kDraw = 512;
static_assert(kChunk % kDraw == 0 && kDraw % kBlock == 0 && kBlock == kCoded);

// Calls f(k, offset) for the k-th of `n` elements from `begin` in row-major order, offset in elements of the operand.
template <class F>
FUSED_OPT_FN void for_each_strided(const Tensor& tensor, const Operand& operand, int64_t begin, int64_t n, const F& f) {
  int64_t offset = 0;
  int64_t rest = begin;
  int64_t index[kMaxDimensions];
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    index[d] = rest % tensor.sizes[d];
    rest /= tensor.sizes[d];
    offset += index[d] * operand.strides[d];
  }
  for (int64_t k = 0; k < n; ++k) {
    f(k, offset);
    for (int d = tensor.ndim - 1; d >= 0; --d) {
      offset += operand.strides[d];
      if (++index[d] < tensor.sizes[d]) break;
      offset -= index[d] * operand.strides[d];
      index[d] = 0;
    }
  }
}

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;

template <class T>
FUSED_OPT_FN bool lies_ready(const Tensor& tensor, const Operand& operand) {
  return tensor.flat && operand.dtype == kDTypeOf<T>;
}

// Not inlined, like `copy_out`: the loops around them are better off short.
template <class T>
__attribute__((noinline)) T* copy_in(const Tensor& tensor, const Operand& operand, int64_t begin, int64_t n,
                                     T* buffer) {
  with_type(operand.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(operand.data);
    if (tensor.flat)
      widen_all(data + begin, n, buffer);
    else
      for_each_strided(tensor, operand, begin, n,
                       [&](int64_t k, int64_t i) { buffer[k] = static_cast<T>(widen(data[i])); });
  });
  return buffer;
}

template <class T>
__attribute__((noinline)) void copy_out(const Tensor& tensor, const Operand& operand, int64_t begin, int64_t n,
                                        const T* values) {
  with_type(operand.dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    auto* data = static_cast<Element*>(operand.data);
    if (tensor.flat)
      narrow_all(values, n, data + begin);
    else
      for_each_strided(tensor, operand, begin, n, [&](int64_t k, int64_t i) { data[i] = narrow<Element>(values[k]); });
  });
}

// Whether a loop is done where it is asked for, of bfloat16: over a whole block, whose length the compiler knows, it is
// as short as a call.
template <class T, class N>
constexpr bool kInline = std::is_same_v<T, float> && !std::is_same_v<N, int64_t>;

// Where elements [begin, begin + n) can be worked on as T: in place, or copied into `buffer`.
template <class T, class N>
FUSED_OPT_FN T* load(const Tensor& tensor, const Operand& operand, int64_t begin, N n, T* buffer) {
  if (lies_ready<T>(tensor, operand)) return static_cast<T*>(operand.data) + begin;
  if constexpr (kInline<T, N>)
    if (tensor.flat && operand.dtype == DType::kBFloat16) {
      widen_all(static_cast<const BFloat16*>(operand.data) + begin, n, buffer);
      return buffer;
    }
  return copy_in(tensor, operand, begin, n, buffer);
}

// Puts back what `load` had to copy.
template <class T>
FUSED_OPT_FN void store(const Tensor& tensor, const Operand& operand, int64_t begin, int64_t n, const T* values) {
  if (!lies_ready<T>(tensor, operand)) copy_out(tensor, operand, begin, n, values);
}

template <class T, class N>
FUSED_OPT_FN T* load_state(const Tensor& tensor, int s, int64_t begin, N n, T* buffer) {
  const Operand& state = tensor.states[s];
  if (!tensor.scales[s]) return load(tensor, state, begin, n, buffer);
  const float scale = tensor.scales[s][begin / kCoded];
  if (state.dtype == DType::kInt8)
    decode(static_cast<const int8_t*>(state.data) + begin, scale, n, buffer);
  else
    decode(static_cast<const uint8_t*>(state.data) + begin, scale, n, buffer);
  return buffer;
}

// Of a parameter that is the rounding of something exact: in and out.
__attribute__((noinline)) float* copy_in_exact(const Tensor& tensor, int64_t begin, int64_t n, float* buffer) {
  const auto* low = static_cast<const int16_t*>(tensor.exact.data);
  const auto* copy = static_cast<const float*>(tensor.exact.data);
  const auto walk = [&](const auto& get) {
    if (tensor.flat)
      for (int64_t k = 0; k < n; ++k) get(k, begin + k);
    else
      for_each_strided(tensor, tensor.p, begin, n, get);
  };
  with_type(tensor.p.dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    const auto* data = static_cast<const Element*>(tensor.p.data);
    if (tensor.exact.dtype == DType::kInt16) {
      if constexpr (std::is_same_v<Element, BFloat16>) {
        if (tensor.flat)
          join_all(data + begin, low + begin, n, buffer);
        else
          walk([&](int64_t k, int64_t i) { buffer[k] = join(data[i], low[i]); });
      }
    } else if constexpr (sizeof(Element) == 2) {
      walk([&](int64_t k, int64_t i) { buffer[k] = exact_of(data[i], copy[i]); });
    }
  });
  return buffer;
}

__attribute__((noinline)) void copy_out_exact(const Tensor& tensor, int64_t begin, int64_t n, const float* values) {
  auto* low = static_cast<int16_t*>(tensor.exact.data);
  auto* copy = static_cast<float*>(tensor.exact.data);
  const auto walk = [&](const auto& put) {
    if (tensor.flat)
      for (int64_t k = 0; k < n; ++k) put(k, begin + k);
    else
      for_each_strided(tensor, tensor.p, begin, n, put);
  };
  with_type(tensor.p.dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    auto* data = static_cast<Element*>(tensor.p.data);
    if (tensor.exact.dtype == DType::kInt16) {
      if constexpr (std::is_same_v<Element, BFloat16>) {
        if (tensor.flat)
          split_all(values, n, data + begin, low + begin);
        else
          walk([&](int64_t k, int64_t i) {
            const Split parts = split(values[k]);
            data[i] = parts.high, low[i] = parts.low;
          });
      }
    } else if constexpr (sizeof(Element) == 2) {
      walk([&](int64_t k, int64_t i) { copy[i] = values[k], data[i] = narrow<Element>(values[k]); });
    }
  });
}

template <class T, class N>
FUSED_OPT_FN T* load_weights(const Tensor& tensor, int64_t begin, N n, T* buffer) {
  if constexpr (std::is_same_v<T, float>)
    if (tensor.exact.data) return copy_in_exact(tensor, begin, n, buffer);
  return load(tensor, tensor.p, begin, n, buffer);
}

// A sum of squares whose bits do not depend on how the elements came, as long as all but the last `add` bring a
// multiple of 32: the product of two float32 is exact in float64.
struct SumOfSquares {
  static constexpr int kLanes = 32;
  Doubles lanes[kLanes / kDoubles] = {};

  template <class T>
  FUSED_OPT_FN void add(const T* x, int64_t n) {
    const int64_t whole = n - n % kLanes;
#pragma GCC unroll 4
    for (int64_t i = 0; i < whole; i += kLanes)
#pragma GCC unroll 16
      for (int k = 0; k < kLanes / kDoubles; ++k) {
        const Doubles some = widened(x + i + k * kDoubles);
        lanes[k] += some * some;
      }
    for (int64_t i = whole; i < n; ++i)
      lanes[i % kLanes / kDoubles][i % kDoubles] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  double total() const {
    double sums[kLanes];
    std::memcpy(sums, lanes, sizeof sums);
    for (int width = kLanes / 2; width; width /= 2)
      for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
    return sums[0];
  }
};

// Two vector registers of counters: a round is a chain of dependent instructions, and two chains hide each other's
// latency.
struct ManyLanes {
  struct Word {
    Words a, b;
    FUSED_OPT_FN Word operator>>(int n) const { return {a >> n, b >> n}; }
    FUSED_OPT_FN Word operator^(const Word& other) const { return {a ^ other.a, b ^ other.b}; }
  };
  static FUSED_OPT_FN Word splat(uint32_t x) {
    const Words all = Words{} + static_cast<uint64_t>(x);
    return {all, all};
  }
  static FUSED_OPT_FN Word multiply32(const Word& x, const Word& y) {
    return {cpu::multiply32(x.a, y.a), cpu::multiply32(x.b, y.b)};
  }
};

// z: room for a multiple of 128 normal numbers, before each of which it calls ahead(done): calculating and fetching can
// overlap.
template <class Ahead>
FUSED_OPT_FN void draw_counters(const Draw& by, uint64_t begin, int64_t n, float* z, const Ahead& ahead) {
  constexpr int kLanes = kRegister / sizeof(uint64_t);
  constexpr int kCounters = 32;
  alignas(64) uint32_t words[4][kCounters];
  Words first{};
  for (int lane = 0; lane < kLanes; ++lane) first[lane] = begin + static_cast<uint64_t>(lane);
  for (int64_t done = 0; done < n; done += kCounters) {
    ahead(4 * done);
    for (int k = 0; k < kCounters; k += 2 * kLanes) {
      const Words counter = first + static_cast<uint64_t>(done + k);
      ManyLanes::Word c0{counter, counter + static_cast<uint64_t>(kLanes)}, c1 = c0 >> 32;
      ManyLanes::Word c2 = ManyLanes::splat(by.index), c3 = ManyLanes::splat(by.step);
      philox<ManyLanes>(c0, c1, c2, c3, static_cast<uint32_t>(by.seed), static_cast<uint32_t>(by.seed >> 32));
      const ManyLanes::Word* c[] = {&c0, &c1, &c2, &c3};
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) *reinterpret_cast<Halves*>(&words[w][k]) = evens(c[w]->a, c[w]->b);
    }
    alignas(64) float lanes[4][kCounters];
    for (int k = 0; k < kCounters; ++k) box_muller(words[0][k], words[1][k], lanes[0][k], lanes[1][k]);
    for (int k = 0; k < kCounters; ++k) box_muller(words[2][k], words[3][k], lanes[2][k], lanes[3][k]);
    for (int k = 0; k < kCounters; ++k)
#pragma GCC unroll 4
      for (int lane = 0; lane < 4; ++lane) z[4 * (done + k) + lane] = lanes[lane][k];
  }
}

void normal(uint64_t seed, uint32_t index, uint32_t t, uint64_t begin, int64_t n, float* z) {
  draw_counters({seed, index, t}, begin, n, z, [](int64_t) {});
}

// Calls f(begin, n) for every block of [begin, end); all but the last have a length that the compiler knows.
template <class F>
FUSED_OPT_FN void for_each_block(int64_t begin, int64_t end, const F& f) {
  for (; begin + kBlock <= end; begin += kBlock) f(begin, std::integral_constant<int64_t, kBlock>());
  if (begin < end) f(begin, end - begin);
}

// Prefetches what the block that begins kAhead elements further will read, where the processor's own prefetching stops
// while it computes, and starts too late; of states in 8 bits on every one, since it computes for longer.
template <class... Operands>
FUSED_OPT_FN void prefetch(const Tensor& tensor, int64_t begin, const Operands&... operands) {
  if (!(kPrefetches || tensor.scales[0]) || !tensor.flat || begin + kAhead + kBlock > tensor.numel) return;
  const auto ask = [&](const Operand& operand) {
    const int64_t size = size_of(operand.dtype);
    const char* data = static_cast<const char*>(operand.data) + (begin + kAhead) * size;
    for (int64_t byte = 0; byte < kBlock * size; byte += 64) __builtin_prefetch(data + byte);
  };
  (ask(operands), ...);
}

// What elements [begin, begin + n) draw that lie in another order than the whole tensor's: that of a slab at a time is
// drawn in the whole's order, and kept for the next call.
__attribute__((noinline)) void draw_slabs(const Tensor& tensor, const Draw& by, const Layer& layer, int64_t begin,
                                          int64_t n, float* z) {
  struct Drawn {
    Draw by;
    uint64_t first = 0;
    int64_t size = 0;
    alignas(64) float z[kMostInSlab + 256];  // what comes before and after in the draws
  };
  static thread_local Drawn drawn;
  const ShardLayout& layout = *layer.shard;
  const Operand whole{nullptr, DType::kFloat32, layout.strides};
  for (int64_t i = 0, m; i < n; i += m) {
    const int64_t slab = (begin + i) / layout.slab * layout.slab;
    m = std::min(n - i, slab + layout.slab - begin - i);
    const auto first = static_cast<uint64_t>(in_whole(tensor, layout, slab)), skipped = first % 4;
    if (drawn.size != layout.slab || drawn.first != first || drawn.by.seed != by.seed || drawn.by.index != by.index ||
        drawn.by.step != by.step) {
      draw_counters(by, first / 4, (static_cast<int64_t>(skipped) + layout.slab + 3) / 4, drawn.z, [](int64_t) {});
      drawn.by = by, drawn.first = first, drawn.size = layout.slab;
    }
    const uint64_t before = skipped + static_cast<uint64_t>(layout.offset) - first;
    for_each_strided(tensor, whole, begin + i, m,
                     [&](int64_t k, int64_t place) { z[i + k] = drawn.z[before + static_cast<uint64_t>(place)]; });
  }
}

// What elements [begin, begin + n) draw, n at most kDraw.
template <class Ahead>
__attribute__((noinline)) void draw(const Tensor& tensor, const Draw& by, const Layer& layer, int64_t begin, int64_t n,
                                    float* z, const Ahead& ahead) {
  if (!layer.shard) {
    draw_counters(by, static_cast<uint64_t>(begin) / 4, (n + 3) / 4, z, [&](int64_t done) { ahead(begin + done); });
    return;
  }
  if (layer.shard->slab) {
    for (int64_t k = 0; k < n; k += kBlock) ahead(begin + k);
    return draw_slabs(tensor, by, layer, begin, n, z);
  }
  alignas(64) float some[kDraw];
  for (int64_t i = 0, m; i < n; i += m) {
    // A shard may begin in the middle of the four elements that share a counter.
    const int64_t first = in_whole(tensor, *layer.shard, begin + i), skipped = first % 4;
    const int64_t left = layer.shard->run - (begin + i) % layer.shard->run;
    m = n - i < kDraw - skipped ? n - i : kDraw - skipped;
    if (left < m) m = left;
    draw_counters(by, static_cast<uint64_t>(first) / 4, (skipped + m + 3) / 4, some, [](int64_t) {});
    for (int64_t k = 0; k < m; ++k) z[i + k] = some[skipped + k];
  }
}

// The keys of the random bits that a tensor's elements are rounded by, of `places` stored numbers.
template <int places>
struct RoundingKeys {
  static constexpr int kWords = (places + kRoundedByWord - 1) / kRoundedByWord;
  RoundingKey of[kWords];
  FUSED_OPT_FN RoundingKeys(const StepArgs& args, const Layer& layer) {
    for (int k = 0; args.stochastic && k < kWords; ++k)
      of[k] = rounding_key({args.rounding_seed, layer.index, args.noise_step}, k);
  }
};

// The words of consecutive elements of the whole tensor.
template <class N>
FUSED_OPT_FN void hash(int64_t first, N n, RoundingKey key, uint32_t* words) {
  const auto low = static_cast<uint32_t>(first);
  const auto high = static_cast<uint32_t>(static_cast<uint64_t>(first) >> 32);
  if (low > UINT32_MAX - kBlock)
    for (int64_t k = 0; k < n; ++k) words[k] = rounding_word(first + k, key);
  else
    for (uint32_t k = 0; k < static_cast<uint32_t>(n); ++k) words[k] = rounding_word(low + k, high, key);
}

// The random bits of a block of at most kBlock elements, a word for each.
template <class N>
struct Bits {
  const Tensor& tensor;
  const StepArgs& args;
  const Layer& layer;
  const RoundingKey* keys;
  int64_t begin;
  N n;
  int held = -1;  // which words of the elements these are
  alignas(64) uint32_t words[kBlock];

  FUSED_OPT_FN Bits(const Tensor& tensor, const StepArgs& args, const Layer& layer, const RoundingKey* keys,
                    int64_t begin, N n)
      : tensor(tensor), args(args), layer(layer), keys(keys), begin(begin), n(n) {}
  __attribute__((noinline)) void hash_strided(RoundingKey key) {
    for_each_strided(tensor, {nullptr, DType::kFloat32, layer.shard->strides}, begin, n,
                     [&](int64_t k, int64_t i) { words[k] = rounding_word(layer.shard->offset + i, key); });
  }
  FUSED_OPT_FN const uint32_t* of(int place) {
    if (held == place / kRoundedByWord) return words;
    held = place / kRoundedByWord;
    const RoundingKey key = keys[held];
    const ShardLayout whole = layer.shard ? *layer.shard : ShardLayout{0, begin + n};
    if (begin + n <= whole.run)
      hash(whole.offset + begin, n, key, words);
    else
      hash_strided(key);
    return words;
  }
};

// `copy_out`, at random where that was asked for and there are 16 bits.
template <class T, class N>
__attribute__((noinline)) void copy_out(const Operand& operand, const T* values, Bits<N>& bits, int place) {
  if (!bits.args.stochastic || size_of(operand.dtype) != 2)
    return copy_out(bits.tensor, operand, bits.begin, bits.n, values);
  const uint32_t* words = bits.of(place);
  with_type(operand.dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(Element) == 2) {
      auto* data = static_cast<Element*>(operand.data);
      const auto put = [&](int64_t k, int64_t i) {
        data[i] = narrow_at_random<Element>(static_cast<float>(values[k]), rounding_bits(words[k], place));
      };
      if (bits.tensor.flat)
        narrow_all_at_random(values, words, place, bits.n, data + bits.begin);
      else
        for_each_strided(bits.tensor, operand, bits.begin, bits.n, put);
    }
  });
}

template <class T, class N>
FUSED_OPT_FN void store(const Operand& operand, const T* values, Bits<N>& bits, int place) {
  if (lies_ready<T>(bits.tensor, operand)) return;
  if constexpr (kInline<T, N>)
    if (bits.tensor.flat && operand.dtype == DType::kBFloat16) {
      auto* data = static_cast<BFloat16*>(operand.data) + bits.begin;
      return bits.args.stochastic ? narrow_all_at_random(values, bits.of(place), place, bits.n, data)
                                  : narrow_all(values, bits.n, data);
    }
  copy_out(operand, values, bits, place);
}

// The scales of a block's states in 8 bits are found before any is stored: one waits for what the other does not.
template <class T, class N>
FUSED_OPT_FN Scale scale_of_state(const T* values, const Bits<N>& bits, int s) {
  return bits.tensor.scales[s] ? scale_in(values, bits.n) : Scale{};
}

template <class T, class N>
FUSED_OPT_FN void store_state(const T* values, const Scale& scale, Bits<N>& bits, int s) {
  const Operand& state = bits.tensor.states[s];
  if (!bits.tensor.scales[s]) return store(state, values, bits, s);
  bits.tensor.scales[s][bits.begin / kCoded] = scale.scale;
  if (state.dtype == DType::kInt8)
    encode(static_cast<int8_t*>(state.data) + bits.begin, scale, bits.n, values);
  else
    encode(static_cast<uint8_t*>(state.data) + bits.begin, scale, bits.n, values);
}

template <class T, class N>
FUSED_OPT_FN void store_weights(const T* values, Bits<N>& bits, int place) {
  if constexpr (std::is_same_v<T, float>)
    if (bits.tensor.exact.data) return copy_out_exact(bits.tensor, bits.begin, bits.n, values);
  store(bits.tensor.p, values, bits, place);
}

// Block by block, for what is not done in one go. Not inlined: its frame would cost every small tensor. The rule comes
// by value: were its address passed on, the caller's loops would read its coefficients from memory, and not be
// vectorized.
template <class T, size_t... S, class Rule>
__attribute__((noinline)) Squares update_blocks(const Rule rule, const Factors<T> by, const Tensor& tensor,
                                                const StepArgs& args, const Layer& layer, int64_t begin, int64_t end,
                                                std::index_sequence<S...>) {
  const bool carries = carries_norm(tensor, args), averages = fused_opt::averages(args), plain = is_plain(args);
  const auto masks = fused_opt::masks<T>(tensor, args, layer);
  const T sigma = static_cast<T>(fused_opt::sigma(tensor, args, layer));
  alignas(64) T buffers[3 + sizeof...(S)][kBlock];
  alignas(64) float z[kDraw];
  const RoundingKeys<sizeof...(S) + 2> keys(args, layer);
  SumOfSquares found, left;
  const auto ahead = [&](int64_t begin) {
    prefetch(tensor, begin, tensor.p, tensor.g, tensor.states[S]...);
    if (averages) prefetch(tensor, begin, tensor.average);
    if (tensor.exact.data) prefetch(tensor, begin, tensor.exact);
  };
  for_each_block(begin, end, [&](int64_t begin, auto n) {
    if (args.sigma == 0)
      ahead(begin);
    else if (begin % kDraw == 0)
      draw(tensor, {args.seed, layer.index, args.noise_step}, layer, begin, end - begin < kDraw ? end - begin : kDraw,
           z, ahead);
    Bits bits(tensor, args, layer, keys.of, begin, n);
    T* p = load_weights(tensor, begin, n, buffers[0]);
    const T* g = load(tensor, tensor.g, begin, n, buffers[1]);
    T* states[] = {load_state(tensor, S, begin, n, buffers[2 + S])..., nullptr};
    if (carries) found.add(p, n);
    if (plain)
      apply(rule, by, n, p, g, states[S]...);
    else
      apply_masked(rule, by, masks, n, p, g, states[S]...);
    [[maybe_unused]] const Scale scales[] = {scale_of_state(states[S], bits, S)..., Scale{}};
    (store_state(states[S], scales[S], bits, S), ...);
    if (args.sigma != 0)
      for (int64_t k = 0; k < n; ++k) p[k] += sigma * static_cast<T>(z[begin % kDraw + k]);
    store_weights(p, bits, sizeof...(S));
    if (!averages && !carries) return;
    p = load_weights(tensor, begin, n, buffers[0]);  // what is averaged and summed is what was stored
    if (averages) {
      T* v = load(tensor, tensor.average, begin, n, buffers[2 + sizeof...(S)]);
      fold(args, n, v, p);
      store(tensor, tensor.average, begin, n, v);
      if (moves_weights(args)) {
        store_weights(p, bits, sizeof...(S) + 1);
        p = load_weights(tensor, begin, n, buffers[0]);
      }
    }
    if (carries) left.add(p, n);
  });
  return carries ? Squares{found.total(), left.total()} : Squares{};
}

template <template <class> class Rule, class T, size_t... S>
Squares update_as(const Tensor& tensor, const StepArgs& args, const Layer& layer, int64_t begin, int64_t end,
                  std::index_sequence<S...> states) {
  // From here on prefetching by blocks gains more than the blocks cost.
  constexpr int64_t kLong = 8192;
  const auto rule = make<Rule<T>, T>(args.coefficients);
  const auto by = factors<T>(args, args.lr, args.grad_scale, layer);
  bool in_one_go = (end - begin < kLong || !kPrefetches) && lies_ready<T>(tensor, tensor.p) &&
                   lies_ready<T>(tensor, tensor.g) && !carries_norm(tensor, args) && !averages(args) && args.sigma == 0;
  ((in_one_go &= lies_ready<T>(tensor, tensor.states[S])), ...);
  if (!in_one_go) return update_blocks<T>(rule, by, tensor, args, layer, begin, end, states);
  auto* p = static_cast<T*>(tensor.p.data) + begin;
  const auto* g = static_cast<const T*>(tensor.g.data) + begin;
  if (is_plain(args))
    apply(rule, by, end - begin, p, g, static_cast<T*>(tensor.states[S].data) + begin...);
  else
    apply_masked(rule, by, masks<T>(tensor, args, layer), end - begin, p, g,
                 static_cast<T*>(tensor.states[S].data) + begin...);
  return {};
}

// Of how many elements of a block the update goes the gradient's way. The sign of a numerator is that of the update,
// and tells it from less memory and without division, unless the quotient may be 0 or no number: where numerator or
// gradient are beyond these bounds, or a denominator of 16 bits was too large for them. By integers, whose order is
// that of magnitudes, since a processor compares fewer at a time.
template <class Rule, class T, size_t... S, class N>
FUSED_OPT_FN int64_t agreements(const Rule& rule, const Factors<T>& by, const Tensor& tensor, int64_t begin, N n,
                                const T* p, const T* g, T (*buffers)[kBlock], std::index_sequence<S...>) {
  using Signed = std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t>;
  using Unsigned = std::make_unsigned_t<Signed>;
  Signed agreeing = 0;
  if constexpr (kHasNumerator<Rule>) {
    constexpr auto kLeast = __builtin_bit_cast(Unsigned, T(0x1p-60)), kMost = __builtin_bit_cast(Unsigned, T(0x1p60));
    constexpr Unsigned kMagnitude = ~Unsigned{} >> 1;
    if (((S == 0 || tensor.states[S].dtype != DType::kFloat16) && ...)) {
      const T* first = load_state(tensor, 0, begin, n, buffers[0]);
      Unsigned least = kMost, most = 0;  // but zeros, which are none of a doubt, and go beyond all others
      for (int64_t i = 0; i < n; ++i) {
        const T gradient = given(by, p[i], g[i]), numerator = rule.numerator(gradient, first[i]);
        const auto a = __builtin_bit_cast(Unsigned, gradient), b = __builtin_bit_cast(Unsigned, numerator);
        const Unsigned x = a & kMagnitude, y = b & kMagnitude, smaller = std::min(x, y);
        least = std::min(least, smaller - 1);
        most = std::max(most, std::max(x, y));
        agreeing += (smaller != 0) & (static_cast<Signed>(a ^ b) >= 0);
      }
      if (least >= kLeast && most < kMost) return agreeing;
      agreeing = 0;
    }
  }
  const T* states[] = {load_state(tensor, S, begin, n, buffers[S])..., nullptr};
  for (int64_t i = 0; i < n; ++i) {
    T copies[] = {states[S][i]..., T()};  // the step itself moves them
    agreeing += agreement(rule, by, p[i], g[i], copies[S]...) != 0;
  }
  return agreeing;
}

template <template <class> class Rule, class T, size_t... S>
Norms norms_as(const Tensor& tensor, const StepArgs& args, const Layer& layer, int64_t begin, int64_t end,
               Wanted wanted, std::index_sequence<S...> slots) {
  const auto rule = make<Rule<T>, T>(args.coefficients);
  const auto by = factors<T>(args, args.lr, args.grad_scale, layer);
  const auto masks = fused_opt::masks<T>(tensor, args, layer);
  const bool decays = by.coupled_decay != 0, by_numerator = kHasNumerator<Rule<T>> && !(wanted & kDirection);
  const bool needs_weights = wanted & (kWeight | kDirection) || (wanted & kAgreement && decays);
  alignas(64) T buffers[3 + sizeof...(S)][kBlock];
  SumOfSquares weight2, grad2, direction2;
  int64_t agreeing = 0;
  for_each_block(begin, end, [&](int64_t begin, auto n) {
    const T *p = nullptr, *g = nullptr;
    if (needs_weights) prefetch(tensor, begin, tensor.p);
    if (wanted & kUpdates && !by_numerator)
      prefetch(tensor, begin, tensor.g, tensor.states[S]...);
    else if (wanted & kUpdates)
      prefetch(tensor, begin, tensor.g, tensor.states[0]);
    else if (wanted & kGradient)
      prefetch(tensor, begin, tensor.g);
    if (needs_weights) p = load_weights(tensor, begin, n, buffers[0]);
    if (wanted & (kGradient | kUpdates)) g = load(tensor, tensor.g, begin, n, buffers[1]);
    if (wanted & kWeight) weight2.add(p, n);
    if (wanted & kGradient) grad2.add(g, n);
    if (wanted & kAgreement) {
      agreeing += agreements(rule, by, tensor, begin, n, decays ? p : g, g, buffers + 2, slots);
    } else if (wanted & kDirection) {
      const T* states[] = {load_state(tensor, S, begin, n, buffers[3 + S])..., nullptr};
      T* directions = buffers[2];
      const auto each = [&](const auto& f) {
        for (int64_t i = 0; i < n; ++i) {
          T copies[] = {states[S][i]..., T()}, beside;  // the step itself moves them
          directions[i] = f(p[i], g[i], beside, copies[S]...);
        }
      };
      if (is_plain(args))
        each([&](T p, T g, T&, auto&... states) { return direction(rule, by, p, g, states...); });
      else
        each([&](T p, T g, T& beside, auto&... states) {
          return masked_direction(rule, by, masks, p, g, beside, states...);
        });
      direction2.add(directions, n);
    }
  });
  return {weight2.total(), grad2.total(), wanted & kAgreement ? static_cast<double>(agreeing) : direction2.total()};
}

// Arithmetic in float32 whatever the storage, in float64 for float64 parameters.
template <template <class> class Rule>
Squares update(const Tensor& tensor, const StepArgs& args, const Layer& layer, int64_t begin, int64_t end) {
  constexpr auto states = std::make_index_sequence<Rule<float>::kStates>();
  return tensor.p.dtype == DType::kFloat64 ? update_as<Rule, double>(tensor, args, layer, begin, end, states)
                                           : update_as<Rule, float>(tensor, args, layer, begin, end, states);
}

template <template <class> class Rule>
Norms norms(const Tensor& tensor, const StepArgs& args, const Layer& layer, int64_t begin, int64_t end, Wanted wanted) {
  constexpr auto states = std::make_index_sequence<Rule<float>::kStates>();
  return tensor.p.dtype == DType::kFloat64 ? norms_as<Rule, double>(tensor, args, layer, begin, end, wanted, states)
                                           : norms_as<Rule, float>(tensor, args, layer, begin, end, wanted, states);
}

template <class T>
Sums accumulate_as(const Tensor& tensor, int64_t begin, int64_t end) {
  alignas(64) T buffers[2][kBlock];
  SumOfSquares part2, total2;
  for_each_block(begin, end, [&](int64_t begin, auto n) {
    prefetch(tensor, begin, tensor.g);
    if (tensor.p.data) prefetch(tensor, begin, tensor.p);
    const T* g = load(tensor, tensor.g, begin, n, buffers[1]);
    part2.add(g, n);
    if (!tensor.p.data) return;
    T* p = load(tensor, tensor.p, begin, n, buffers[0]);
    for (int64_t k = 0; k < n; ++k) p[k] += g[k];
    store(tensor, tensor.p, begin, n, p);
    total2.add(load(tensor, tensor.p, begin, n, buffers[0]), n);
  });
  return {part2.total(), tensor.p.data ? total2.total() : part2.total()};
}

#define FUSED_OPT_KERNEL(name, Rule) {update<Rule>, norms<Rule>},
constexpr Kernel kKernels[] = {FUSED_OPT_RULES(FUSED_OPT_KERNEL)};

Sums accumulate(const Tensor& tensor, int64_t begin, int64_t end) {
  return sums_in_float64(tensor) ? accumulate_as<double>(tensor, begin, end) : accumulate_as<float>(tensor, begin, end);
}

}  // namespace

#define FUSED_OPT_JOIN_(a, b) a##b
#define FUSED_OPT_JOIN(a, b) FUSED_OPT_JOIN_(a, b)
#define FUSED_OPT_NAME_(isa) #isa
#define FUSED_OPT_NAME(isa) FUSED_OPT_NAME_(isa)
InstructionSet FUSED_OPT_JOIN(instruction_set_, FUSED_OPT_ISA)(bool (*runs_here)()) {
  return {FUSED_OPT_NAME(FUSED_OPT_ISA), runs_here, kKernels, accumulate, normal};
}

}  // namespace fused_opt::cpu
