"""Rules of whole matrices: two buckets of another backend, and between them the rule's matrix products, in PyTorch.

The first bucket steps matrices of zeros, one stack for every shape, with the gradients and states of the parameters: what it
leaves there is the rule's update. ``Matrices.make`` makes of a stack what moves the weights, and the second bucket steps the
parameters with that as their gradient. So sign, unscaling and clipping are in the first pass; decay, multipliers, noise and
averages in the second; and both are those of every other rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..rule import Matrices, Rule
from . import interface
from .foreach import objects
from .interface import (
    Backend,
    DeviceBucket,
    DeviceScalars,
    ParamEntry,
    PartNorms,
    ShardBucket,
    StepArgs,
    StepKey,
)

_MOST = 1 << 26  # elements that are multiplied at once: a stack of more takes more memory and is no faster


def dtype(matrices: Matrices, group: Mapping[str, Any], p: Tensor) -> torch.dtype:
    """The dtype of what lies between the two passes."""
    return p.dtype if p.dtype == torch.float64 else matrices.dtype(group)


class _Stack(NamedTuple):
    """Matrices of one shape, of parameters of one group."""

    group: int
    rows: int  # of the parameters; in memory rows may be columns
    columns: int
    updates: Tensor  # three dimensions


def _lie(p: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Sizes of a matrix in the order of memory, and the strides of a parameter of which it is a view.

    Where a parameter lies otherwise (with gaps, or its first dimension between others) the matrix is contiguous. That of a
    parameter in channels_last has its columns in another order, which the matrix products of a rule do not notice.
    """
    rows, columns = _sizes(p)
    strides = torch.empty_like(p, device="meta").stride()
    if rows > 1 and strides[0] == 1:
        return columns, rows, strides
    if rows > 1 and strides[0] != columns:
        strides = torch.empty(p.shape, device="meta").stride()
    return rows, columns, strides


def _sizes(p: Tensor) -> tuple[int, int]:
    return p.shape[0], math.prod(p.shape[1:])


class Bucket:
    """Parameters whose matrices are stepped together.

    Args:
        backend: that steps.
        rule: with ``matrices``, what it does with them.
        members: its parameters, none of them a shard.
        param_groups: the optimizer's.
        state: the optimizer's.
    """

    def __init__(
        self,
        backend: Backend,
        rule: Rule,
        matrices: Matrices,
        members: Sequence[ParamEntry],
        param_groups: list[dict[str, Any]],
        state: Mapping[Tensor, Any],
    ) -> None:
        self.matrices = matrices
        self.members = members
        self.groups = param_groups
        self._of_groups = {member.group for member in members}
        self._seen = self._look(param_groups, state)
        self._places = [_place(member.tensor) for member in members]
        self._stacks: list[_Stack] = []
        self._updates: list[Tensor] = [torch.empty(0)] * len(members)  # views of the stacks
        self._weights = [member.tensor.detach() for member in members]  # the same memory, with another gradient
        self._numbers = self._stack(members)  # of the stacks, by member
        self._bind()
        first = [
            ParamEntry(x, k, m.index, m.name, m.states, states_are_new=m.states_are_new)
            for x, k, m in zip(self._updates, self._numbers, members)
        ]
        states = [None if m.states is None else list[Tensor]() for m in members]
        second = [
            replace(m, tensor=w, group=k, states=of_m)
            for w, k, m, of_m in zip(self._weights, self._numbers, members, states)
        ]
        self._first_groups, self._second_groups = self._as_groups(self._updates), self._as_groups(self._weights)
        self._first_state = {
            x: dict(zip(rule.states, m.states)) for x, m in zip(self._updates, members) if m.states is not None
        }
        self.first = backend.bucket(rule, first, self._first_groups, self._first_state)
        self.second = backend.bucket(matrices.apply, second, self._second_groups, {})
        self._keys: list[StepKey] = []
        self._before: list[tuple[Tensor, Tensor]] = []  # states that a step has written, and what they were
        self.unbind()

    def _stack(self, members: Sequence[ParamEntry]) -> list[int]:
        """Make the stacks, and the views of them that are as large as the members."""
        alike: dict[Any, list[int]] = {}
        layouts = [_lie(member.tensor) for member in members]
        for i, (member, (above, beside, _)) in enumerate(zip(members, layouts)):
            p = member.tensor
            between = dtype(self.matrices, self.groups[member.group], p)
            alike.setdefault((member.group, _sizes(p), above, beside, between, p.device), []).append(i)
        numbers = [0] * len(members)
        for k, ((group, sizes, above, beside, between, device), places) in enumerate(alike.items()):
            stack = torch.zeros(len(places), above, beside, dtype=between, device=device)
            self._stacks.append(_Stack(group, sizes[0], sizes[1], stack))
            for n, i in enumerate(places):
                p, strides = members[i].tensor, layouts[i][2]
                self._updates[i] = stack.as_strided(p.shape, strides, n * above * beside)
                self._updates[i].grad_dtype = self._weights[i].grad_dtype = None  # any
                numbers[i] = k
        return numbers

    def _as_groups(self, tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
        """A group for every stack, with what torch.optim's own function for SGD reads."""
        of_sgd = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
        return [
            {**of_sgd, "params": [x for x, number in zip(tensors, self._numbers) if number == k]}
            for k in range(len(self._stacks))
        ]

    def _look(self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> list[Any]:
        """What would make the bucket stale if it were replaced."""
        here = [group for g, group in enumerate(param_groups) if g in self._of_groups]
        return [*objects(param_groups, state), *map(self.matrices.dtype, here)]

    def _bind(self) -> None:
        """Give the zeros the gradients of the parameters, and the weights the zeros."""
        for member, update, weight in zip(self.members, self._updates, self._weights):
            grad = member.tensor.grad
            update.grad = grad
            weight.grad = None if grad is None else update

    def unbind(self) -> None:
        """Let go of the gradients, and of what was prepared for a step that was not made."""
        for state, before in self._before:
            state.copy_(before)
        self._before = []
        for update in self._updates:
            update.grad = None

    @property
    def device(self) -> torch.device | None:
        """Of a DeviceBucket."""
        return self.first.device

    def collect_gradients(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]
    ) -> list[StepKey] | None:
        """Find this step's gradients: the keys that ``run`` needs arguments for, or None: plan anew."""
        found = self._look(param_groups, state)
        if len(found) != len(self._seen) or not all(map(is_, found, self._seen)):
            return None
        if self._places != [_place(member.tensor) for member in self.members]:
            return None
        self._bind()
        keys = self.first.collect_gradients(self._first_groups, self._first_state)
        if keys is None:
            return None
        self._keys = keys
        return [(self._stacks[key[0]].group, *key[1:]) for key in keys]

    def set_part_norms(self, norms: Sequence[PartNorms | None]) -> None:
        """Not needed: a matrix has no ratio that is formed from them."""

    def norms(
        self, args: Sequence[StepArgs], gradients: bool, directions: bool, scalars: DeviceScalars | None = None
    ) -> Tensor:
        """Of the gradients, where the norm of all is wanted."""
        return cast(ShardBucket, self.first).norms(_of_first(args), gradients, False, scalars)

    def set_norms(self, norms: Tensor) -> None:
        """As it found them: none of its members is a shard."""
        cast(ShardBucket, self.first).set_norms(norms)

    def grad_norm2(self) -> float:
        """Sum of squares of all gradients, as they lie in memory."""
        return self.first.grad_norm2()

    def sum_gradients(self, norm2: Tensor, add: bool) -> None:
        """The same, left on the device."""
        cast(DeviceBucket, self.first).sum_gradients(norm2, add)

    def prepare(self, args: Sequence[StepArgs], scalars: DeviceScalars | None = None) -> None:
        """Make what moves the weights, with the same arguments as ``run``, and keep the states until that was called.

        The products take memory and time, and may raise: memory ends, or somebody presses Ctrl-C.
        """
        states = [x for m in self.members if m.tensor.grad is not None for x in m.states or ()]
        before = [torch.empty_like(x) for x in states]
        if states:
            torch._foreach_copy_(before, states)
        self._before = list(zip(states, before))
        for stack in self._stacks:
            stack.updates.zero_()
        _run(self.first, _of_first(args), scalars)
        for k in {key[0] for key in self._keys}:
            group, *_, updates = self._stacks[k]
            for some in updates.split(max(1, _MOST // max(1, updates[0].numel()))):
                some.copy_(self.matrices.make(some, self.groups[group]))

    def run(self, args: Sequence[StepArgs], scalars: DeviceScalars | None = None) -> None:
        """Step every parameter that has a gradient, with what was prepared."""
        of_stack = {key[0]: of_key for key, of_key in zip(self._keys, args)}
        keys = self.second.collect_gradients(self._second_groups, {})
        assert keys is not None
        second = []
        for k, *_ in keys:
            group, rows, columns, _ = self._stacks[k]
            scale = self.matrices.scale(self.groups[group], rows, columns)
            second.append(of_stack[k]._replace(grad_scale=scale, coefficients=()))
        _run(self.second, second, None if scalars is None else DeviceScalars(found_inf=scalars.found_inf))
        self._before = []

    def capturing(self) -> bool:
        """Whether a step would go into a CUDA graph now."""
        return cast(DeviceBucket, self.first).capturing()

    def counts(self) -> list[tuple[int, int, int, int]]:
        """Of the second bucket, by the optimizer's groups."""
        found = cast(DeviceBucket, self.second).counts()
        return [(self._stacks[k].group, steps, samples, periods) for k, steps, samples, periods in found]

    def written_states(self) -> list[Tensor]:
        """Momentum and averages."""
        return [*self.first.written_states(), *self.second.written_states()]

    def ratios(self) -> list[float]:
        """The trust ratio of every member in the last step; 1 where it has none, NaN where it was not stepped."""
        return self.second.ratios()


def _place(p: Tensor) -> tuple[Any, ...]:
    return p.data_ptr(), p.dtype, p.device, p.shape, p.stride()


def _of_first(args: Sequence[StepArgs]) -> list[StepArgs]:
    """Of the step that leaves the rule's update where there were zeros: 0 - (-1) * update."""
    nothing: dict[str, Any] = dict.fromkeys(StepArgs._fields[StepArgs._fields.index("ratio") :])
    return [of_key._replace(lr=-1.0, decoupled_decay=0.0, independent_decay=0.0, **nothing) for of_key in args]


def _run(bucket: interface.Bucket, args: Sequence[StepArgs], scalars: DeviceScalars | None) -> None:
    if scalars is None:
        bucket.run(args)
    else:
        cast(DeviceBucket, bucket).run(args, scalars)
