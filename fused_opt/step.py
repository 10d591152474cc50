"""One step: its numbers, and the order of what happens. Either the host has the numbers, or the plan's GPU keeps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from .backends.interface import DeviceScalars, Norm, StepArgs, StepKey
from .checks import check_kind_of_lr, check_lr
from .extras import NO_ARGS, step_args
from .extras.clipping import PASS, RAISE, allows, clip_factor
from .extras.decay import COUPLED, DECOUPLED, INDEPENDENT
from .extras.rounding import rounds_at_random
from .extras.schedule import UNCOUNTED, counted
from .groups import Groups
from .parts.tracker import PartTracker
from .plan import Plan
from .rule import number
from .shard_norms import all_reduce_norms

_OfGroup: TypeAlias = tuple[tuple[Any, Any, Any, Any, Any], Sequence[float]]


class Step:
    """What is the same wherever the numbers are.

    As a context manager it leaves nothing behind of a step that was not made: no new state, and no shard bound.

    Args:
        param_groups: the optimizer's.
        groups: what they say.
        plan: that fits; None: it is still to be made.
        keys: what its ``collect_gradients`` returned.
    """

    overflowed = False  # GradScaler found an infinity: nothing is stepped
    scale: float = 1.0  # multiplies every gradient
    grad_norm: float | Callable[[], float] | None = None
    device: torch.device | None = None  # where tensors are read by the kernels
    scalars: DeviceScalars | None = None  # of a DeviceStep

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        groups: Groups,
        plan: Plan | None,
        keys: Any,
        lrs: list[float | Tensor],
    ) -> None:
        self.param_groups = param_groups
        self.groups = groups
        self.plan = plan
        self.keys: list[list[StepKey]] = keys
        self.lrs = lrs
        self.stepping = any([isinstance(lr, Tensor) or lr for lr in lrs])  # noqa: C419  # of one or two, a list is faster
        self.captured = plan is not None and plan.capturing()  # into a graph, whose replays will make the step
        self.binds = plan is None or plan.binds
        self.parts: PartTracker | None = None
        self._made: list[list[StepArgs]] = []
        self._made_for: tuple[Plan | None, list[list[StepKey]], float] | None = None
        self._of_groups: dict[float, list[_OfGroup]] = {}  # by scale
        self.extras = self._make_extras()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.plan is not None:
            self.plan.undo()

    def again(self, keys: list[list[StepKey]]) -> bool:
        """Whether the coming step, by the same plan and of groups that say the same, is this one with other gradients.

        What depends on the counts is then that step's.
        """
        assert self.plan is not None
        if self.captured or (self.plan.on_devices and self.plan.capturing()):
            return False
        self.keys = keys
        if self.groups.counted:
            self.extras = self._make_extras()
            self._made_for = None
        return True

    def _make_extras(self) -> list[tuple[Any, ...]]:
        """Of every group what StepArgs say of the extras."""
        return [
            step_args(group, _known(group, lr)) if spec.has_args and self.stepping else NO_ARGS
            for group, spec, lr in zip(self.param_groups, self.groups.specs, self.lrs)
        ]

    def _args(self) -> list[list[StepArgs]]:
        """For every bucket, what a step does to the parameters of every key."""
        made_for = self.plan, self.keys, self.scale
        if self._made_for == made_for:
            return self._made
        specs, of_group = self.groups.specs, self._of_groups.get(self.scale)
        if of_group is None:
            of_group = self._of_groups[self.scale] = self._make_of_group()
        assert self.plan is not None
        self._made = [
            [
                StepArgs(*of_group[g][0], specs[g].rule.at(of_group[g][1], step, scalar, earlier), *extras[g])
                for g, step, scalar, earlier in of_bucket
            ]
            for bucket, of_bucket in zip(self.plan.buckets, self.keys)
            for extras in [self.extras if bucket.device is None else self._counted()]
        ]
        self._made_for = made_for
        return self._made

    def _make_of_group(self) -> list[_OfGroup]:
        """Of every group what is first in StepArgs, and the coefficients before ``at_step``."""
        of_group: list[_OfGroup] = []
        numbers: tuple[Any, Any, Any, Any, Any]
        for group, spec, lr in zip(self.param_groups, self.groups.specs, self.lrs):
            decay = on_device(group, group["weight_decay"], self.device)
            if spec.averaged and self.stepping and (rate := group["averaging"].rate) != 1:  # a tensor stays where it is
                lr, decay = lr * rate, decay * rate if spec.decay == INDEPENDENT else decay
            scale = -self.scale if group["maximize"] else self.scale
            if spec.decay == COUPLED:
                numbers = lr, scale, decay, 0.0, 0.0
            elif spec.decay == DECOUPLED:
                numbers = lr, scale, 0.0, decay, 0.0
            else:
                numbers = lr, scale, 0.0, 0.0, decay if self.stepping else 0.0
            of_group.append((numbers, spec.rule.coefficients(group)))
        return of_group

    def _counted(self) -> list[tuple[Any, ...]]:
        """For a device, which counts, what noise and averages are computed from in place of what they are in this step."""
        found: list[tuple[Any, ...]] = []
        for group, extras in zip(self.param_groups, self.extras):
            if not self.stepping:
                found.append(extras)
            elif not _depends_on_counts(group):
                found.append((*extras, UNCOUNTED if self.captured else None))
            elif (by_device := counted(group)) is None:
                found.append(extras)
            else:
                found.append((extras[0], None, None, *extras[3:], by_device))
        return found

    def take_parts(self, parts: PartTracker) -> None:
        """Tell the backends the norms of the gradients' parts."""
        assert self.plan is not None
        parts.share()
        for bucket in self.plan.buckets:
            bucket.set_part_norms([parts.norms(member.parameter) for member in bucket.members])
        self.parts = parts

    def count_writes_to_states(self) -> None:
        """Tell autograd that the step has written the states."""
        assert self.plan is not None
        self.plan.count_writes_to_states()

    def complete_norms(self) -> None:
        """Where shards are stepped, add up the norms of whole tensors over processes."""
        assert self.plan is not None
        if self.plan.shards:
            wanted = Norm.WEIGHT | Norm.GRADIENT
            if not self.groups.wants_norm:  # or the scale of the directions' gradients is still to come
                wanted |= Norm.DIRECTION
            all_reduce_norms(
                self.plan,
                self._args(),
                self.extras,
                self.parts,
                wanted,
                gradients=self.groups.wants_norm,
                scalars=self.scalars,
            )

    def _complete_directions(self) -> None:
        """The same for LAMB's directions, once the scale of the gradients is known."""
        assert self.plan is not None
        if self.plan.shards:
            all_reduce_norms(
                self.plan, self._args(), self.extras, None, Norm.DIRECTION, gradients=False, scalars=self.scalars
            )


class HostStep(Step):
    """A step whose numbers the host has; it waits for those that a GPU has."""

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        groups: Groups,
        plan: Plan | None,
        keys: Any,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        super().__init__(param_groups, groups, plan, keys, rates(param_groups, None))
        self.overflowed = found_inf is not None and bool(found_inf.item())
        self.scale = 1.0 if grad_scale is None else 1.0 / grad_scale.item()

    def clip(self) -> bool:
        """Scale the gradients down to ``max_grad_norm``; False: they are not finite, and the step may not be made."""
        assert self.plan is not None
        if not self.groups.wants_norm:
            return True
        group = self.param_groups[0]
        self.grad_norm = norm = self.scale * math.sqrt(self.plan.grad_norm2())
        if not allows(group["nonfinite"], norm):
            return False
        self.scale *= clip_factor(norm, group["max_grad_norm"])
        self._complete_directions()
        return True

    def check_finite(self) -> None:
        """Raise, where ``nonfinite="raise"`` asks for it, an error that names the parameters."""
        assert self.plan is not None
        if self.param_groups[0]["nonfinite"] == RAISE:
            raise RuntimeError(
                f"the gradient of parameter {', '.join(self.plan.nonfinite())} is not finite, and nonfinite='raise' was "
                f"asked for; nonfinite='skip' leaves out such steps"
            )

    def run(self) -> None:
        """Make it."""
        assert self.plan is not None
        self.plan.run(self._args())


class DeviceStep(Step):
    """A step that the host does not wait for: numbers that are on the GPU, such as the step count, are read there."""

    plan: Plan
    scalars: DeviceScalars

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        groups: Groups,
        plan: Plan,
        keys: Any,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        super().__init__(param_groups, groups, plan, keys, rates(param_groups, plan.device))
        self.scalars = DeviceScalars(found_inf, grad_scale)
        self.device = plan.device

    def clip(self) -> bool:
        """Have the GPU compute the norm and the factor that clips the gradients."""
        if self.groups.wants_norm:
            norm2 = self.plan.sum_gradients()
            self.scalars = self.scalars._replace(norm2=norm2, max_norm=self.param_groups[0]["max_grad_norm"])
            self.grad_norm = norm_reader(norm2, self.scalars.grad_scale)
            self._complete_directions()
        return True

    def check_finite(self) -> None:
        """Never asked: where gradients that are not finite matter, the host has the numbers."""

    def run(self) -> None:
        """Queue it.

        Raises:
            RuntimeError: in a capture, where replays could not do what a step does to averages.
        """
        if self.captured:
            _refuse_averages(self.param_groups, self.plan)
        self.plan.run(self._args(), self.scalars)


def host_decides(groups: Sequence[Mapping[str, Any]], found_inf: Tensor | None, plan: Plan) -> bool:
    """Whether the host must read numbers from the GPU: to skip or raise, and to count steps where they are keys."""
    counts = any(map(_depends_on_counts, groups))
    return groups[0]["nonfinite"] != PASS or (found_inf is not None and counts and not plan.capturing())


def _depends_on_counts(group: Mapping[str, Any]) -> bool:
    """Whether the steps that a group counts decide on what a step does: on noise, averages and rounding at random."""
    return group["noise"] is not None or group["averaging"] is not None or rounds_at_random(group["rounding"])


def _known(group: Mapping[str, Any], lr: float | Tensor) -> float | Tensor:
    """A rate for what the host computes of noise: none that is on a device which computes the noise itself."""
    return 0.0 if isinstance(lr, Tensor) and counted(group) is not None else lr


def _refuse_averages(groups: Sequence[Mapping[str, Any]], plan: Plan) -> None:
    """Raise where a captured step has averages that its replays could not continue."""
    begins_anew = [
        g for g, group in enumerate(groups) if getattr(group["averaging"], "on_write_back", "keep") == "zero"
    ]
    idle = [m.name for b in plan.buckets for m in b.members if m.average is not None and m.tensor.grad is None]
    if not begins_anew and not idle:
        return
    why = (
        f"group {begins_anew[0]} has on_write_back='zero', by which new states are made; 'keep' would work"
        if begins_anew
        else f"parameter {idle[0]} has an average and no gradient, and the host takes its samples; a gradient of zeros would "
        f"work, or requires_grad_(False) before the optimizer is made"
    )
    raise RuntimeError(
        f"a step with averaging cannot be captured in a CUDA graph: {why}, or a step outside of the graph"
    )


def rates(groups: Sequence[Mapping[str, Any]], device: torch.device | None) -> list[float | Tensor]:
    """The groups' learning rates: those that are on the device as they are, others as floats.

    Raises:
        ValueError: for one that is none, or negative, where the host looks at it.
    """
    for group in groups:
        if not isinstance(group["lr"], float):
            check_kind_of_lr(group)
    if device is None:
        lrs: list[float | Tensor] = [number(group, group["lr"]) for group in groups]
    else:
        lrs = [on_device(group, group["lr"], device) for group in groups]
    for group, lr in zip(groups, lrs):
        if (device is None or isinstance(lr, float)) and not lr >= 0.0:
            check_lr(group)
    return lrs


def on_device(group: Mapping[str, Any], value: Any, device: torch.device | None) -> float | Tensor:
    """A hyper-parameter as it is where the kernels read it there, otherwise as the host's number."""
    if device is not None and getattr(value, "device", None) == device:
        return value
    return number(group, value)


def norm_reader(norm2: Tensor, scale: Tensor | None) -> Callable[[], float]:
    """Reads, and waits for, the norm of gradients that were multiplied with a scale, from the sum of their squares."""
    scale = None if scale is None else scale.clone()  # a GradScaler writes its own after the step
    return lambda: math.sqrt(norm2.item()) / (1.0 if scale is None else scale.item())
