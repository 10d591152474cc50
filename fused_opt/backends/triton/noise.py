"""Numbers drawn at random by an element's place in its whole tensor, line for line as csrc/noise.h."""

import triton
import triton.language as tl

from .rules import square_root

# Where the elements of a tensor that does not lie in row-major order, or of a shard, are in the whole one: words in the table
# of tensors. Then follow, of every dimension from the innermost one of memory on, its size and its stride in the whole.
OFFSET, RUN, ELSEWHERE, DIMENSIONS, FIRST_DIMENSION = (tl.constexpr(word) for word in range(5))


@triton.jit
def box_muller(w0, w1):
    """Two words to two normal numbers, line for line as in noise.h."""
    u = (w0 >> 9).to(tl.int32).to(tl.float32) * 1.1920928955078125e-07 + 5.9604644775390625e-08  # 2**-23, 2**-24
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1
    ln = -0.174007252
    ln = ln * f + 0.285349548
    ln = ln * f - 0.298295736
    ln = ln * f + 0.331551731
    ln = ln * f - 0.399261236
    ln = ln * f + 0.500026762
    ln = ln * f - 0.66667819
    ln = ln * f + 1
    ln = ln * f - 2
    r = square_root(e.to(tl.float32) * -1.38629436 + ln * f)
    angle = (w1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.6572952e-10  # pi / 2 * 2**-32
    a2 = angle * angle
    sine = a2 * -1.95152825e-4 + 8.33216031e-3
    sine = sine * a2 - 0.166666552
    sine = sine * a2 * angle + angle
    cosine = a2 * 2.44331568e-5 - 1.38873165e-3
    cosine = cosine * a2 + 4.16666456e-2
    cosine = cosine * a2 - 0.5
    cosine = cosine * a2 + 1
    c, s = r * tl.where((w1 >> 31) != 0, -cosine, cosine), r * sine
    swap = ((w1 >> 30) & 1) != 0
    return tl.where(swap, s, c), tl.where(swap, c, s)


@triton.jit
def words(counter, index, t, seed):
    """Philox4x32-10 at the counters (counter, index, t)."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(c0)
    return tl.philox(seed, c0, c1, zero + index.to(tl.uint32), zero + t.to(tl.uint32))


@triton.jit
def normal(counter, index, t, seed):
    """The four normal numbers of every counter, which belong to the elements 4 * counter and following."""
    w0, w1, w2, w3 = words(counter, index, t, seed)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def normal_at(element, index, t, seed):
    """The normal numbers of elements, wherever they are."""
    w0, w1, w2, w3 = words(element >> 2, index, t, seed)
    upper = (element & 2) != 0
    z0, z1 = box_muller(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    return tl.where((element & 1) != 0, z1, z0)


@triton.jit
def bits_at(low, high, index, t, seed, PLACE: tl.constexpr):
    """16 bits for what is stored in this place, of elements by the halves of their places: rounding_word of noise.h."""
    counter = tl.full((), 1 + PLACE // 4, tl.int64) << 61
    first, second, _, _ = words(counter, index, t, seed)
    x = low.to(tl.uint32) ^ first
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = ((x ^ (x >> 13)) + (second + high.to(tl.uint32) * 0x9E3779B9)) * 0xC2B2AE35
    x ^= x >> 16
    BEGIN: tl.constexpr = PLACE % 2 * 16 + PLACE // 2 % 2 * 8
    return ((x >> BEGIN) | (x << (-BEGIN & 31))) & 0xFFFF


@triton.jit
def in_whole(layout, i):
    """Where in the whole tensor its elements i are; ``layout``: of the tensor, in the table."""
    element = tl.load(layout + OFFSET) + i * 0
    at = layout + FIRST_DIMENSION
    for _ in range(tl.load(layout + DIMENSIONS)):
        size = tl.load(at)
        element += i % size * tl.load(at + 1)
        i = i // size
        at += 2
    return element


@triton.jit
def grouped(layout, numel):
    """Whether the elements are neighbours in the whole tensor as here, and draw in fours as here."""
    return (tl.load(layout + RUN) >= numel) & ((tl.load(layout + OFFSET) & 3) == 0)


@triton.jit
def normal_of(start, layout, fours, index, t, seed, ELSEWHERE: tl.constexpr, BLOCK: tl.constexpr):
    """The normal numbers of a block; ELSEWHERE: it may lie otherwise than the whole tensor does, unless ``fours``."""
    if ELSEWHERE:
        if fours:
            z = normal((tl.load(layout + OFFSET) + start) // 4 + tl.arange(0, BLOCK // 4), index, t, seed)
        else:
            z = normal_at(in_whole(layout, start + tl.arange(0, BLOCK)), index, t, seed)
        return z
    return normal(start // 4 + tl.arange(0, BLOCK // 4), index, t, seed)


@triton.jit
def bits_of(start, layout, fours, index, t, seed, PLACE: tl.constexpr, ELSEWHERE: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of a block, likewise."""
    i = tl.arange(0, BLOCK)
    if ELSEWHERE:
        if fours:  # noqa: SIM108  # one of both is computed
            element = tl.load(layout + OFFSET) + (start + i)
        else:
            element = in_whole(layout, start + i)
        return bits_at(element, element >> 32, index, t, seed, PLACE)
    first = tl.full((), 0, tl.int64) + start  # a multiple of BLOCK, so that the higher half is that of all
    return bits_at(first.to(tl.uint32) + i, first >> 32, index, t, seed, PLACE)


@triton.jit
def at_random(x, bits, DTYPE: tl.constexpr):
    """What x is rounded to with these bits: narrow_at_random of csrc/types.h."""
    narrow = x.to(tl.float32)
    word = narrow.to(tl.uint32, bitcast=True)
    size = tl.abs(narrow)
    if tl.bfloat16 == DTYPE:
        finite = size <= 3.3895313892515355e38
        rounded = ((word + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        finite = size <= 65504.0
        coarse = ((word + (bits >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        denormal = size < 6.103515625e-05  # 2**-14: a whole number of 2**-24
        units = (tl.where(denormal, size, 0.0) * 1099511627776.0).to(tl.uint32) + bits  # 2**40
        whole = (units >> 16).to(tl.float32) * 5.9604644775390625e-08
        signed = (whole.to(tl.uint32, bitcast=True) | (word & 0x80000000)).to(tl.float32, bitcast=True)
        rounded = tl.where(denormal, signed, coarse)
    return tl.where(finite, rounded, narrow).to(x.dtype)
