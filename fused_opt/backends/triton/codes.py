"""States in 8 bits in Triton, as ``share_of``, ``code_of`` and ``scale_of`` of csrc/types.h: fused_opt/eight_bits.py."""

import triton
import triton.language as tl

from ...eight_bits import BLOCK as BLOCK_OF_CODES
from .rules import divide, square_root

CODED = tl.constexpr(BLOCK_OF_CODES)
INFINITY, NORMAL, NAN = tl.constexpr(0x7F800000), tl.constexpr(0x00800000), tl.constexpr(0x7FC00000)


@triton.jit
def decode(codes, scales, SIGNED: tl.constexpr):
    """What codes stand for, float32; ``scales``: of their blocks."""
    if SIGNED:
        root = codes.to(tl.float32) * (1 / 127)
        share = root * tl.abs(root)
    else:
        root = codes.to(tl.float32) * (1 / 255)
        square = root * root
        share = square * square
    blocks: tl.constexpr = share.shape[0] // CODED
    return (share.reshape(blocks, CODED) * tl.expand_dims(scales, 1)).reshape(blocks * CODED)


@triton.jit
def encode(values, SIGNED: tl.constexpr):
    """The codes of float32 numbers, int32, and the scales of their blocks; what is no number of a block must be 0."""
    blocks: tl.constexpr = values.shape[0] // CODED
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits.reshape(blocks, CODED), axis=1)
    finite, zero = largest < INFINITY, largest < NORMAL
    scales = tl.where(zero, 0, tl.where(finite, largest, NAN)).to(tl.float32, bitcast=True)
    usable = finite & (zero == 0)
    inverse = tl.where(usable, divide(tl.full([blocks], 1, tl.float32), tl.where(usable, scales, 1.0)), 0.0)
    size = bits.to(tl.float32, bitcast=True)
    share = (size.reshape(blocks, CODED) * tl.expand_dims(inverse, 1)).reshape(blocks * CODED)
    if SIGNED:
        root = square_root(share * (127.0 * 127.0))
        codes = (tl.where(root > 0, root, 0.0) + 0.5).to(tl.int32)
        codes = tl.where(values < 0, -codes, codes)
    else:
        root = square_root(square_root(share) * (255.0 * 255.0))
        codes = (tl.where(root > 1, root, 1.0) + 0.5).to(tl.int32)
        codes = tl.where(bits == 0, 0, codes)
    return codes, scales
