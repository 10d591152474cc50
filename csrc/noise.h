// Standard normal numbers by counting: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC
// 2011) and Box-Muller. Element i of parameter k in step t draws lane i % 4 of the counter (i / 4, k, t) under the key
// `seed`: nothing else decides, neither threads nor chunks nor the order of elements in memory.
#pragma once
#include <cstdint>

#include "rules.h"

namespace fused_opt {

// What a draw is keyed by, beside the element.
struct Draw {
  uint64_t seed = 0;
  uint32_t index = 0, step = 0;
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

// 32-bit words held in the lower halves of 64-bit lanes: here one lane, in a vector register several. What the upper
// halves hold does not matter; multiply32 takes the lower ones.
struct OneLane {
  using Word = uint64_t;
  static FUSED_OPT_FN Word splat(uint32_t x) { return x; }
  static FUSED_OPT_FN Word multiply32(Word a, Word b) {
#ifdef __CUDA_ARCH__  // one instruction, which nvcc does not see in the line below: it multiplies 64 bits
    Word product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(static_cast<uint32_t>(a)), "r"(static_cast<uint32_t>(b)));
    return product;
#else
    return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
  }
};

template <class Lanes, class Word = typename Lanes::Word>
FUSED_OPT_FN void philox(Word& c0, Word& c1, Word& c2, Word& c3, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const Word a = Lanes::multiply32(c0, Lanes::splat(kPhiloxM0)), b = Lanes::multiply32(c2, Lanes::splat(kPhiloxM1));
    c0 = (b >> 32) ^ c1 ^ Lanes::splat(key0);
    c1 = b;
    c2 = (a >> 32) ^ c3 ^ Lanes::splat(key1);
    c3 = a;
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
}

// Rounding at random takes less than noise does: an element's bits are a hash of its place, whose keys are drawn for
// every parameter and step. Each byte of a word is the higher one of one stored number's 16 bits and the lower one of
// another's: four numbers have theirs in one, in the order of a rule's states, the parameter, and the parameter where
// an average moves it once more.
constexpr int kRoundedByWord = 4;
struct RoundingKey {
  uint32_t first = 0, second = 0;
};
// The first two words of a counter that no element's noise reaches.
FUSED_OPT_FN RoundingKey rounding_key(const Draw& by, int word) {
  uint64_t c0 = 0, c1 = static_cast<uint64_t>(1 + word) << 29, c2 = by.index, c3 = by.step;
  philox<OneLane>(c0, c1, c2, c3, static_cast<uint32_t>(by.seed), static_cast<uint32_t>(by.seed >> 32));
  return {static_cast<uint32_t>(c0), static_cast<uint32_t>(c1)};
}
// The last steps of MurmurHash3 (Appleby 2011, fmix32), with a key before each multiplication.
FUSED_OPT_FN uint32_t rounding_word(uint32_t low, uint32_t high, RoundingKey key) {
  uint32_t x = low ^ key.first;
  x = (x ^ x >> 16) * 0x85EBCA6B;
  x = ((x ^ x >> 13) + (key.second + high * 0x9E3779B9)) * 0xC2B2AE35;
  return x ^ x >> 16;
}
FUSED_OPT_FN uint32_t rounding_word(int64_t i, RoundingKey key) {
  return rounding_word(static_cast<uint32_t>(i), static_cast<uint32_t>(static_cast<uint64_t>(i) >> 32), key);
}
// Of one word or a register of them.
template <class Words>
FUSED_OPT_FN Words rounding_bits(Words words, int place) {
  const int from = place % 2 * 16 + place / 2 % 2 * 8;
  return (words >> from | words << (-from & 31)) & 0xFFFF;
}

// Two words to two normal numbers, |z| < 5.8. The radius has 23 bits of w0, as many as leave room for the half. Of w1
// the highest bit is the sign of the cosine, the next one says which number gets it, and the others are an angle
// between -pi / 4 and pi / 4: together a point anywhere on the circle.
FUSED_OPT_FN void box_muller(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  // u in (0, 1), exactly representable; ln u = e ln 2 + ln(1 + f) with 1 + f in [sqrt(1/2), sqrt(2)). All polynomials
  // were fitted for the smallest relative error: -2 ln(1 + f) = f (-2 + f + f^2 P(f)) has 3.2e-8, sine and cosine below
  // 4e-9.
  const float u = static_cast<float>(static_cast<int32_t>(w0 >> 9)) * 0x1p-23f + 0x1p-24f;
  const int32_t bits = __builtin_bit_cast(int32_t, u);
  const int32_t e = (bits - 0x3F3504F3) >> 23;
  const float f = __builtin_bit_cast(float, bits - e * (1 << 23)) - 1;
  float ln = -0.174007252f;
  ln = ln * f + 0.285349548f;
  ln = ln * f - 0.298295736f;
  ln = ln * f + 0.331551731f;
  ln = ln * f - 0.399261236f;
  ln = ln * f + 0.500026762f;
  ln = ln * f - 0.66667819f;
  ln = ln * f + 1;
  ln = ln * f - 2;
  const float r = square_root(static_cast<float>(e) * -1.38629436f + ln * f);
  const float angle = static_cast<float>(static_cast<int32_t>(w1 << 2)) * (1.57079633f * 0x1p-32f), a2 = angle * angle;
  float sine = -1.95152825e-4f;
  sine = sine * a2 + 8.33216031e-3f;
  sine = sine * a2 - 0.166666552f;
  sine = sine * a2 * angle + angle;
  float cosine = 2.44331568e-5f;
  cosine = cosine * a2 - 1.38873165e-3f;
  cosine = cosine * a2 + 4.16666456e-2f;
  cosine = cosine * a2 - 0.5f;
  cosine = cosine * a2 + 1;
  const float c = r * __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, cosine) | (w1 & 0x80000000)), s = r * sine;
  z0 = w1 & 0x40000000 ? s : c;
  z1 = w1 & 0x40000000 ? c : s;
}

}  // namespace fused_opt
