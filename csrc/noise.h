// Standard normal numbers by counting: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC
// 2011) and Box-Muller. Element i of parameter k in step t draws lane i % 4 of the counter (i / 4, k, t) under the key
// `seed`: nothing else decides, neither threads nor chunks nor the order of elements in memory.
#pragma once
#include <cstdint>

#include "rules.h"

namespace fused_opt {

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

// 32-bit words held in the lower halves of 64-bit lanes: here one lane, in a vector register several. What the upper
// halves hold does not matter; multiply32 takes the lower ones.
struct OneLane {
  using Word = uint64_t;
  static FUSED_OPT_FN Word splat(uint32_t x) { return x; }
  static FUSED_OPT_FN Word multiply32(Word a, Word b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
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

// Two words to two normal numbers, |z| < 5.8: 23 bits for the radius, as many as leave room for the half, 24 for the
// angle.
FUSED_OPT_FN void box_muller(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  // u in (0, 1), exactly representable; ln u = e ln 2 + ln(1 + f) with 1 + f in [sqrt(1/2), sqrt(2)). The polynomial
  // was fitted to ln(1 + f) = f - f^2 / 2 + f^3 P(f) for the smallest relative error, which is 3.2e-8.
  const float u = (static_cast<float>(static_cast<int32_t>(w0 >> 9)) + 0.5f) * 0x1p-23f;
  const int32_t bits = __builtin_bit_cast(int32_t, u);
  const int32_t e = (bits - 0x3F3504F3) >> 23;
  const float f = __builtin_bit_cast(float, bits - (e << 23)) - 1;
  float poly = 0.0870036259f;
  poly = poly * f - 0.142674774f;
  poly = poly * f + 0.149147868f;
  poly = poly * f - 0.165775866f;
  poly = poly * f + 0.199630618f;
  poly = poly * f - 0.250013381f;
  poly = poly * f + 0.333339095f;
  poly = poly * f - 0.5f;
  const float ln = static_cast<float>(e) * 0.693147182f + (poly * f * f + f);
  const float r = square_root(-2 * ln);
  // 2 pi x = (q + 4 f) pi / 2 with |4 f| <= 1/2; Taylor's polynomials are exact to float32 there.
  const float x = static_cast<float>(static_cast<int32_t>(w1 >> 8)) * 0x1p-24f;
  const int32_t q = static_cast<int32_t>(4 * x + 0.5f);
  const float angle = (x - 0.25f * static_cast<float>(q)) * 6.283185307f, a2 = angle * angle;
  const float sine =
      angle * (1 + a2 * (-1.66666667e-1f + a2 * (8.33333333e-3f + a2 * (-1.98412698e-4f + a2 * 2.75573192e-6f))));
  const float cosine = 1 + a2 * (-0.5f + a2 * (4.16666667e-2f + a2 * (-1.38888889e-3f + a2 * 2.48015873e-5f)));
  const float c = q & 1 ? sine : cosine, d = q & 1 ? cosine : sine;
  z0 = (q + 1) & 2 ? -r * c : r * c;
  z1 = q & 2 ? -r * d : r * d;
}

}  // namespace fused_opt
