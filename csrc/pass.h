// What a step does to elements between load and store, and the numbers that it needs for a tensor: the same on every
// device. Loops run over a few elements in registers or over a block in the cache.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

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

FUSED_OPT_FN bool has_ratio(const Tensor& tensor, const StepArgs& args) {
  return args.kind != Kind::kNone && tensor.ndim > args.exempt;
}
FUSED_OPT_FN bool carries_norm(const Tensor& tensor, const StepArgs& args) {
  return has_ratio(tensor, args) || (args.relative && args.sigma > 0);
}
FUSED_OPT_FN bool moves_weights(const StepArgs& args) {
  return args.write_back || args.follow != 0;
}
FUSED_OPT_FN bool averages(const StepArgs& args) {
  return args.add != 0 || args.write_back;
}

// Which sums must be formed before the weights may be touched.
inline Wanted wanted(const Tensor& tensor, const StepArgs& args, const Layer& layer) {
  const bool ratio = has_ratio(tensor, args), lamb = args.kind == Kind::kLAMB;
  const bool parts_known = args.kind == Kind::kCLARS && is_known(layer.part_norms);
  return (carries_norm(tensor, args) && !is_known(layer.weight_norm2) ? kWeight : 0) |
         (ratio && !lamb && !parts_known && !is_known(layer.grad_norm2) ? kGradient : 0) |
         (ratio && lamb && !is_known(layer.direction_norm2) ? kDirection : 0) |
         (args.cautious_update && args.scaled && !is_known(layer.agreeing) ? kAgreement : 0);
}
// Of what tensors want, what is summed first and, if it is another pass, then: the scale of a mask enters directions.
inline std::pair<Wanted, Wanted> passes(bool scaled_directions) {
  return scaled_directions ? std::pair(~kDirection, kDirection) : std::pair(~Wanted{0}, Wanted{0});
}
FUSED_OPT_FN bool needs_scaled_direction(Wanted wanted) {
  return (wanted & kAgreement) && (wanted & kDirection);
}

// `grad_scale` and the norms in `layer` are those of this step. Sets `finite`.
FUSED_OPT_FN double trust_ratio(const StepArgs& args, double grad_scale, Layer& layer) {
  const double weight = square_root(layer.weight_norm2), scale = grad_scale < 0 ? -grad_scale : grad_scale;
  double denominator = 0;  // without eps and decay: LARS's and LAMB's are the norm of one thing
  switch (args.kind) {
    case Kind::kNone:
      return 1;
    case Kind::kLARS:
      denominator = scale * square_root(layer.grad_norm2);
      if (denominator != 0) denominator += (args.coupled_decay + args.decoupled_decay) * layer.decay_scale * weight;
      break;
    case Kind::kCLARS:
      denominator = scale * (is_known(layer.part_norms) ? layer.part_norms : square_root(layer.grad_norm2));
      break;
    case Kind::kLAMB:
      denominator = square_root(layer.direction_norm2);
      break;
  }
  layer.finite = weight - weight == 0 && denominator - denominator == 0;
  const bool usable = layer.finite && weight > 0 && denominator > 0;
  const double ratio = usable ? args.coefficient * weight / (denominator + args.eps) : 1;
  return ratio < args.cap ? ratio : args.cap;
}

// A rule is nothing but its coefficients, in the order of the table.
template <class Rule, class T>
FUSED_OPT_FN Rule make(const double (&coefficients)[kMaxCoefficients]) {
  Rule rule{};
  if constexpr (Rule::kCoefficients > 0) {
    static_assert(sizeof(Rule) == Rule::kCoefficients * sizeof(T) && Rule::kCoefficients <= kMaxCoefficients);
    T narrowed[Rule::kCoefficients];
    FUSED_OPT_UNROLL
    for (int k = 0; k < Rule::kCoefficients; ++k) narrowed[k] = static_cast<T>(coefficients[k]);
    std::memcpy(&rule, narrowed, sizeof rule);
  }
  return rule;
}

// What all elements of a tensor are multiplied with.
template <class T>
struct Factors {
  T lr, grad_scale, coupled_decay, decoupled_decay;
};
template <class T>
FUSED_OPT_FN Factors<T> factors(const StepArgs& args, double lr, double grad_scale, const Layer& layer) {
  return {static_cast<T>(lr * layer.lr_scale * layer.ratio), static_cast<T>(grad_scale),
          static_cast<T>(args.coupled_decay * layer.decay_scale),
          static_cast<T>(args.decoupled_decay * layer.decay_scale)};
}

// The gradient that the rule is given.
template <class T>
FUSED_OPT_FN T given(const Factors<T>& by, T p, T g) {
  return by.grad_scale * g + by.coupled_decay * p;
}

// The direction in which an element goes: the rule's update between the two decays.
template <class Rule, class T, class... State>
FUSED_OPT_FN T direction(const Rule& rule, const Factors<T>& by, T p, T g, State&... states) {
  return rule(given(by, p, g), states...) + by.decoupled_decay * p;
}

// ---- masks, and decay beside the direction

FUSED_OPT_FN bool is_plain(const StepArgs& args) {
  return !args.cautious_update && !args.cautious_decay && args.independent_decay == 0;
}

// An update is times `others`, and `agreeing` more where it goes the gradient's way; decay is less `against` of it
// where the update goes against the weight. Sums of 0 and 1 are selections that compilers keep apart: of nested
// conditions they make a case for every combination.
template <class T>
struct Masks {
  T others, agreeing, against, decoupled, independent;
};
template <class T>
FUSED_OPT_FN Masks<T> masks(const Tensor& tensor, const StepArgs& args, const Layer& layer) {
  const double numel = static_cast<double>(tensor.numel), least = numel / 1000;
  const bool scaled = args.cautious_update && args.scaled && is_known(layer.agreeing) && numel > 0;
  Masks<T> masks;
  const T agreeing = static_cast<T>(scaled ? numel / (layer.agreeing > least ? layer.agreeing : least) : 1);
  masks.others = args.cautious_update ? T(0) : agreeing;
  masks.agreeing = args.cautious_update ? agreeing : T(0);
  masks.against = args.cautious_decay ? T(1) : T(0);
  masks.decoupled = static_cast<T>(args.decoupled_decay * layer.decay_scale);
  masks.independent = static_cast<T>(args.independent_decay * layer.decay_scale);
  return masks;
}

// 1 where both have one sign, else 0. By comparisons, since a product of small numbers is 0.
template <class T>
FUSED_OPT_FN T agree(T a, T b) {
  return ((a > 0) & (b > 0)) | ((a < 0) & (b < 0)) ? T(1) : T(0);
}

// Whether the update of an element goes the gradient's way.
template <class Rule, class T, class... State>
FUSED_OPT_FN T agreement(const Rule& rule, const Factors<T>& by, T p, T g, State&... states) {
  const T gradient = given(by, p, g);
  return agree(rule(gradient, states...), gradient);
}

// `beside`: the decay that is not times the learning rate.
template <class Rule, class T, class... State>
FUSED_OPT_FN T masked_direction(const Rule& rule, const Factors<T>& by, const Masks<T>& masks, T p, T g, T& beside,
                                State&... states) {
  const T gradient = given(by, p, g), update = rule(gradient, states...);
  const T weight = (1 - masks.against * agree(update, -p)) * p;
  beside = masks.independent * weight;
  return (masks.others + masks.agreeing * agree(update, gradient)) * update + masks.decoupled * weight;
}

// Standard deviation of the noise on a tensor.
FUSED_OPT_FN double sigma(const Tensor& tensor, const StepArgs& args, const Layer& layer) {
  const int64_t whole = tensor.numel + (layer.shard ? layer.shard->elsewhere : 0);
  return args.sigma * (args.relative && whole ? square_root(layer.weight_norm2 / static_cast<double>(whole)) : 1);
}

template <class Rule, class T, class... State>
FUSED_OPT_FN void apply(const Rule rule, const Factors<T> by, const int64_t n, T* __restrict p, const T* __restrict g,
                        State* __restrict... states) {
  FUSED_OPT_UNROLL
  for (int64_t i = 0; i < n; ++i) p[i] -= by.lr * direction(rule, by, p[i], g[i], states[i]...);
}

template <class Rule, class T, class... State>
FUSED_OPT_FN void apply_masked(const Rule rule, const Factors<T> by, const Masks<T> masks, const int64_t n,
                               T* __restrict p, const T* __restrict g, State* __restrict... states) {
  FUSED_OPT_UNROLL
  for (int64_t i = 0; i < n; ++i) {
    T beside;
    const T along = masked_direction(rule, by, masks, p[i], g[i], beside, states[i]...);
    p[i] -= by.lr * along + beside;
  }
}

template <class T>
FUSED_OPT_FN void fold(const StepArgs& args, const int64_t n, T* __restrict v, T* __restrict p) {
  const T add = static_cast<T>(args.add), share = static_cast<T>(args.share);
  if (args.restart) {
    FUSED_OPT_UNROLL
    for (int64_t k = 0; k < n; ++k) v[k] = add * p[k];
  } else if (args.follow != 0) {
    const T follow = static_cast<T>(args.follow);
    FUSED_OPT_UNROLL
    for (int64_t k = 0; k < n; ++k) {
      const T by = add * (p[k] - share * v[k]);
      v[k] += by;
      p[k] += follow * by;
    }
  } else {
    FUSED_OPT_UNROLL
    for (int64_t k = 0; k < n; ++k) v[k] += add * (p[k] - share * v[k]);
  }
  if (args.write_back) {
    FUSED_OPT_UNROLL
    for (int64_t k = 0; k < n; ++k) p[k] = v[k];
  }
}

}  // namespace fused_opt
