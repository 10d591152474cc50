"""THE MATHEMATICS in Triton, line for line as csrc/rules.h, csrc/noise.h and trust_ratio() of csrc/pass.h.

A rule takes the gradient, its states and its coefficients, in the order of fused_opt/rules/, and returns the update u of
``p <- p - lr * (u + decoupled_decay * p)`` and the new states. It is found by its name.
"""

import triton
import triton.language as tl


@triton.jit
def square_root(x):
    """Rounded to the nearest, where tl.sqrt of float32 is an approximation."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def divide(a, b):
    """Rounded to the nearest, where ``/`` of float32 is an approximation."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def maximum(a, b):
    """torch.maximum: a NaN on either side stays, which tl.maximum would drop."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def lerp(a, b, weight):
    """torch.lerp: from whichever end is nearer, so that weights of 0 and 1 give the ends themselves."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (1 - weight) * (b - a))


@triton.jit
def sgd(g):
    """One line."""
    return (g,)


@triton.jit
def momentum_sgd(d, m, momentum, keep, nesterov):
    """In the first step 0 and 1, else the momentum and 1 - dampening; the momentum with Nesterov's, else 0."""
    m = momentum * m + keep * d
    return tl.where(nesterov != 0, d + nesterov * m, m), m


@triton.jit
def adam(g, m, v, one_minus_beta1, beta2, one_minus_beta2, unbias1, unbias2, eps):
    """unbias1 = 1 / (1 - beta1^t) and unbias2 = 1 / sqrt(1 - beta2^t)."""
    m = lerp(m, g, one_minus_beta1)
    v = beta2 * v + one_minus_beta2 * g * g
    return divide(unbias1 * m, unbias2 * square_root(v) + eps), m, v


@triton.jit
def amsgrad(g, m, v, largest, one_minus_beta1, beta2, one_minus_beta2, unbias1, unbias2, eps):
    """Adam with the largest v so far."""
    m = lerp(m, g, one_minus_beta1)
    v = beta2 * v + one_minus_beta2 * g * g
    largest = maximum(largest, v)
    return divide(unbias1 * m, unbias2 * square_root(largest) + eps), m, v, largest


@triton.jit
def lion(g, m, one_minus_beta1, one_minus_beta2):
    """The sign of an interpolation."""
    between = lerp(m, g, one_minus_beta1)
    return (between > 0).to(g.dtype) - (between < 0).to(g.dtype), lerp(m, g, one_minus_beta2)


@triton.jit
def muon(g, m, one_minus_momentum, share):
    """What its matrices are made of; share: the momentum with Nesterov's, else 1."""
    m = lerp(m, g, one_minus_momentum)
    return lerp(g, m, share), m


@triton.jit
def rmsprop(g, v, alpha, one_minus_alpha, eps):
    """The gradient over its root mean square."""
    v = alpha * v + one_minus_alpha * g * g
    return divide(g, square_root(v) + eps), v


@triton.jit
def centered_rmsprop(g, v, average, alpha, one_minus_alpha, eps):
    """The gradient over its standard deviation."""
    v = alpha * v + one_minus_alpha * g * g
    average = lerp(average, g, one_minus_alpha)
    return divide(g, square_root(v - average * average) + eps), v, average


@triton.jit
def momentum_rmsprop(g, v, b, alpha, one_minus_alpha, eps, momentum):
    """The momentum of rmsprop's updates."""
    d, v = rmsprop(g, v, alpha, one_minus_alpha, eps)
    b = momentum * b + d
    return b, v, b


@triton.jit
def centered_momentum_rmsprop(g, v, b, average, alpha, one_minus_alpha, eps, momentum):
    """The momentum of centered_rmsprop's updates."""
    d, v, average = centered_rmsprop(g, v, average, alpha, one_minus_alpha, eps)
    b = momentum * b + d
    return b, v, b, average


@triton.jit
def adamax(g, m, n, one_minus_beta1, beta2, unbias1, eps):
    """unbias1 = 1 / (1 - beta1^t)."""
    m = lerp(m, g, one_minus_beta1)
    n = maximum(beta2 * n, tl.abs(g) + eps)
    return divide(unbias1 * m, n), m, n


@triton.jit
def adagrad(g, s, decayed, eps):
    """Decayed = 1 / (1 + (t - 1) * lr_decay)."""
    s += g * g
    return divide(decayed * g, square_root(s) + eps), s


@triton.jit
def nadam(g, m, v, one_minus_beta1, beta2, one_minus_beta2, of_gradient, of_momentum, unbias2, eps, mu_product):
    """mu_product is the scalar."""
    m = lerp(m, g, one_minus_beta1)
    v = beta2 * v + one_minus_beta2 * g * g
    return divide(of_gradient * g + of_momentum * m, unbias2 * square_root(v) + eps), m, v


@triton.jit
def radam(g, m, v, one_minus_beta1, beta2, one_minus_beta2, unbias1, rectified, eps):
    """unbias1 = 1 / (1 - beta1^t); rectified: 0 in steps that are not divided."""
    m = lerp(m, g, one_minus_beta1)
    v = beta2 * v + one_minus_beta2 * g * g
    return tl.where(rectified != 0, divide(rectified * m, square_root(v) + eps), unbias1 * m), m, v


@triton.jit
def ademamix(g, m, slow, v, one_minus_beta1, beta2, one_minus_beta2, one_minus_beta3, unbias1, unbias2, alpha, eps):
    """Adam with a slow average beside the fast one."""
    m = lerp(m, g, one_minus_beta1)
    slow = lerp(slow, g, one_minus_beta3)
    v = beta2 * v + one_minus_beta2 * g * g
    return divide(unbias1 * m + alpha * slow, unbias2 * square_root(v) + eps), m, slow, v


@triton.jit
def trust_ratio(kind, coefficient, cap, eps, weight2, grad2, parts, weight_decay, grad_scale):
    """From sums of squares (for LAMB grad2 is the direction's) and the sum of the parts' norms (-1: one part)."""
    weight, scale, norm = tl.sqrt(weight2), tl.abs(grad_scale), tl.sqrt(grad2)
    grad = scale * norm
    lars = tl.where(grad == 0, 0.0, grad + weight_decay * weight + eps)
    sum_of_norms = tl.where(parts >= 0, scale * parts, grad)
    clars = tl.where(sum_of_norms == 0, 0.0, sum_of_norms + eps)
    lamb = tl.where(norm == 0, 0.0, norm + eps)
    denominator = tl.where(kind == 1, lars, tl.where(kind == 2, clars, lamb))
    ratio = coefficient * weight / denominator
    infinity = float("inf")
    usable = (weight > 0) & (denominator > 0) & (denominator < infinity) & (ratio < infinity)
    return tl.minimum(cap, tl.where(usable, ratio, 1.0))


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
def words(counter, index, t, seed, STREAM: tl.constexpr):
    """Philox4x32-10 at the counters (counter, index, t) of a stream."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32) | (STREAM << 29)
    zero = tl.zeros_like(c0)
    return tl.philox(seed, c0, c1, zero + index.to(tl.uint32), zero + t.to(tl.uint32))


@triton.jit
def normal(counter, index, t, seed):
    """The four normal numbers of every counter, which belong to the elements 4 * counter and following."""
    w0, w1, w2, w3 = words(counter, index, t, seed, 0)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def at_random(x, counter, index, t, seed, PLACE: tl.constexpr, DTYPE: tl.constexpr):
    """What x is rounded to at random as the number that is stored in this place: narrow_at_random of csrc/types.h."""
    w0, w1, w2, w3 = words(counter, index, t, seed, 1 + PLACE // 2)
    bits = (tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) >> (PLACE % 2 * 16)) & 0xFFFF
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
