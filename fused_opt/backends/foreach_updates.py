"""The rules that torch.optim has, of lists of tensors: in torch's foreach operations, in the order of its own steps.

And in torch's fused steps, which compute 16 bits in float32 and round once, where an operation alone rounds what it stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]

SIXTEEN_BITS = torch.bfloat16, torch.float16


class Numbers(NamedTuple):
    """What a step does to the tensors of one list."""

    group: Mapping[str, Any]
    coefficients: Sequence[float]  # of the rule
    step: float  # counted from 1
    states_are_new: bool
    lr: float
    weight_decay: float
    decoupled: bool


def _rounds_factors(tensors: Tensors) -> bool:
    """Whether adding a multiple rounds the factor and the product to 16 bits first; ``addcmul`` rounds the result alone."""
    return tensors[0].is_cpu and tensors[0].dtype in SIXTEEN_BITS


def _ones(of: Tensors) -> Tensors:
    return [of[0].new_ones(())] * len(of)


def _move(params: Tensors, rate: float, numerators: Tensors, denominators: Tensors | None = None) -> None:
    if denominators is not None:
        torch._foreach_addcdiv_(params, numerators, denominators, -rate)
    elif _rounds_factors(params):
        torch._foreach_addcmul_(params, numerators, _ones(params), -rate)
    else:
        torch._foreach_add_(params, numerators, alpha=-rate)


def _sgd(numbers: Numbers, params: Tensors, grads: Tensors) -> None:
    _move(params, numbers.lr, grads)


def _momentum_sgd(numbers: Numbers, params: Tensors, grads: Tensors, buffers: Tensors) -> None:
    momentum, keep, nesterov = numbers.coefficients
    if numbers.states_are_new:
        torch._foreach_copy_(buffers, grads)
    elif keep == 1 and _rounds_factors(buffers):
        for buffer, g, one in zip(buffers, grads, _ones(buffers)):
            torch.addcmul(g, buffer, one, value=momentum, out=buffer)
    else:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads, alpha=keep)
    if not nesterov:
        _move(params, numbers.lr, buffers)
    elif params[0].dtype in SIXTEEN_BITS:
        _move(params, numbers.lr, torch._foreach_add(grads, buffers, alpha=nesterov))
    else:  # torch.optim adds to the gradients themselves; a sum in new memory takes longer than to move twice
        _move(params, numbers.lr, grads)
        _move(params, numbers.lr * nesterov, buffers)


def _moments(numbers: Numbers, grads: Tensors, mean: Tensors, square: Tensors) -> None:
    one_minus_beta1, beta2, one_minus_beta2, *_ = numbers.coefficients
    torch._foreach_lerp_(mean, grads, one_minus_beta1)
    torch._foreach_mul_(square, beta2)
    torch._foreach_addcmul_(square, grads, grads, one_minus_beta2)


def _adam(numbers: Numbers, params: Tensors, grads: Tensors, mean: Tensors, square: Tensors, *largest: Tensors) -> None:
    _moments(numbers, grads, mean, square)
    if largest:
        torch._foreach_maximum_(largest[0], square)
    beta1, beta2 = map(float, numbers.group["betas"])
    denominators = torch._foreach_sqrt(largest[0] if largest else square)
    torch._foreach_div_(denominators, (1 - beta2**numbers.step) ** 0.5)
    torch._foreach_add_(denominators, numbers.coefficients[-1])
    _move(params, numbers.lr / (1 - beta1**numbers.step), mean, denominators)


def _nadam(numbers: Numbers, params: Tensors, grads: Tensors, mean: Tensors, square: Tensors) -> None:
    _moments(numbers, grads, mean, square)
    of_gradient, of_momentum, unbias2, eps, _ = numbers.coefficients[3:]
    denominators = torch._foreach_sqrt(square)
    torch._foreach_mul_(denominators, unbias2)
    torch._foreach_add_(denominators, eps)
    numerators = torch._foreach_mul(grads, of_gradient)
    torch._foreach_add_(numerators, mean, alpha=of_momentum)
    _move(params, numbers.lr, numerators, denominators)


def _radam(numbers: Numbers, params: Tensors, grads: Tensors, mean: Tensors, square: Tensors) -> None:
    _moments(numbers, grads, mean, square)
    unbias1, rectified, eps = numbers.coefficients[3:]
    if not rectified:
        _move(params, numbers.lr * unbias1, mean)
        return
    denominators = torch._foreach_sqrt(square)
    torch._foreach_add_(denominators, eps)
    _move(params, numbers.lr * rectified, mean, denominators)


def _adamax(numbers: Numbers, params: Tensors, grads: Tensors, mean: Tensors, largest: Tensors) -> None:
    one_minus_beta1, beta2, unbias1, eps = numbers.coefficients
    torch._foreach_lerp_(mean, grads, one_minus_beta1)
    torch._foreach_mul_(largest, beta2)
    sizes = torch._foreach_abs(grads)
    torch._foreach_add_(sizes, eps)
    torch._foreach_maximum_(largest, sizes)
    _move(params, numbers.lr * unbias1, mean, largest)


def _adagrad(numbers: Numbers, params: Tensors, grads: Tensors, total: Tensors) -> None:
    decayed, eps = numbers.coefficients
    torch._foreach_addcmul_(total, grads, grads)
    denominators = torch._foreach_sqrt(total)
    torch._foreach_add_(denominators, eps)
    _move(params, numbers.lr * decayed, grads, denominators)


def _rmsprop(numbers: Numbers, params: Tensors, grads: Tensors, square: Tensors, *others: Tensors) -> None:
    alpha, one_minus_alpha, eps, *momentum = numbers.coefficients
    torch._foreach_mul_(square, alpha)
    torch._foreach_addcmul_(square, grads, grads, one_minus_alpha)
    if average := others[len(momentum) :]:  # behind the momentum buffers
        torch._foreach_lerp_(average[0], grads, one_minus_alpha)
        denominators = torch._foreach_addcmul(square, average[0], average[0], -1)
        torch._foreach_sqrt_(denominators)
    else:
        denominators = torch._foreach_sqrt(square)
    torch._foreach_add_(denominators, eps)
    if not momentum:
        _move(params, numbers.lr, grads, denominators)
        return
    torch._foreach_mul_(others[0], momentum[0])
    torch._foreach_addcdiv_(others[0], grads, denominators)
    torch._foreach_add_(params, others[0], alpha=-numbers.lr)  # in 16 bits to the bit of torch.optim's


UPDATES: dict[str, Callable[..., None]] = {
    "sgd": _sgd,
    "momentum_sgd": _momentum_sgd,
    "adam": _adam,
    "amsgrad": _adam,
    "nadam": _nadam,
    "radam": _radam,
    "adamax": _adamax,
    "adagrad": _adagrad,
    **dict.fromkeys(("rmsprop", "centered_rmsprop", "momentum_rmsprop", "centered_momentum_rmsprop"), _rmsprop),
}


def step(numbers: Numbers, update: Callable[..., None], params: Tensors, grads: Tensors, *states: Tensors) -> None:
    """Move the parameters of a list, and renew their states."""
    if numbers.weight_decay and numbers.decoupled:
        torch._foreach_mul_(params, 1 - numbers.lr * numbers.weight_decay)
    elif numbers.weight_decay:
        grads = torch._foreach_add(grads, params, alpha=numbers.weight_decay)
    update(numbers, params, grads, *states)


def _fused_sgd(numbers: Numbers, maximize: bool, params: Tensors, grads: Tensors, *buffers: Tensors) -> None:
    group = numbers.group
    torch._fused_sgd_(
        params,
        grads,
        buffers[0] if buffers else [],
        weight_decay=numbers.weight_decay,
        momentum=float(group["momentum"]),
        lr=numbers.lr,
        dampening=float(group["dampening"]),
        nesterov=group["nesterov"],
        maximize=maximize,
        is_first_step=numbers.states_are_new,
    )


def _steps(step: float, params: Tensors) -> Tensors:
    return [torch.full((), step, dtype=torch.float32, device=params[0].device)] * len(params)


def _adam_step(
    numbers: Numbers,
    maximize: bool,
    params: Tensors,
    grads: Tensors,
    mean: Tensors,
    square: Tensors,
    largest: Tensors = (),
    *,
    betas: tuple[float, float],
    eps: float,
    rate: float = 1.0,
    step: float = math.inf,
) -> None:
    """Torch's fused step of Adam with ``rate`` times the learning rate, and without bias corrections unless steps are given.

    A decoupled decay is by the learning rate itself.
    """
    (torch._fused_adamw_ if numbers.decoupled else torch._fused_adam_)(
        params,
        grads,
        mean,
        square,
        largest,
        _steps(step, params),
        lr=rate * numbers.lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=numbers.weight_decay / rate if numbers.decoupled else numbers.weight_decay,
        eps=eps,
        amsgrad=bool(largest),
        maximize=maximize,
    )


def _fused_adam(numbers: Numbers, maximize: bool, *tensors: Tensors) -> None:
    beta1, beta2 = map(float, numbers.group["betas"])
    _adam_step(numbers, maximize, *tensors, betas=(beta1, beta2), eps=numbers.coefficients[-1], step=numbers.step)


def _zeros(params: Tensors) -> Tensors:
    return [torch.zeros_like(p) for p in params]


def _fused_rmsprop(numbers: Numbers, maximize: bool, params: Tensors, grads: Tensors, square: Tensors) -> None:
    """Adam whose first moment is the gradient."""
    alpha, _, eps = numbers.coefficients
    _adam_step(numbers, maximize, params, grads, _zeros(params), square, betas=(0.0, alpha), eps=eps)


def _fused_radam(numbers: Numbers, maximize: bool, *tensors: Tensors) -> None:
    """Adam at another rate; not rectified, with an eps so large that the second moment adds nothing to it."""
    beta1, beta2 = map(float, numbers.group["betas"])
    unbias1, rectified, eps = numbers.coefficients[3:]
    rate = rectified or unbias1 * 2.0**100
    _adam_step(numbers, maximize, *tensors, betas=(beta1, beta2), eps=eps if rectified else 2.0**100, rate=rate)


def _fused_nadam(
    numbers: Numbers, maximize: bool, params: Tensors, grads: Tensors, mean: Tensors, square: Tensors
) -> None:
    """Adam whose average has more of this gradient than the one that is kept, which a step of length 0 renews."""
    beta1, beta2 = map(float, numbers.group["betas"])
    of_gradient, of_momentum, unbias2, eps, _ = numbers.coefficients[3:]
    before, both = [m.clone() for m in mean], of_gradient + of_momentum
    _adam_step(numbers._replace(lr=0.0), maximize, params, grads, mean, _zeros(params), betas=(beta1, beta2), eps=1.0)
    betas, rate = (of_momentum * beta1 / both, beta2), both / unbias2
    _adam_step(numbers, maximize, params, grads, before, square, betas=betas, eps=eps / unbias2, rate=rate)


def _fused_adagrad(numbers: Numbers, maximize: bool, params: Tensors, grads: Tensors, total: Tensors) -> None:
    torch._fused_adagrad_(
        params,
        grads,
        total,
        _steps(numbers.step, params),
        lr=numbers.lr,
        lr_decay=float(numbers.group["lr_decay"]),
        weight_decay=numbers.weight_decay,
        eps=numbers.coefficients[-1],
        maximize=maximize,
    )


# They take maximize behind the numbers, and tensors that lie in memory alike, without gaps.
FUSED: dict[str, Callable[..., None]] = {
    "sgd": _fused_sgd,
    "momentum_sgd": _fused_sgd,
    "adam": _fused_adam,
    "amsgrad": _fused_adam,
    "nadam": _fused_nadam,
    "radam": _fused_radam,
    "adagrad": _fused_adagrad,
    "rmsprop": _fused_rmsprop,
}
#: Of these, those whose fused step has decoupled decay.
DECOUPLED = "adam", "amsgrad", "nadam", "radam", "rmsprop"


def fused_in_16_bits(rule: str, device: str) -> bool:
    """Whether torch has a fused step that rounds float32 once: on the CPU SGD's and Adagrad's do from torch 2.14 on."""
    if device == "cpu":
        return rule in DECOUPLED or (rule in FUSED and torch.__version__ >= "2.14")
    return device == "cuda" and rule in FUSED and rule != "adagrad"


def by_operations_in_16_bits(rule: str, dtype: torch.dtype) -> bool:
    """Whether what is not fused is stepped in its dtype, as torch.optim does; float16 has no 1e-8, the usual eps."""
    without_eps = rule in ("sgd", "momentum_sgd")
    return without_eps or (dtype == torch.bfloat16 and (rule == "adamax" or UPDATES[rule] is _rmsprop))
