// What a step does to elements between load and store, and the numbers that it needs for a tensor: the same on every
// device. Loops run over a few elements in registers or over a block in the cache.
#pragma once
#include <cstdint>
#include <cstring>

#include "rules.h"
#include "table.h"

#ifdef __CUDACC__
#define FUSED_OPT_UNROLL _Pragma("unroll")
#define FUSED_OPT_ROLLED _Pragma("unroll 1")
#else
#define FUSED_OPT_UNROLL
#define FUSED_OPT_ROLLED
#endif

namespace fused_opt {

FUSED_OPT_FN bool has_ratio(const Tensor& tensor, const Group& group) {
  return group.ratio != Ratio::kNone && tensor.ndim > group.exempt;
}
FUSED_OPT_FN bool carries_norm(const Tensor& tensor, const Group& group) {
  return has_ratio(tensor, group) || (group.relative && group.sigma > 0);
}
FUSED_OPT_FN bool averages(const Group& group) {
  return group.add != 0 || group.write_back;
}

// Which sums must be formed before the weights may be touched.
struct Wanted {
  bool weight = false, grad = false, direction = false;
};

inline Wanted wanted(const Tensor& tensor, const Group& group, const Layer& layer) {
  const bool ratio = has_ratio(tensor, group);
  const bool parts_known = group.ratio == Ratio::kCLARS && layer.part_norms >= 0;
  return {carries_norm(tensor, group) && !(layer.weight_norm2 >= 0),
          ratio && group.ratio != Ratio::kLAMB && !parts_known && layer.grad_norm2 == -1,
          ratio && group.ratio == Ratio::kLAMB && layer.direction_norm2 == -1};
}

// `grad_scale` and the norms in `layer` are those of this step. Sets `finite`.
FUSED_OPT_FN double trust_ratio(const Group& group, double grad_scale, Layer& layer) {
  const double weight = square_root(layer.weight_norm2), scale = grad_scale < 0 ? -grad_scale : grad_scale;
  double denominator = 0;  // without eps and decay: LARS's and LAMB's are the norm of one thing
  switch (group.ratio) {
    case Ratio::kNone:
      return 1;
    case Ratio::kLARS:
      denominator = scale * square_root(layer.grad_norm2);
      if (denominator != 0) denominator += group.rule[0] * layer.decay_scale * weight;
      break;
    case Ratio::kCLARS:
      denominator = scale * (layer.part_norms >= 0 ? layer.part_norms : square_root(layer.grad_norm2));
      break;
    case Ratio::kLAMB:
      denominator = square_root(layer.direction_norm2);
      break;
  }
  layer.finite = weight - weight == 0 && denominator - denominator == 0;
  const bool usable = layer.finite && weight > 0 && denominator > 0;
  const double ratio = usable ? group.coefficient * weight / (denominator + group.eps) : 1;
  return ratio < group.cap ? ratio : group.cap;
}

// A rule is nothing but its coefficients, in the order of the table.
template <class Rule, class T>
FUSED_OPT_FN Rule make(const double (&coefficients)[kMaxCoefficients], double decay_scale) {
  constexpr int kCoefficients = sizeof(Rule) / sizeof(T);
  T narrowed[kCoefficients];
  FUSED_OPT_UNROLL
  for (int k = 0; k < kCoefficients; ++k) narrowed[k] = static_cast<T>(coefficients[k] * (k ? 1 : decay_scale));
  Rule rule;
  std::memcpy(&rule, narrowed, sizeof rule);
  return rule;
}

// Standard deviation of the noise on a tensor.
FUSED_OPT_FN double sigma(const Tensor& tensor, const Group& group, const Layer& layer) {
  const int64_t whole = tensor.numel + (layer.place ? layer.place->elsewhere : 0);
  return group.sigma * (group.relative && whole ? square_root(layer.weight_norm2 / static_cast<double>(whole)) : 1);
}

template <class Rule, class T, class... State>
FUSED_OPT_FN void apply(const Rule rule, const T lr, const T grad_scale, const int64_t n, T* __restrict p,
                        const T* __restrict g, State* __restrict... states) {
  FUSED_OPT_UNROLL
  for (int64_t i = 0; i < n; ++i) p[i] -= lr * rule(p[i], grad_scale * g[i], states[i]...);
}

template <class T>
FUSED_OPT_FN void fold(const Group& group, const int64_t n, T* __restrict v, T* __restrict p) {
  const T add = static_cast<T>(group.add), share = static_cast<T>(group.share);
  if (group.fresh) {
    FUSED_OPT_UNROLL
    for (int64_t k = 0; k < n; ++k) v[k] = add * p[k];
  } else {
    FUSED_OPT_UNROLL
    for (int64_t k = 0; k < n; ++k) v[k] += add * (p[k] - share * v[k]);
  }
  if (group.write_back) {
    FUSED_OPT_UNROLL
    for (int64_t k = 0; k < n; ++k) p[k] = v[k];
  }
}

}  // namespace fused_opt
