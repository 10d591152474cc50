// What is written once per instruction set, by hand where compilers do not find it: everything else in kernels.cpp is
// the same for all of them.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>

#include "../rules.h"

namespace fused_opt::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kRegister = 64;  // bytes
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
using Doubles = double __attribute__((vector_size(kRegister)));
using Words = uint64_t __attribute__((vector_size(kRegister)));
using Halves = uint32_t __attribute__((vector_size(kRegister), may_alias));
constexpr int kDoubles = kRegister / sizeof(double);

// `widened`: one register of float32, as float64; of a whole register of float32, compilers take the halves apart
// first. `multiply32`: the products of the lower halves of words; compilers do not see that the upper ones do not
// matter. `evens`: the lower halves of all words of a and then of b.
#if defined(__AVX512F__)
FUSED_OPT_FN Doubles widened(const float* x) {
  return _mm512_cvtps_pd(_mm256_loadu_ps(x));
}
FUSED_OPT_FN Words multiply32(Words a, Words b) {
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
FUSED_OPT_FN Halves evens(Words a, Words b) {
  return __builtin_shufflevector((Halves)a, (Halves)b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
#elif defined(__AVX2__)
FUSED_OPT_FN Doubles widened(const float* x) {
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
}
FUSED_OPT_FN Words multiply32(Words a, Words b) {
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
FUSED_OPT_FN Halves evens(Words a, Words b) {
  return __builtin_shufflevector((Halves)a, (Halves)b, 0, 2, 4, 6, 8, 10, 12, 14);
}
#else
#if defined(__aarch64__)
FUSED_OPT_FN Doubles widened(const float* x) {
  return (Doubles)vcvt_f64_f32(vld1_f32(x));
}
FUSED_OPT_FN Words multiply32(Words a, Words b) {
  return (Words)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}
#else
FUSED_OPT_FN Doubles widened(const float* x) {
  return Doubles{x[0], x[1]};
}
FUSED_OPT_FN Words multiply32(Words a, Words b) {
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
}
#endif
FUSED_OPT_FN Halves evens(Words a, Words b) {
  return __builtin_shufflevector((Halves)a, (Halves)b, 0, 2, 4, 6);
}
#endif
FUSED_OPT_FN Doubles widened(const double* x) {
  Doubles some;
  std::memcpy(&some, x, sizeof some);  // wherever x lies
  return some;
}

}  // namespace
}  // namespace fused_opt::cpu
