// What a step knows, in plain structs that mean the same on every device. Three tables, by how often they change:
// tensors (when something moved), layers (when somebody writes to them), groups (every step).
#pragma once
#include <cstdint>
#include <limits>

namespace fused_opt {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int kMaxStates = 3;
constexpr int kMaxCoefficients = 8;

// Work is cut into chunks of this many elements. Sums are formed chunk by chunk and added in the order of the chunks,
// so their bits depend on this number and not on who computed which chunk.
constexpr int64_t kChunk = 16384;

struct Operand {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  const int64_t* strides = nullptr;  // in elements
};

struct Tensor {
  Operand p, g, states[kMaxStates];
  int64_t numel = 0;
  // Flat: element i of every operand is at data[i]. Otherwise element i is the i-th in row-major order of `sizes`.
  bool flat = true;
  int32_t ndim = 0;
  const int64_t* sizes = nullptr;
  int32_t group = 0;    // row of the group table
  bool active = false;  // has a gradient this step
};

struct Layer {
  double lr_scale = 1;
  double decay_scale = 1;
};

struct Group {
  double lr = 0;
  double grad_scale = 1;               // multiplies every gradient: sign, unscaling and clipping in one factor
  double rule[kMaxCoefficients] = {};  // in the order of the rule's members in rules.h; the first is the weight decay
};

}  // namespace fused_opt
