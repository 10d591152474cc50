#include "step.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "parallel.h"

namespace fused_opt::cpu {

// One per compilation of kernels.cpp.
InstructionSet instruction_set_baseline(bool (*)());
#ifdef FUSED_OPT_X86
InstructionSet instruction_set_avx2(bool (*)());
InstructionSet instruction_set_avx512(bool (*)());
#endif

#ifdef FUSED_OPT_X86
const bool kPrefetches = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
#else
const bool kPrefetches = false;
#endif

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
#ifdef FUSED_OPT_X86
      instruction_set_avx512([] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
      }),
      instruction_set_avx2([] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }),
#endif
      instruction_set_baseline([] { return true; }),
  };
  return sets;
}

const InstructionSet* choose(const char* name) {
  for (const InstructionSet& set : instruction_sets())
    if ((!name || !std::strcmp(name, set.name)) && set.runs_here()) return &set;
  return nullptr;
}

namespace {
bool in_child = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { in_child = true; });
}  // namespace

bool forked() {
  return in_child;
}

void Table::cut() {
  // Elements of which what a norm reads is in the cache when it is read again, that of one thread or of some: two
  // operands of float32 are 0.5 MB, and 2.
  constexpr int64_t kSmall = 64 << 10, kWindow = 256 << 10;
  chunks.clear();
  windows.assign(1, 0);
  for (const bool large : {false, true}) {
    int64_t elements = 0;
    const auto close = [&] {
      if (elements) windows.push_back(chunks.size());
      elements = 0;
    };
    for (size_t t = 0; t < tensors.size(); ++t) {
      const int64_t numel = tensors[t].numel;
      if ((numel > kSmall) != large) continue;
      if (elements + numel > (large ? kWindow : kSmall)) close();
      elements += numel;
      for (int64_t begin = 0; begin < numel; begin += kChunk) chunks.push_back({static_cast<int32_t>(t), begin});
    }
    close();
    if (!large) small = windows.size() - 1;
  }
}

namespace {

// Calls f(chunk number, tensor number, begin, end) for a chunk of an active tensor.
template <class F>
void with_chunk(const Table& table, size_t c, const F& f) {
  const Chunk& chunk = table.chunks[c];
  const Tensor& tensor = table.tensors[chunk.tensor];
  if (tensor.active) f(c, chunk.tensor, chunk.begin, std::min(chunk.begin + kChunk, tensor.numel));
}

// Waking the pool costs some microseconds; below so many elements one thread is done sooner.
int worth_waking(const Table& table, int threads) {
  constexpr int64_t kWorthWaking = 65536;
  int64_t elements = 0;
  for (size_t c = 0; c < table.chunks.size() && elements < kWorthWaking; ++c)
    with_chunk(table, c, [&](size_t, int32_t, int64_t begin, int64_t end) { elements += end - begin; });
  return elements < kWorthWaking ? 1 : threads;
}

// The same for every chunk, in any order.
template <class F>
void for_each_chunk(const Table& table, int threads, const F& f) {
  parallel_for(static_cast<int64_t>(table.chunks.size()), worth_waking(table, threads),
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) with_chunk(table, c, f);
               });
}

// Calls f(phase, chunk number, tensor number, begin, end) likewise in every phase of a step, and finish(phase, first,
// last) of a window's chunks in between. No thread waits for others but where it has come to a window of which they
// still do the phase before.
template <class F, class Finish>
void for_each_phase(const Table& table, int phases, int threads, const F& f, const Finish& finish) {
  threads = worth_waking(table, threads);
  struct Window {
    std::atomic<size_t> left{0};
    std::atomic<int> phase{0};
  };
  struct Task {
    size_t window, begin, end;  // chunks: some neighbours, whose memory is read in one go
    int phase;
  };
  const size_t count = table.windows.size() - 1;
  std::vector<Window> windows(count);
  std::vector<Task> tasks;
  for (size_t w = 0; w < count; ++w) {
    const size_t first = table.windows[w], last = table.windows[w + 1];
    windows[w].left = last - first;
    if (w < table.small)
      tasks.push_back({w, first, last, 0});
    else
      for (int phase = 0; phase < phases; ++phase)
        for (size_t c = first, end; c < last; c = end) {
          end = std::min(last, c + 1 + (last - first) / (8 * std::max(threads, 1)));
          tasks.push_back({w, c, end, phase});
        }
  }
  const auto run = [&](const Task& task) {
    const size_t first = table.windows[task.window], last = table.windows[task.window + 1];
    const auto work = [&](int phase) {
      for (size_t c = task.begin; c < task.end; ++c)
        with_chunk(table, c, [&](size_t c, int32_t t, int64_t begin, int64_t end) { f(phase, c, t, begin, end); });
    };
    if (task.window < table.small) {
      for (int phase = 0; phase < phases; ++phase) work(phase), finish(phase, first, last);
      return;
    }
    Window& window = windows[task.window];
    while (window.phase.load(std::memory_order_acquire) < task.phase) std::this_thread::yield();
    work(task.phase);
    const size_t done = task.end - task.begin;
    if (window.left.fetch_sub(done, std::memory_order_acq_rel) > done) return;
    finish(task.phase, first, last);
    window.left.store(last - first, std::memory_order_relaxed);
    window.phase.store(task.phase + 1, std::memory_order_release);
  };
  const auto n = static_cast<int64_t>(tasks.size());
  parallel_for(
      n, threads,
      [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) run(tasks[k]);
      },
      n);
}

// Calls f(tensor number, c) for every chunk number c in order: how partial sums become sums.
template <class F>
void in_order(const Table& table, size_t first, size_t last, const F& f) {
  for (size_t c = first; c < last; ++c)
    if (table.tensors[table.chunks[c].tensor].active) f(table.chunks[c].tensor, c);
}

// Sums all that is wanted, in two phases where some tensor wants a direction that a mask's scale enters, and then calls
// update(chunk number, tensor number, begin, end) after ready(first, last) of a window's chunks.
template <class Ready, class Update>
void measure(const Kernel& kernel, Table& table, const std::vector<Wanted>& wants, int threads, const Ready& ready,
             const Update& update) {
  std::vector<Norms> partial(table.chunks.size());
  const auto [now, then] = passes(std::any_of(wants.begin(), wants.end(), needs_scaled_direction));
  const Wanted among[] = {now, then};
  const int sums = then ? 2 : 1;
  for_each_phase(
      table, sums + 1, threads,
      [&](int phase, size_t c, int32_t t, int64_t begin, int64_t end) {
        if (phase == sums) return update(c, t, begin, end);
        const Tensor& tensor = table.tensors[t];
        if (const Wanted wanted = wants[t] & among[phase])
          partial[c] = kernel.norms(tensor, table.args[tensor.args], table.layers[t], begin, end, wanted);
      },
      [&](int phase, size_t first, size_t last) {
        if (phase == sums) return;
        in_order(table, first, last, [&](int32_t t, size_t c) {
          Layer& layer = table.layers[t];
          const bool begins = table.chunks[c].begin == 0;
          const Wanted wanted = wants[t] & among[phase];
          if (wanted & kWeight) layer.weight_norm2 = (begins ? 0 : layer.weight_norm2) + partial[c].weight2;
          if (wanted & kGradient) layer.grad_norm2 = (begins ? 0 : layer.grad_norm2) + partial[c].grad2;
          if (wanted & kDirection) layer.direction_norm2 = (begins ? 0 : layer.direction_norm2) + partial[c].direction2;
          if (wanted & kAgreement) layer.agreeing = (begins ? 0 : layer.agreeing) + partial[c].direction2;
        });
        if (phase == sums - 1) ready(first, last);
      });
}

}  // namespace

double grad_norm2(const Kernel& kernel, Table& table, int threads) {
  std::vector<double> partial(table.chunks.size());
  const auto unknown = [&](int32_t t) { return !is_known(table.layers[t].grad_norm2); };
  for_each_chunk(table, threads, [&](size_t c, int32_t t, int64_t begin, int64_t end) {
    if (unknown(t))
      partial[c] = kernel.norms(table.tensors[t], StepArgs{}, table.layers[t], begin, end, kGradient).grad2;
  });
  std::vector<double> sums(table.tensors.size());
  in_order(table, 0, table.chunks.size(), [&](int32_t t, size_t c) { sums[t] += partial[c]; });
  double total = 0;
  for (size_t t = 0; t < sums.size(); ++t) {
    if (!table.tensors[t].active) continue;
    if (unknown(static_cast<int32_t>(t))) table.layers[t].grad_norm2 = sums[t];
    total += table.layers[t].grad_norm2;
  }
  return total;
}

void norms(const Kernel& kernel, Table& table, bool gradients, bool directions, int threads) {
  std::vector<Wanted> wants(table.tensors.size());
  for (size_t t = 0; t < wants.size(); ++t) {
    if (!table.tensors[t].active) continue;
    Layer& layer = table.layers[t];
    wants[t] = wanted(table.tensors[t], table.args[table.tensors[t].args], layer);
    if (gradients && !is_known(layer.grad_norm2)) wants[t] |= kGradient;
    if (!directions) wants[t] &= ~(kDirection | kAgreement);
    if (table.tensors[t].numel) continue;  // no chunk will come
    if (wants[t] & kWeight) layer.weight_norm2 = 0;
    if (wants[t] & kGradient) layer.grad_norm2 = 0;
    if (wants[t] & kDirection) layer.direction_norm2 = 0;
  }
  measure(kernel, table, wants, threads, [](size_t, size_t) {}, [](size_t, int32_t, int64_t, int64_t) {});
}

void step(const Kernel& kernel, Table& table, int threads) {
  const size_t count = table.tensors.size(), chunks = table.chunks.size();
  std::vector<Wanted> wants(count);
  bool any = false, carried = false;
  for (size_t t = 0; t < count; ++t) {
    if (!table.tensors[t].active) continue;
    const StepArgs& args = table.args[table.tensors[t].args];
    wants[t] = wanted(table.tensors[t], args, table.layers[t]);
    any |= wants[t] != 0;
    carried |= carries_norm(table.tensors[t], args);
    table.layers[t].ratio = has_ratio(table.tensors[t], args) ? std::min(args.cap, 1.0) : 1;  // empty tensors keep it,
    if (!carries_norm(table.tensors[t], args))
      table.layers[t].weight_norm2 = kUnknown;  // the norm of what this step writes is not summed
    table.layers[t].finite = true;
    if (!table.tensors[t].numel && table.layers[t].weight_norm2 > 0) {  // but for empty shards of others that are not
      table.layers[t].ratio = trust_ratio(args, args.grad_scale, table.layers[t]);
      table.layers[t].weight_norm2 = 0;
    }
  }

  std::vector<Squares> squares(carried ? chunks : 0);
  const auto find_ratios = [&](size_t first, size_t last) {
    for (size_t c = first; carried && c < last; ++c) {
      const int32_t t = table.chunks[c].tensor;
      if (!table.tensors[t].active) continue;
      const StepArgs& args = table.args[table.tensors[t].args];
      if (table.chunks[c].begin == 0 && has_ratio(table.tensors[t], args))
        table.layers[t].ratio = trust_ratio(args, args.grad_scale, table.layers[t]);
    }
  };
  const auto update = [&](size_t c, int32_t t, int64_t begin, int64_t end) {
    const Tensor& tensor = table.tensors[t];
    const Squares sums = kernel.update(tensor, table.args[tensor.args], table.layers[t], begin, end);
    if (carried) squares[c] = sums;
  };
  if (any) {
    measure(kernel, table, wants, threads, find_ratios, update);
    for (size_t t = 0; t < count; ++t) table.layers[t].direction_norm2 = table.layers[t].agreeing = kUnknown;
  } else {
    find_ratios(0, chunks);
    for_each_chunk(table, threads, update);
  }
  if (!carried) return;
  std::vector<Squares> of_tensor(count);
  in_order(table, 0, chunks, [&](int32_t t, size_t c) {
    of_tensor[t].found += squares[c].found;
    of_tensor[t].left += squares[c].left;
  });
  for (size_t t = 0; t < count; ++t) {
    Layer& layer = table.layers[t];
    if (!table.tensors[t].active || !table.tensors[t].numel ||
        !carries_norm(table.tensors[t], table.args[table.tensors[t].args]))
      continue;
    // A write that no version shows: the ratio of this step was that of other weights. (What a part of a tensor was
    // told is the norm of the whole one.)
    const double found = of_tensor[t].found;
    const bool part = layer.shard && layer.shard->elsewhere;
    if (!part && !(std::abs(layer.weight_norm2 - found) <= 1e-12 * found)) layer.carries = false;
    layer.weight_norm2 = layer.carries ? of_tensor[t].left : kUnknown;
  }
}

Sums accumulate(const InstructionSet& set, const Tensor& tensor, int threads) {
  Table table;
  table.tensors.assign(1, tensor);
  table.tensors[0].active = true;
  table.cut();
  std::vector<Sums> partial(table.chunks.size());
  for_each_chunk(table, threads, [&](size_t c, int32_t, int64_t begin, int64_t end) {
    partial[c] = set.accumulate(tensor, begin, end);
  });
  Sums sums;
  for (const Sums& some : partial) {
    sums.part2 += some.part2;
    sums.total2 += some.total2;
  }
  return sums;
}

}  // namespace fused_opt::cpu
