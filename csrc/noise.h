// Standard normal numbers by counting: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC
// 2011) and Box-Muller. Element i of parameter k in step t draws lane i % 4 of the counter (i / 4, k, t) under the key
// `seed`: nothing else decides, neither threads nor chunks nor the order of elements in memory. What is drawn for other
// ends than noise is in streams of its own: their numbers are the highest bits of i / 4, which no tensor reaches.
#pragma once
#include <cstdint>

#include "rules.h"

namespace fused_opt {

// What a draw is keyed by, beside the element.
struct Draw {
  uint64_t seed = 0;
  uint32_t index = 0, step = 0;
  uint32_t stream = 0;  // below 8; 0: noise
  FUSED_OPT_FN uint32_t high() const { return stream << 29; }
};
// Of rounding at random: the words of one stream have the bits of two stored numbers of an element, so that a rule's
// states, the parameter, and the parameter where an average moves it once more, have theirs in this order.
FUSED_OPT_FN constexpr uint32_t rounding_stream(int place) {
  return 1 + static_cast<uint32_t>(place) / 2;
}
FUSED_OPT_FN constexpr int rounding_shift(int place) {
  return place % 2 * 16;
}

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
