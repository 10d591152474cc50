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
#include <type_traits>

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

using Floats = float __attribute__((vector_size(kRegister)));
using Bits32 = uint32_t __attribute__((vector_size(kRegister)));
using Bits16 = uint16_t __attribute__((vector_size(kRegister)));
using Bits8 = uint8_t __attribute__((vector_size(kRegister)));
constexpr int kFloats = kRegister / sizeof(float);

template <class V>
FUSED_OPT_FN V get(const void* from) {
  V some;
  std::memcpy(&some, from, sizeof some);
  return some;
}
template <class V>
FUSED_OPT_FN void put(void* to, const V& some) {
  std::memcpy(to, &some, sizeof some);
}

// `beyond`: whether the magnitude of any element is more than `most`, or not a number. `uppers`, `lowers`: those halves
// of all words of a and then of b.
//
// Of codes (types.h), where there are instructions for it: `less`: a - b, or 0 where a is 0, of numbers with lower
// halves of 0. `rounded`: roots to the nearest integers, with the signs of `of` or, where there are none, at least 1
// where `of` is not 0. `bytes`: all of a, b, c and d, integers that fit.
#if defined(__AVX512F__)
FUSED_OPT_FN bool beyond(Floats a, Floats b, float most) {
  const __m512 limit = _mm512_set1_ps(most);
  return _mm512_cmp_ps_mask(_mm512_abs_ps((__m512)a), limit, _CMP_NLE_UQ) |
         _mm512_cmp_ps_mask(_mm512_abs_ps((__m512)b), limit, _CMP_NLE_UQ);
}
FUSED_OPT_FN Bits16 uppers(Bits32 a, Bits32 b) {
  return __builtin_shufflevector((Bits16)a, (Bits16)b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33,
                                 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
}
FUSED_OPT_FN Bits16 lowers(Bits32 a, Bits32 b) {
  return __builtin_shufflevector((Bits16)a, (Bits16)b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32,
                                 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62);
}
FUSED_OPT_FN Bits32 widened(const uint16_t* x) {
  return (Bits32)_mm512_cvtepu16_epi32(get<__m256i>(x));
}
FUSED_OPT_FN Bits32 widened(const int16_t* x) {
  return (Bits32)_mm512_cvtepi16_epi32(get<__m256i>(x));
}
FUSED_OPT_FN Floats floats(const int8_t* x) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(get<__m128i>(x)));
}
FUSED_OPT_FN Floats floats(const uint8_t* x) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(get<__m128i>(x)));
}
FUSED_OPT_FN Bits32 less(Bits32 a, Bits32 b) {
  return (Bits32)_mm512_subs_epu16((__m512i)a, (__m512i)b);
}
template <class Code>
FUSED_OPT_FN Bits32 rounded(Bits32 root, Bits32 of) {
  const auto found = (__m512)root;
  if constexpr (std::is_signed_v<Code>) return (Bits32)_mm512_cvtps_epi32((__m512)(root | (of & 0x80000000)));
  const __mmask16 some = _mm512_test_epi32_mask((__m512i)of, (__m512i)of);
  return (Bits32)_mm512_cvtps_epi32(_mm512_mask_max_ps(found, some, found, _mm512_set1_ps(1)));
}
template <class Code>
FUSED_OPT_FN Bits8 bytes(Bits32 a, Bits32 b, Bits32 c, Bits32 d) {
  const __m512i ab = _mm512_packs_epi32((__m512i)a, (__m512i)b), cd = _mm512_packs_epi32((__m512i)c, (__m512i)d);
  const __m512i all = std::is_signed_v<Code> ? _mm512_packs_epi16(ab, cd) : _mm512_packus_epi16(ab, cd);
  return (Bits8)_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), all);
}
#elif defined(__AVX2__)
FUSED_OPT_FN bool beyond(Floats a, Floats b, float most) {
  const __m256 limit = _mm256_set1_ps(most), sign = _mm256_set1_ps(-0.0f);
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, (__m256)a), limit, _CMP_NLE_UQ),
                                         _mm256_cmp_ps(_mm256_andnot_ps(sign, (__m256)b), limit, _CMP_NLE_UQ)));
}
// Packing takes the registers' halves in turns.
FUSED_OPT_FN Bits16 uppers(Bits32 a, Bits32 b) {
  return (Bits16)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)(a >> 16), (__m256i)(b >> 16)), 0xD8);
}
FUSED_OPT_FN Bits16 lowers(Bits32 a, Bits32 b) {
  return (Bits16)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)(a & 0xFFFF), (__m256i)(b & 0xFFFF)), 0xD8);
}
FUSED_OPT_FN Bits32 widened(const uint16_t* x) {
  return (Bits32)_mm256_cvtepu16_epi32(get<__m128i>(x));
}
FUSED_OPT_FN Bits32 widened(const int16_t* x) {
  return (Bits32)_mm256_cvtepi16_epi32(get<__m128i>(x));
}
FUSED_OPT_FN Floats floats(const int8_t* x) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(x)));
}
FUSED_OPT_FN Floats floats(const uint8_t* x) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadu_si64(x)));
}
FUSED_OPT_FN Bits32 less(Bits32 a, Bits32 b) {
  return (Bits32)_mm256_subs_epu16((__m256i)a, (__m256i)b);
}
template <class Code>
FUSED_OPT_FN Bits32 rounded(Bits32 root, Bits32 of) {
  const auto found = (__m256)root;
  const auto code = _mm256_cvtps_epi32(std::is_signed_v<Code> ? found : _mm256_max_ps(found, _mm256_set1_ps(1)));
  return (Bits32)_mm256_sign_epi32(code, (__m256i)of);
}
template <class Code>
FUSED_OPT_FN Bits8 bytes(Bits32 a, Bits32 b, Bits32 c, Bits32 d) {
  const __m256i ab = _mm256_packs_epi32((__m256i)a, (__m256i)b), cd = _mm256_packs_epi32((__m256i)c, (__m256i)d);
  const __m256i all = std::is_signed_v<Code> ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);
  return (Bits8)_mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
#else
FUSED_OPT_FN bool beyond(Floats a, Floats b, float most) {
  using Signed = int32_t __attribute__((vector_size(kRegister)));  // magnitudes are in the order of their bits
  const auto size = [](Floats x) { return (Signed)((Bits32)x & 0x7FFFFFFF); };
  const Signed limit = Signed{} + __builtin_bit_cast(int32_t, most);
  const auto halves = (Words)((size(a) > limit) | (size(b) > limit));
  return halves[0] | halves[1];
}
FUSED_OPT_FN Bits32 widened(const uint16_t* x) {
  using Few = uint16_t __attribute__((vector_size(kRegister / 2)));
  return __builtin_convertvector(get<Few>(x), Bits32);
}
FUSED_OPT_FN Bits32 widened(const int16_t* x) {
  using Few = int16_t __attribute__((vector_size(kRegister / 2)));
  using Signed = int32_t __attribute__((vector_size(kRegister)));
  return (Bits32) __builtin_convertvector(get<Few>(x), Signed);
}
FUSED_OPT_FN Bits16 uppers(Bits32 a, Bits32 b) {
  return __builtin_shufflevector((Bits16)a, (Bits16)b, 1, 3, 5, 7, 9, 11, 13, 15);
}
FUSED_OPT_FN Bits16 lowers(Bits32 a, Bits32 b) {
  return __builtin_shufflevector((Bits16)a, (Bits16)b, 0, 2, 4, 6, 8, 10, 12, 14);
}
#endif

}  // namespace
}  // namespace fused_opt::cpu
