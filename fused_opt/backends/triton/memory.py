"""Blocks of a tensor: loaded in the type of the arithmetic, and stored as they are kept."""

import triton
import triton.language as tl

from .codes import CODED, decode, encode

# Elements that one program works on at once. A FULL block lies wholly within its chunk and is aligned: its loads are
# unmasked and 128 bits wide, eight elements for each of 4 * 32 threads. What is left, and all of an unaligned tensor,
# goes in TAIL blocks with masks: fewer elements, since masked ones take several times the registers, and a kernel takes
# as many as the part that needs most.
FULL, TAIL = tl.constexpr(1024), tl.constexpr(256)


@triton.jit
def scales_at(address, start, end, BLOCK: tl.constexpr):
    """Pointers to those of a block, and which of them there are."""
    blocks = tl.arange(0, BLOCK // CODED)
    return address.to(tl.pointer_type(tl.float32)) + start // CODED + blocks, start + blocks * CODED < end


@triton.jit
def load_state(address, scales, start, end, DTYPE: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """As ``load``; ``scales``: the address of those of a state in 8 bits."""
    if DTYPE.primitive_bitwidth == 8:
        pointers, there = scales_at(scales, start, end, BLOCK)
        codes = load(address, start, end, DTYPE, tl.int32, BLOCK)
        return decode(codes, tl.load(pointers, mask=there, other=0.0), DTYPE.is_int_signed()).to(T)
    return load(address, start, end, DTYPE, T, BLOCK)


@triton.jit
def store_codes(address, scales, start, end, values, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A state in 8 bits, and its scales."""
    values = values.to(tl.float32)
    if BLOCK != FULL:
        values = tl.where(start + tl.arange(0, BLOCK) < end, values, 0.0)
    codes, new = encode(values, DTYPE.is_int_signed())
    pointers, there = scales_at(scales, start, end, BLOCK)
    tl.store(pointers, new, mask=there)
    store(address, start, end, codes, DTYPE, BLOCK)


@triton.jit
def load(address, start, end, DTYPE: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """A block as T. Unmasked and aligned, or the loads would not be 128 bits wide."""
    offsets = tl.arange(0, BLOCK)
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    if BLOCK == FULL:
        values = tl.load(tl.multiple_of(pointer, 16) + offsets)
    else:
        values = tl.load(pointer + offsets, mask=start + offsets < end, other=0)
    if DTYPE.is_int():
        return values.to(T)
    return values.to(tl.float32).to(T) if DTYPE.primitive_bitwidth == 16 else values.to(T)


@triton.jit
def load_weights(
    address, exact, start, end, DTYPE: tl.constexpr, KEPT: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr
):
    """Those of a parameter; KEPT: the dtype of what makes them exact, None: nothing does."""
    if tl.int16 == KEPT:
        high = load(address, start, end, tl.int16, tl.int32, BLOCK)
        low = load(exact, start, end, tl.int16, tl.int32, BLOCK)
        return ((high << 16) + low).to(tl.float32, bitcast=True).to(T)
    seen = load(address, start, end, DTYPE, T, BLOCK)
    if tl.float32 == KEPT:
        kept = load(exact, start, end, tl.float32, T, BLOCK)
        return tl.where(narrow(kept, DTYPE).to(T) == seen, kept, seen)
    return seen


@triton.jit
def store_weights(address, exact, start, end, values, DTYPE: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """Those of a parameter, with what makes them exact."""
    if tl.int16 == KEPT:  # the nearest, ties away from zero, and the lower half
        bits = values.to(tl.float32).to(tl.int32, bitcast=True)
        number = values == values
        high = tl.where(number, (bits + 0x8000) >> 16, (bits >> 16) | 0x40)
        store(address, start, end, high, tl.int16, BLOCK)
        store(exact, start, end, tl.where(number, bits, 0), tl.int16, BLOCK)
    else:
        store(address, start, end, values, DTYPE, BLOCK)
        if tl.float32 == KEPT:
            store(exact, start, end, values, tl.float32, BLOCK)


@triton.jit
def narrow(values, DTYPE: tl.constexpr):
    """As they are stored; float64 to 16 bits by way of float32, as everywhere else."""
    if DTYPE.is_int():
        return values.to(DTYPE)
    return values.to(tl.float32).to(DTYPE) if DTYPE.primitive_bitwidth == 16 else values.to(DTYPE)


@triton.jit
def store(address, start, end, values, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A block, as it is kept."""
    offsets = tl.arange(0, BLOCK)
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    if BLOCK == FULL:
        tl.store(tl.multiple_of(pointer, 16) + offsets, narrow(values, DTYPE))
    else:
        tl.store(pointer + offsets, narrow(values, DTYPE), mask=start + offsets < end)


@triton.jit
def load_states(addresses, scales, start, end, DTYPES: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of a rule's states."""
    states = ()
    for k in tl.static_range(2, len(DTYPES)):
        states = states + (load_state(addresses[k], scales[k], start, end, DTYPES[k], T, BLOCK),)
    return states
