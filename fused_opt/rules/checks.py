"""Hyper-parameters that torch.optim's optimizers have in common, checked in its words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_lr(options: Mapping[str, Any]) -> None:
    """Raise, in torch.optim's words, unless the learning rate is one."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")


def check_decay(options: Mapping[str, Any]) -> None:
    """Raise, in torch.optim's words, unless the weight decay is one."""
    if not options["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}")


def check_switches(options: Mapping[str, Any]) -> None:
    """Refuse the switches of torch.optim that would change what a step means."""
    if options["differentiable"]:
        raise RuntimeError(
            "differentiable=True asks for a step that autograd can follow, and a fused step writes in place; "
            "torch.optim's class of the same name takes differentiable=True"
        )
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
