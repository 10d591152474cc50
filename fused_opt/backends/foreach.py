"""torch.optim's own functions, many tensors at a time: what "auto" takes where no compiled backend can step.

Rules that torch.optim has are stepped so, as long as a step has neither trust ratio nor noise; anything else, and complex
parameters, is stepped as the reference does it, tensor by tensor. 16-bit parameters are stepped in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ..rule import Rule
from . import reference
from .interface import ParamEntry, StepArgs, StepKey
from .reference import DEVICES, accumulate, standard, steps_on_device, unavailable, unsupported

__all__ = ["DEVICES", "REUSABLE", "accumulate", "bucket", "standard", "steps_on_device", "unavailable", "unsupported"]

REUSABLE = True
_MOST = 1 << 26  # elements that are converted at once
_LARGE = 1 << 14  # from here on a CPU is faster tensor by tensor, which is torch's choice there


def _sgd(group: Mapping[str, Any], tensors: Any, members: Sequence[ParamEntry], **shared: Any) -> None:
    params, grads, *buffers = tensors
    new = members[0].states_are_new
    given: Any = [None] * len(params) if new or not buffers else list(buffers[0])
    sgd(
        params, grads, given, momentum=group["momentum"] if buffers else 0.0, dampening=group["dampening"],
        nesterov=group["nesterov"], **shared,
    )  # fmt: skip
    if new and buffers:
        torch._foreach_copy_(buffers[0], given)
    for member in members:
        member.states_are_new = False


def _adam(group: Mapping[str, Any], tensors: Any, members: Sequence[ParamEntry], **shared: Any) -> None:
    beta1, beta2 = group["betas"]
    largest = tensors[4] if len(tensors) > 4 else []
    steps: Any = [member.step for member in members]
    shared |= {"amsgrad": bool(largest), "beta1": float(beta1), "beta2": float(beta2), "eps": float(group["eps"])}
    p, g, m, v, *_ = tensors
    adam(p, g, m, v, largest, steps, **shared)


_FUNCTIONS: dict[str, Callable[..., None]] = {"sgd": _sgd, "momentum_sgd": _sgd, "adam": _adam, "amsgrad": _adam}


class Bucket(reference.Bucket):
    """Parameters that are stepped together as far as torch.optim can.

    It is kept from step to step, and so notices what is replaced.
    """

    def __init__(
        self,
        rule: Rule,
        members: Sequence[ParamEntry],
        param_groups: list[dict[str, Any]],
        state: Mapping[Tensor, Any],
    ) -> None:
        super().__init__(rule, members)
        self.groups = param_groups
        self.function = _FUNCTIONS.get(rule.name)
        self.seen = list(objects(param_groups, state))
        self.kinds = [(_kind(m.tensor), m.tensor.grad is not None and _kind(m.tensor.grad)) for m in members]

    def collect_gradients(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]
    ) -> list[StepKey] | None:
        """Find this step's gradients: the keys that ``run`` needs arguments for, or None: plan anew."""
        found = list(objects(param_groups, state))
        if len(found) != len(self.seen) or not all(map(is_, found, self.seen)):
            return None
        self.active = []
        self._norms.clear()
        self._parts = {}
        keys: dict[StepKey, int] = {}
        for member, (kind, of_grad) in zip(self.members, self.kinds):
            if (grad := member.tensor.grad) is None:
                continue
            if member.states is None or _kind(grad) != of_grad or _kind(member.tensor) != kind:
                return None
            self.active.append((member, keys.setdefault(member.key(), len(keys))))
        return list(keys)

    @torch.no_grad()
    def run(self, args: Sequence[StepArgs]) -> None:
        """Step every parameter that has a gradient."""
        self._ratios = {}
        together: dict[tuple[Any, ...], list[ParamEntry]] = {}
        able = [self._able(of_row) for of_row in args]
        exempt = [math.inf if of_row.ratio is None else of_row.ratio.exempt for of_row in args]
        for member, row in self.active:
            p, g = member.tensor, member.tensor.grad
            assert g is not None
            plain = g.layout == torch.strided and not g._is_zerotensor() and not p.is_complex() and member.exact is None
            plain = plain and not member.coded
            plain = plain and not any([t.is_neg() for t in (p, *(member.states or ()))])  # noqa: C419  # of few
            if able[row] and p.ndim <= exempt[row] and plain:
                alike = (
                    row,
                    member.lr_scale,
                    member.decay_scale,
                    member.states_are_new,
                    p.device,
                    p.dtype,
                    p.numel() > _LARGE,
                )
                together.setdefault(alike, []).append(member)
            else:
                self._step(member, args[row])
                member.advance(args[row])
        for (row, *_), members in together.items():
            for some in _in_parts(members):
                self._step_together(some, args[row])

    def _able(self, args: StepArgs) -> bool:
        """Whether torch.optim has a function for a step with these arguments."""
        if self.function is None or args.cautious is not None or args.independent_decay or args.rounding is not None:
            return False
        if args.decoupled_decay and self.function is not _adam:
            return False
        return not (args.noise and args.noise.sigma)

    def _step_together(self, members: Sequence[ParamEntry], args: StepArgs) -> None:
        assert self.function is not None
        self._ratios.update((member.index, 1.0) for member in members)
        first = members[0]
        p = first.tensor
        given: Any = [[m.tensor for m in members], [m.tensor.grad for m in members]]
        given += map(list, zip(*[m.states or () for m in members]))
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        tensors = [
            of_kind if all([t.dtype == dtype for t in of_kind]) else [t.to(dtype) for t in of_kind]  # noqa: C419
            for of_kind in given
        ]
        nesterov = self.groups[first.group].get("nesterov")  # torch adds the momentum to the gradients themselves
        if abs(args.grad_scale) != 1.0 or nesterov:
            tensors[1] = list(torch._foreach_mul(tensors[1], abs(args.grad_scale)))
        decay: dict[str, Any] = {"weight_decay": (args.coupled_decay + args.decoupled_decay) * first.decay_scale}
        if self.function is _adam:
            decay["decoupled_weight_decay"] = bool(args.decoupled_decay)
        self.function(
            self.groups[first.group], tensors, members, lr=args.lr * first.lr_scale, maximize=args.grad_scale < 0,
            foreach=None if p.device.type == "cpu" and p.numel() > _LARGE else True, **decay,
        )  # fmt: skip
        for place, (of_kind, computed) in enumerate(zip(given, tensors)):
            if place != 1 and of_kind is not computed:
                torch._foreach_copy_(of_kind, computed)
        if args.fold is not None:
            for member in members:
                self._fold(member, args, member.tensor.to(dtype))


def objects(param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> Iterator[Any]:
    """What would make a bucket stale if it were replaced."""
    for group in param_groups:
        yield group
        yield from group["params"]
    for p, of_p in state.items():
        yield p
        yield from of_p.values()


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """What a bucket was made for; that memory overlaps it was asked then."""
    lazily = tensor.is_neg(), tensor._is_zerotensor()  # another backend steps what is neither
    return type(tensor), tensor.layout, tensor.dtype, tensor.device, tensor.shape, *lazily


def _in_parts(members: Sequence[ParamEntry]) -> Iterator[list[ParamEntry]]:
    """Runs of members of so many elements that converting them takes little memory."""
    part: list[ParamEntry] = []
    elements = 0
    for member in members:
        if part and elements + member.tensor.numel() > _MOST:
            yield part
            part, elements = [], 0
        part.append(member)
        elements += member.tensor.numel()
    yield part


def bucket(
    rule: Rule,
    members: Sequence[ParamEntry],
    param_groups: list[dict[str, Any]],
    state: Mapping[Tensor, Any],
) -> Bucket:
    """The parameters, and what must not have changed until the next step."""
    return Bucket(rule, members, param_groups, state)
