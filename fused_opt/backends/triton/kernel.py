"""The loops of a step in Triton: one kernel that updates, one that sums squares first, one that accumulates.

A tensor is cut into chunks, one program each. Sums of squares are kept as one float64 per chunk; a program that needs a
tensor's norm adds them up, always in the same order, so a carried norm costs no launch of its own. The size of a chunk
is chosen so that this adding is cheap: see ``chunk_size``.
"""

import triton
import triton.language as tl

from .columns import (
    ADD,
    AVERAGE,
    CHUNK,
    COUPLED,
    DECAY_SCALE,
    DECOUPLED,
    EXACT,
    FIRST,
    FOLD,
    FOUND_INF,
    GRAD2,
    GROUPS,
    HEADER,
    INDEPENDENT,
    INDEX,
    KNOWN,
    LAMB,
    LAYOUT,
    LR_AT,
    LR_SCALE,
    NDIM,
    NOISE,
    NUMEL,
    PARTS,
    PLACE,
    RATIO,
    ROUNDING,
    ROW,
    ROWS,
    TOTAL,
    UNKNOWN,
    WANT_AGREEMENT,
    WANT_DIRECTION,
    WANT_GRAD,
    WANT_UPDATE,
    WANT_WEIGHT,
    WANTS,
    WIDTH,
    addresses_of,
    agree,
    coefficients_of,
    count_step,
    decay_of,
    decays_of,
    find,
    full_scale,
    is_last,
    masked,
    narrowed,
    number,
    scale_of_mask,
    squares_of,
    sum_of,
)
from .memory import FULL, TAIL, load, load_states, load_weights, narrow, store, store_codes, store_weights
from .noise import ELSEWHERE, at_random, bits_of, grouped, normal_of
from .rules import trust_ratio
from .schedule import COUNTED, at_counts


def chunk_size(numel: int) -> int:
    """Elements in a chunk of a tensor of ``numel``.

    Not so many that the last programs run alone, not so few that adding up the sums of all chunks, which every program
    does, counts: a chunk of n elements moves at least 12 n bytes, and the sums are at most 2 n bytes, out of the cache.
    """
    size = 4 * FULL.value
    while size * size < 4 * numel:
        size *= 2
    return size


@triton.jit(do_not_specialize=["count"])
def update(
    tensors,
    layers,
    words,
    numbers,
    counts,
    carried,  # sums of squares of the weights as they are, one for every chunk
    leaving,  # those of the weights as they will be: another buffer, since other programs still read this one
    gradients,  # those of the gradients, for LAMB of the directions
    agreements,  # how many elements of the update go the gradient's way
    ratios,  # and then what the rule's scalars become
    count,
    RULE: tl.constexpr,
    AT_STEP: tl.constexpr,  # None: the coefficients are the same in every step, or the host's
    DTYPES: tl.constexpr,
    AVERAGE_DTYPE: tl.constexpr,  # None: nothing is averaged in this step
    T: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    COUNTS: tl.constexpr,  # there are counts of steps
    SCHEDULED: tl.constexpr,  # some of the rows go by counts
    CUT: tl.constexpr,  # some tensors lie otherwise than in the row-major order of the whole one
    NOISY: tl.constexpr,
    NORMS: tl.constexpr,
    MASKED: tl.constexpr,  # there are masks, or decay that is not times the rate
    STOCHASTIC: tl.constexpr,  # something of 16 bits is rounded at random
    KEPT: tl.constexpr,  # the dtype of what makes weights exact; None: nothing does
):
    """Step one chunk: everything that a step does to it, in one pass."""
    header, floats = words, numbers
    words += HEADER
    numbers += HEADER
    chunk = tl.program_id(0)
    t = find(tensors + FIRST * count, count, chunk)
    row_index = tl.load(words + ROW * count + t)
    if number(tl.load(header + FOUND_INF), 0.0, tl.float32) != 0:
        row_index = row_index * 0 - 1
    if row_index >= 0:
        row = numbers + ROWS * count + row_index * WIDTH
        row_words = words + ROWS * count + row_index * WIDTH
        first = tl.load(tensors + FIRST * count + t)
        numel = tl.load(tensors + NUMEL * count + t)
        size = tl.load(tensors + CHUNK * count + t)
        decay = decay_of(row_words, tl.load(layers + DECAY_SCALE * count + t))
        grad_scale = full_scale(header, floats, row)
        rate = number(tl.load(row_words + LR_AT), tl.load(row), tl.float64)
        chunks = tl.maximum(tl.cdiv(numel, size), 1)
        sigma = tl.load(row + NOISE)
        carries = False
        if NORMS:
            kind, relative = tl.load(row + RATIO), tl.load(row + NOISE + 1) != 0
            has_ratio = (kind != 0) & (tl.load(tensors + NDIM * count + t) > tl.load(row + RATIO + 4))
            carries = has_ratio | (relative & (sigma > 0))
        noise_t = tl.load(row_words + NOISE + 3)
        add, share = tl.load(row + FOLD), tl.load(row + FOLD + 1)
        restart, write_back = tl.load(row + FOLD + 2) != 0, tl.load(row + FOLD + 3) != 0
        if STOCHASTIC:
            rounds, rounding_seed = tl.load(row + ROUNDING) != 0, tl.load(row_words + ROUNDING + 1)
            rounding_t = tl.load(row_words + ROUNDING + 2)
        if SCHEDULED:
            if tl.load(row_words + COUNTED) != 0:
                sigma, add, share, restart, write_back, noise_t = at_counts(row_words, row, counts + GROUPS, rate)
                if STOCHASTIC:
                    rounding_t = noise_t
        layout = tensors + tl.load(tensors + LAYOUT * count + t)
        fours = False
        if CUT:
            fours = grouped(layout, numel)
        ratio = tl.full((), 1, tl.float64)
        if NORMS:
            if carries:
                known = tl.load(header + KNOWN)
                grad2 = tl.load(numbers + GRAD2 * count + t)
                if known != 0:
                    of_tensor = known.to(tl.pointer_type(tl.float64)) + 3 * tl.load(tensors + PLACE * count + t)
                    weight2 = tl.load(of_tensor)
                    if (grad2 == UNKNOWN) | (kind == LAMB):
                        grad2 = tl.load(of_tensor + tl.where(kind == LAMB, 2, 1))
                else:
                    weight2 = sum_of(carried + first, chunks)
                    if has_ratio & ((grad2 == UNKNOWN) | (kind == LAMB)):  # whose direction's it is
                        grad2 = sum_of(gradients + first, chunks)
                if has_ratio:
                    ratio = trust_ratio(
                        kind,
                        tl.load(row + RATIO + 1),
                        tl.load(row + RATIO + 2),
                        tl.load(row + RATIO + 3),
                        weight2,
                        grad2,
                        tl.load(numbers + PARTS * count + t),
                        (tl.load(row + COUPLED) + tl.load(row + DECOUPLED)) * decay,
                        grad_scale,
                    )
                whole = numel
                if CUT:
                    whole += tl.load(layout + ELSEWHERE)
                if relative & (whole > 0):
                    sigma *= tl.sqrt(weight2 / whole.to(tl.float64))
        exactly = coefficients_of(row, tensors, t, count, COEFFICIENTS, AT_STEP)
        if chunk == first:
            tl.store(ratios + t, ratio)
            if AT_STEP is not None and COEFFICIENTS > 0:
                tl.store(ratios + count + t, exactly[COEFFICIENTS - 1])

        lr = (rate * tl.load(layers + LR_SCALE * count + t) * ratio).to(T)
        coefficients = narrowed(exactly, COEFFICIENTS, T)
        coupled, decoupled = decays_of(row, decay, T)
        if MASKED:
            scale = scale_of_mask(row, agreements + first, numel, chunks)
            independent = (tl.load(row + INDEPENDENT) * decay).to(T)
        seed, index = tl.load(row_words + NOISE + 2), tl.load(tensors + INDEX * count + t)
        samples = (add != 0) | write_back
        add, share, follow = add.to(T), share.to(T), tl.load(row + FOLD + 4).to(T)
        addresses, scales, aligned = addresses_of(tensors, words, t, count, DTYPES)
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
                p = load_weights(addresses[0], exact, start, end, DTYPES[0], KEPT, T, BLOCK)
                g = grad_scale.to(T) * load(addresses[1], start, end, DTYPES[1], T, BLOCK) + coupled * p
                results = RULE(g, *load_states(addresses, scales, start, end, DTYPES, T, BLOCK), *coefficients)
                for k in tl.static_range(2, len(DTYPES)):
                    new = results[k - 1]
                    if STOCHASTIC and DTYPES[k].primitive_bitwidth == 16:
                        bits = bits_of(start, layout, fours, index, rounding_t, rounding_seed, k - 2, CUT, BLOCK)
                        drawn = at_random(new, bits, DTYPES[k])
                        new = tl.where(rounds, drawn, new)
                    if DTYPES[k].primitive_bitwidth == 8:
                        store_codes(addresses[k], scales[k], start, end, new, DTYPES[k], BLOCK)
                    else:
                        store(addresses[k], start, end, new, DTYPES[k], BLOCK)
                if MASKED:
                    update, decaying = masked(row, results[0], g, p, scale)
                    p -= lr * (update + decoupled * decaying) + independent * decaying
                else:
                    p -= lr * (results[0] + decoupled * p)
                if NOISY:
                    if sigma != 0:
                        z = normal_of(start, layout, fours, index, noise_t, seed, CUT, BLOCK)
                        p += sigma.to(T) * z.to(T)
                if STOCHASTIC and KEPT is None and DTYPES[0].primitive_bitwidth == 16:  # and is then stored as it is
                    place: tl.constexpr = len(DTYPES) - 2
                    bits = bits_of(start, layout, fours, index, rounding_t, rounding_seed, place, CUT, BLOCK)
                    p = tl.where(rounds, at_random(p, bits, DTYPES[0]), p)
                if AVERAGE_DTYPE is not None:
                    if KEPT is None:
                        p = narrow(p, DTYPES[0]).to(T)  # what is averaged is what would be stored
                    if samples:
                        v = load(average, start, end, AVERAGE_DTYPE, T, BLOCK)
                        by = add * (p - share * v)
                        v = tl.where(restart, add * p, v + by)
                        store(average, start, end, v, AVERAGE_DTYPE, BLOCK)
                        p = tl.where(write_back, v, tl.where(follow != 0, p + follow * by, p))
                        if STOCHASTIC and KEPT is None and DTYPES[0].primitive_bitwidth == 16:
                            then: tl.constexpr = len(DTYPES) - 1
                            bits = bits_of(start, layout, fours, index, rounding_t, rounding_seed, then, CUT, BLOCK)
                            p = tl.where(rounds, at_random(p, bits, DTYPES[0]), p)
                store_weights(addresses[0], exact, start, end, p, DTYPES[0], KEPT, BLOCK)
                if NORMS:
                    squares += squares_of(p if KEPT is not None else narrow(p, DTYPES[0]).to(T), start, end, BLOCK)
            new2 += tl.sum(squares)
            begin = stop
        if NORMS:
            tl.store(leaving + chunk, new2)
    elif NORMS:  # the weights stay, and what is known of them
        tl.store(leaving + chunk, tl.load(carried + chunk))
    if COUNTS or SCHEDULED:
        if is_last(counts):
            count_step(tensors, header, floats, counts + GROUPS, ratios + count, count, COUNTS, SCHEDULED)


@triton.jit(do_not_specialize=["count"])
def norms(
    tensors,
    layers,
    words,
    numbers,
    counts,
    carried,
    gradients,
    agreements,
    count,
    RULE: tl.constexpr,
    AT_STEP: tl.constexpr,
    DTYPES: tl.constexpr,
    T: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    TOTAL_WANTED: tl.constexpr,  # the sum over all gradients, too
    WANTED: tl.constexpr,  # by any tensor, and of this launch; what one does not want of it is not stored
    MASKED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Sum the squares of one chunk, before the weights may be touched."""
    header, floats = words, numbers
    words += HEADER
    numbers += HEADER
    chunk = tl.program_id(0)
    t = find(tensors + FIRST * count, count, chunk)
    wanted = tl.load(words + WANTS * count + t) & WANTED
    if wanted != 0:
        first = tl.load(tensors + FIRST * count + t)
        numel = tl.load(tensors + NUMEL * count + t)
        size = tl.load(tensors + CHUNK * count + t)
        addresses, scales, aligned = addresses_of(tensors, words, t, count, DTYPES)
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
            row_index = tl.load(words + ROW * count + t)
            row = numbers + ROWS * count + row_index * WIDTH
            decay = decay_of(words + ROWS * count + row_index * WIDTH, tl.load(layers + DECAY_SCALE * count + t))
            coupled, decoupled = decays_of(row, decay, T)
            grad_scale = full_scale(header, floats, row).to(T)
            exactly = coefficients_of(row, tensors, t, count, COEFFICIENTS, AT_STEP)
            coefficients = narrowed(exactly, COEFFICIENTS, T)
            if MASKED and (WANT_DIRECTION & WANTED):
                scale = scale_of_mask(row, agreements + first, numel, tl.maximum(tl.cdiv(numel, size), 1))
        for BLOCK in tl.static_range(FULL, TAIL - 1, TAIL - FULL):  # FULL, then TAIL
            stop = full if BLOCK == FULL else end
            of_weights = tl.zeros([BLOCK // 4], tl.float64)
            of_gradient = tl.zeros([BLOCK // 4], tl.float64)
            of_direction = tl.zeros([BLOCK // 4], tl.float64)
            of_agreement = tl.zeros([BLOCK // 4], tl.float64)
            for start in range(begin, stop, BLOCK):
                if WANT_UPDATE & WANTED:
                    p = load_weights(addresses[0], exact, start, end, DTYPES[0], KEPT, T, BLOCK)
                    g = grad_scale * load(addresses[1], start, end, DTYPES[1], T, BLOCK) + coupled * p
                    states = load_states(addresses, scales, start, end, DTYPES, T, BLOCK)
                    results = RULE(g, *states, *coefficients)
                    if WANT_AGREEMENT & WANTED:
                        of_agreement += squares_of(tl.where(agree(results[0], g), 1.0, 0.0), start, end, BLOCK)
                    if WANT_DIRECTION & WANTED:
                        if MASKED:
                            update, p = masked(row, results[0], g, p, scale)
                            of_direction += squares_of(update + decoupled * p, start, end, BLOCK)
                        else:
                            of_direction += squares_of(results[0] + decoupled * p, start, end, BLOCK)
                if WANT_WEIGHT & WANTED:
                    weights = load_weights(addresses[0], exact, start, end, DTYPES[0], KEPT, T, BLOCK)
                    of_weights += squares_of(weights, start, end, BLOCK)
                if WANT_GRAD & WANTED:
                    of_gradient += squares_of(load(addresses[1], start, end, DTYPES[1], T, BLOCK), start, end, BLOCK)
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
    elif TOTAL_WANTED:
        tl.store(gradients + chunk, 0.0)
    if TOTAL_WANTED:
        if is_last(counts):
            total = tl.load(header + TOTAL).to(tl.pointer_type(tl.float64))
            others = tl.load(total, mask=tl.load(header + ADD) != 0, other=0.0)
            tl.store(total, others + sum_of(gradients, tl.num_programs(0)))


@triton.jit(do_not_specialize=["count"])
def collect(tensors, words, carried, sums, found, count):
    """The norms of one tensor that were summed, into its row of a table of three columns."""
    t = tl.program_id(0).to(tl.int64)
    words += HEADER
    first = tl.load(tensors + FIRST * count + t)
    chunks = tl.maximum(tl.cdiv(tl.load(tensors + NUMEL * count + t), tl.load(tensors + CHUNK * count + t)), 1)
    wanted = tl.load(words + WANTS * count + t)
    if tl.load(words + ROW * count + t) >= 0:
        row = found + 3 * tl.load(tensors + PLACE * count + t)
        tl.store(row, sum_of(carried + first, chunks))
        if wanted & (WANT_GRAD | WANT_DIRECTION):
            tl.store(row + tl.where((wanted & WANT_DIRECTION) != 0, 2, 1), sum_of(sums + first, chunks))


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
            g = load(part, start, end, PART_DTYPE, T, BLOCK)
            of_part += squares_of(g, start, end, BLOCK)
            if TOTAL_DTYPE is not None:
                new = load(total, start, end, TOTAL_DTYPE, T, BLOCK) + g
                store(total, start, end, new, TOTAL_DTYPE, BLOCK)
                of_total += squares_of(narrow(new, TOTAL_DTYPE).to(T), start, end, BLOCK)
        part2 += tl.sum(of_part)
        total2 += tl.sum(of_total)
        begin = stop
    tl.store(sums + chunk, part2)
    tl.store(sums + tl.num_programs(0) + chunk, total2)
