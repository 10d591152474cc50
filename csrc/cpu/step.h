// One step of one rule over a table of tensors, on the CPU.
#pragma once
#include <cstddef>
#include <vector>

#include "../pass.h"

namespace fused_opt::cpu {

// Work is cut into chunks of this many elements. Sums are formed chunk by chunk and added in the order of the chunks,
// so their bits depend on this number and not on which thread computed which chunk.
constexpr int64_t kChunk = 16384;

// Sums of squares of the weights as a step found and left them, where a norm of them is carried.
struct Squares {
  double found = 0, left = 0;
};

// The part of a step that is compiled once per instruction set (kernels.cpp). All work on elements [begin, end).
struct Kernel {
  // Writes the parameter and its states.
  Squares (*update)(const Tensor&, const StepArgs&, const Layer&, int64_t begin, int64_t end);
  Norms (*norms)(const Tensor&, const StepArgs&, const Layer&, int64_t begin, int64_t end, Wanted);
};
struct Sums {
  double part2 = 0, total2 = 0;
};
struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  const Kernel* kernels;  // by rule, in the order of kRules
  // p += g, with the sums of squares of g and of the new p; p without data: only g's, in both.
  Sums (*accumulate)(const Tensor&, int64_t begin, int64_t end);
  // The noise of elements [4 * begin, 4 * (begin + n)), n a multiple of 32.
  void (*normal)(uint64_t seed, uint32_t index, uint32_t t, uint64_t begin, int64_t n, float* z);
};

// Whether loops ask for memory ahead of their reads. AMD Zen 4 is slowed down by it: without, a
// step that memory limits takes 0.6 to 0.9 of the time. Intel's Xeons gain: docs/performance.md.
extern const bool kPrefetches;

// Fastest first. `choose` takes the first that runs here, or the named one, or null.
const std::vector<InstructionSet>& instruction_sets();
const InstructionSet* choose(const char* name = nullptr);

struct Chunk {
  int32_t tensor;
  int64_t begin;
};

struct Table {
  std::vector<Tensor> tensors;
  std::vector<Layer> layers;  // one per tensor
  std::vector<StepArgs> args;
  std::vector<Chunk> chunks;
  // Runs of whole tensors, as indices into `chunks`, whose second read finds the cache: that of one thread, which does
  // all of one of the first `small` windows, or one that threads share.
  std::vector<size_t> windows;
  size_t small = 0;
  void cut();  // fills `chunks` and `windows`; call it when tensors changed
};

void step(const Kernel&, Table&, int threads);

// Fills in the norms that a step wants and does not know, so that they can be added up over shards before it: those of
// all gradients where `gradients` says so, and LAMB's directions unless their gradients' scale is still to come.
void norms(const Kernel&, Table&, bool gradients, bool directions, int threads);

// Fills in the norms of the active gradients that are not known, and returns the sum of all their squares.
double grad_norm2(const Kernel&, Table&, int threads);

Sums accumulate(const InstructionSet&, const Tensor&, int threads);

}  // namespace fused_opt::cpu
