// The types that elements are stored in, and their way to the type of the arithmetic and back.
#pragma once
#include <cstdint>
#include <type_traits>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "rules.h"
#include "table.h"

namespace fused_opt {

struct BFloat16 {
  uint16_t bits;
};
#ifdef __CUDACC__
using Float16 = __half;
#elif defined(__aarch64__)
using Float16 = __fp16;  // g++ 12 has no _Float16 there; the same bits
#else
using Float16 = _Float16;
#endif

FUSED_OPT_FN float widen(float x) {
  return x;
}
FUSED_OPT_FN double widen(double x) {
  return x;
}
FUSED_OPT_FN float widen(Float16 x) {
  return static_cast<float>(x);
}
FUSED_OPT_FN float widen(BFloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

template <class To>
FUSED_OPT_FN To narrow(double x) {
  return static_cast<To>(x);
}
template <class To>
FUSED_OPT_FN To narrow(float x) {
  if constexpr (std::is_same_v<To, BFloat16>) {
#ifdef __CUDA_ARCH__  // one instruction, whose only NaN is 0x7FFF
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    // To the nearest, ties to even; a NaN keeps its sign and a quiet bit, since rounding could carry it to infinity.
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40)};
#endif
  } else {
    return static_cast<To>(x);
  }
}
// By way of float32, as PyTorch and Triton do.
template <>
FUSED_OPT_FN BFloat16 narrow<BFloat16>(double x) {
  return narrow<BFloat16>(static_cast<float>(x));
}
template <>
FUSED_OPT_FN Float16 narrow<Float16>(double x) {
  return narrow<Float16>(static_cast<float>(x));
}

constexpr float kLargestBFloat16 = 0x1.FEp127f;

// One of the two numbers that x lies between, at random so that their mean is x: the one further from 0 for as many of
// 2^16 `bits` as x is nearer to it. Beyond the largest finite number, and of NaN, what `narrow` makes of x.
template <class To>
FUSED_OPT_FN To narrow_at_random(float x, uint32_t bits) {
  const uint32_t word = __builtin_bit_cast(uint32_t, x);
  const float size = absolute(x);
  if constexpr (std::is_same_v<To, BFloat16>) {
    if (!(size <= kLargestBFloat16)) return narrow<To>(x);
    return {static_cast<uint16_t>((word + bits) >> 16)};
  } else if constexpr (std::is_same_v<To, Float16>) {
    if (!(size <= 65504)) return narrow<To>(x);
    if (size >= 0x1p-14f) return narrow<To>(__builtin_bit_cast(float, (word + (bits >> 3)) & ~0x1FFFu));
    // A whole number of 2^-24, which is how a denormal is stored.
    const uint32_t units = (static_cast<uint32_t>(static_cast<int32_t>(size * 0x1p40f)) + bits) >> 16;
    return narrow<To>(__builtin_bit_cast(
        float, __builtin_bit_cast(uint32_t, static_cast<float>(static_cast<int32_t>(units)) * 0x1p-24f) |
                   (word & 0x80000000)));
  } else {
    return x;
  }
}

// A float32 as the nearest bfloat16, ties away from zero, and what then is to be added to its bits: the lower half of
// the float32's. (With ties to even as in `narrow` it would be one of 2^16 + 1 numbers.)
struct Split {
  BFloat16 high;
  int16_t low;
};
FUSED_OPT_FN Split split(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const Split number = {{static_cast<uint16_t>((bits + 0x8000) >> 16)}, static_cast<int16_t>(bits)};
  const Split none = {{static_cast<uint16_t>(bits >> 16 | 0x40)}, 0};
  return x == x ? number : none;
}
FUSED_OPT_FN float join(BFloat16 high, int16_t low) {
  return __builtin_bit_cast(
      float, (static_cast<uint32_t>(high.bits) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low)));
}

// What a 16-bit number that was stored beside a float32 stands for: that, unless something else has written it since.
template <class Element>
FUSED_OPT_FN float exact_of(Element stored, float exact) {
  const float seen = widen(stored);
  return widen(narrow<Element>(exact)) == seen ? exact : seen;
}

// Calls f with a null pointer of the element type that `dtype` names.
template <class F>
FUSED_OPT_FN void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    case DType::kInt16:  // never on their own
    case DType::kInt8:
    case DType::kUInt8:
      return;
  }
}

// ---- states in 8 bits: fused_opt/eight_bits.py says what they are. But for a product with a number of the block there
// is only arithmetic on bits, so that they are the same everywhere.

constexpr int64_t kCoded = 128;  // consecutive elements that share a scale; as BLOCK there

// By how many places bits are shifted, and what is then added to those of the root: 1 becomes the largest code.
template <class Code>
constexpr int kShift = std::is_signed_v<Code> ? 1 : 2;
template <class Code>
constexpr uint32_t kRoot = (std::is_signed_v<Code> ? 0x42FE0000 : 0x437F0000) - (0x3F800000 >> kShift<Code>);
constexpr uint32_t kSign = 0x80000000;

// Of a block, by the bits of the largest magnitude in it: its scale, what its numbers are multiplied with, and which of
// their bits count.
struct Scale {
  float scale, inverse;
  uint32_t mask;
};
FUSED_OPT_FN Scale scale_of(int32_t largest) {
  if (largest >= 0x7F800000) return {__builtin_bit_cast(float, 0x7FC00000), 0, 0};
  if (largest < 0x00800000) return {0, 0, 0};
  const auto scale = __builtin_bit_cast(float, largest);
  return {scale, 1 / scale, ~kSign};
}
FUSED_OPT_FN int32_t magnitude(float x) {
  return static_cast<int32_t>(__builtin_bit_cast(uint32_t, x) & ~kSign);
}

// The code of a number: of one that is not 0, never the code of 0 where there are no signs. To the nearest, by adding a
// number whose unit is 1.
template <class Code>
FUSED_OPT_FN Code code_of(float x, const Scale& by) {
  constexpr float kUnits = 12582912;
  const uint32_t bits = __builtin_bit_cast(uint32_t, x) & by.mask;
  const auto share = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, bits) * by.inverse);
  const uint32_t root = (share >> kShift<Code>)+kRoot<Code>;
  if constexpr (std::is_signed_v<Code>) {
    const auto with_sign = __builtin_bit_cast(float, root | (__builtin_bit_cast(uint32_t, x) & kSign));
    return static_cast<Code>(__builtin_bit_cast(uint32_t, with_sign + kUnits));
  } else {
    const auto found = __builtin_bit_cast(float, root);
    const auto code = __builtin_bit_cast(uint32_t, (found > 1 ? found : 1) + kUnits);
    return static_cast<Code>(bits == 0 ? 0 : code);
  }
}

// What a code is of its block's scale.
template <class Code>
FUSED_OPT_FN float share_of(Code code) {
  const auto root = __builtin_bit_cast(uint32_t, static_cast<float>(static_cast<int32_t>(code)));
  const uint32_t bits = (root << kShift<Code>)-(kRoot<Code> << kShift<Code>);
  const uint32_t sign = std::is_signed_v<Code> ? root & kSign : 0;
  return __builtin_bit_cast(float, root == 0 ? 0 : bits | sign);
}

FUSED_OPT_FN constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : dtype < DType::kInt8 ? 2 : 1;
}

}  // namespace fused_opt
