// The data of a step, in plain structs that are the same on every device. Three tables, by how often they change:
// tensors (when something moved), layers (when a multiplier or norm is set), groups (every step).
#pragma once
#include <cstdint>

#include "rules.h"

namespace fused_opt {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt16, kInt8, kUInt8 };
enum class Kind : uint8_t { kNone, kLARS, kCLARS, kLAMB };  // of trust ratio; as Kind in backends/interface.py

constexpr int kMaxStates = 3;
constexpr int kMaxDimensions = 64;  // of a strided walk
constexpr int kMaxCoefficients = 8;

// Of counts and norms, which are not negative; as UNKNOWN in rule.py.
constexpr double kUnknown = -1;
FUSED_OPT_FN bool is_known(double number) {
  return number != kUnknown;
}

// Norms that a step may need before it writes, one bit each; as Norm in backends/interface.py.
using Wanted = uint32_t;
constexpr Wanted kWeight = 1, kGradient = 2, kDirection = 4;
// And how many elements of the update go the gradient's way, which is summed as a direction of zeros and ones is.
constexpr Wanted kAgreement = 8, kUpdates = kDirection | kAgreement;

struct Norms {
  double weight2 = 0, grad2 = 0, direction2 = 0;
};

struct Operand {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  const int64_t* strides = nullptr;  // in elements
};

struct Tensor {
  Operand p, g, states[kMaxStates], average;
  // Of what `p` is the rounding, laid out as `p`: a float32, or of a bfloat16 the int16 to be added to its bits. Or
  // nothing.
  Operand exact;
  // Of states in 8 bits, one for every block of codes (types.h), which are contiguous whatever else is; or nothing.
  float* scales[kMaxStates] = {};
  int64_t numel = 0;
  // Flat: element i of every operand is at data[i]. Otherwise element i is the i-th in row-major order of `sizes`.
  bool flat = true;
  int32_t ndim = 0;
  const int64_t* sizes = nullptr;
  int32_t args = 0;     // which of the step's arguments
  bool active = false;  // has a gradient this step
};

// Whether arithmetic on a sum `p` of gradients and another gradient `g` is in float64.
inline bool sums_in_float64(const Tensor& tensor) {
  return tensor.g.dtype == DType::kFloat64 || tensor.p.dtype == DType::kFloat64;
}

// Where elements are in the row-major order of the whole tensor, which keys the noise: those of a shard, or of a tensor
// that is walked in another order, that of its memory, to which its `sizes` belong then.
struct ShardLayout {
  int64_t offset = 0;                // of the first
  int64_t run = 1;                   // consecutive elements that are so in the whole
  int64_t elsewhere = 0;             // elements of the whole that it lacks
  const int64_t* strides = nullptr;  // of the whole, in elements
  int64_t slab = 0;  // where not 0, each so many elements are as many consecutive ones of the whole, in another order
};
constexpr int64_t kMostInSlab = 32768;

// Norms are squared; a negative one is not known. Of a shard they are its own until `norms` has been asked for them and
// the step was told those of the whole tensor.
struct Layer {
  double lr_scale = 1;
  double decay_scale = 1;
  uint32_t index = 0;                 // which parameter of the optimizer: a key of its noise
  double weight_norm2 = kUnknown;     // carried from the step that wrote the weights to the next one
  double grad_norm2 = kUnknown;       // of the gradient as it lies in memory
  double part_norms = kUnknown;       // sum of the norms (not squared) of the parts that the gradient is a sum of
  double direction_norm2 = kUnknown;  // LAMB's; of one step only
  double agreeing = kUnknown;         // how many elements of the update go the gradient's way; of one step only
  double ratio = 1;
  bool finite = true;   // whether the norms that the ratio needs are numbers
  bool carries = true;  // until the weights were found to be others than those whose norm was carried

  const ShardLayout* shard = nullptr;  // where noise needs one
};

// What a step does to the tensors of one row of arguments.
struct StepArgs {
  double lr = 0;
  double grad_scale = 1;                          // multiplies every gradient: sign, unscaling and clipping
  double coupled_decay = 0, decoupled_decay = 0;  // times the weights, before and after the rule
  double independent_decay = 0;                   // and beside the direction: not times the learning rate
  double coefficients[kMaxCoefficients] = {};     // in the order of the rule's members

  Kind kind = Kind::kNone;
  double coefficient = 1, cap = 0, eps = 0;
  int32_t exempt = 1;  // tensors of at most this many dimensions keep ratio 1

  double sigma = 0;  // of the noise
  bool relative = false;
  uint64_t seed = 0;
  uint32_t noise_step = 0;  // of rounding at random, too

  bool stochastic = false;  // what is stored in 16 bits is rounded at random
  uint64_t rounding_seed = 0;

  // The average: v <- (restart ? 0 : v) + add * (p - share * v), and then p <- v where it is written back, else
  // p <- p + follow * (the new v - the old v).
  double add = 0, share = 0, follow = 0;
  bool restart = false, write_back = false;

  // Masks: where the update goes against the gradient it is left out, and the rest `scaled` by how many are left; where
  // it goes against the weight, decay is.
  bool cautious_update = false, cautious_decay = false, scaled = false;
};

// Which element of the whole tensor, in row-major order, is element i of what is walked.
FUSED_OPT_FN int64_t in_whole(const Tensor& tensor, const ShardLayout& shard, int64_t i) {
  if (i < shard.run) return shard.offset + i;
  int64_t whole = shard.offset;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    whole += i % tensor.sizes[d] * shard.strides[d];
    i /= tensor.sizes[d];
  }
  return whole;
}

}  // namespace fused_opt
