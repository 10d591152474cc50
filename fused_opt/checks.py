"""Hyper-parameters, checked: numbers of any library, and what torch.optim's optimizers have in common, in its words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def real(name: str, value: Any, valid: Callable[[Any], bool], range_: str) -> float:
    """A number as Python's own, numpy's included.

    Raises:
        ValueError: where it is none, or ``valid`` says that it is not in its range.
    """
    if not isinstance(value, Real) or not valid(value):
        raise ValueError(f"Invalid {name}: {value!r}; it must be {range_}")
    return int(value) if isinstance(value, Integral) else float(value)


def whole(name: str, value: Any, least: int) -> int:
    """A whole number as Python's own, numpy's included.

    Raises:
        ValueError: where it is none, or less than ``least``.
    """
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"Invalid {name}: {value!r}; it must be a whole number, at least {least}")
    return int(value)


def check_number(message: str, value: Any, valid: Callable[[Any], bool]) -> None:
    """Raise a ValueError in torch.optim's words, followed by the value, unless it is a valid number or 1-element Tensor."""
    if not isinstance(value, Real | Tensor) or not valid(value):
        raise ValueError(f"{message}: {value}")


def check_kind_of_lr(options: Mapping[str, Any]) -> None:
    """Raise, in torch.optim's words, unless the learning rate is one number, of any value."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    check_number("Invalid learning rate", lr, lambda _: True)


def check_lr(options: Mapping[str, Any]) -> None:
    """Raise, in torch.optim's words, unless the learning rate is one."""
    check_kind_of_lr(options)
    check_number("Invalid learning rate", options["lr"], lambda x: x >= 0.0)


def check_decay(options: Mapping[str, Any]) -> None:
    """Raise, in torch.optim's words, unless the weight decay is one, and one with ``decoupled_weight_decay``."""
    decay, kind = options["weight_decay"], options.get("decay")
    if isinstance(decay, Tensor) and decay.numel() != 1:
        raise ValueError("Tensor weight_decay must be 1-element")
    if options.get("decoupled_weight_decay") and kind not in (None, "decoupled"):
        raise ValueError(
            f"decoupled_weight_decay=True and decay={kind!r} were asked for; one of them, or decay='decoupled', is meant"
        )
    check_number("Invalid weight_decay value", options["weight_decay"], lambda x: x >= 0.0)


def check_betas(options: Mapping[str, Any]) -> None:
    """Raise, in torch.optim's words, unless the two decay rates are in [0, 1), both floats or both Tensors."""
    for index, beta in enumerate(options["betas"]):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{index}] must be 1-element")
        check_number(f"Invalid beta parameter at index {index}", beta, lambda x: 0.0 <= x < 1.0)
    if len({isinstance(beta, Tensor) for beta in options["betas"]}) != 1:
        raise ValueError("betas must be either both floats or both Tensors")


def check_switches(options: Mapping[str, Any]) -> None:
    """Raise, in torch.optim's words, where the switches contradict each other."""
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
