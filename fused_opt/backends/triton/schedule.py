"""What a step's noise and averages are, from counts that are on the device, line for line as csrc/schedule.h.

The functions take pointers to a row of arguments, as integers and as floats, and the counts of its group.
"""

from functools import lru_cache

import triton
import triton.language as tl

from ...extras.noise import uniforms
from ..interface import Average, Schedule
from .noise import words
from .rules import power

# In a row: the noise's standard deviation, of whatever it was given by; then a Schedule, and beside it a group's counts.
SIGMA = tl.constexpr(17)
COUNTED, SLOT, ADVANCES, COUNTS = (tl.constexpr(word) for word in range(35, 39))
TEMPERATURE, DECAY, CYCLE, AVERAGE, START, PERIOD, INTERVAL = (tl.constexpr(word) for word in range(42, 49))
WINDOW, PROBABILITY, BETA, SEED, WARMUP = (tl.constexpr(word) for word in range(49, 54))
#: What COUNTED says: nothing of the row depends on counts; on those in the row; on those that the device keeps.
BY_HOST, BY_DEVICE = tl.constexpr(1), tl.constexpr(2)
#: Words of a group's counts.
EACH = tl.constexpr(4)

EXPONENTIAL, MOMENTUM = tl.constexpr(Average.EXPONENTIAL.value), tl.constexpr(Average.MOMENTUM.value)
DRAWS = tl.constexpr(128)  # at once
OF_STEPS = tl.constexpr(0xFFFFFFFF)  # in place of a parameter's index


@lru_cache(maxsize=256)
def _due(schedule: Schedule, last: int) -> int:
    steps = int(schedule.window) + (int(schedule.window) < schedule.window)
    backs = range(0, steps, schedule.interval)
    if schedule.probability == 1:
        return len(backs)
    return sum(u < schedule.probability for u in uniforms(schedule.seed, [last - back for back in backs]))


def due(schedule: Schedule, steps: int) -> int:
    """How many samples are taken in the period that the step after so many is in, where the average needs it."""
    if schedule.average != Average.MOMENTUM or steps < schedule.start:
        return 0
    return _due(schedule, schedule.start + ((steps - schedule.start) // schedule.period + 1) * schedule.period)


@triton.jit
def annealed(t):
    """(1 + t)^0.275 by Newton's method for the 40th root of (1 + t)^11."""
    n = t.to(tl.float64) + 1
    n11 = power(n, tl.full((), 11, tl.float64))
    begin = (n.to(tl.int64, bitcast=True) - 0x3FF0000000000000).to(tl.float64)
    root = ((0.275 * begin).to(tl.int64) + 0x3FF0000000000000).to(tl.float64, bitcast=True)
    for _ in range(8):
        root *= (39 + n11 / power(root, tl.full((), 40, tl.float64))) / 40
    return root


@triton.jit
def drawn(row, numbers, t):
    """Whether the draws of steps t succeed."""
    zero = t * 0
    w0, _, _, _ = words(zero, zero + OF_STEPS, t, tl.load(row + SEED))
    return w0.to(tl.float64) * 2.3283064365386963e-10 < tl.load(numbers + PROBABILITY)  # 2**-32


@triton.jit
def sampled(row, numbers, t):
    """Whether the weights after step t, counted from 1, are a sample."""
    start, period = tl.load(row + START), tl.load(row + PERIOD)
    since = tl.maximum(t - start, 0)
    length = tl.maximum(period, 1)
    left = tl.where(period != 0, (length - since % length) % length, since)
    taken = (tl.load(row + AVERAGE) != 0) & (t > start) & (left % tl.load(row + INTERVAL) == 0)
    taken &= (period == 0) | (left.to(tl.float64) < tl.load(numbers + WINDOW))
    if taken & (tl.load(numbers + PROBABILITY) != 1):
        taken = tl.sum(drawn(row, numbers, t + tl.zeros([1], tl.int64)).to(tl.int32)) != 0
    return taken


@triton.jit
def ends(row, t, samples):
    """Whether a period that has samples ends with step t."""
    start, period = tl.load(row + START), tl.load(row + PERIOD)
    return (period != 0) & (t > start) & ((t - start) % tl.maximum(period, 1) == 0) & (samples > 0)


@triton.jit
def samples_due(row, numbers, steps):
    """How many samples are taken in the period that the step after so many is in."""
    start, period, interval = tl.load(row + START), tl.load(row + PERIOD), tl.load(row + INTERVAL)
    window = tl.load(numbers + WINDOW)
    floor = window.to(tl.int64)
    count = (floor + (floor.to(tl.float64) < window).to(tl.int64) + interval - 1) // interval
    if tl.load(numbers + PROBABILITY) != 1:
        last = start + ((steps - start) // period + 1) * period
        among, count = count, count * 0
        for first in range(0, among, DRAWS):
            n = first + tl.arange(0, DRAWS)
            count += tl.sum((drawn(row, numbers, last - n * interval) & (n < among)).to(tl.int64))
    return count


@triton.jit
def counts_of(row, counts):
    """Steps, samples of the period, past periods and samples that are due: by the host or on the device."""
    at = row + COUNTS
    if tl.load(row + COUNTED) == BY_DEVICE:
        at = counts + tl.load(row + SLOT) * EACH
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def at_counts(row, numbers, counts, lr):
    """What the coming step does: sigma; add, share, restart and write_back of the average; and how many steps were before."""
    steps, samples, periods, due = counts_of(row, counts)
    sigma = tl.load(numbers + SIGMA)
    if tl.load(row + TEMPERATURE) != 0:
        sigma = tl.sqrt(2 * lr * sigma)
    if tl.load(row + DECAY) != 0:
        sigma /= annealed(steps)
    cycle = tl.load(row + CYCLE)
    if cycle != 0:
        sigma *= 1 - (steps % cycle).to(tl.float64) / cycle.to(tl.float64)

    kind, beta = tl.load(row + AVERAGE), tl.load(numbers + BETA)
    t = steps + 1
    taken = sampled(row, numbers, t)
    write_back = ends(row, t, samples + taken.to(tl.int64))
    first, before = samples == 0, samples.to(tl.float64)
    rising = (1 + before) / (10 + before)
    of_sample = tl.where(tl.load(row + WARMUP) != 0, tl.minimum(beta, rising), beta)
    if kind == EXPONENTIAL:
        restart = first & (periods == 0)
        add, share = tl.where(restart, 1.0, 1 - of_sample), before * 0 + 1
    elif kind == MOMENTUM:
        restart = first & (periods == 0)
        number = due.to(tl.float64)
        add = tl.where(periods == 0, 1.0, 1 - beta) / tl.maximum(number, 1.0)
        share = tl.where(first & (periods != 0), number, 0.0)
    else:
        restart = first
        add, share = 1 / (before + 1), before * 0 + 1
    return sigma, tl.where(taken, add, 0.0), tl.where(taken, share, 0.0), restart & taken, write_back, steps


@triton.jit
def advance(row, numbers, counts):
    """Count it, on the device."""
    steps, samples, periods, due = counts_of(row, counts)
    t = steps + 1
    samples += sampled(row, numbers, t).to(tl.int64)
    ended = ends(row, t, samples)
    start, period = tl.load(row + START), tl.load(row + PERIOD)
    if (tl.load(row + AVERAGE) == MOMENTUM) & (t >= start):
        if (t - start) % period == 0:
            due = samples_due(row, numbers, t)
    at = counts + tl.load(row + SLOT) * EACH
    tl.debug_barrier()  # every thread has read what one of them writes
    tl.store(at, t)
    tl.store(at + 1, tl.where(ended, 0, samples))
    tl.store(at + 2, periods + ended.to(tl.int64))
    tl.store(at + 3, due)
