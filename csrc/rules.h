// THE MATHEMATICS. Every rule once: its coefficients, in the order of fused_opt/rules/, and one function that updates
// the states of one element and returns its update u, p <- p - lr * (u + decoupled_decay * p). The pass owns p, lr and
// the weight decay, so that multipliers, trust ratios and kinds of decay need nothing from a rule.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define FUSED_OPT_FN __host__ __device__ __forceinline__
#elif !defined(FUSED_OPT_FN)
// Always inlined: one copy compiled for AVX-512 must never be the one that the linker keeps for other processors.
#define FUSED_OPT_FN inline __attribute__((always_inline))
#endif

namespace fused_opt {

FUSED_OPT_FN float square_root(float x) {
  return __builtin_sqrtf(x);
}
FUSED_OPT_FN double square_root(double x) {
  return __builtin_sqrt(x);
}

template <class T>
FUSED_OPT_FN T absolute(T x) {
  return x < 0 ? -x : x;
}

// torch.maximum: a NaN on either side stays.
template <class T>
FUSED_OPT_FN T maximum(T a, T b) {
  return (b > a || b != b) ? b : a;
}

// torch.lerp: from whichever end is nearer, so that weights of 0 and 1 give the ends themselves.
template <class T>
FUSED_OPT_FN T lerp(T a, T b, T weight) {
  return weight < T(0.5) ? a + weight * (b - a) : b - (1 - weight) * (b - a);
}

// x^t for a whole t, by squaring: within 2 log2(t) roundings.
FUSED_OPT_FN double power(double x, double t) {
  double result = 1;
  for (uint64_t n = static_cast<uint64_t>(t); n; n >>= 1, x *= x)
    if (n & 1) result *= x;
  return result;
}

// A rule has kStates, kCoefficients, which are all its members, kCountsSteps and, where it counts,
// at_step(coefficients, t): what the coefficients of fused_opt/rules/ are in a parameter's step t, for devices that
// keep the count. Python's Rule has the same numbers, and a bucket compares them. One whose at_step takes a third
// argument keeps a scalar for every parameter beside the count: its last coefficient is what that becomes.
template <class Rule, class = void>
constexpr bool kKeepsScalar = false;
template <class Rule>
constexpr bool kKeepsScalar<Rule, std::void_t<decltype(Rule::at_step(nullptr, 0.0, 0.0f))>> = true;

// A rule whose update is a quotient of which nothing but states after the first is in the denominator may have
// numerator(g, first state): that of the update, for who asks its sign alone.
template <class Rule, class = void>
constexpr bool kHasNumerator = false;
template <class Rule>
constexpr bool kHasNumerator<Rule, std::void_t<decltype(&Rule::numerator)>> = true;

template <class T>
struct SGD {
  static constexpr int kStates = 0, kCoefficients = 0;
  static constexpr bool kCountsSteps = false;

  FUSED_OPT_FN T operator()(T g) const { return g; }
};

template <class T>
struct MomentumSGD {
  static constexpr int kStates = 1, kCoefficients = 3;
  static constexpr bool kCountsSteps = false;
  // In the first step 0 and 1, else the momentum and 1 - dampening; the momentum with Nesterov's, else 0.
  T momentum, keep, nesterov;

  FUSED_OPT_FN T operator()(T d, T& m) const {
    m = momentum * m + keep * d;
    return nesterov != 0 ? d + nesterov * m : m;
  }
};

template <class T>
struct Adam {
  static constexpr int kStates = 2, kCoefficients = 6;
  static constexpr bool kCountsSteps = true;
  // unbias1 = 1 / (1 - beta1^t) and unbias2 = 1 / sqrt(1 - beta2^t); before at_step they are beta1 and beta2.
  T one_minus_beta1, beta2, one_minus_beta2, unbias1, unbias2, eps;

  static FUSED_OPT_FN void at_step(double* coefficients, double t) {
    coefficients[3] = 1 / (1 - power(coefficients[3], t));
    coefficients[4] = 1 / square_root(1 - power(coefficients[4], t));
  }
  FUSED_OPT_FN T numerator(T g, T m) const { return lerp(m, g, one_minus_beta1); }
  FUSED_OPT_FN T operator()(T g, T& m, T& v) const {
    m = numerator(g, m);
    v = beta2 * v + one_minus_beta2 * g * g;
    return unbias1 * m / (unbias2 * square_root(v) + eps);
  }
};

template <class T>
struct AMSGrad {
  static constexpr int kStates = 3, kCoefficients = 6;
  static constexpr bool kCountsSteps = true;
  T one_minus_beta1, beta2, one_minus_beta2, unbias1, unbias2, eps;

  static FUSED_OPT_FN void at_step(double* coefficients, double t) { Adam<double>::at_step(coefficients, t); }
  FUSED_OPT_FN T numerator(T g, T m) const { return lerp(m, g, one_minus_beta1); }
  FUSED_OPT_FN T operator()(T g, T& m, T& v, T& largest) const {
    m = numerator(g, m);
    v = beta2 * v + one_minus_beta2 * g * g;
    largest = maximum(largest, v);
    return unbias1 * m / (unbias2 * square_root(largest) + eps);
  }
};

template <class T>
struct Lion {
  static constexpr int kStates = 1, kCoefficients = 2;
  static constexpr bool kCountsSteps = false;
  T one_minus_beta1, one_minus_beta2;

  FUSED_OPT_FN T operator()(T g, T& m) const {
    const T between = lerp(m, g, one_minus_beta1);
    m = lerp(m, g, one_minus_beta2);
    return T(between > 0) - T(between < 0);
  }
};

template <class T>
struct RMSprop {
  static constexpr int kStates = 1, kCoefficients = 3;
  static constexpr bool kCountsSteps = true;
  T alpha, one_minus_alpha, eps;

  static FUSED_OPT_FN void at_step(double*, double) {}
  FUSED_OPT_FN T operator()(T g, T& v) const {
    v = alpha * v + one_minus_alpha * g * g;
    return g / (square_root(v) + eps);
  }
};

template <class T>
struct CenteredRMSprop {
  static constexpr int kStates = 2, kCoefficients = 3;
  static constexpr bool kCountsSteps = true;
  T alpha, one_minus_alpha, eps;

  static FUSED_OPT_FN void at_step(double*, double) {}
  FUSED_OPT_FN T operator()(T g, T& v, T& average) const {
    v = alpha * v + one_minus_alpha * g * g;
    average = lerp(average, g, one_minus_alpha);
    return g / (square_root(v - average * average) + eps);
  }
};

template <class T>
struct MomentumRMSprop {
  static constexpr int kStates = 2, kCoefficients = 4;
  static constexpr bool kCountsSteps = true;
  T alpha, one_minus_alpha, eps, momentum;

  static FUSED_OPT_FN void at_step(double*, double) {}
  FUSED_OPT_FN T operator()(T g, T& v, T& b) const {
    b = momentum * b + RMSprop<T>{alpha, one_minus_alpha, eps}(g, v);
    return b;
  }
};

template <class T>
struct CenteredMomentumRMSprop {
  static constexpr int kStates = 3, kCoefficients = 4;
  static constexpr bool kCountsSteps = true;
  T alpha, one_minus_alpha, eps, momentum;

  static FUSED_OPT_FN void at_step(double*, double) {}
  FUSED_OPT_FN T operator()(T g, T& v, T& b, T& average) const {
    b = momentum * b + CenteredRMSprop<T>{alpha, one_minus_alpha, eps}(g, v, average);
    return b;
  }
};

template <class T>
struct Adamax {
  static constexpr int kStates = 2, kCoefficients = 4;
  static constexpr bool kCountsSteps = true;
  T one_minus_beta1, beta2, unbias1, eps;  // unbias1 = 1 / (1 - beta1^t); before at_step it is beta1

  static FUSED_OPT_FN void at_step(double* coefficients, double t) {
    coefficients[2] = 1 / (1 - power(coefficients[2], t));
  }
  FUSED_OPT_FN T operator()(T g, T& m, T& n) const {
    m = lerp(m, g, one_minus_beta1);
    n = maximum(beta2 * n, absolute(g) + eps);
    return unbias1 * m / n;
  }
};

template <class T>
struct Adagrad {
  static constexpr int kStates = 1, kCoefficients = 2;
  static constexpr bool kCountsSteps = true;
  T decayed, eps;  // decayed = 1 / (1 + (t - 1) * lr_decay); before at_step it is lr_decay

  static FUSED_OPT_FN void at_step(double* coefficients, double t) {
    coefficients[0] = 1 / (1 + (t - 1) * coefficients[0]);
  }
  FUSED_OPT_FN T operator()(T g, T& s) const {
    s += g * g;
    return decayed * g / (square_root(s) + eps);
  }
};

template <class T>
struct NAdam {
  static constexpr int kStates = 2, kCoefficients = 8;
  static constexpr bool kCountsSteps = true;
  // Before at_step of_gradient and of_momentum are beta1 and 0.96^momentum_decay; mu_product is the scalar.
  T one_minus_beta1, beta2, one_minus_beta2, of_gradient, of_momentum, unbias2, eps, mu_product;

  static FUSED_OPT_FN void at_step(double* coefficients, double t, float mu_product) {
    const double beta1 = coefficients[3], decay = coefficients[4], decayed = power(decay, t);
    const double mu = beta1 * (1 - 0.5 * decayed), next_mu = beta1 * (1 - 0.5 * decayed * decay);
    mu_product *= static_cast<float>(mu);
    coefficients[3] = (1 - mu) / (1 - static_cast<double>(mu_product));
    coefficients[4] = next_mu / (1 - static_cast<double>(mu_product) * next_mu);
    coefficients[5] = 1 / square_root(1 - power(coefficients[1], t));
    coefficients[7] = static_cast<double>(mu_product);
  }
  FUSED_OPT_FN T operator()(T g, T& m, T& v) const {
    m = lerp(m, g, one_minus_beta1);
    v = beta2 * v + one_minus_beta2 * g * g;
    return (of_gradient * g + of_momentum * m) / (unbias2 * square_root(v) + eps);
  }
};

template <class T>
struct RAdam {
  static constexpr int kStates = 2, kCoefficients = 6;
  static constexpr bool kCountsSteps = true;
  // unbias1 = 1 / (1 - beta1^t); before at_step it is beta1. rectified: 0 in steps that are not divided.
  T one_minus_beta1, beta2, one_minus_beta2, unbias1, rectified, eps;

  static FUSED_OPT_FN void at_step(double* coefficients, double t) {
    const double left = 1 - power(coefficients[1], t), unbias1 = 1 / (1 - power(coefficients[3], t));
    const double longest = 2 / coefficients[2] - 1, length = longest - 2 * t * (1 - left) / left;
    const double ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length);
    coefficients[3] = unbias1;
    coefficients[4] = length > 5 ? unbias1 * square_root(ratio * left) : 0;
  }
  FUSED_OPT_FN T operator()(T g, T& m, T& v) const {
    m = lerp(m, g, one_minus_beta1);
    v = beta2 * v + one_minus_beta2 * g * g;
    return rectified != 0 ? rectified * m / (square_root(v) + eps) : unbias1 * m;
  }
};

template <class T>
struct AdEMAMix {
  static constexpr int kStates = 3, kCoefficients = 8;
  static constexpr bool kCountsSteps = true;
  // Before at_step one_minus_beta3, unbias1 and unbias2 are beta3, beta3_warmup and alpha_warmup.
  T one_minus_beta1, beta2, one_minus_beta2, one_minus_beta3, unbias1, unbias2, alpha, eps;

  static FUSED_OPT_FN void at_step(double* coefficients, double t) {
    const double beta1 = 1 - coefficients[0], warmup = coefficients[4], share = t / warmup;
    double beta3 = coefficients[3];
    if (t < warmup) {
      // The half-life, which is proportional to 1 / ln(beta), grows linearly; that of beta = 0 is 0.
      const double inverse =
          (beta1 > 0 ? (1 - share) / std::log(beta1) : 0) + (beta3 > 0 ? share / std::log(beta3) : 0);
      const double grown = inverse != 0 ? std::exp(1 / inverse) : 0;
      if (grown < beta3) beta3 = grown;
    }
    if (t < coefficients[5]) coefficients[6] *= t / coefficients[5];
    coefficients[3] = 1 - beta3;
    coefficients[4] = 1 / (1 - power(beta1, t));
    coefficients[5] = 1 / square_root(1 - power(coefficients[1], t));
  }
  FUSED_OPT_FN T operator()(T g, T& m, T& slow, T& v) const {
    m = lerp(m, g, one_minus_beta1);
    slow = lerp(slow, g, one_minus_beta3);
    v = beta2 * v + one_minus_beta2 * g * g;
    return (unbias1 * m + alpha * slow) / (unbias2 * square_root(v) + eps);
  }
};

// The first half of Muon: what its matrices are made of.
template <class T>
struct Muon {
  static constexpr int kStates = 1, kCoefficients = 2;
  static constexpr bool kCountsSteps = false;
  // share: the momentum with Nesterov's, else 1.
  T one_minus_momentum, share;

  FUSED_OPT_FN T operator()(T g, T& m) const {
    m = lerp(m, g, one_minus_momentum);
    return lerp(g, m, share);
  }
};

// The name a rule has in Python, and its type.
#define FUSED_OPT_RULES(RULE)                                \
  RULE("sgd", SGD)                                           \
  RULE("momentum_sgd", MomentumSGD)                          \
  RULE("adam", Adam)                                         \
  RULE("amsgrad", AMSGrad)                                   \
  RULE("lion", Lion)                                         \
  RULE("rmsprop", RMSprop)                                   \
  RULE("centered_rmsprop", CenteredRMSprop)                  \
  RULE("momentum_rmsprop", MomentumRMSprop)                  \
  RULE("centered_momentum_rmsprop", CenteredMomentumRMSprop) \
  RULE("adamax", Adamax)                                     \
  RULE("adagrad", Adagrad)                                   \
  RULE("nadam", NAdam)                                       \
  RULE("radam", RAdam)                                       \
  RULE("ademamix", AdEMAMix)                                 \
  RULE("muon", Muon)

// What a rule declares.
struct RuleShape {
  const char* name;
  int states, coefficients;
  bool counts_steps, keeps_scalar;
};
#define FUSED_OPT_SHAPE(name, Rule) \
  {name, Rule<float>::kStates, Rule<float>::kCoefficients, Rule<float>::kCountsSteps, kKeepsScalar<Rule<float>>},
constexpr RuleShape kRules[] = {FUSED_OPT_RULES(FUSED_OPT_SHAPE)};
#undef FUSED_OPT_SHAPE

// Its place in kRules, or -1: there is no such rule.
inline int rule_index(const char* name) {
  int index = 0;
  for (const RuleShape& rule : kRules) {
    if (!std::strcmp(rule.name, name)) return index;
    ++index;
  }
  return -1;
}

}  // namespace fused_opt
