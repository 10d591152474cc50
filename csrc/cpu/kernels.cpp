// The loops of a step. This file is compiled once per instruction set, with FUSED_OPT_ISA naming it; everything but the
// function at the end is in an unnamed namespace, so that no two copies are ever merged.
#include <cstring>
#include <type_traits>
#include <utility>

#include "../rules.h"
#include "step.h"

namespace fused_opt::cpu {
namespace {

// Elements that are staged at once where storage and arithmetic differ; all operands of a block stay in the L1 cache.
constexpr int64_t kBlock = 512;

struct BFloat16 {
  uint16_t bits;
};

FUSED_OPT_FN float widen(float x) {
  return x;
}
FUSED_OPT_FN double widen(double x) {
  return x;
}
FUSED_OPT_FN float widen(_Float16 x) {
  return static_cast<float>(x);
}
FUSED_OPT_FN float widen(BFloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

template <class To>
FUSED_OPT_FN To narrow(double x) {
  return static_cast<To>(x);
}
template <class To>
FUSED_OPT_FN To narrow(float x) {
  if constexpr (std::is_same_v<To, BFloat16>) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    // To the nearest, ties to even; a NaN keeps its sign and a quiet bit, since rounding could carry it to infinity.
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40)};
  } else {
    return static_cast<To>(x);
  }
}
template <>
FUSED_OPT_FN BFloat16 narrow<BFloat16>(double x) {
  return narrow<BFloat16>(static_cast<float>(x));
}

// Calls f with a null pointer of the element type that `dtype` names.
template <class F>
FUSED_OPT_FN void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<_Float16*>(nullptr));
  }
}

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

template <class Rule, class T, class... State>
void apply(const Rule rule, const T lr, const T grad_scale, const int64_t n, T* __restrict p, const T* __restrict g,
           State* __restrict... states) {
  for (int64_t i = 0; i < n; ++i) p[i] -= lr * rule(p[i], grad_scale * g[i], states[i]...);
}

template <template <class> class Rule, class T, size_t... S>
void update_as(const Tensor& tensor, const Group& group, const Layer& layer, int64_t begin, int64_t end,
               std::index_sequence<S...>) {
  // A rule is nothing but its coefficients, in the order of the table.
  constexpr int kCoefficients = sizeof(Rule<T>) / sizeof(T);
  T coefficients[kCoefficients];
  for (int k = 0; k < kCoefficients; ++k) coefficients[k] = static_cast<T>(group.rule[k] * (k ? 1 : layer.decay_scale));
  Rule<T> rule;
  std::memcpy(&rule, coefficients, sizeof rule);
  const T lr = static_cast<T>(group.lr * layer.lr_scale);

  bool staged = !tensor.flat || tensor.p.dtype != kDTypeOf<T> || tensor.g.dtype != kDTypeOf<T>;
  ((staged |= tensor.states[S].dtype != kDTypeOf<T>), ...);
  const int64_t block = staged ? kBlock : end - begin;
  alignas(64) T buffers[2 + sizeof...(S)][kBlock];
  for (; begin < end; begin += block) {
    const int64_t n = end - begin < block ? end - begin : block;
    T* p = load(tensor, tensor.p, begin, n, buffers[0]);
    const T* g = load(tensor, tensor.g, begin, n, buffers[1]);
    T* states[] = {load(tensor, tensor.states[S], begin, n, buffers[2 + S])..., nullptr};
    apply(rule, lr, static_cast<T>(group.grad_scale), n, p, g, states[S]...);
    (store(tensor, tensor.states[S], begin, n, states[S]), ...);
    store(tensor, tensor.p, begin, n, p);
  }
}

// Arithmetic in float32 whatever the storage, in float64 for float64 parameters.
template <template <class> class Rule>
void update(const Tensor& tensor, const Group& group, const Layer& layer, int64_t begin, int64_t end) {
  constexpr auto states = std::make_index_sequence<Rule<float>::kStates>();
  if (tensor.p.dtype == DType::kFloat64)
    update_as<Rule, double>(tensor, group, layer, begin, end, states);
  else
    update_as<Rule, float>(tensor, group, layer, begin, end, states);
}

#define FUSED_OPT_KERNEL(name, Rule) {name, Rule<float>::kStates, update<Rule>},
constexpr Kernel kKernels[] = {FUSED_OPT_RULES(FUSED_OPT_KERNEL)};

}  // namespace

#define FUSED_OPT_JOIN_(a, b) a##b
#define FUSED_OPT_JOIN(a, b) FUSED_OPT_JOIN_(a, b)
const Kernel* FUSED_OPT_JOIN(find_, FUSED_OPT_ISA)(const char* rule) {
  for (const Kernel& kernel : kKernels)
    if (!std::strcmp(kernel.rule, rule)) return &kernel;
  return nullptr;
}

}  // namespace fused_opt::cpu
