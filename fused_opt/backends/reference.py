"""The reference: a rule in plain PyTorch, tensor by tensor. Runs anywhere; what the others are tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import Member
from ..rule import Rule


def unavailable() -> str | None:
    """Nothing keeps plain PyTorch from running."""
    return None


def unsupported(rule: Rule, tensors: Sequence[Tensor]) -> str | None:
    """Nothing that torch.optim can step is beyond it."""
    return None


class Bucket:
    """Parameters that are stepped one by one."""

    def __init__(
        self,
        rule: Rule,
        members: Sequence[Member],
        param_groups: list[dict[str, Any]],
        state: Mapping[Tensor, Any],
    ) -> None:
        self.rule = rule
        self.members = members
        self.active: list[tuple[Member, int]] = []

    def gather(self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> list[tuple[int, float]] | None:
        """Find this step's gradients; the (group, step count) pairs that ``run`` needs rows for, or None: plan anew."""
        self.active = []
        keys: dict[tuple[int, float], int] = {}
        for member in self.members:
            if member.tensor.grad is None:
                continue
            if member.states is None or any(
                state[member.tensor].get(name) is not s for name, s in zip(self.rule.states, member.states)
            ):
                return None
            key = (member.group, member.count() + 1)
            self.active.append((member, keys.setdefault(key, len(keys))))
        return list(keys)

    @torch.no_grad()
    def run(self, rows: Sequence[Sequence[float]]) -> None:
        """Step every parameter that has a gradient."""
        for member, row in self.active:
            lr, grad_scale, weight_decay, *coefficients = rows[row]
            tensors = [member.tensor, member.tensor.grad, *(member.states or ())]
            if member.tensor.is_complex():
                tensors = [torch.view_as_real(tensor.resolve_conj()) for tensor in tensors]
            dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
            p, g, *states = (tensor.to(dtype) for tensor in tensors)
            if g.is_sparse:
                g = g.to_dense()
            direction, *new = self.rule.direction(
                p, grad_scale * g, *states, weight_decay * member.decay_scale, *coefficients
            )
            for tensor, value in zip(tensors[2:], new):
                tensor.copy_(value)
            tensors[0].copy_(p - lr * member.lr_scale * direction)
            member.advance()
