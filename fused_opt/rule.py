"""What a rule is: its coefficients and one function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float  # or, with differentiable=True, a tensor that autograd follows

UNKNOWN = -1.0  # a count or a norm that is not known; true ones are not negative


def number(group: Mapping[str, Any], value: Any) -> Number:
    """A hyper-parameter as a float, or as it is where autograd is to follow it."""
    return value if group.get("differentiable") else float(value)


def square_root(x: Number) -> Number:
    """Of a float, or of a tensor that autograd follows."""
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def _same_in_every_step(coefficients: Sequence[float], step: float) -> Sequence[float]:
    return coefficients


class Matrices(NamedTuple):
    """What a rule does with whole matrices: its update, an element at a time, is not yet what moves the weights.

    Parameters of more than two dimensions are matrices, too: rows by the first, columns by all others.
    """

    make: Callable[
        [Tensor, Mapping[str, Any]], Tensor
    ]  # (updates of matrices of one shape in a stack, group): in PyTorch
    scale: Callable[[Mapping[str, Any], int, int], float]  # (group, rows, columns): what is made is multiplied with it
    dtype: Callable[[Mapping[str, Any]], torch.dtype]  # of the stack, where the parameters are not float64
    apply: Rule  # steps with what was made as the gradient; it has neither states nor coefficients


@dataclass(frozen=True)
class Rule:
    """One optimizer's mathematics; every backend applies ``p <- p - lr * (update + decoupled_decay * p)``.

    Neither the learning rate nor the weight decay is in a rule: the gradient that it is given has the coupled decay in it.

    Attributes:
        name: what the rule is called in ``csrc/rules.h`` and in every backend.
        states: the per-element states in the order in which ``update`` takes them, named as torch.optim names them, so
            that checkpoints interchange.
        coefficients: ``group -> floats``, on the host in float64: everything that does not depend on the element.
        update: ``(g, *states, *coefficients) -> (update, *new states)`` on tensors of the arithmetic's dtype (float32, or
            float64 for float64 parameters).
        at_step: ``(coefficients, step) -> floats``, as many: the coefficients of a parameter's step, counted from 1. In
            C++ rules that count steps have it, too, for devices that keep the count. With a ``scalar`` it is
            ``(coefficients, step, scalar) -> floats``.
        counts_steps: whether torch keeps a ``step`` tensor for every parameter; without it ``step`` is 1 for the first
            step and 2 for all others.
        scalar: the name of a number that torch keeps for every parameter beside ``step``, 1 before the first step; empty:
            none. The last of the step's coefficients is what it becomes. It is a float32 tensor.
        refuses_sparse: what to say to a sparse gradient, in torch's words; empty: it is made dense.
        initial: ``group -> float``: every element of a new state.
        matrices: what is made of the updates before they move the weights; None: they do themselves. With it ``update``
            may not depend on the step.
        unsigned: the states that are never negative.
        not_in_8_bits: by state, why eight bits cannot hold it.
    """

    name: str
    states: tuple[str, ...]
    coefficients: Callable[[Mapping[str, Any]], Sequence[float]]
    update: Callable[..., tuple[Tensor, ...]]
    at_step: Callable[..., Sequence[float]] = _same_in_every_step
    counts_steps: bool = False
    scalar: str = ""
    refuses_sparse: str = ""
    initial: Callable[[Mapping[str, Any]], float] = lambda group: 0.0
    matrices: Matrices | None = None
    unsigned: tuple[str, ...] = ()
    not_in_8_bits: Mapping[str, str] = field(default_factory=dict, hash=False)

    @cached_property
    def coefficient_count(self) -> int:
        """How many coefficients ``update`` takes."""
        return len(signature(self.update).parameters) - 1 - len(self.states)

    @property
    def scalars(self) -> tuple[str, ...]:
        """The states that are one number for every parameter."""
        return ("step",) * self.counts_steps + (self.scalar,) * bool(self.scalar)

    def numbers(self, group: Mapping[str, Any], step: float, scalar: float = 1.0, earlier: int = 0) -> Sequence[float]:
        """The coefficients of a step; of an UNKNOWN one, before ``at_step``. The scalar is that before ``earlier`` more."""
        return self.at(self.coefficients(group), step, scalar, earlier)

    def at(self, coefficients: Sequence[float], step: float, scalar: float, earlier: int) -> Sequence[float]:
        """The same, from what does not depend on the step."""
        if step == UNKNOWN:
            return coefficients
        if not self.scalar:
            return self.at_step(coefficients, step)
        for back in range(earlier, 0, -1):
            scalar = self.at_step(coefficients, step - back, scalar)[-1]
        return self.at_step(coefficients, step, scalar)
