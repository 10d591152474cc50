"""States in 8 bits in Triton, as ``share_of``, ``code_of`` and ``scale_of`` of csrc/types.h: fused_opt/eight_bits.py."""

import triton
import triton.language as tl

from ...eight_bits import BLOCK as BLOCK_OF_CODES
from .rules import divide

CODED = tl.constexpr(BLOCK_OF_CODES)
INFINITY, NORMAL, NAN = tl.constexpr(0x7F800000), tl.constexpr(0x00800000), tl.constexpr(0x7FC00000)
OF_SIGNED, OF_UNSIGNED = tl.constexpr(0x42FE0000 - (0x3F800000 >> 1)), tl.constexpr(0x437F0000 - (0x3F800000 >> 2))
UNITS = tl.constexpr(12582912.0)  # a number whose unit is 1: what is added to it is rounded to the nearest


@triton.jit
def decode(codes, scales, SIGNED: tl.constexpr):
    """What codes stand for, float32; ``scales``: of their blocks."""
    size = tl.abs(codes).to(tl.float32).to(tl.int32, bitcast=True)
    if SIGNED:
        share = ((size - OF_SIGNED) << 1).to(tl.float32, bitcast=True)
        share = tl.where(codes < 0, -share, share)
    else:
        share = ((size - OF_UNSIGNED) << 2).to(tl.float32, bitcast=True)
    share = tl.where(codes == 0, 0.0, share)
    blocks: tl.constexpr = share.shape[0] // CODED
    return (share.reshape(blocks, CODED) * tl.expand_dims(scales, 1)).reshape(blocks * CODED)


@triton.jit
def encode(values, SIGNED: tl.constexpr):
    """The codes of float32 numbers, int32, and the scales of their blocks; what is no number of a block must be 0."""
    blocks: tl.constexpr = values.shape[0] // CODED
    bits = (values.to(tl.int32, bitcast=True) & 0x7FFFFFFF).reshape(blocks, CODED)
    largest = tl.max(bits, axis=1)
    usable = (largest < INFINITY) & (largest >= NORMAL)
    scales = tl.where(largest < NORMAL, 0, tl.where(largest < INFINITY, largest, NAN)).to(tl.float32, bitcast=True)
    inverse = tl.where(usable, divide(tl.full([blocks], 1, tl.float32), tl.where(usable, scales, 1.0)), 0.0)
    bits = tl.where(tl.expand_dims(usable, 1), bits, 0)
    share = bits.to(tl.float32, bitcast=True) * tl.expand_dims(inverse, 1)
    share = share.to(tl.int32, bitcast=True).reshape(blocks * CODED)
    if SIGNED:
        root = ((share >> 1) + OF_SIGNED).to(tl.float32, bitcast=True)
        codes = ((root + UNITS) - UNITS).to(tl.int32)
        codes = tl.where(values < 0, -codes, codes)
    else:
        root = ((share >> 2) + OF_UNSIGNED).to(tl.float32, bitcast=True)
        codes = ((tl.where(root > 1, root, 1.0) + UNITS) - UNITS).to(tl.int32)
        codes = tl.where(bits.reshape(blocks * CODED) == 0, 0, codes)
    return codes, scales
