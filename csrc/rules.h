// THE MATHEMATICS. Every rule once: its coefficients, in the order of fused_opt/rules/, and one function that updates
// the states of one element and returns the direction u in which the step goes, p <- p - lr * u. Whoever applies a rule
// owns p and lr, so learning-rate multipliers and trust ratios need nothing from a rule.
#pragma once
#include <cstdint>

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

template <class T>
struct SGD {
  static constexpr int kStates = 0;
  T weight_decay;

  FUSED_OPT_FN T operator()(T p, T g) const { return g + weight_decay * p; }
};

template <class T>
struct MomentumSGD {
  static constexpr int kStates = 1;
  T weight_decay, momentum, keep, nesterov;  // keep: 1 - dampening, and 1 in the first step

  FUSED_OPT_FN T operator()(T p, T g, T& m) const {
    const T d = g + weight_decay * p;
    m = momentum * m + keep * d;
    return nesterov != 0 ? d + momentum * m : m;
  }
};

template <class T>
struct Adam {
  static constexpr int kStates = 2;
  // coupled: 1 adds the decay to the gradient (Adam), 0 to the direction (AdamW); unbias1 = 1 / (1 - beta1^t) and
  // unbias2 = 1 / sqrt(1 - beta2^t)
  T weight_decay, coupled, one_minus_beta1, beta2, one_minus_beta2, unbias1, unbias2, eps;

  FUSED_OPT_FN T operator()(T p, T g, T& m, T& v) const {
    g += coupled * weight_decay * p;
    m = lerp(m, g, one_minus_beta1);
    v = beta2 * v + one_minus_beta2 * g * g;
    return unbias1 * m / (unbias2 * square_root(v) + eps) + (1 - coupled) * weight_decay * p;
  }
};

template <class T>
struct AMSGrad {
  static constexpr int kStates = 3;
  T weight_decay, coupled, one_minus_beta1, beta2, one_minus_beta2, unbias1, unbias2, eps;

  FUSED_OPT_FN T operator()(T p, T g, T& m, T& v, T& largest) const {
    g += coupled * weight_decay * p;
    m = lerp(m, g, one_minus_beta1);
    v = beta2 * v + one_minus_beta2 * g * g;
    largest = maximum(largest, v);
    return unbias1 * m / (unbias2 * square_root(largest) + eps) + (1 - coupled) * weight_decay * p;
  }
};

// x^t for a whole t, by squaring: within 2 log2(t) roundings.
FUSED_OPT_FN double power(double x, double t) {
  double result = 1;
  for (uint64_t n = static_cast<uint64_t>(t); n; n >>= 1, x *= x)
    if (n & 1) result *= x;
  return result;
}

// Adam's and AMSGrad's coefficients for step t, made of those for an infinite one, where only the device knows t.
FUSED_OPT_FN void unbias(double (&coefficients)[8], double t) {
  coefficients[5] = 1 / (1 - power(1 - coefficients[2], t));
  coefficients[6] = 1 / square_root(1 - power(coefficients[3], t));
}

// The name a rule has in Python, and its type.
#define FUSED_OPT_RULES(RULE)       \
  RULE("sgd", SGD)                  \
  RULE("momentum_sgd", MomentumSGD) \
  RULE("adam", Adam)                \
  RULE("amsgrad", AMSGrad)

}  // namespace fused_opt
