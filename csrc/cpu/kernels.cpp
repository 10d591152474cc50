// The loops of a step. This file is compiled once per instruction set, with FUSED_OPT_ISA naming it; everything but the
// function at the end is in an unnamed namespace, so that no two copies are ever merged.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstring>
#include <type_traits>
#include <utility>

#include "../noise.h"
#include "../pass.h"
#include "../types.h"
#include "step.h"

namespace fused_opt::cpu {
namespace {

// Elements that are staged at once where storage and arithmetic differ; all operands of a block stay in the L1 cache.
constexpr int64_t kBlock = 512;

// Calls f(k, offset) for the k-th of `n` elements from `begin` in row-major order, offset in elements of the operand.
template <class F>
FUSED_OPT_FN void for_each_strided(const Tensor& tensor, const Operand& operand, int64_t begin, int64_t n, const F& f) {
  int64_t offset = 0;
  int64_t rest = begin;
  int64_t index[64];
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

// Where elements [begin, begin + n) can be worked on as T: in place, or copied into `buffer`.
template <class T>
T* load(const Tensor& tensor, const Operand& operand, int64_t begin, int64_t n, T* buffer) {
  if (tensor.flat && operand.dtype == kDTypeOf<T>) return static_cast<T*>(operand.data) + begin;
  with_type(operand.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(operand.data);
    if (tensor.flat)
      for (int64_t k = 0; k < n; ++k) buffer[k] = static_cast<T>(widen(data[begin + k]));
    else
      for_each_strided(tensor, operand, begin, n,
                       [&](int64_t k, int64_t i) { buffer[k] = static_cast<T>(widen(data[i])); });
  });
  return buffer;
}

// Puts back what `load` had to copy.
template <class T>
void store(const Tensor& tensor, const Operand& operand, int64_t begin, int64_t n, const T* values) {
  if (tensor.flat && operand.dtype == kDTypeOf<T>) return;
  with_type(operand.dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    auto* data = static_cast<Element*>(operand.data);
    if (tensor.flat)
      for (int64_t k = 0; k < n; ++k) data[begin + k] = narrow<Element>(values[k]);
    else
      for_each_strided(tensor, operand, begin, n, [&](int64_t k, int64_t i) { data[i] = narrow<Element>(values[k]); });
  });
}

// A sum of squares whose bits do not depend on how the elements came, as long as all but the last `add` bring a
// multiple of 32: the product of two float32 is exact in float64.
struct SumOfSquares {
  double lanes[32] = {};

  template <class T>
  FUSED_OPT_FN void add(const T* x, int64_t n) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
      for (int k = 0; k < 32; ++k) lanes[k] += static_cast<double>(x[i + k]) * static_cast<double>(x[i + k]);
    for (; i < n; ++i) lanes[i % 32] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  double total() const {
    double sums[32];
    std::memcpy(sums, lanes, sizeof sums);
    for (int width = 16; width; width /= 2)
      for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
    return sums[0];
  }
};

// Two vector registers of counters: a round is a chain of dependent instructions, and two chains hide each other's
// latency. Compilers do not see that the upper halves do not matter, and multiply 64 bits by 64 bits; hence the
// intrinsics.
struct ManyLanes {
#if defined(__AVX512F__)
  using Vector = uint64_t __attribute__((vector_size(64)));
  static FUSED_OPT_FN Vector multiply32(Vector a, Vector b) { return (Vector)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
  using Vector = uint64_t __attribute__((vector_size(32)));
  static FUSED_OPT_FN Vector multiply32(Vector a, Vector b) { return (Vector)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#else
  using Vector = uint64_t __attribute__((vector_size(16)));
  static FUSED_OPT_FN Vector multiply32(Vector a, Vector b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
#endif
  struct Word {
    Vector a, b;
    FUSED_OPT_FN Word operator>>(int n) const { return {a >> n, b >> n}; }
    FUSED_OPT_FN Word operator^(const Word& other) const { return {a ^ other.a, b ^ other.b}; }
  };
  static FUSED_OPT_FN Word splat(uint32_t x) {
    const Vector all = Vector{} + static_cast<uint64_t>(x);
    return {all, all};
  }
  static FUSED_OPT_FN Word multiply32(const Word& x, const Word& y) {
    return {multiply32(x.a, y.a), multiply32(x.b, y.b)};
  }
};

// The lower halves of all lanes of a and then of b.
FUSED_OPT_FN void evens(ManyLanes::Vector a, ManyLanes::Vector b, uint32_t* out) {
  using Words = uint32_t __attribute__((vector_size(sizeof(ManyLanes::Vector)), may_alias));
#if defined(__AVX512F__)
  *(Words*)out = __builtin_shufflevector((Words)a, (Words)b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX2__)
  *(Words*)out = __builtin_shufflevector((Words)a, (Words)b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  *(Words*)out = __builtin_shufflevector((Words)a, (Words)b, 0, 2, 4, 6);
#endif
}

void normal(uint64_t seed, uint32_t index, uint32_t t, uint64_t begin, int64_t n, float* z) {
  using Vector = ManyLanes::Vector;
  constexpr int kLanes = sizeof(Vector) / sizeof(uint64_t);
  constexpr int kCounters = 64;
  alignas(64) uint32_t words[4][kCounters];
  alignas(64) float lanes[4][kCounters];
  Vector first{};
  for (int lane = 0; lane < kLanes; ++lane) first[lane] = begin + static_cast<uint64_t>(lane);
  for (int64_t done = 0; done < n; done += kCounters) {
    for (int k = 0; k < kCounters; k += 2 * kLanes) {
      const Vector counter = first + static_cast<uint64_t>(done + k);
      ManyLanes::Word c0{counter, counter + static_cast<uint64_t>(kLanes)}, c1 = c0 >> 32;
      ManyLanes::Word c2 = ManyLanes::splat(index), c3 = ManyLanes::splat(t);
      philox<ManyLanes>(c0, c1, c2, c3, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
      const ManyLanes::Word* c[] = {&c0, &c1, &c2, &c3};
      for (int w = 0; w < 4; ++w) {
        evens(c[w]->a, c[w]->b, &words[w][k]);
      }
    }
    for (int k = 0; k < kCounters; ++k) box_muller(words[0][k], words[1][k], lanes[0][k], lanes[1][k]);
    for (int k = 0; k < kCounters; ++k) box_muller(words[2][k], words[3][k], lanes[2][k], lanes[3][k]);
    for (int k = 0; k < kCounters; ++k)
      for (int lane = 0; lane < 4; ++lane) z[4 * (done + k) + lane] = lanes[lane][k];
  }
}

// Asks for elements [begin, end) of a flat operand, so that drawing noise and fetching what comes next can overlap.
FUSED_OPT_FN void prefetch(const Operand& operand, int64_t begin, int64_t end) {
  const int64_t size = operand.dtype == DType::kFloat64 ? 8 : operand.dtype == DType::kFloat32 ? 4 : 2;
  const char* data = static_cast<const char*>(operand.data);
  for (int64_t byte = begin * size; byte < end * size; byte += 64) __builtin_prefetch(data + byte);
}

// `ahead(first, last)` is called in between with the elements that lie one block further.
template <class T, class Ahead>
void add_noise(const Tensor& tensor, const Group& group, const Layer& layer, T sigma, int64_t begin, int64_t n, T* p,
               const Ahead& ahead) {
  alignas(64) float z[256];
  for (int64_t i = 0, m; i < n; i += m) {
    // A shard may begin in the middle of the four elements that share a counter.
    const int64_t first = layer.place ? in_whole(tensor, *layer.place, begin + i) : begin + i, skipped = first % 4;
    m = n - i < 256 - skipped ? n - i : 256 - skipped;
    if (layer.place)
      if (const int64_t left = layer.place->run - (begin + i) % layer.place->run; left < m) m = left;
    ahead(begin + i + kBlock, begin + i + kBlock + m);
    normal(group.seed, layer.index, group.t, static_cast<uint64_t>(first) / 4, 64, z);
    for (int64_t k = 0; k < m; ++k) p[i + k] += sigma * static_cast<T>(z[skipped + k]);
  }
}

// Block by block, for what is not done in place in one go. Not inlined: its frame would cost every small tensor.
template <class T, size_t... S, class Rule>
__attribute__((noinline)) double update_blocks(const Rule& rule, const T lr, const Tensor& tensor, const Group& group,
                                               const Layer& layer, int64_t begin, int64_t end,
                                               std::index_sequence<S...>) {
  const bool carries = carries_norm(tensor, group), averages = fused_opt::averages(group);
  const T sigma = static_cast<T>(fused_opt::sigma(tensor, group, layer));
  alignas(64) T buffers[3 + sizeof...(S)][kBlock];
  SumOfSquares weight2;
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    T* p = load(tensor, tensor.p, begin, n, buffers[0]);
    const T* g = load(tensor, tensor.g, begin, n, buffers[1]);
    T* states[] = {load(tensor, tensor.states[S], begin, n, buffers[2 + S])..., nullptr};
    apply(rule, lr, static_cast<T>(group.grad_scale), n, p, g, states[S]...);
    (store(tensor, tensor.states[S], begin, n, states[S]), ...);
    if (group.sigma != 0)
      add_noise(tensor, group, layer, sigma, begin, n, p, [&](int64_t first, int64_t last) {
        if (!tensor.flat || last > tensor.numel) return;
        prefetch(tensor.p, first, last);
        prefetch(tensor.g, first, last);
        (prefetch(tensor.states[S], first, last), ...);
      });
    store(tensor, tensor.p, begin, n, p);
    if (!averages && !carries) continue;
    p = load(tensor, tensor.p, begin, n, buffers[0]);  // what is averaged and summed is what was stored
    if (averages) {
      T* v = load(tensor, tensor.average, begin, n, buffers[2 + sizeof...(S)]);
      fold(group, n, v, p);
      store(tensor, tensor.average, begin, n, v);
      if (group.write_back) {
        store(tensor, tensor.p, begin, n, p);
        p = load(tensor, tensor.p, begin, n, buffers[0]);
      }
    }
    if (carries) weight2.add(p, n);
  }
  return carries ? weight2.total() : -1;
}

template <template <class> class Rule, class T, size_t... S>
double update_as(const Tensor& tensor, const Group& group, const Layer& layer, int64_t begin, int64_t end,
                 std::index_sequence<S...> states) {
  const auto rule = make<Rule<T>, T>(group.rule, layer.decay_scale);
  const T lr = static_cast<T>(group.lr * layer.lr_scale * layer.ratio);
  bool in_place = tensor.flat && tensor.p.dtype == kDTypeOf<T> && tensor.g.dtype == kDTypeOf<T> &&
                  !carries_norm(tensor, group) && !averages(group) && group.sigma == 0;
  ((in_place &= tensor.states[S].dtype == kDTypeOf<T>), ...);
  if (!in_place) return update_blocks<T>(rule, lr, tensor, group, layer, begin, end, states);
  apply(rule, lr, static_cast<T>(group.grad_scale), end - begin, static_cast<T*>(tensor.p.data) + begin,
        static_cast<const T*>(tensor.g.data) + begin, static_cast<T*>(tensor.states[S].data) + begin...);
  return -1;
}

template <template <class> class Rule, class T, size_t... S>
Norms norms_as(const Tensor& tensor, const Group& group, const Layer& layer, int64_t begin, int64_t end, Wanted wanted,
               std::index_sequence<S...>) {
  const auto rule = make<Rule<T>, T>(group.rule, layer.decay_scale);
  const T grad_scale = static_cast<T>(group.grad_scale);
  alignas(64) T buffers[3 + sizeof...(S)][kBlock];
  SumOfSquares weight2, grad2, direction2;
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    const T *p = nullptr, *g = nullptr;
    if (wanted.weight || wanted.direction) p = load(tensor, tensor.p, begin, n, buffers[0]);
    if (wanted.grad || wanted.direction) g = load(tensor, tensor.g, begin, n, buffers[1]);
    if (wanted.weight) weight2.add(p, n);
    if (wanted.grad) grad2.add(g, n);
    if (wanted.direction) {
      const T* states[] = {load(tensor, tensor.states[S], begin, n, buffers[3 + S])..., nullptr};
      T* direction = buffers[2];
      for (int64_t i = 0; i < n; ++i) {
        T copies[] = {states[S][i]..., T()};  // the step itself moves them
        direction[i] = rule(p[i], grad_scale * g[i], copies[S]...);
      }
      direction2.add(direction, n);
    }
  }
  return {weight2.total(), grad2.total(), direction2.total()};
}

// Arithmetic in float32 whatever the storage, in float64 for float64 parameters.
template <template <class> class Rule>
double update(const Tensor& tensor, const Group& group, const Layer& layer, int64_t begin, int64_t end) {
  constexpr auto states = std::make_index_sequence<Rule<float>::kStates>();
  return tensor.p.dtype == DType::kFloat64 ? update_as<Rule, double>(tensor, group, layer, begin, end, states)
                                           : update_as<Rule, float>(tensor, group, layer, begin, end, states);
}

template <template <class> class Rule>
Norms norms(const Tensor& tensor, const Group& group, const Layer& layer, int64_t begin, int64_t end, Wanted wanted) {
  constexpr auto states = std::make_index_sequence<Rule<float>::kStates>();
  return tensor.p.dtype == DType::kFloat64 ? norms_as<Rule, double>(tensor, group, layer, begin, end, wanted, states)
                                           : norms_as<Rule, float>(tensor, group, layer, begin, end, wanted, states);
}

template <class T>
Sums accumulate_as(const Tensor& tensor, int64_t begin, int64_t end) {
  alignas(64) T buffers[2][kBlock];
  SumOfSquares part2, total2;
  for (; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    const T* g = load(tensor, tensor.g, begin, n, buffers[1]);
    part2.add(g, n);
    if (!tensor.p.data) continue;
    T* p = load(tensor, tensor.p, begin, n, buffers[0]);
    for (int64_t k = 0; k < n; ++k) p[k] += g[k];
    store(tensor, tensor.p, begin, n, p);
    total2.add(load(tensor, tensor.p, begin, n, buffers[0]), n);
  }
  return {part2.total(), tensor.p.data ? total2.total() : part2.total()};
}

#define FUSED_OPT_KERNEL(name, Rule) {name, Rule<float>::kStates, update<Rule>, norms<Rule>},
constexpr Kernel kKernels[] = {FUSED_OPT_RULES(FUSED_OPT_KERNEL)};

const Kernel* find(const char* rule) {
  for (const Kernel& kernel : kKernels)
    if (!std::strcmp(kernel.rule, rule)) return &kernel;
  return nullptr;
}

Sums accumulate(const Tensor& tensor, int64_t begin, int64_t end) {
  return tensor.g.dtype == DType::kFloat64 ? accumulate_as<double>(tensor, begin, end)
                                           : accumulate_as<float>(tensor, begin, end);
}

}  // namespace

#define FUSED_OPT_JOIN_(a, b) a##b
#define FUSED_OPT_JOIN(a, b) FUSED_OPT_JOIN_(a, b)
#define FUSED_OPT_NAME_(isa) #isa
#define FUSED_OPT_NAME(isa) FUSED_OPT_NAME_(isa)
InstructionSet FUSED_OPT_JOIN(instruction_set_, FUSED_OPT_ISA)(bool (*runs_here)()) {
  return {FUSED_OPT_NAME(FUSED_OPT_ISA), runs_here, find, accumulate, normal};
}

}  // namespace fused_opt::cpu
