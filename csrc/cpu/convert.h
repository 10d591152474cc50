// Elements in a row to the type of the arithmetic and back: two registers at a time where there are so many and all are
// numbers, and else one by one, as types.h does.
#pragma once
#include <limits>

#include "../noise.h"
#include "../types.h"
#include "vectors.h"

namespace fused_opt::cpu {
namespace {

constexpr int64_t kPair = 2 * kFloats;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls pair(k) for every two registers of float32 from `x` that have no element beyond `most`, and one(k) for each
// other element.
template <class Pair, class One>
FUSED_OPT_FN void by_pairs(const float* x, int64_t n, float most, const Pair& pair, const One& one) {
  int64_t k = 0;
  for (; k + kPair <= n; k += kPair) {
    const auto a = get<Floats>(x + k), b = get<Floats>(x + k + kFloats);
    if (__builtin_expect(!beyond(a, b, most), true))
      pair(k, (Bits32)a, (Bits32)b);
    else
      for (int64_t i = k; i < k + kPair; ++i) one(i);
  }
  for (; k < n; ++k) one(k);
}

template <class T, class Element>
FUSED_OPT_FN void widen_all(const Element* x, int64_t n, T* y) {
  int64_t k = 0;
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Element, BFloat16>)
    for (; k + kFloats <= n; k += kFloats) put(y + k, widened(&x[k].bits) << 16);
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Element, Float16>)
    for (; k + 8 <= n; k += 8) _mm256_storeu_ps(y + k, _mm256_cvtph_ps(get<__m128i>(x + k)));
#endif
  for (; k < n; ++k) y[k] = static_cast<T>(widen(x[k]));
}

template <class Element, class T>
FUSED_OPT_FN void narrow_all(const T* x, int64_t n, Element* y) {
  int64_t k = 0;
  const auto one = [&](int64_t k) { y[k] = narrow<Element>(x[k]); };
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Element, BFloat16>)
    return by_pairs(
        x, n, kInfinity,
        [&](int64_t k, Bits32 a, Bits32 b) {
          put(y + k, uppers(a + 0x7FFF + (a >> 16 & 1), b + 0x7FFF + (b >> 16 & 1)));
        },
        one);
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Element, Float16>)
    for (; k + 8 <= n; k += 8) put(y + k, _mm256_cvtps_ph(_mm256_loadu_ps(x + k), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; k < n; ++k) one(k);
}

template <class Element, class T>
FUSED_OPT_FN void narrow_all_at_random(const T* x, const uint32_t* words, int place, int64_t n, Element* y) {
  const auto one = [&](int64_t k) {
    y[k] = narrow_at_random<Element>(static_cast<float>(x[k]), rounding_bits(words[k], place));
  };
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Element, BFloat16>)
    return by_pairs(
        x, n, kLargestBFloat16,
        [&](int64_t k, Bits32 a, Bits32 b) {
          const auto by = [&](int64_t k) { return rounding_bits(get<Bits32>(words + k), place); };
          put(y + k, uppers(a + by(k), b + by(k + kFloats)));
        },
        one);
  for (int64_t k = 0; k < n; ++k) one(k);
}

FUSED_OPT_FN void join_all(const BFloat16* high, const int16_t* low, int64_t n, float* y) {
  int64_t k = 0;
  for (; k + kFloats <= n; k += kFloats) put(y + k, (widened(&high[k].bits) << 16) + widened(low + k));
  for (; k < n; ++k) y[k] = join(high[k], low[k]);
}

FUSED_OPT_FN void split_all(const float* x, int64_t n, BFloat16* high, int16_t* low) {
  by_pairs(
      x, n, kInfinity,
      [&](int64_t k, Bits32 a, Bits32 b) {
        put(high + k, uppers(a + 0x8000, b + 0x8000));
        put(low + k, lowers(a, b));
      },
      [&](int64_t k) {
        const Split parts = split(x[k]);
        high[k] = parts.high, low[k] = parts.low;
      });
}

// ---- states in 8 bits, a block of codes or its beginning at a time

// 1 / x to the nearest, of a normal number below 2^126, by the divider of integers: that of floats is busy with the
// step.
FUSED_OPT_FN float inverse_of(uint32_t bits) {
  const uint64_t digits = (bits & 0x7FFFFF) | 0x800000;
  const auto inverse = static_cast<uint32_t>(((uint64_t{1} << 47) + digits / 2) / digits);
  return __builtin_bit_cast(float, inverse + ((252 - (bits >> 23)) << 23));
}

// The bits of the largest magnitude.
template <class T>
__attribute__((noinline)) int32_t largest_in(const T* x, int64_t n) {
  int32_t largest = 0;
  const auto among = [&](int64_t n) {
    for (int64_t k = 0; k < n; ++k) {
      const int32_t bits = magnitude(static_cast<float>(x[k]));
      largest = bits > largest ? bits : largest;
    }
  };
  n == kCoded ? among(kCoded) : among(n);
  return largest;
}

template <class T>
FUSED_OPT_FN Scale scale_in(const T* x, int64_t n) {
  const int32_t largest = largest_in(x, n);
  if (largest < 0x00800000 || largest >= 0x7E800000) return scale_of(largest);
  return {__builtin_bit_cast(float, largest), inverse_of(static_cast<uint32_t>(largest)), ~kSign};
}

template <class T, class Code>
__attribute__((noinline)) void decode(const Code* codes, float scale, int64_t n, T* x) {
  const auto some = [&](int64_t n) {
    for (int64_t k = 0; k < n; ++k) x[k] = static_cast<T>(share_of(codes[k]) * scale);
  };
  if (n < kCoded) return some(n);
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    constexpr uint32_t kLeast = kRoot<Code>;
    for (int64_t k = 0; k < kCoded; k += kFloats) {
      const auto root = (Bits32)floats(codes + k);
      if constexpr (std::is_signed_v<Code>)
        put(x + k, (Floats)(less(root << 1, Bits32{} + (kLeast << 1)) | (root & kSign)) * scale);
      else
        put(x + k, (Floats)(less(root, Bits32{} + kLeast) << 2) * scale);
    }
    return;
  }
#endif
  some(kCoded);
}

template <class T, class Code>
__attribute__((noinline)) void encode(Code* codes, const Scale& by, int64_t n, const T* x) {
  const auto some = [&](int64_t n) {
    for (int64_t k = 0; k < n; ++k) codes[k] = code_of<Code>(static_cast<float>(x[k]), by);
  };
  if (n < kCoded) return some(n);
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    const auto code = [&](int64_t k) {
      const auto number = get<Bits32>(x + k), size = number & by.mask;
      const auto share = (Bits32)((Floats)size * by.inverse);
      return rounded<Code>((share >> kShift<Code>)+kRoot<Code>, std::is_signed_v<Code> ? number : size);
    };
    for (int64_t k = 0; k < kCoded; k += 4 * kFloats)
      put(codes + k, bytes<Code>(code(k), code(k + kFloats), code(k + 2 * kFloats), code(k + 3 * kFloats)));
    return;
  }
#endif
  some(kCoded);
}

}  // namespace
}  // namespace fused_opt::cpu
