#include "step.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace fused_opt::cpu {

// One per compilation of kernels.cpp.
const Kernel* find_baseline(const char*);
#ifdef FUSED_OPT_X86
const Kernel* find_avx2(const char*);
const Kernel* find_avx512(const char*);
#endif

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = {
#ifdef FUSED_OPT_X86
      {"avx512",
       [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
       },
       find_avx512},
      {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, find_avx2},
#endif
      {"baseline", [] { return true; }, find_baseline},
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
  chunks.clear();
  for (size_t t = 0; t < tensors.size(); ++t)
    for (int64_t begin = 0; begin < tensors[t].numel; begin += kChunk)
      chunks.push_back({static_cast<int32_t>(t), begin});
}

void step(const Kernel& kernel, const Table& table, int threads) {
  // Waking the pool costs some microseconds; below this many elements one thread is done sooner.
  constexpr int64_t kWorthWaking = 65536;
  int64_t elements = 0;
  for (const Tensor& tensor : table.tensors) elements += tensor.active ? tensor.numel : 0;
  // Threads draw runs of chunks, so that a model of many small tensors does not spend its time drawing.
  const int64_t count = static_cast<int64_t>(table.chunks.size());
  const int64_t run = std::max<int64_t>(1, std::min<int64_t>(count / (8 * std::max(threads, 1)), 16));
  parallel_for((count + run - 1) / run, elements < kWorthWaking ? 1 : threads, [&](int64_t r) {
    for (int64_t c = r * run; c < std::min(count, (r + 1) * run); ++c) {
      const Table::Chunk& chunk = table.chunks[c];
      const Tensor& tensor = table.tensors[chunk.tensor];
      if (tensor.active)
        kernel.update(tensor, table.groups[tensor.group], table.layers[chunk.tensor], chunk.begin,
                      std::min(chunk.begin + kChunk, tensor.numel));
    }
  });
}

}  // namespace fused_opt::cpu
