"""The loops of a step in Triton: one kernel that updates, one that sums squares first, one that accumulates.

A tensor is cut into chunks, one program each. Sums of squares are kept as one float64 per chunk; a program that needs a
tensor's norm adds them up, always in the same order, so a carried norm costs no launch of its own. The size of a chunk
is chosen so that this adding is cheap: see ``chunk_size``.

The tables, of 8-byte words, are stored column by column, one entry for every tensor:

- ``tensors``, made when something moved: FIRST (its first chunk), NUMEL, CHUNK (elements in a chunk), NDIM, INDEX (which
  parameter of the optimizer), LR_SCALE, DECAY_SCALE, P, AVERAGE, EXACT (addresses), and the addresses of the states; where
  some are in 8 bits, then those of all states' scales;
- ``words``, new in every step: G (the gradient's address), ROW (of the groups' table, -1: no gradient), WANTS (bits:
  what the first pass sums), PARTS, GRAD2 (norms that are known, -1 where they are not), and then the rows.

Floats are the bits of float64; the kernels take every table a second time as float64.
"""

import struct

import triton
import triton.language as tl

from ...rule import UNKNOWN as UNKNOWN_NORM
from ..interface import Kind, Norm
from .codes import CODED, decode, encode
from .rules import at_random, normal, trust_ratio

# Elements that one program works on at once. A FULL block lies wholly within its chunk and is aligned: its loads are
# unmasked and 128 bits wide, eight elements for each of 4 * 32 threads. What is left, and all of an unaligned tensor,
# goes in TAIL blocks with masks: fewer elements, since masked ones take several times the registers, and a kernel takes
# as many as the part that needs most.
FULL, TAIL = tl.constexpr(1024), tl.constexpr(256)
SUMS = tl.constexpr(512)  # partial sums that are added at once

FIRST, NUMEL, CHUNK, NDIM, INDEX = (tl.constexpr(column) for column in range(5))
LR_SCALE, DECAY_SCALE, P, AVERAGE, EXACT, STATES = (tl.constexpr(column) for column in range(5, 11))
G, ROW, WANTS, PARTS, GRAD2, ROWS = (tl.constexpr(column) for column in range(6))
WANT_WEIGHT, WANT_GRAD, WANT_DIRECTION, WANT_AGREEMENT = (tl.constexpr(norm.value) for norm in Norm)
WANT_UPDATE = tl.constexpr((Norm.DIRECTION | Norm.AGREEMENT).value)
UNKNOWN, LAMB = tl.constexpr(UNKNOWN_NORM), tl.constexpr(Kind.LAMB.value)

# A row of arguments, as StepArgs: lr, grad_scale, two decays, 8 coefficients; kind, coefficient, cap, eps, exempt; sigma,
# relative, seed, step; add, share, restart, write_back, follow; the third decay; whether masks are of the update, of the
# decay, and scaled; whether rounding is at random, its seed and step.
MOST_COEFFICIENTS = 8
ROW_FORMAT = struct.Struct("=19dQq9ddQq")
COUPLED, DECOUPLED, COEFFICIENTS_AT = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
RATIO, NOISE, FOLD, WIDTH = tl.constexpr(12), tl.constexpr(17), tl.constexpr(21), tl.constexpr(33)
INDEPENDENT, MASKS, ROUNDING = tl.constexpr(26), tl.constexpr(27), tl.constexpr(30)


def chunk_size(numel: int) -> int:
    """Elements in a chunk of a tensor of ``numel``.

    Not so many that the last programs run alone, not so few that adding up the sums of all chunks, which every program
    does, counts: a chunk of n elements moves at least 12 n bytes, and the sums are at most 2 n bytes, out of the cache.
    """
    size = 4 * FULL.value
    while size * size < 4 * numel:
        size *= 2
    return size


@triton.jit
def _find(first, count, chunk):
    """Which tensor a chunk belongs to: the last one whose first chunk is not after it."""
    low = count * 0
    high = count - 1
    while low < high:
        middle = (low + high + 1) // 2
        reached = tl.load(first + middle) <= chunk
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low.to(tl.int64)


@triton.jit
def _addresses(tensors, words, t, count, DTYPES: tl.constexpr):
    """Of p, g and the states, and whether all of them can be loaded 16 bytes at a time."""
    p = tl.load(tensors + P * count + t)
    g = tl.load(words + G * count + t)
    addresses, scales = (p, g), (p, g)
    together = p | g
    for state in tl.static_range(len(DTYPES) - 2):
        address = tl.load(tensors + (STATES + state) * count + t)
        addresses = addresses + (address,)
        together |= address
        if DTYPES[2 + state].primitive_bitwidth == 8:
            scales = scales + (tl.load(tensors + (STATES + len(DTYPES) - 2 + state) * count + t),)
        else:
            scales = scales + (address,)
    return addresses, scales, (together & 15) == 0


@triton.jit
def _scales(address, start, end, BLOCK: tl.constexpr):
    """Pointers to those of a block, and which of them there are."""
    blocks = tl.arange(0, BLOCK // CODED)
    return address.to(tl.pointer_type(tl.float32)) + start // CODED + blocks, start + blocks * CODED < end


@triton.jit
def _load_state(address, scales, start, end, DTYPE: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """As ``_load``; ``scales``: the address of those of a state in 8 bits."""
    if DTYPE.primitive_bitwidth == 8:
        pointers, there = _scales(scales, start, end, BLOCK)
        codes = _load(address, start, end, DTYPE, tl.int32, BLOCK)
        return decode(codes, tl.load(pointers, mask=there, other=0.0), DTYPE.is_int_signed()).to(T)
    return _load(address, start, end, DTYPE, T, BLOCK)


@triton.jit
def _store_codes(address, scales, start, end, values, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    values = values.to(tl.float32)
    if BLOCK != FULL:
        values = tl.where(start + tl.arange(0, BLOCK) < end, values, 0.0)
    codes, new = encode(values, DTYPE.is_int_signed())
    pointers, there = _scales(scales, start, end, BLOCK)
    tl.store(pointers, new, mask=there)
    _store(address, start, end, codes, DTYPE, BLOCK)


@triton.jit
def _load(address, start, end, DTYPE: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
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
def _load_weights(
    address, exact, start, end, DTYPE: tl.constexpr, KEPT: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr
):
    """Those of a parameter; KEPT: the dtype of what makes them exact, None: nothing does."""
    if tl.int16 == KEPT:
        high = _load(address, start, end, tl.int16, tl.int32, BLOCK)
        low = _load(exact, start, end, tl.int16, tl.int32, BLOCK)
        return ((high << 16) + low).to(tl.float32, bitcast=True).to(T)
    seen = _load(address, start, end, DTYPE, T, BLOCK)
    if tl.float32 == KEPT:
        kept = _load(exact, start, end, tl.float32, T, BLOCK)
        return tl.where(_narrow(kept, DTYPE).to(T) == seen, kept, seen)
    return seen


@triton.jit
def _store_weights(address, exact, start, end, values, DTYPE: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    if tl.int16 == KEPT:  # the nearest, ties away from zero, and the lower half
        bits = values.to(tl.float32).to(tl.int32, bitcast=True)
        number = values == values
        high = tl.where(number, (bits + 0x8000) >> 16, (bits >> 16) | 0x40)
        _store(address, start, end, high, tl.int16, BLOCK)
        _store(exact, start, end, tl.where(number, bits, 0), tl.int16, BLOCK)
    else:
        _store(address, start, end, values, DTYPE, BLOCK)
        if tl.float32 == KEPT:
            _store(exact, start, end, values, tl.float32, BLOCK)


@triton.jit
def _narrow(values, DTYPE: tl.constexpr):
    """As they are stored; float64 to 16 bits by way of float32, as everywhere else."""
    if DTYPE.is_int():
        return values.to(DTYPE)
    return values.to(tl.float32).to(DTYPE) if DTYPE.primitive_bitwidth == 16 else values.to(DTYPE)


@triton.jit
def _store(address, start, end, values, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    if BLOCK == FULL:
        tl.store(tl.multiple_of(pointer, 16) + offsets, _narrow(values, DTYPE))
    else:
        tl.store(pointer + offsets, _narrow(values, DTYPE), mask=start + offsets < end)


@triton.jit
def _squares(values, start, end, BLOCK: tl.constexpr):
    """Sums of four neighbours' squares, in float64, where the square of a float32 is exact; nothing beyond the end."""
    wide = values.to(tl.float64)
    squares = wide * wide if BLOCK == FULL else tl.where(start + tl.arange(0, BLOCK) < end, wide * wide, 0.0)
    return tl.sum(squares.reshape(BLOCK // 4, 4), axis=1)


@triton.jit
def _sum(partials, chunks):
    """Of one float64 per chunk, in an order that only their number decides."""
    total = tl.zeros([SUMS], tl.float64)
    for start in range(0, chunks, SUMS):
        offsets = start + tl.arange(0, SUMS)
        total += tl.load(partials + offsets, mask=offsets < chunks, other=0)
    return tl.sum(total)


@triton.jit
def _coefficients(row, COUNT: tl.constexpr, T: tl.constexpr):
    coefficients = ()
    for k in tl.static_range(COUNT):
        coefficients = coefficients + (tl.load(row + COEFFICIENTS_AT + k).to(T),)
    return coefficients


@triton.jit
def _decays(row, decay_scale, T: tl.constexpr):
    """Coupled and decoupled."""
    return (tl.load(row + COUPLED) * decay_scale).to(T), (tl.load(row + DECOUPLED) * decay_scale).to(T)


@triton.jit
def _scale(row, agreements, numel, chunks):
    """What a mask multiplies the update with where it does not leave it out; ``agreements``: counts of the chunks."""
    scale = tl.full((), 1, tl.float64)
    if (tl.load(row + MASKS) != 0) & (tl.load(row + MASKS + 2) != 0) & (numel > 0):
        elements = numel.to(tl.float64)
        scale = elements / tl.maximum(_sum(agreements, chunks), elements / 1000)
    return scale


@triton.jit
def _agree(a, b):
    """By their signs, since a product of small numbers is 0."""
    return ((a > 0) & (b > 0)) | ((a < 0) & (b < 0))


@triton.jit
def _masked(row, update, g, p, scale):
    """The update and the weights that decay, after the masks."""
    otherwise = tl.where(tl.load(row + MASKS) != 0, 0.0, scale)
    against = tl.where(tl.load(row + MASKS + 1) != 0, 0.0, p)
    return tl.where(_agree(update, g), scale, otherwise).to(p.dtype) * update, tl.where(_agree(update, -p), against, p)


@triton.jit
def _states(addresses, scales, start, end, DTYPES: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of a rule's states."""
    states = ()
    for k in tl.static_range(2, len(DTYPES)):
        states = states + (_load_state(addresses[k], scales[k], start, end, DTYPES[k], T, BLOCK),)
    return states


@triton.jit(do_not_specialize=["count"])
def update(
    tensors,
    layers,
    words,
    numbers,
    carried,  # sums of squares of the weights as they are, one for every chunk
    leaving,  # those of the weights as they will be: another buffer, since other programs still read this one
    gradients,  # those of the gradients, for LAMB of the directions
    agreements,  # how many elements of the update go the gradient's way
    ratios,
    count,
    RULE: tl.constexpr,
    DTYPES: tl.constexpr,
    AVERAGE_DTYPE: tl.constexpr,  # None: nothing is averaged in this step
    T: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    NOISY: tl.constexpr,
    NORMS: tl.constexpr,
    MASKED: tl.constexpr,  # there are masks, or decay that is not times the rate
    STOCHASTIC: tl.constexpr,  # something of 16 bits is rounded at random
    KEPT: tl.constexpr,  # the dtype of what makes weights exact; None: nothing does
):
    """Step one chunk: everything that a step does to it, in one pass."""
    chunk = tl.program_id(0)
    t = _find(tensors + FIRST * count, count, chunk)
    row_index = tl.load(words + ROW * count + t)
    if row_index >= 0:
        row = numbers + ROWS * count + row_index * WIDTH
        first = tl.load(tensors + FIRST * count + t)
        numel = tl.load(tensors + NUMEL * count + t)
        size = tl.load(tensors + CHUNK * count + t)
        decay_scale = tl.load(layers + DECAY_SCALE * count + t)
        grad_scale = tl.load(row + 1)
        sigma = tl.load(row + NOISE)
        chunks = tl.maximum(tl.cdiv(numel, size), 1)
        ratio = tl.full((), 1, tl.float64)
        carries = False
        if NORMS:
            kind, exempt, relative = tl.load(row + RATIO), tl.load(row + RATIO + 4), tl.load(row + NOISE + 1) != 0
            has_ratio = (kind != 0) & (tl.load(tensors + NDIM * count + t) > exempt)
            carries = has_ratio | (relative & (sigma > 0))
            if carries:
                weight2 = _sum(carried + first, chunks)
                if has_ratio:
                    grad2 = tl.load(numbers + GRAD2 * count + t)
                    if (grad2 == UNKNOWN) | (kind == LAMB):  # whose direction's it is
                        grad2 = _sum(gradients + first, chunks)
                    ratio = trust_ratio(
                        kind,
                        tl.load(row + RATIO + 1),
                        tl.load(row + RATIO + 2),
                        tl.load(row + RATIO + 3),
                        weight2,
                        grad2,
                        tl.load(numbers + PARTS * count + t),
                        (tl.load(row + COUPLED) + tl.load(row + DECOUPLED)) * decay_scale,
                        grad_scale,
                    )
                if relative & (numel > 0):
                    sigma *= tl.sqrt(weight2 / numel.to(tl.float64))
        if chunk == first:
            tl.store(ratios + t, ratio)

        lr = (tl.load(row) * tl.load(layers + LR_SCALE * count + t) * ratio).to(T)
        coefficients = _coefficients(row, COEFFICIENTS, T)
        coupled, decoupled = _decays(row, decay_scale, T)
        if MASKED:
            scale = _scale(row, agreements + first, numel, chunks)
            independent = (tl.load(row + INDEPENDENT) * decay_scale).to(T)
        # The seed and the step lie among the floats as integers.
        seed_and_t = words + ROWS * count + row_index * WIDTH + NOISE + 2
        seed, noise_t, index = tl.load(seed_and_t), tl.load(seed_and_t + 1), tl.load(tensors + INDEX * count + t)
        if STOCHASTIC:
            rounds = tl.load(row + ROUNDING) != 0
            rounding_seed = tl.load(words + ROWS * count + row_index * WIDTH + ROUNDING + 1)
            rounding_t = tl.load(words + ROWS * count + row_index * WIDTH + ROUNDING + 2)
        add, share = tl.load(row + FOLD).to(T), tl.load(row + FOLD + 1).to(T)
        restart, write_back = tl.load(row + FOLD + 2) != 0, tl.load(row + FOLD + 3) != 0
        follow = tl.load(row + FOLD + 4).to(T)
        addresses, scales, aligned = _addresses(tensors, words, t, count, DTYPES)
        average = tl.load(tensors + AVERAGE * count + t)
        exact = tl.load(tensors + EXACT * count + t)
        aligned &= (average & 15) == 0
        if KEPT is not None:
            aligned &= (exact & 15) == 0

        begin = (chunk - first) * size
        end = tl.minimum(begin + size, numel)
        full = tl.where(aligned, begin + (end - begin) // FULL * FULL, begin)
        new2 = tl.full((), 0, tl.float64)
        for BLOCK in tl.static_range(FULL, TAIL - 1, TAIL - FULL):  # FULL, then TAIL
            stop = full if BLOCK == FULL else end
            squares = tl.zeros([BLOCK // 4], tl.float64)
            for start in range(begin, stop, BLOCK):
                p = _load_weights(addresses[0], exact, start, end, DTYPES[0], KEPT, T, BLOCK)
                g = grad_scale.to(T) * _load(addresses[1], start, end, DTYPES[1], T, BLOCK) + coupled * p
                results = RULE(g, *_states(addresses, scales, start, end, DTYPES, T, BLOCK), *coefficients)
                for k in tl.static_range(2, len(DTYPES)):
                    new = results[k - 1]
                    if STOCHASTIC and DTYPES[k].primitive_bitwidth == 16:
                        counter = start // 4 + tl.arange(0, BLOCK // 4)
                        drawn = at_random(new, counter, index, rounding_t, rounding_seed, k - 2, DTYPES[k])
                        new = tl.where(rounds, drawn, new)
                    if DTYPES[k].primitive_bitwidth == 8:
                        _store_codes(addresses[k], scales[k], start, end, new, DTYPES[k], BLOCK)
                    else:
                        _store(addresses[k], start, end, new, DTYPES[k], BLOCK)
                if MASKED:
                    update, decaying = _masked(row, results[0], g, p, scale)
                    p -= lr * (update + decoupled * decaying) + independent * decaying
                else:
                    p -= lr * (results[0] + decoupled * p)
                if NOISY:
                    if sigma != 0:
                        z = normal(start // 4 + tl.arange(0, BLOCK // 4), index, noise_t, seed)
                        p += sigma.to(T) * z.to(T)
                if STOCHASTIC and KEPT is None and DTYPES[0].primitive_bitwidth == 16:  # and is then stored as it is
                    counter = start // 4 + tl.arange(0, BLOCK // 4)
                    drawn = at_random(p, counter, index, rounding_t, rounding_seed, len(DTYPES) - 2, DTYPES[0])
                    p = tl.where(rounds, drawn, p)
                if AVERAGE_DTYPE is not None:
                    if KEPT is None:
                        p = _narrow(p, DTYPES[0]).to(T)  # what is averaged is what would be stored
                    if (add != 0) | write_back:
                        v = _load(average, start, end, AVERAGE_DTYPE, T, BLOCK)
                        by = add * (p - share * v)
                        v = tl.where(restart, add * p, v + by)
                        _store(average, start, end, v, AVERAGE_DTYPE, BLOCK)
                        p = tl.where(write_back, v, tl.where(follow != 0, p + follow * by, p))
                        if STOCHASTIC and KEPT is None and DTYPES[0].primitive_bitwidth == 16:
                            counter = start // 4 + tl.arange(0, BLOCK // 4)
                            drawn = at_random(p, counter, index, rounding_t, rounding_seed, len(DTYPES) - 1, DTYPES[0])
                            p = tl.where(rounds, drawn, p)
                _store_weights(addresses[0], exact, start, end, p, DTYPES[0], KEPT, BLOCK)
                if NORMS:
                    squares += _squares(p if KEPT is not None else _narrow(p, DTYPES[0]).to(T), start, end, BLOCK)
            new2 += tl.sum(squares)
            begin = stop
        if NORMS:
            tl.store(leaving + chunk, new2)


@triton.jit(do_not_specialize=["count"])
def norms(
    tensors,
    layers,
    words,
    numbers,
    carried,
    gradients,
    agreements,
    count,
    RULE: tl.constexpr,
    DTYPES: tl.constexpr,
    T: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    WANTED: tl.constexpr,  # by any tensor, and of this launch; what one does not want of it is not stored
    MASKED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Sum the squares of one chunk, before the weights may be touched."""
    chunk = tl.program_id(0)
    t = _find(tensors + FIRST * count, count, chunk)
    wanted = tl.load(words + WANTS * count + t) & WANTED
    if wanted != 0:
        first = tl.load(tensors + FIRST * count + t)
        numel = tl.load(tensors + NUMEL * count + t)
        size = tl.load(tensors + CHUNK * count + t)
        decay_scale = tl.load(layers + DECAY_SCALE * count + t)
        addresses, scales, aligned = _addresses(tensors, words, t, count, DTYPES)
        exact = tl.load(tensors + EXACT * count + t)
        if KEPT is not None:
            aligned &= (exact & 15) == 0

        begin = (chunk - first) * size
        end = tl.minimum(begin + size, numel)
        full = tl.where(aligned, begin + (end - begin) // FULL * FULL, begin)
        weight2 = tl.full((), 0, tl.float64)
        grad2 = tl.full((), 0, tl.float64)
        direction2 = tl.full((), 0, tl.float64)
        agreeing = tl.full((), 0, tl.float64)
        if WANT_UPDATE & WANTED:
            row = numbers + ROWS * count + tl.load(words + ROW * count + t) * WIDTH
            coupled, decoupled = _decays(row, decay_scale, T)
            if MASKED and (WANT_DIRECTION & WANTED):
                scale = _scale(row, agreements + first, numel, tl.maximum(tl.cdiv(numel, size), 1))
        for BLOCK in tl.static_range(FULL, TAIL - 1, TAIL - FULL):  # FULL, then TAIL
            stop = full if BLOCK == FULL else end
            of_weights = tl.zeros([BLOCK // 4], tl.float64)
            of_gradient = tl.zeros([BLOCK // 4], tl.float64)
            of_direction = tl.zeros([BLOCK // 4], tl.float64)
            of_agreement = tl.zeros([BLOCK // 4], tl.float64)
            for start in range(begin, stop, BLOCK):
                if WANT_UPDATE & WANTED:
                    p = _load_weights(addresses[0], exact, start, end, DTYPES[0], KEPT, T, BLOCK)
                    g = tl.load(row + 1).to(T) * _load(addresses[1], start, end, DTYPES[1], T, BLOCK) + coupled * p
                    states = _states(addresses, scales, start, end, DTYPES, T, BLOCK)
                    results = RULE(g, *states, *_coefficients(row, COEFFICIENTS, T))
                    if WANT_AGREEMENT & WANTED:
                        of_agreement += _squares(tl.where(_agree(results[0], g), 1.0, 0.0), start, end, BLOCK)
                    if WANT_DIRECTION & WANTED:
                        if MASKED:
                            update, p = _masked(row, results[0], g, p, scale)
                            of_direction += _squares(update + decoupled * p, start, end, BLOCK)
                        else:
                            of_direction += _squares(results[0] + decoupled * p, start, end, BLOCK)
                if WANT_WEIGHT & WANTED:
                    weights = _load_weights(addresses[0], exact, start, end, DTYPES[0], KEPT, T, BLOCK)
                    of_weights += _squares(weights, start, end, BLOCK)
                if WANT_GRAD & WANTED:
                    of_gradient += _squares(_load(addresses[1], start, end, DTYPES[1], T, BLOCK), start, end, BLOCK)
            weight2 += tl.sum(of_weights)
            grad2 += tl.sum(of_gradient)
            direction2 += tl.sum(of_direction)
            agreeing += tl.sum(of_agreement)
            begin = stop
        if wanted & WANT_WEIGHT:
            tl.store(carried + chunk, weight2)
        if wanted & WANT_GRAD:
            tl.store(gradients + chunk, grad2)
        if wanted & WANT_DIRECTION:
            tl.store(gradients + chunk, direction2)
        if wanted & WANT_AGREEMENT:
            tl.store(agreements + chunk, agreeing)


@triton.jit(do_not_specialize=["total", "part", "numel", "size"])
def accumulate(
    sums,  # two columns, of a float64 for every chunk
    total: tl.int64,  # an address; an empty tensor's is 0, which without a type would be an int32
    part: tl.int64,
    numel,
    size,
    TOTAL_DTYPE: tl.constexpr,  # None: there is only a part
    PART_DTYPE: tl.constexpr,
    T: tl.constexpr,
):
    """One chunk of ``total += part``, with the sums of squares of the part and of the new total."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * size
    end = tl.minimum(begin + size, numel)
    full = tl.where(((total | part) & 15) == 0, begin + (end - begin) // FULL * FULL, begin)
    part2 = tl.full((), 0, tl.float64)
    total2 = tl.full((), 0, tl.float64)
    for BLOCK in tl.static_range(FULL, TAIL - 1, TAIL - FULL):  # FULL, then TAIL
        stop = full if BLOCK == FULL else end
        of_part = tl.zeros([BLOCK // 4], tl.float64)
        of_total = tl.zeros([BLOCK // 4], tl.float64)
        for start in range(begin, stop, BLOCK):
            g = _load(part, start, end, PART_DTYPE, T, BLOCK)
            of_part += _squares(g, start, end, BLOCK)
            if TOTAL_DTYPE is not None:
                new = _load(total, start, end, TOTAL_DTYPE, T, BLOCK) + g
                _store(total, start, end, new, TOTAL_DTYPE, BLOCK)
                of_total += _squares(_narrow(new, TOTAL_DTYPE).to(T), start, end, BLOCK)
        part2 += tl.sum(of_part)
        total2 += tl.sum(of_total)
        begin = stop
    tl.store(sums + chunk, part2)
    tl.store(sums + tl.num_programs(0) + chunk, total2)
