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
def power(x, t):
    """x^t for a whole t, by squaring."""
    n = t.to(tl.int64)
    result = tl.full((), 1, tl.float64)
    while n > 0:
        result = tl.where((n & 1) != 0, result * x, result)
        x *= x
        n = n >> 1
    return result


# What the coefficients of a rule that counts steps are in step t, counted from 1, of those before: csrc/rules.h.


@triton.jit
def adam_at_step(t, scalar, one_minus_beta1, beta2, one_minus_beta2, beta1, beta2_again, eps):
    """The bias corrections."""
    unbias1 = 1 / (1 - power(beta1, t))
    return one_minus_beta1, beta2, one_minus_beta2, unbias1, 1 / tl.sqrt(1 - power(beta2_again, t)), eps


@triton.jit
def amsgrad_at_step(t, scalar, one_minus_beta1, beta2, one_minus_beta2, beta1, beta2_again, eps):
    """Adam's."""
    return adam_at_step(t, scalar, one_minus_beta1, beta2, one_minus_beta2, beta1, beta2_again, eps)


@triton.jit
def adamax_at_step(t, scalar, one_minus_beta1, beta2, beta1, eps):
    """The bias correction of the momentum."""
    return one_minus_beta1, beta2, 1 / (1 - power(beta1, t)), eps


@triton.jit
def adagrad_at_step(t, scalar, lr_decay, eps):
    """The decay of the rate."""
    return 1 / (1 + (t - 1) * lr_decay), eps


@triton.jit
def nadam_at_step(t, scalar, one_minus_beta1, beta2, one_minus_beta2, beta1, decay, unused, eps, unused_too):
    """The scalar is the product of the mu so far, which torch multiplies in float32."""
    decayed = power(decay, t)
    mu, next_mu = beta1 * (1 - 0.5 * decayed), beta1 * (1 - 0.5 * decayed * decay)
    product = (scalar.to(tl.float32) * mu.to(tl.float32)).to(tl.float64)
    of_gradient, of_momentum = (1 - mu) / (1 - product), next_mu / (1 - product * next_mu)
    unbias2 = 1 / tl.sqrt(1 - power(beta2, t))
    return one_minus_beta1, beta2, one_minus_beta2, of_gradient, of_momentum, unbias2, eps, product


@triton.jit
def radam_at_step(t, scalar, one_minus_beta1, beta2, one_minus_beta2, beta1, unused, eps):
    """Rectified once there are enough steps."""
    left, unbias1 = 1 - power(beta2, t), 1 / (1 - power(beta1, t))
    longest = 2 / one_minus_beta2 - 1
    length = longest - 2 * t * (1 - left) / left
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    rectified = tl.where(length > 5, unbias1 * tl.sqrt(tl.where(length > 5, ratio * left, 0.0)), 0.0)
    return one_minus_beta1, beta2, one_minus_beta2, unbias1, rectified, eps


@triton.jit
def ademamix_at_step(t, scalar, one_minus_beta1, beta2, one_minus_beta2, beta3, warmup, alpha_warmup, alpha, eps):
    """The half-life of the slow average grows linearly, and so does its share."""
    beta1 = 1 - one_minus_beta1
    share = t / tl.where(warmup > 0, warmup, 1.0)
    if t < warmup:
        inverse = tl.where(beta1 > 0, (1 - share) / tl.log(tl.where(beta1 > 0, beta1, 0.5)), 0.0)
        inverse += tl.where(beta3 > 0, share / tl.log(tl.where(beta3 > 0, beta3, 0.5)), 0.0)
        grown = tl.where(inverse != 0, tl.exp(1 / tl.where(inverse != 0, inverse, 1.0)), 0.0)
        beta3 = tl.minimum(beta3, grown)
    alpha *= tl.where(t < alpha_warmup, t / tl.where(alpha_warmup > 0, alpha_warmup, 1.0), 1.0)
    unbias1, unbias2 = 1 / (1 - power(beta1, t)), 1 / tl.sqrt(1 - power(beta2, t))
    return one_minus_beta1, beta2, one_minus_beta2, 1 - beta3, unbias1, unbias2, alpha, eps


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
