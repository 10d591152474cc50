"""The tables that the kernels read, and what a program needs to know of them before it comes to elements.

The tables, of 8-byte words, are stored column by column, one entry for every tensor:

- ``tensors``, made when something moved: FIRST (its first chunk), NUMEL, CHUNK (elements in a chunk), NDIM, INDEX (which
  parameter of the optimizer), LR_SCALE, DECAY_SCALE, P, AVERAGE, EXACT, STEP, SCALAR (addresses, the last two of the count
  of steps and the rule's scalar), LAYOUT (where in this table noise.py finds its words, 0: nowhere), PLACE (in its bucket),
  and the addresses of the states; where some are in 8 bits, then those of all states' scales; then the layouts;
- ``words``, sent where a step has other ones than the one before: what is of all tensors, from FOUND_INF on; G (the
  gradient's address), ROW (of the groups' table, -1: no gradient), WANTS (bits: what the first pass sums), PARTS, GRAD2
  (norms that are known, -1 where they are not), and then the rows;
- ``counts``: those of the groups (schedule.py), and how many programs of a launch have arrived, 0 between launches.

Floats are the bits of float64; the kernels take every table a second time as float64.
"""

import struct

import triton
import triton.language as tl

from ...rule import UNKNOWN as UNKNOWN_NORM
from ..interface import Kind, Norm
from .memory import FULL
from .schedule import ADVANCES, COUNTED, advance

SUMS = tl.constexpr(512)  # partial sums that are added at once
STEPS = tl.constexpr(128)  # counts of steps, likewise

FIRST, NUMEL, CHUNK, NDIM, INDEX = (tl.constexpr(column) for column in range(5))
LR_SCALE, DECAY_SCALE, P, AVERAGE, EXACT = (tl.constexpr(column) for column in range(5, 10))
STEP, SCALAR, LAYOUT, PLACE, STATES = (tl.constexpr(column) for column in range(10, 15))
# Addresses of a GradScaler's numbers, of the squared norm to clip and what to clip it to, of whole tensors' norms; how many
# rows there are; where the sum of all gradients' squares goes, and whether it is added to what is there. Addresses may be 0.
FOUND_INF, GRAD_SCALE, NORM2, MAX_NORM, KNOWN, ROW_COUNT, TOTAL, ADD = (tl.constexpr(word) for word in range(8))
HEADER = tl.constexpr(8)
#: Where in ``counts`` the groups begin: before them is how many programs have arrived.
GROUPS = tl.constexpr(1)
G, ROW, WANTS, PARTS, GRAD2, ROWS = (tl.constexpr(column) for column in range(6))
WANT_WEIGHT, WANT_GRAD, WANT_DIRECTION, WANT_AGREEMENT = (tl.constexpr(norm.value) for norm in Norm)
WANT_UPDATE = tl.constexpr((Norm.DIRECTION | Norm.AGREEMENT).value)
UNKNOWN, LAMB = tl.constexpr(UNKNOWN_NORM), tl.constexpr(Kind.LAMB.value)

# A row of arguments, as StepArgs: lr, grad_scale, two decays, 8 coefficients; kind, coefficient, cap, eps, exempt; sigma,
# relative, seed, step; add, share, restart, write_back, follow; the third decay; whether masks are of the update, of the
# decay, and scaled; whether rounding is at random, its seed and step; the addresses of a rate and a decay on the device, in
# float64, or 0; and what schedule.py reads.
MOST_COEFFICIENTS = 8
ROW_FORMAT = struct.Struct("=19dQq9ddQq2q7q7q3dQq")
COUPLED, DECOUPLED, COEFFICIENTS_AT = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
RATIO, NOISE, FOLD, WIDTH = tl.constexpr(12), tl.constexpr(17), tl.constexpr(21), tl.constexpr(54)
INDEPENDENT, MASKS, ROUNDING = tl.constexpr(26), tl.constexpr(27), tl.constexpr(30)
LR_AT, DECAY_AT = tl.constexpr(33), tl.constexpr(34)


@triton.jit
def find(first, count, chunk):
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
def addresses_of(tensors, words, t, count, DTYPES: tl.constexpr):
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
def squares_of(values, start, end, BLOCK: tl.constexpr):
    """Sums of four neighbours' squares, in float64, where the square of a float32 is exact; nothing beyond the end."""
    wide = values.to(tl.float64)
    squares = wide * wide if BLOCK == FULL else tl.where(start + tl.arange(0, BLOCK) < end, wide * wide, 0.0)
    return tl.sum(squares.reshape(BLOCK // 4, 4), axis=1)


@triton.jit
def sum_of(partials, chunks):
    """Of one float64 per chunk, in an order that only their number decides."""
    total = tl.zeros([SUMS], tl.float64)
    for start in range(0, chunks, SUMS):
        offsets = start + tl.arange(0, SUMS)
        total += tl.load(partials + offsets, mask=offsets < chunks, other=0)
    return tl.sum(total)


@triton.jit
def number(address, otherwise, DTYPE: tl.constexpr):
    """What is at an address, in float64; at 0 something else."""
    pointer = address.to(tl.pointer_type(DTYPE))
    return tl.load(pointer, mask=address != 0, other=otherwise).to(tl.float64)


@triton.jit
def coefficients_of(row, tensors, t, count, COUNT: tl.constexpr, AT_STEP: tl.constexpr):
    """The rule's, in float64, in the step that is to come."""
    coefficients = ()
    for k in tl.static_range(COUNT):
        coefficients = coefficients + (tl.load(row + COEFFICIENTS_AT + k),)
    if AT_STEP is not None:
        step = number(tl.load(tensors + STEP * count + t), 0.0, tl.float32) + 1
        scalar = number(tl.load(tensors + SCALAR * count + t), 1.0, tl.float32)
        coefficients = AT_STEP(step, scalar, *coefficients)
    return coefficients


@triton.jit
def narrowed(numbers, COUNT: tl.constexpr, T: tl.constexpr):
    """The same as T."""
    narrowed = ()
    for k in tl.static_range(COUNT):
        narrowed = narrowed + (numbers[k].to(T),)
    return narrowed


@triton.jit
def full_scale(header, floats, row):
    """What every gradient is multiplied with: sign, unscaling and clipping in one factor."""
    scale = 1 / number(tl.load(header + GRAD_SCALE), 1.0, tl.float32)
    norm2 = tl.load(header + NORM2)
    if norm2 != 0:
        norm = scale * tl.sqrt(tl.load(norm2.to(tl.pointer_type(tl.float64))))
        clip = tl.load(floats + MAX_NORM) / (norm + 1e-6)
        scale *= tl.where(clip > 1, 1.0, clip)
    return tl.load(row + 1) * scale


@triton.jit
def decay_of(words, decay_scale):
    """What the three kinds of decay are multiplied with; ``words``: the row as integers."""
    return decay_scale * number(tl.load(words + DECAY_AT), 1.0, tl.float64)


@triton.jit
def decays_of(row, decay, T: tl.constexpr):
    """Coupled and decoupled."""
    return (tl.load(row + COUPLED) * decay).to(T), (tl.load(row + DECOUPLED) * decay).to(T)


@triton.jit
def is_last(counts):
    """Whether this is the last program of its launch: it reads what the others have written, and may write what they read."""
    tl.debug_barrier()
    last = tl.atomic_add(counts, 1) == tl.num_programs(0) - 1
    if last:
        tl.store(counts, 0)
    return last


@triton.jit
def count_step(tensors, header, floats, counts, scalars, count, COUNTS: tl.constexpr, SCHEDULED: tl.constexpr):
    """Count the step, when nobody reads the counts any more; none that found infinities."""
    stopped = number(tl.load(header + FOUND_INF), 0.0, tl.float32) != 0
    words, numbers = header + HEADER, floats + HEADER
    if COUNTS:
        for start in range(0, tl.where(stopped, 0, count), STEPS):
            t = start + tl.arange(0, STEPS)
            here = t < count
            here &= tl.load(words + ROW * count + t, mask=here, other=-1) >= 0
            step = tl.load(tensors + STEP * count + t, mask=here, other=0).to(tl.pointer_type(tl.float32))
            tl.store(step, tl.load(step, mask=here, other=0) + 1, mask=here)
            scalar = tl.load(tensors + SCALAR * count + t, mask=here, other=0)
            here &= scalar != 0
            new = tl.load(scalars + t, mask=here, other=0, cache_modifier=".cg")  # by another program, in this launch
            tl.store(scalar.to(tl.pointer_type(tl.float32)), new.to(tl.float32), mask=here)
    if SCHEDULED:
        for r in range(tl.where(stopped, 0, tl.load(header + ROW_COUNT))):
            row = words + ROWS * count + r * WIDTH
            if (tl.load(row + COUNTED) != 0) & (tl.load(row + ADVANCES) != 0):
                advance(row, numbers + ROWS * count + r * WIDTH, counts)


@triton.jit
def scale_of_mask(row, agreements, numel, chunks):
    """What a mask multiplies the update with where it does not leave it out; ``agreements``: counts of the chunks."""
    scale = tl.full((), 1, tl.float64)
    if (tl.load(row + MASKS) != 0) & (tl.load(row + MASKS + 2) != 0) & (numel > 0):
        elements = numel.to(tl.float64)
        scale = elements / tl.maximum(sum_of(agreements, chunks), elements / 1000)
    return scale


@triton.jit
def agree(a, b):
    """By their signs, since a product of small numbers is 0."""
    return ((a > 0) & (b > 0)) | ((a < 0) & (b < 0))


@triton.jit
def masked(row, update, g, p, scale):
    """The update and the weights that decay, after the masks."""
    otherwise = tl.where(tl.load(row + MASKS) != 0, 0.0, scale)
    against = tl.where(tl.load(row + MASKS + 1) != 0, 0.0, p)
    return tl.where(agree(update, g), scale, otherwise).to(p.dtype) * update, tl.where(agree(update, -p), against, p)
