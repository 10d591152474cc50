"""What a rule is: its coefficients and one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One optimizer's mathematics; every backend applies ``p <- p - lr * direction``.

    Attributes:
        name: what the rule is called in ``csrc/rules.h`` and in every backend.
        states: the per-element states in the order in which ``direction`` takes them, named as torch.optim names them,
            so that checkpoints interchange.
        coefficients: ``(group, t) -> floats``, on the host in float64: everything that does not depend on the element,
            for the ``t``-th step of a parameter, counted from 1. The first is the weight decay, which per-layer
            multipliers scale. Computed once per group and step count, never per tensor.
        direction: ``(p, g, *states, *coefficients) -> (direction, *new states)`` on tensors of the arithmetic's dtype
            (float32, or float64 for float64 parameters).
        counts_steps: whether torch keeps a ``step`` tensor for every parameter.
    """

    name: str
    states: tuple[str, ...]
    coefficients: Callable[[Mapping[str, Any], float], Sequence[float]]
    direction: Callable[..., tuple[Tensor, ...]]
    counts_steps: bool = False
