// The data of a launch, and which block does what: plain structs and arithmetic, the same on the host and on a GPU.
#pragma once
#include <cstdint>

#include "../pass.h"
#include "../schedule.h"
#include "../types.h"

namespace fused_opt::cuda {

constexpr int kThreads = 128;

// A tensor is cut into chunks of this many elements, an empty one into one chunk. Sums are formed chunk by chunk and
// added in an order that only the number of chunks decides, so their bits do not depend on the number of blocks.
constexpr int64_t kChunk = 4096;
constexpr int64_t kLongest =
    (int64_t{1} << 30) / kChunk;  // chunks that are walked at once: 32 bits count their elements

FUSED_OPT_FN int64_t chunks_of(int64_t numel) {
  return numel > kChunk ? (numel - 1) / kChunk + 1 : 1;
}

// The first chunk of a block: blocks take runs of chunks, of equal length to within one.
FUSED_OPT_FN int64_t first_chunk(int64_t chunks, int64_t block, int64_t blocks) {
  const int64_t longer = chunks % blocks;
  return chunks / blocks * block + (block < longer ? block : longer);
}

// Which tensor a chunk belongs to: the last one whose first chunk is not after it.
FUSED_OPT_FN int64_t find(const int64_t* first, int64_t count, int64_t chunk) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first[middle] <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Elements of one access to memory: 16 bytes in the arithmetic's type; 16, 8 or 4 as they are stored. A thread takes
// two such groups at once. Neighbouring threads take neighbouring groups, so that the accesses of a warp have no gaps.
template <class T>
constexpr int kGroup = 16 / sizeof(T);

// How many elements to leave before a group of every operand is aligned to its size, or -1: they never are together.
template <class T, int N>
FUSED_OPT_FN int peel(const Operand (&operands)[N], bool flat) {
  FUSED_OPT_ROLLED
  for (int head = 0; flat && head < kGroup<T>; ++head) {
    bool aligned = true;
    for (const Operand& operand : operands) {
      if (!operand.data) continue;
      const int64_t size = size_of(operand.dtype), bytes = size * kGroup<T>;
      aligned &= bytes <= 16 && (reinterpret_cast<uintptr_t>(operand.data) + head * size) % bytes == 0;
    }
    if (aligned) return head;
  }
  return -1;
}

// Of n elements, [first, last) go by two groups, those before and after one by one.
struct Span {
  int32_t first, last;
};
template <class T>
FUSED_OPT_FN Span span(int32_t n, int head) {
  if (head < 0 || n < head) return {0, 0};
  constexpr int32_t kTwo = 2 * kGroup<T>;
  return {head, head + (n - head) / kTwo * kTwo};
}

// A tensor, made when something moved. Its `g`, `args` and `active` are in Now, its layer's norms in Norms. A shard's
// layout, and the sizes that it goes with, are in device memory, too.
struct Entry {
  Tensor tensor;
  Layer layer;
  float* step = nullptr;    // the count of steps, where the rule keeps one
  float* scalar = nullptr;  // and its scalar
};

// What is new of a tensor in a step.
struct Now {
  void* g = nullptr;
  int32_t row = -1;  // -1: it has no gradient
  Wanted wanted = 0;
  double part_norms = kUnknown, grad_norm2 = kUnknown;  // where the host knows them
};

struct Row {
  StepArgs args;
  Operand lr{}, decay{};  // where they are in device memory, if they are: the decay times each kind of it in `args`
  Schedule schedule{};
  int32_t group = -1;    // whose counts decide on noise and averages; -1: the host has, and nothing is counted
  int32_t advances = 0;  // whether it is the one of its group's rows that counts the step
};

// What of a step's scale is in device memory.
struct DeviceScalars {
  const float* found_inf = nullptr;   // not 0: nothing is done and nothing counted
  const float* grad_scale = nullptr;  // what the gradients were multiplied with
  double* norm2 = nullptr;            // sum of squares of all gradients
  double max_norm = 0;                // what to clip it to, where `norm2` is given
};

struct Launch {
  int64_t count, chunks, active;
  const Entry* entries;
  const int64_t* first;  // chunks before each tensor, and all of them at the end
  const Now* now;
  const Row* rows;
  Norms *norms, *partial;  // of the tensors; of the chunks, for the length of a launch
  const Norms* known;      // those that the step goes by: `norms`, or where tensors are shards those of whole tensors
  double *ratios, *agreeing;  // of the tensors
  // Whether a tensor's carried norm was found wrong: on the device, and where the host reads it.
  uint64_t *stale, *told;
  Counts* counts;     // of the groups
  int64_t counting;   // how many rows may advance them when all is done
  uint64_t* arrived;  // chunks of each tensor that are done, and tensors that are: 0 between launches
  DeviceScalars scalars;
  Wanted among = ~Wanted{0};        // of what tensors want, what this launch sums
  bool total = false, add = false;  // what the sums of the gradients are for: scalars.norm2, with what is there or not
  bool rounds = false;              // whether any tensor is rounded at random
};

// total += part.
struct Accumulation {
  Tensor tensor;  // p: the total, or nothing; g: the part
  int64_t chunks;
  Norms* partial;
  double* sums;  // of the part, of the total
  uint64_t* arrived;
};

}  // namespace fused_opt::cuda
