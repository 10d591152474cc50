// One step of one rule over a table of tensors, on the CPU.
#pragma once
#include <cstddef>
#include <vector>

#include "../table.h"

namespace fused_opt::cpu {

// The part of a step that is compiled once per instruction set (kernels.cpp).
struct Kernel {
  const char* rule;
  int states;
  // Updates elements [begin, end) of a tensor.
  void (*update)(const Tensor&, const Group&, const Layer&, int64_t begin, int64_t end);
};

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  const Kernel* (*find)(const char* rule);  // null where there is no such rule
};

// Fastest first. `choose` takes the first that runs here, or the named one, or null.
const std::vector<InstructionSet>& instruction_sets();
const InstructionSet* choose(const char* name = nullptr);

struct Table {
  std::vector<Tensor> tensors;
  std::vector<Layer> layers;  // one per tensor
  std::vector<Group> groups;

  struct Chunk {
    int32_t tensor;
    int64_t begin;
  };
  std::vector<Chunk> chunks;
  void cut();  // fills `chunks`; call it when tensors changed
};

void step(const Kernel&, const Table&, int threads);

}  // namespace fused_opt::cpu
