"""The rules that torch.optim has, of lists of tensors: in torch's foreach operations, in the order of its own steps.

And what torch has fused, for 16 bits, in which operation by operation would round as often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]


class Numbers(NamedTuple):
    """What a step does to the tensors of one list."""

    group: Mapping[str, Any]
    coefficients: Sequence[float]  # of the rule
    step: float  # counted from 1
    states_are_new: bool
    lr: float
    weight_decay: float
    decoupled: bool


# What the weights move by: numerators, denominators (None: ones), and the rate, where bias corrections are. It is returned by
# a rule's function of numbers, gradients and states, which renews the states.
Moves: TypeAlias = tuple[Tensors, Tensors | None, float]


def _sgd(numbers: Numbers, grads: Tensors) -> Moves:
    return grads, None, numbers.lr


def _momentum_sgd(numbers: Numbers, grads: Tensors, buffers: Tensors) -> Moves:
    momentum, keep, nesterov = numbers.coefficients
    if numbers.states_are_new:
        torch._foreach_copy_(buffers, grads)
    else:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads, alpha=keep)
    return torch._foreach_add(grads, buffers, alpha=nesterov) if nesterov else buffers, None, numbers.lr


def _moments(numbers: Numbers, grads: Tensors, mean: Tensors, square: Tensors) -> None:
    one_minus_beta1, beta2, one_minus_beta2, *_ = numbers.coefficients
    torch._foreach_lerp_(mean, grads, one_minus_beta1)
    torch._foreach_mul_(square, beta2)
    torch._foreach_addcmul_(square, grads, grads, one_minus_beta2)


def _adam(numbers: Numbers, grads: Tensors, mean: Tensors, square: Tensors, *largest: Tensors) -> Moves:
    _moments(numbers, grads, mean, square)
    if largest:
        torch._foreach_maximum_(largest[0], square)
    beta1, beta2 = map(float, numbers.group["betas"])
    denominators = torch._foreach_sqrt(largest[0] if largest else square)
    torch._foreach_div_(denominators, (1 - beta2**numbers.step) ** 0.5)
    torch._foreach_add_(denominators, numbers.coefficients[-1])
    return mean, denominators, numbers.lr / (1 - beta1**numbers.step)


def _nadam(numbers: Numbers, grads: Tensors, mean: Tensors, square: Tensors) -> Moves:
    _moments(numbers, grads, mean, square)
    of_gradient, of_momentum, unbias2, eps, _ = numbers.coefficients[3:]
    denominators = torch._foreach_sqrt(square)
    torch._foreach_mul_(denominators, unbias2)
    torch._foreach_add_(denominators, eps)
    numerators = torch._foreach_mul(grads, of_gradient)
    torch._foreach_add_(numerators, mean, alpha=of_momentum)
    return numerators, denominators, numbers.lr


def _radam(numbers: Numbers, grads: Tensors, mean: Tensors, square: Tensors) -> Moves:
    _moments(numbers, grads, mean, square)
    unbias1, rectified, eps = numbers.coefficients[3:]
    if not rectified:
        return mean, None, numbers.lr * unbias1
    denominators = torch._foreach_sqrt(square)
    torch._foreach_add_(denominators, eps)
    return mean, denominators, numbers.lr * rectified


def _adamax(numbers: Numbers, grads: Tensors, mean: Tensors, largest: Tensors) -> Moves:
    one_minus_beta1, beta2, unbias1, eps = numbers.coefficients
    torch._foreach_lerp_(mean, grads, one_minus_beta1)
    torch._foreach_mul_(largest, beta2)
    sizes = torch._foreach_abs(grads)
    torch._foreach_add_(sizes, eps)
    torch._foreach_maximum_(largest, sizes)
    return mean, largest, numbers.lr * unbias1


def _adagrad(numbers: Numbers, grads: Tensors, total: Tensors) -> Moves:
    decayed, eps = numbers.coefficients
    torch._foreach_addcmul_(total, grads, grads)
    denominators = torch._foreach_sqrt(total)
    torch._foreach_add_(denominators, eps)
    return grads, denominators, numbers.lr * decayed


def _rmsprop(numbers: Numbers, grads: Tensors, square: Tensors, *others: Tensors) -> Moves:
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
        return grads, denominators, numbers.lr
    torch._foreach_mul_(others[0], momentum[0])
    torch._foreach_addcdiv_(others[0], grads, denominators)
    return others[0], None, numbers.lr


UPDATES: dict[str, Callable[..., Moves]] = {
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


def step(numbers: Numbers, update: Callable[..., Moves], params: Tensors, grads: Tensors, *states: Tensors) -> None:
    """Move the parameters of a list, and renew their states."""
    if numbers.weight_decay and numbers.decoupled:
        torch._foreach_mul_(params, 1 - numbers.lr * numbers.weight_decay)
    elif numbers.weight_decay:
        grads = torch._foreach_add(grads, params, alpha=numbers.weight_decay)
    numerators, denominators, rate = update(numbers, grads, *states)
    if denominators is None:
        torch._foreach_add_(params, numerators, alpha=-rate)
    else:
        torch._foreach_addcdiv_(params, numerators, denominators, -rate)


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


def _steps(numbers: Numbers, params: Tensors) -> Tensors:
    return [torch.full((), numbers.step, dtype=torch.float32, device=params[0].device)] * len(params)


def _fused_adam(numbers: Numbers, maximize: bool, params: Tensors, grads: Tensors, *states: Tensors) -> None:
    mean, square, *largest = states
    beta1, beta2 = map(float, numbers.group["betas"])
    (torch._fused_adamw_ if numbers.decoupled else torch._fused_adam_)(
        params,
        grads,
        mean,
        square,
        largest[0] if largest else [],
        _steps(numbers, params),
        lr=numbers.lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=numbers.weight_decay,
        eps=numbers.coefficients[-1],
        amsgrad=bool(largest),
        maximize=maximize,
    )


def _fused_adagrad(numbers: Numbers, maximize: bool, params: Tensors, grads: Tensors, total: Tensors) -> None:
    torch._fused_adagrad_(
        params,
        grads,
        total,
        _steps(numbers, params),
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
    "adagrad": _fused_adagrad,
}


def fused_in_16_bits(rule: str, device: str) -> bool:
    """Whether torch has a fused step that computes in float32 and rounds once; on the CPU most came right in 2.14."""
    if device == "cpu":
        return rule in FUSED and (torch.__version__ >= "2.14" or rule in ("adam", "amsgrad"))
    return device == "cuda" and rule in FUSED and rule != "adagrad"
