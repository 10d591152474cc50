"""The parts that a gradient is a sum of, and their norms, taken while the gradient is accumulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .. import backends


@dataclass
class _Sum:
    """A gradient as the last backward left it."""

    grad: Tensor
    version: int
    norms: float  # sum of the parts' norms
    norm2: float  # squared norm of their sum
    parts: int


def squared_norm(gradient: Tensor) -> float:
    """Sum of squares, in float64."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return float(torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float64)).item()) ** 2


class Microbatches:
    """Every ``backward`` between two steps is a part of the gradient.

    Two hooks per parameter: one sets the gradient aside before autograd adds to it, so that autograd hands over the new part
    as it is; the other adds the part to what was set aside and sums both squares in the same pass. Between the
    backwards ``p.grad`` is what it always is. Gradients that somebody has changed since (clipping, unscaling, zeroing) are
    noticed by their version, and the parts' norms scaled as the gradient's norm was.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._sums: dict[Tensor, _Sum] = {}
        self._aside: dict[Tensor, Tensor | None] = {}
        self._nodes: dict[Tensor, Node] = {}
        self._handles: list[RemovableHandle] = []
        for p in parameters:
            if p.requires_grad:
                self._watch(p)
                handle = p.register_post_accumulate_grad_hook(self._weakly(type(self)._add))
                # First of all, or the hooks of others would see a part instead of the gradient. (Not by move_to_end: what
                # runs them from C++ sees the order of insertion.)
                hooks: dict[int, Any] = p._post_accumulate_grad_hooks
                for key in [key for key in hooks if key != handle.id]:
                    hooks[key] = hooks.pop(key)
                self._handles.append(handle)

    def _watch(self, p: Tensor) -> None:
        # A hook on the tensor would also run in torch.autograd.grad, which hands nothing over: p.grad would be lost.
        node = self._nodes[p] = get_gradient_edge(p).node  # kept, since its hooks are gone when it is
        hook = self._weakly(type(self)._set_aside)
        self._handles.append(node.register_prehook(lambda _: hook(p)))

    def _weakly(self, method: Callable[[Any, Tensor], None]) -> Callable[[Tensor], None]:
        """The method as a hook that does not keep this object alive: the collector does not see references from nodes."""
        this = ref(self)
        return lambda p: None if (tracker := this()) is None else method(tracker, p)

    def _set_aside(self, p: Tensor) -> None:
        self._aside[p] = p.grad
        p.grad = None

    @torch.no_grad()
    def _add(self, p: Tensor) -> None:
        if p not in self._aside:  # moved to another dtype or device, and with it to another node
            self._watch(p)
        total, part = self._aside.pop(p, None), p.grad
        assert part is not None
        before = None if total is None else self._current(p, total)
        if part.requires_grad or (total is not None and (part.is_sparse or total.is_sparse)):
            part2 = squared_norm(part.detach())
            with torch.enable_grad():
                p.grad = part if total is None else total + part
            norm2 = squared_norm(p.grad.detach())
        else:
            part2, norm2 = backends.accumulate(total, part)
            p.grad = part if total is None else total
        added, count = self._measure(p, part.detach(), math.sqrt(part2))
        norms, parts = (before.norms, before.parts) if before else (0.0, 0)
        assert p.grad is not None
        self._sums[p] = _Sum(p.grad, p.grad._version, norms + added, norm2, parts + count)

    def _measure(self, p: Tensor, part: Tensor, norm: float) -> tuple[float, int]:
        """Sum of the norms of the parts in what one backward adds to ``p.grad``, and their number."""
        return norm, 1

    def _current(self, p: Tensor, grad: Tensor) -> _Sum:
        """What is known of a gradient, corrected for what has happened to it since."""
        known = self._sums.get(p)
        if known is None:  # left by somebody else: one part, none if zeroed
            norm2 = squared_norm(grad)
            return _Sum(grad, grad._version, math.sqrt(norm2), norm2, int(norm2 > 0))
        if known.grad is not grad or known.version != grad._version:
            norm2 = squared_norm(grad)
            norms = known.norms * math.sqrt(norm2 / known.norm2) if known.norm2 > 0 else math.sqrt(norm2)
            known = _Sum(grad, grad._version, norms, norm2, known.parts if norm2 > 0 else 0)
            self._sums[p] = known
        return known

    def norms(self, p: Tensor) -> tuple[float, float] | None:
        """Sum of the norms of the parts of ``p.grad``, and its squared norm; None where no backward was seen."""
        if p.grad is None or p not in self._sums:
            return None
        known = self._current(p, p.grad)
        return known.norms, known.norm2

    def counts(self) -> dict[Tensor, int]:
        """How many parts each gradient has had since the last step."""
        return {p: known.parts for p, known in self._sums.items()}

    def recheck(self) -> None:
        """Measure every gradient anew: torch.amp.GradScaler.unscale_ changes them and not their versions."""
        for known in self._sums.values():
            known.version = -1

    def reset(self) -> None:
        """Begin anew, after a step."""
        self._sums.clear()

    @property
    def active(self) -> bool:
        """Whether the hooks are still there."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks away; nothing is left in the backward."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        self.reset()
