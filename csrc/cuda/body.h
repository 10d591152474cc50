// What the kernels do. `Where` says which block this is and how its threads wait for each other: `all_threads(f)` calls
// f for every thread of the block and waits, `one_thread(f)` for one. On a GPU a thread calls its own f; on the host
// they are a loop.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "../noise.h"
#include "memory.h"

namespace fused_opt::cuda {

// ---- sums

FUSED_OPT_FN void operator+=(Norms& sums, const Norms& others) {
  sums.weight2 += others.weight2;
  sums.grad2 += others.grad2;
  sums.direction2 += others.direction2;
}

FUSED_OPT_FN Norms fetch_norms(const Norms* at) {
  return {fetch(&at->weight2), fetch(&at->grad2), fetch(&at->direction2)};
}

FUSED_OPT_FN Counts fetch_counts(const Counts* at) {
  return {fetch(&at->steps), fetch(&at->samples), fetch(&at->periods), fetch(&at->due)};
}

template <int V, class T>
FUSED_OPT_FN void add_squares(const T (&x)[V], double& sum) {
  FUSED_OPT_UNROLL
  for (int k = 0; k < V; ++k) sum += static_cast<double>(x[k]) * static_cast<double>(x[k]);
}

// Sums what the threads of a block have, in lanes[0]: a tree, always the same.
template <class Where>
FUSED_OPT_FN void sum_lanes(const Where& where, Norms* lanes) {
  FUSED_OPT_ROLLED
  for (int width = kThreads / 2; width; width /= 2)
    where.all_threads([&](int thread) {
      if (thread < width) lanes[thread] += lanes[thread + width];
    });
}

// Sums n partial sums in lanes[0], in an order that only n decides. A thread requests several before it adds the first.
template <class Where, class At>
FUSED_OPT_FN void sum_all(const Where& where, Norms* lanes, int64_t n, const At& at) {
  where.all_threads([&](int thread) {
    constexpr int kInFlight = 8;
    Norms sum;
    FUSED_OPT_ROLLED
    for (int64_t k = thread; k < n; k += kInFlight * kThreads) {
      Norms next[kInFlight];
      FUSED_OPT_UNROLL
      for (int j = 0; j < kInFlight; ++j)
        if (k + j * kThreads < n) next[j] = at(k + j * kThreads);
      FUSED_OPT_UNROLL
      for (int j = 0; j < kInFlight; ++j) sum += next[j];
    }
    lanes[thread] = sum;
  });
  sum_lanes(where, lanes);
}

// ---- a step

// What the threads of a block share about the tensor that they are at.
template <class Rule, class T>
struct Shared {
  Entry entry;
  Now now;
  Row row;
  int64_t first, next;  // its chunks
  Norms lanes[kThreads];
  Rule rule;
  Factors<T> by;
  Masks<T> masks;
  T sigma;
  int head;
  bool plain, carries, averages, noisy, stochastic;
  bool kept, counts, last, all;  // see walk()
  // For the states, and the weights, which may be stored twice.
  static constexpr int kWords = (Rule::kStates + 1 + kRoundedByWord) / kRoundedByWord;
  RoundingKey keys[kWords];
};

FUSED_OPT_FN double clip_factor(double norm, double limit) {
  const double clip = limit / (norm + 1e-6);
  return clip > 1 ? 1 : clip;
}

FUSED_OPT_FN double full_scale(const DeviceScalars& scalars, double grad_scale) {
  double scale = scalars.grad_scale ? 1 / static_cast<double>(fetch(scalars.grad_scale)) : 1;
  if (scalars.norm2) scale *= clip_factor(scale * square_root(fetch(scalars.norm2)), scalars.max_norm);
  return grad_scale * scale;
}

FUSED_OPT_FN double grad_norm2(const Launch& launch, const Now& now, int64_t t) {
  return is_known(now.grad_norm2) ? now.grad_norm2 : fetch(&launch.known[t].grad2);
}

// Copies as words, by all threads.
template <class S>
FUSED_OPT_FN void copy_words(const S* from, S* to, int thread) {
  static_assert(sizeof(S) % 8 == 0);
  FUSED_OPT_ROLLED
  for (int word = thread; word < static_cast<int>(sizeof(S) / 8); word += kThreads) {
    const uint64_t value = fetch(reinterpret_cast<const uint64_t*>(from) + word);
#ifdef __CUDA_ARCH__
    reinterpret_cast<uint64_t*>(to)[word] = value;
#else
    std::memcpy(reinterpret_cast<char*>(to) + 8 * word, &value, 8);
#endif
  }
}

// After the copies of what the tables say of a tensor: the numbers that all elements need.
template <class Rule, class T>
FUSED_OPT_FN void prepare(const Launch& launch, int64_t t, Shared<Rule, T>& shared) {
  Tensor& tensor = shared.entry.tensor;
  tensor.g.data = shared.now.g;
  StepArgs& args = shared.row.args;
  Layer& layer = shared.entry.layer;
  if constexpr (Rule::kCountsSteps)
    if (shared.entry.step) {
      const double step = static_cast<double>(fetch(shared.entry.step)) + 1;
      if constexpr (kKeepsScalar<Rule>)
        Rule::at_step(args.coefficients, step, fetch(shared.entry.scalar));
      else
        Rule::at_step(args.coefficients, step);
    }
  if (shared.row.decay.data) {
    double decay[1];
    convert(shared.row.decay, 0, {}, decay);
    args.coupled_decay *= decay[0];
    args.decoupled_decay *= decay[0];
    args.independent_decay *= decay[0];
  }
  double lr[1] = {args.lr};
  if (shared.row.lr.data) convert(shared.row.lr, 0, {}, lr);
  shared.carries = carries_norm(tensor, args);  // also where a rate on the device leaves no noise
  if (shared.row.group >= 0)
    at_counts(shared.row.schedule, fetch_counts(&launch.counts[shared.row.group]), lr[0], args);
  const double grad_scale = full_scale(launch.scalars, args.grad_scale);
  shared.rule = make<Rule, T>(args.coefficients);

  const Norms norms = fetch_norms(&launch.known[t]);
  layer.weight_norm2 = norms.weight2;
  layer.grad_norm2 = grad_norm2(launch, shared.now, t);
  layer.direction_norm2 = norms.direction2;
  layer.part_norms = shared.now.part_norms;
  layer.agreeing = fetch(&launch.agreeing[t]);
  shared.now.wanted &= launch.among;
  layer.ratio = has_ratio(tensor, args) ? trust_ratio(args, grad_scale, layer) : 1;
  shared.by = factors<T>(args, lr[0], grad_scale, layer);
  shared.plain = is_plain(args);
  shared.masks = masks<T>(tensor, args, layer);
  shared.sigma = static_cast<T>(sigma(tensor, args, layer));
  shared.noisy = args.sigma != 0;
  shared.averages = averages(args);

  Operand operands[4 + Rule::kStates] = {tensor.p, tensor.g};
  for (int s = 0; s < Rule::kStates; ++s) operands[2 + s] = tensor.states[s];
  if (shared.averages) operands[2 + Rule::kStates] = tensor.average;
  operands[3 + Rule::kStates] = tensor.exact;
  shared.head = peel<T>(operands, tensor.flat);
  shared.stochastic = launch.rounds && args.stochastic;
  if (shared.noisy && shared.head) shared.head = -1;  // four neighbours draw together, from a multiple of 4 on
  for (int k = 0; shared.stochastic && k < Shared<Rule, T>::kWords; ++k)
    shared.keys[k] = rounding_key({args.rounding_seed, layer.index, args.noise_step}, k);
}

// The words that element i of the whole tensor draws, and the V - 1 after it: i is a multiple of V. A counter gives
// four: a group of four takes all of them, a group of two one pair. Of a single element it is the pair that its word is
// in.
template <int V>
FUSED_OPT_FN void draw(const Draw& by, int64_t i, uint32_t (&words)[V == 1 ? 2 : V]) {
  const uint64_t counter = static_cast<uint64_t>(i) / 4;
  uint64_t c0 = counter & 0xFFFFFFFF, c1 = counter >> 32, c2 = by.index, c3 = by.step;
  philox<OneLane>(c0, c1, c2, c3, static_cast<uint32_t>(by.seed), static_cast<uint32_t>(by.seed >> 32));
  const bool upper = V < 4 && i & 2;
  words[0] = static_cast<uint32_t>(upper ? c2 : c0), words[1] = static_cast<uint32_t>(upper ? c3 : c1);
  if constexpr (V == 4) words[2] = static_cast<uint32_t>(c2), words[3] = static_cast<uint32_t>(c3);
}

// Adds their noise to the weights of these elements.
struct Noise {
  Draw by;
  template <int V, class T>
  FUSED_OPT_FN void operator()(int64_t i, T sigma, T (&p)[V]) const {
    uint32_t words[V == 1 ? 2 : V];
    draw<V>(by, i, words);
    float z[V == 1 ? 2 : V];
    FUSED_OPT_UNROLL
    for (int k = 0; k < V; k += 2) box_muller(words[k], words[k + 1], z[k], z[k + 1]);
    if (V == 1 && i & 1) z[0] = z[1];
    FUSED_OPT_UNROLL
    for (int k = 0; k < V; ++k) p[k] += sigma * static_cast<T>(z[k]);
  }
};

// Their words, for rounding at random.
struct Words {
  RoundingKey key;
  template <int V>
  FUSED_OPT_FN void operator()(int64_t i, uint32_t, uint32_t (&words)[V]) const {
    FUSED_OPT_UNROLL
    for (int k = 0; k < V; ++k) words[k] = rounding_word(i + k, key);
  }
};

// What `of` does with elements of the whole tensor, from element i of a tensor or shard on.
template <int V, class Of, class T>
FUSED_OPT_FN void draw_for(const Tensor& tensor, const Layer& layer, int64_t i, const Of& of, T sigma, T (&p)[V]) {
  if (!layer.shard) return of(i, sigma, p);
  const ShardLayout& shard = *layer.shard;
  const int64_t whole = in_whole(tensor, shard, i);
  if constexpr (V > 1)
    if (whole % V != 0 || (i + V > shard.run && i % shard.run + V > shard.run)) {
      // Neighbours that do not draw together. They take turns in the first place: an index that is not known would need
      // memory.
      FUSED_OPT_ROLLED
      for (int k = 0; k < V; ++k) {
        T one[1] = {p[0]};
        of(in_whole(tensor, shard, i + k), sigma, one);
        FUSED_OPT_UNROLL
        for (int j = 0; j + 1 < V; ++j) p[j] = p[j + 1];
        p[V - 1] = one[0];
      }
      return;
    }
  of(whole, sigma, p);
}

// The random bits of V elements, a word for each, made where a number of 16 bits is stored first.
template <int V>
struct Bits {
  const Tensor& tensor;
  const Layer& layer;
  const RoundingKey* keys;  // null: to the nearest
  int64_t i;
  int held = -1;
  uint32_t words[V] = {};

  template <class T>
  FUSED_OPT_FN void store(const Operand& operand, int64_t at, T (&x)[V], int place) {
    if (!keys || size_of(operand.dtype) != 2) return cuda::store(operand, at, x);
    if (held != place / kRoundedByWord) {
      held = place / kRoundedByWord;
      draw_for(tensor, layer, i, Words{keys[held]}, uint32_t{0}, words);
    }
    store_at_random(operand, at, x, words, place);
  }
  template <class T>
  FUSED_OPT_FN void store_weights(int64_t at, T (&x)[V], int place) {
    if constexpr (std::is_same_v<T, float>)
      if (tensor.exact.data) return store_exact(tensor, at, x);
    store(tensor.p, at, x, place);
  }
};

// Requests a group of every operand that the wanted norms need; a step needs those of its direction.
template <int V, size_t... S>
FUSED_OPT_FN void fetch_some(const Tensor& tensor, Wanted wanted, int64_t i, Raw<16>* raw, std::index_sequence<S...>) {
  if (wanted & (kWeight | kUpdates)) fetch_weights<V>(tensor, i, raw[0]);
  if (wanted & (kGradient | kUpdates)) fetch_raw<V>(tensor.g, i, raw[1]);
  if (wanted & kUpdates) (fetch_raw<V>(tensor.states[S], i, raw[2 + S]), ...);
}

template <int V, bool rounds, class Rule, class T, size_t... S>
FUSED_OPT_FN void step_some(const Shared<Rule, T>& shared, int64_t i, const Raw<16>* raw, Norms& sums,
                            std::index_sequence<S...> slots) {
  constexpr int kAverage = 2 + sizeof...(S);
  const Tensor& tensor = shared.entry.tensor;
  int64_t at[kAverage + 1];
  locate<V>(tensor, i, at, slots);
  T p[V], g[V], states[sizeof...(S) + 1][V];
  convert_weights(tensor, at[0], raw[0], p);
  convert(tensor.g, at[1], raw[1], g);
  (convert(tensor.states[S], at[2 + S], raw[2 + S], states[S]), ...);
  if (shared.carries) add_squares(p, sums.grad2);  // in an update: of the weights that it finds

  if (shared.plain)
    apply(shared.rule, shared.by, V, p, g, states[S]...);
  else
    apply_masked(shared.rule, shared.by, shared.masks, V, p, g, states[S]...);
  const StepArgs& args = shared.row.args;
  const Layer& layer = shared.entry.layer;
  Bits<V> bits{tensor, layer, rounds && shared.stochastic ? shared.keys : nullptr, i};
  (bits.store(tensor.states[S], at[2 + S], states[S], S), ...);
  if (shared.noisy) draw_for(tensor, layer, i, Noise{{args.seed, layer.index, args.noise_step}}, shared.sigma, p);
  bits.store_weights(at[0], p, sizeof...(S));
  if (shared.averages) {
    T v[V];
    convert(tensor.average, at[kAverage], raw[kAverage], v);
    fold(args, V, v, p);
    store(tensor.average, at[kAverage], v);
    if (moves_weights(args)) bits.store_weights(at[0], p, sizeof...(S) + 1);
  }
  if (shared.carries) add_squares(p, sums.weight2);
}

template <int V, class Rule, class T, size_t... S>
FUSED_OPT_FN void sum_some(const Shared<Rule, T>& shared, int64_t i, const Raw<16>* raw, Norms& sums,
                           std::index_sequence<S...> slots) {
  const Tensor& tensor = shared.entry.tensor;
  int64_t at[3 + sizeof...(S)];
  locate<V>(tensor, i, at, slots);
  T p[V], g[V];
  const Wanted wanted = shared.now.wanted;
  if (wanted & (kWeight | kUpdates)) convert_weights(tensor, at[0], raw[0], p);
  if (wanted & (kGradient | kUpdates)) convert(tensor.g, at[1], raw[1], g);
  if (wanted & kWeight) add_squares(p, sums.weight2);
  if (wanted & kGradient) add_squares(g, sums.grad2);
  if (wanted & kUpdates) {
    T states[sizeof...(S) + 1][V];
    (convert(tensor.states[S], at[2 + S], raw[2 + S], states[S]), ...);
    FUSED_OPT_UNROLL
    for (int k = 0; k < V; ++k) {
      T beside, copies[] = {states[S][k]..., T()};
      p[k] = wanted & kAgreement ? agreement(shared.rule, shared.by, p[k], g[k], copies[S]...)
             : shared.plain ? direction(shared.rule, shared.by, p[k], g[k], copies[S]...)
                            : masked_direction(shared.rule, shared.by, shared.masks, p[k], g[k], beside, copies[S]...);
    }
    add_squares(p, sums.direction2);
  }
}

template <int V>
using Count = std::integral_constant<int, V>;

// One thread's share of n elements from `begin` on: `work(Count<V>, i, raw)` does V elements, a group whose N operands
// `fetch(i, raw)` has requested, or one. Both groups that a thread takes at once are requested before it works on the
// first; of all that the block takes at once, or of what is left in the end, the second ones are the second half.
template <class T, int N, class Fetch, class Work>
FUSED_OPT_FN void for_each(int64_t begin, int32_t n, int head, int thread, const Fetch& fetch, const Work& work) {
  constexpr int32_t kMost = kThreads * kGroup<T>;
  const Span s = span<T>(n, head);
  Raw<16> raw[N], second[N];
  FUSED_OPT_ROLLED
  for (int32_t k = s.first; k < s.last; k += 2 * kMost) {
    const int32_t left = (s.last - k) / 2, half = left < kMost ? left : kMost;
    if (thread * kGroup<T> >= half) break;
    int64_t i = begin + k + thread * kGroup<T>;
    fetch(i, raw);
    fetch(i + half, second);
    // One copy of the work for both takes a quarter fewer registers than two.
    FUSED_OPT_ROLLED
    for (int u = 0; u < 2; ++u, i += half) {
      work(Count<kGroup<T>>(), i, raw);
      std::memcpy(raw, second, sizeof raw);
    }
  }
  FUSED_OPT_ROLLED
  for (int32_t k = thread; k < s.first + n - s.last; k += kThreads)
    work(Count<1>(), begin + (k < s.first ? k : s.last + k - s.first), raw);
}

// How many elements lie in `chunks` chunks from element `begin` on.
FUSED_OPT_FN int32_t elements(const Tensor& tensor, int64_t begin, int64_t chunks) {
  const int64_t left = tensor.numel - begin;
  return static_cast<int32_t>(left < chunks * kChunk ? left : chunks * kChunk);
}

// Walks the chunks of this block, tensor by tensor. `work(begin, n, thread, sums)` does n elements; where `keeps`, its
// sums are kept for every chunk, and the last block to arrive at a tensor adds them up in shared.lanes[0] and calls
// `finish(t)`.
template <class Rule, class T, class Where, class Keeps, class Work, class Finish>
FUSED_OPT_FN void walk(const Where& where, const Launch& launch, Shared<Rule, T>& shared, const Keeps& keeps,
                       const Work& work, const Finish& finish) {
  int64_t chunk = first_chunk(launch.chunks, where.block(), where.blocks());
  const int64_t end = first_chunk(launch.chunks, where.block() + 1, where.blocks());
  for (int64_t t = find(launch.first, launch.count, chunk); chunk < end; ++t) {
    const int64_t begin = chunk, next = launch.first[t + 1], stop = next < end ? next : end;
    chunk = stop;
    if (launch.now[t].row < 0) continue;
    where.all_threads([&](int thread) {
      copy_words(&launch.entries[t], &shared.entry, thread);
      copy_words(&launch.now[t], &shared.now, thread);
      copy_words(&launch.rows[launch.now[t].row], &shared.row, thread);
    });
    where.one_thread([&] {
      prepare(launch, t, shared);
      shared.first = launch.first[t];
      shared.next = launch.first[t + 1];
      if (launch.ratios && begin == shared.first) launch.ratios[t] = shared.entry.layer.ratio;
      if (shared.carries && fetch(&launch.stale[t])) shared.now.wanted |= kWeight & launch.among;  // if it sums
      shared.kept = keeps();
      shared.counts = shared.kept || shared.entry.step || launch.total || launch.counting;
    });
    // Chunks without sums are processed in long runs, and no thread waits for another.
    const int64_t longest = shared.kept ? 1 : kLongest;
    FUSED_OPT_ROLLED
    for (int64_t k = begin; k < stop; k += longest) {
      where.all_threads([&](int thread) {
        Norms sums;
        const int64_t from = (k - shared.first) * kChunk;
        work(from, elements(shared.entry.tensor, from, stop - k < longest ? stop - k : longest), thread, sums);
        if (shared.kept) shared.lanes[thread] = sums;
      });
      if (!shared.kept) continue;
      sum_lanes(where, shared.lanes);
      where.one_thread([&] { launch.partial[k] = shared.lanes[0]; });
    }
    if (!shared.counts) continue;
    where.one_thread([&] { shared.last = where.arrive(&launch.arrived[t], stop - begin, shared.next - shared.first); });
    if (!shared.last) continue;
    if (shared.kept)
      sum_all(where, shared.lanes, shared.next - shared.first,
              [&](int64_t k) { return fetch_norms(&launch.partial[shared.first + k]); });
    finish(t);
  }
}

// What the counts are after the step, when nobody reads them any more.
FUSED_OPT_FN void count_step(const Launch& launch) {
  FUSED_OPT_ROLLED
  for (int64_t r = 0; r < launch.counting; ++r) {
    const Row& row = launch.rows[r];
    if (!row.advances) continue;
    Counts counts = fetch_counts(&launch.counts[row.group]);
    advance(row.schedule, counts);
    launch.counts[row.group] = counts;
  }
}

// Without `rounds` nothing is rounded at random: the random words would cost every step 20 registers.
template <template <class> class Rule, class T, bool rounds, class Where>
FUSED_OPT_FN void update(const Where& where, const Launch& launch, Shared<Rule<T>, T>& shared) {
  if (launch.scalars.found_inf && fetch(launch.scalars.found_inf) != 0) return;
  constexpr auto states = std::make_index_sequence<Rule<T>::kStates>();
  walk(
      where, launch, shared, [&] { return shared.carries; },
      [&](int64_t begin, int32_t n, int thread, Norms& sums) {
        const Tensor& tensor = shared.entry.tensor;
        for_each<T, 3 + Rule<T>::kStates>(
            begin, n, shared.head, thread,
            [&](int64_t i, Raw<16>* raw) {
              fetch_some<kGroup<T>>(tensor, kDirection, i, raw, states);
              if (shared.averages) fetch_raw<kGroup<T>>(tensor.average, i, raw[2 + Rule<T>::kStates]);
            },
            [&](auto count, int64_t i, const Raw<16>* raw) {
              step_some<decltype(count)::value, rounds>(shared, i, raw, sums, states);
            });
      },
      [&](int64_t t) {
        where.one_thread([&] {
          if (shared.kept) {
            // A write that no version shows: the norm that the tensor was given was that of other weights.
            const double found = shared.lanes[0].grad2;
            if (!(absolute(fetch(&launch.norms[t].weight2) - found) <= 1e-12 * found)) {
              put(&launch.stale[t], uint64_t{1});
              put(&launch.told[t], uint64_t{1});
            }
            launch.norms[t].weight2 = shared.lanes[0].weight2;
          }
          if (shared.entry.step) put(shared.entry.step, fetch(shared.entry.step) + 1);
          if constexpr (kKeepsScalar<Rule<T>>)
            if (shared.entry.scalar)
              put(shared.entry.scalar, static_cast<float>(shared.row.args.coefficients[Rule<T>::kCoefficients - 1]));
          if (launch.counting && where.arrive(&launch.arrived[launch.count], 1, launch.active)) count_step(launch);
        });
      });
}

template <template <class> class Rule, class T, class Where>
FUSED_OPT_FN void norms(const Where& where, const Launch& launch, Shared<Rule<T>, T>& shared) {
  constexpr auto states = std::make_index_sequence<Rule<T>::kStates>();
  walk(
      where, launch, shared, [&] { return shared.now.wanted != 0; },
      [&](int64_t begin, int32_t n, int thread, Norms& sums) {
        if (!shared.now.wanted) return;
        for_each<T, 2 + Rule<T>::kStates>(
            begin, n, shared.head, thread,
            [&](int64_t i, Raw<16>* raw) {
              fetch_some<kGroup<T>>(shared.entry.tensor, shared.now.wanted, i, raw, states);
            },
            [&](auto count, int64_t i, const Raw<16>* raw) {
              sum_some<decltype(count)::value>(shared, i, raw, sums, states);
            });
      },
      [&](int64_t t) {
        where.one_thread([&] {
          Norms& of_tensor = launch.norms[t];
          if (shared.now.wanted & kWeight) of_tensor.weight2 = shared.lanes[0].weight2;
          if (shared.now.wanted & kGradient) of_tensor.grad2 = shared.lanes[0].grad2;
          if (shared.now.wanted & kDirection) of_tensor.direction2 = shared.lanes[0].direction2;
          if (shared.now.wanted & kAgreement) launch.agreeing[t] = shared.lanes[0].direction2;
          shared.all = launch.total && where.arrive(&launch.arrived[launch.count], 1, launch.active);
        });
        if (!shared.all) return;
        sum_all(where, shared.lanes, launch.count, [&](int64_t k) {
          Norms of_tensor;
          if (launch.now[k].row >= 0) of_tensor.grad2 = grad_norm2(launch, launch.now[k], k);
          return of_tensor;
        });
        where.one_thread([&] {
          const double others = launch.add ? fetch(launch.scalars.norm2) : 0;
          put(launch.scalars.norm2, others + shared.lanes[0].grad2);
        });
      });
}

template <int V, class T>
FUSED_OPT_FN void add_some(const Tensor& tensor, int64_t i, const Raw<16>* raw, Norms& sums) {
  T p[V], g[V];
  convert(tensor.g, i, raw[1], g);
  add_squares(g, sums.grad2);
  if (!tensor.p.data) return;
  convert(tensor.p, i, raw[0], p);
  FUSED_OPT_UNROLL
  for (int k = 0; k < V; ++k) p[k] += g[k];
  store(tensor.p, i, p);
  add_squares(p, sums.weight2);
}

template <class T, class Where>
FUSED_OPT_FN void accumulate(const Where& where, const Accumulation& work, Norms* lanes, bool& last) {
  const Tensor& tensor = work.tensor;
  const Operand operands[] = {tensor.p, tensor.g};
  const int head = peel<T>(operands, tensor.flat);
  const int64_t begin = first_chunk(work.chunks, where.block(), where.blocks());
  const int64_t end = first_chunk(work.chunks, where.block() + 1, where.blocks());
  FUSED_OPT_ROLLED
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    where.all_threads([&](int thread) {
      Norms sums;
      for_each<T, 2>(
          chunk * kChunk, elements(tensor, chunk * kChunk, 1), head, thread,
          [&](int64_t i, Raw<16>* raw) {
            fetch_raw<kGroup<T>>(tensor.g, i, raw[1]);
            if (tensor.p.data) fetch_raw<kGroup<T>>(tensor.p, i, raw[0]);
          },
          [&](auto count, int64_t i, const Raw<16>* raw) {
            add_some<decltype(count)::value, T>(tensor, i, raw, sums);
          });
      lanes[thread] = sums;
    });
    sum_lanes(where, lanes);
    where.one_thread([&] { work.partial[chunk] = lanes[0]; });
  }
  where.one_thread([&] { last = begin < end && where.arrive(work.arrived, end - begin, work.chunks); });
  if (!last) return;
  sum_all(where, lanes, work.chunks, [&](int64_t k) { return fetch_norms(&work.partial[k]); });
  where.one_thread([&] {
    work.sums[0] = lanes[0].grad2;
    work.sums[1] = tensor.p.data ? lanes[0].weight2 : lanes[0].grad2;
  });
}

}  // namespace fused_opt::cuda
