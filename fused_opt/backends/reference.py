"""The reference: a rule in plain PyTorch, tensor by tensor. Runs anywhere; what the others are tested against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..extras.noise import normal, normal_at
from ..plan import Member, Row, warn_not_finite
from ..rule import Rule


def unavailable() -> str | None:
    """Nothing keeps plain PyTorch from running."""
    return None


def unsupported(rule: Rule | None, tensors: Sequence[Tensor], noisy: bool = False) -> str | None:
    """Nothing that torch.optim can step is beyond it."""
    return None


def norm2(tensor: Tensor) -> float:
    """Sum of squares, in float64."""
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return float(torch.linalg.vector_norm(values.double() if not values.is_complex() else values).item()) ** 2


@torch.no_grad()
def accumulate(total: Tensor | None, part: Tensor) -> tuple[float, float]:
    """``total += part``, and the sums of squares of both."""
    if total is None:
        return norm2(part), norm2(part)
    total.add_(part)
    return norm2(part), norm2(total)


def trust_ratio(
    member: Member, row: Row, weight2: float, grad2: float, parts: float, direction2: float, weight_decay: float
) -> float:
    """The ratio of fused_opt.extras.trust_ratio, from sums of squares and the sum of the parts' norms (-1: one part)."""
    assert row.ratio is not None
    kind, coefficient, cap, eps, _ = row.ratio
    weight, scale = math.sqrt(weight2), abs(row.grad_scale)
    if kind == 1:  # lars
        grad = scale * math.sqrt(grad2)
        denominator = grad + weight_decay * weight + eps if grad else 0.0
    elif kind == 2:  # clars
        sum_of_norms = scale * (parts if parts >= 0 else math.sqrt(grad2))
        denominator = sum_of_norms + eps if sum_of_norms else 0.0
    else:  # lamb
        denominator = math.sqrt(direction2) + eps if direction2 else 0.0
    if not (math.isfinite(weight) and math.isfinite(denominator)):
        warn_not_finite(member)
        return min(cap, 1.0)
    return min(cap, coefficient * weight / denominator if weight > 0 and denominator > 0 else 1.0)


class Bucket:
    """Parameters that are stepped one by one."""

    def __init__(
        self,
        rule: Rule,
        members: Sequence[Member],
        param_groups: list[dict[str, Any]],
        state: Mapping[Tensor, Any],
        noisy: bool,
    ) -> None:
        self.rule = rule
        self.members = members
        self.active: list[tuple[Member, int]] = []
        self._norms: dict[int, list[float]] = {}  # by index: weight, gradient, direction, squared; -1 where not known
        self._parts: dict[int, float] = {}
        self._ratios = dict.fromkeys((member.index for member in members), 1.0)

    def gather(self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> list[tuple[int, float]] | None:
        """Find this step's gradients: the (group, step count) pairs that ``run`` needs rows for, or None: plan anew."""
        self.active = []
        self._norms = {member.index: [-1.0, -1.0, -1.0] for member in self.members}
        self._parts = {}
        keys: dict[tuple[int, float], int] = {}
        for member in self.members:
            if member.tensor.grad is None:
                continue
            if member.states is None:
                return None
            key = (member.group, member.count() + 1)
            self.active.append((member, keys.setdefault(key, len(keys))))
        return list(keys)

    def know(self, norms: list[tuple[float, float] | None]) -> None:
        """For every member the sum of its gradient's parts' norms and the gradient's sum of squares, where known."""
        for member, known in zip(self.members, norms):
            if known is not None:
                self._parts[member.index], self._norms[member.index][1] = known

    @torch.no_grad()
    def norms(self, rows: Sequence[Row], gradients: bool, directions: bool) -> list[list[float]]:
        """Squared norms of weights, gradient and direction (where asked for) by member; -1 where there is no gradient."""
        for member, row in self.active:
            p, g, direction, *_ = self._direct(member, rows[row])
            for which, tensor in enumerate((p, g, direction) if directions else (p, g)):
                self._norm2(member, which, tensor)
        return [self._norms[member.index] for member in self.members]

    def know_norms(self, norms: Sequence[Sequence[float]]) -> None:
        """What the norms of the whole tensors are, where the members are shards of them."""
        self._norms = {member.index: list(of_member) for member, of_member in zip(self.members, norms)}

    def _norm2(self, member: Member, which: int, tensor: Tensor) -> float:
        known = self._norms[member.index]
        if known[which] == -1:
            known[which] = norm2(tensor)
        return known[which]

    def grad_norm2(self) -> float:
        """Sum of squares of all gradients, as they lie in memory."""
        return sum(self._norm2(m, 1, m.tensor.grad) for m, _ in self.active if m.tensor.grad is not None)

    @torch.no_grad()
    def run(self, rows: Sequence[Row]) -> None:
        """Step every parameter that has a gradient."""
        for member, row in self.active:
            self._step(member, rows[row])
            member.advance()

    def _direct(self, member: Member, row: Row) -> tuple[Tensor, ...]:
        """Parameter, gradient, direction and new states, real and dense, in the arithmetic's dtype."""
        assert member.tensor.grad is not None
        tensors = [member.tensor, member.tensor.grad, *(member.states or ())]
        if member.tensor.is_complex():
            tensors = [torch.view_as_real(tensor.resolve_conj()) for tensor in tensors]
        dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        p, g, *states = ((tensor.to_dense() if tensor.is_sparse else tensor).to(dtype) for tensor in tensors)
        weight_decay = row.coefficients[0] * member.decay_scale
        return p, g, *self.rule.direction(p, row.grad_scale * g, *states, weight_decay, *row.coefficients[1:])

    @staticmethod
    def _noise(member: Member, seed: int, t: int, p: Tensor) -> Tensor:
        if member.place is None:
            return normal(seed, member.index, t, p.numel(), p.device)
        elements = member.place.elements(member.tensor.shape).to(p.device)
        if member.tensor.is_complex():  # each two numbers
            elements = torch.stack([2 * elements, 2 * elements + 1], dim=1).flatten()
        return normal_at(seed, member.index, t, elements)

    def _step(self, member: Member, row: Row) -> None:
        p, g, direction, *new = self._direct(member, row)
        average = member.average
        if average is not None and average.is_complex():
            average = torch.view_as_real(average)
        ratio = 1.0
        if row.ratio is not None and member.tensor.ndim > row.ratio[-1]:
            norms = [self._norm2(member, which, tensor) for which, tensor in enumerate((p, g, direction))]
            parts, weight_decay = self._parts.get(member.index, -1.0), row.coefficients[0] * member.decay_scale
            ratio = trust_ratio(member, row, norms[0], norms[1], parts, norms[2], weight_decay)
        self._ratios[member.index] = ratio
        updated = p - row.lr * member.lr_scale * ratio * direction
        if row.noise is not None:
            sigma, relative, seed, t = row.noise
            if relative and p.numel():
                elsewhere = 0 if member.place is None else member.place.elsewhere * p.numel() // member.tensor.numel()
                sigma *= math.sqrt(self._norm2(member, 0, p) / (p.numel() + elsewhere))
            updated = updated + sigma * self._noise(member, seed, t, p).to(p.dtype).reshape(p.shape)
        for tensor, value in zip([member.tensor, *(member.states or ())], [updated, *new]):
            # Not through the real view: that of a lazy conjugate is a copy.
            tensor.copy_(torch.view_as_complex(value.contiguous()) if tensor.is_complex() else value)
        if row.average is not None and average is not None:
            add, share, fresh, write_back = row.average
            stored = torch.empty(0, dtype=member.tensor.dtype).real.dtype
            p = updated.to(stored).to(p.dtype)
            v = torch.zeros_like(p) if fresh else average.to(p.dtype)
            v = v + add * (p - share * v)
            average.copy_(v)
            if write_back:
                member.tensor.copy_(torch.view_as_complex(v) if member.tensor.is_complex() else v)

    def ratios(self) -> list[float]:
        """The trust ratio of every member in the last step."""
        return [self._ratios[member.index] for member in self.members]
