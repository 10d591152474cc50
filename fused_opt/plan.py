"""Parameter groups -> buckets that one backend steps; kept until a pointer, a state or a group changes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .rule import Rule
from .shards import Place, Shard, add_up, check_alike, is_spread, local

AVERAGE = "average"  # the slot in a parameter's state
_said: set[str] = set()
_captured: list[Tensor] = []  # what CUDA graphs refer to, which may outlive the plan


def warn_once(message: str) -> None:
    """Warn, once per process and message."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=4)


class Shape(NamedTuple):
    """What of a group's hyper-parameters decides how its parameters are stepped."""

    rule: Rule
    noisy: bool
    averaged: bool


class Row(NamedTuple):
    """What a step does to the parameters of one group that have taken equally many steps."""

    lr: float | Tensor  # a tensor only where Plan.device has it
    grad_scale: float
    coefficients: Sequence[float]
    ratio: tuple[int, float, float, float, int] | None = None  # TrustRatio.row()
    noise: tuple[float, bool, int, int] | None = None  # sigma, relative, seed, t
    average: tuple[float, float, bool, bool] | None = None  # averaging.Fold


class Signals(NamedTuple):
    """What of a step's scale is left on the device, for whoever steps there to read."""

    found_inf: Tensor | None = None  # not 0: nothing is stepped, nothing counted
    grad_scale: Tensor | None = None  # what the gradients were multiplied with
    norm2: Tensor | None = None  # the sum of squares of all gradients, float64, to be clipped
    max_norm: float = 0.0  # to this norm


@dataclass
class Member:
    """One parameter of a bucket."""

    tensor: Tensor  # what is stepped: of a DTensor the part that lies here
    group: int
    index: int  # in the optimizer
    name: str
    states: list[Tensor] | None  # None until its first gradient
    step: Tensor | None
    average: Tensor | None
    fresh: bool  # its states were made for the coming step
    lr_scale: float = 1.0
    decay_scale: float = 1.0
    shard: Shard | None = None  # of a DTensor

    @property
    def parameter(self) -> Tensor:
        """What the optimizer was given."""
        return self.tensor if self.shard is None else self.shard.parameter

    @property
    def place(self) -> Place | None:
        """Where in the whole tensor a shard lies."""
        return None if self.shard is None else self.shard.place

    def count(self) -> float:
        """How many steps it has taken; 0 or 1 where torch.optim keeps no count."""
        return self.step.item() if self.step is not None else float(not self.fresh)

    def advance(self) -> None:
        """Count one more step."""
        self.fresh = False
        if self.step is not None:
            self.step.add_(1)


def name_of(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """What to call a parameter."""
    names = group.get("param_names")
    return names[index] if names else f"{index} of group {group_index}"


def _check(name: str, what: str, found: Tensor, p: Tensor) -> None:
    check_alike(name, p, what, found)
    if found.shape != p.shape:
        raise RuntimeError(
            f"parameter {name} has shape {tuple(p.shape)} and its {what} {tuple(found.shape)}; they must be equal. If "
            f"the parameter was resized, clear its gradient and its entry in optimizer.state"
        )
    if found.device != p.device:
        raise RuntimeError(
            f"parameter {name} is on {p.device} and its {what} on {found.device}; they must be on the same device. "
            f"Move the model before making the optimizer, or load_state_dict after moving it"
        )
    if found.is_complex() != p.is_complex() or not (found.is_floating_point() or found.is_complex()):
        raise RuntimeError(f"parameter {name} is {p.dtype} and its {what} {found.dtype}, which do not go together")


def _counts_there(backend: str, p: Tensor) -> bool:
    """Whether a backend counts the steps of a parameter on its device."""
    counts_there = getattr(backends.get(backend), "counts_there", None)
    return counts_there is not None and counts_there(p)


def warn_not_finite(member: Member) -> None:
    """Say, once per parameter, that its trust ratio could not be formed."""
    warn_once(f"the norms of parameter {member.name} are not finite: its trust ratio is 1 in such steps")


class Plan:
    """Which backend steps which parameters.

    Args:
        param_groups: the optimizer's groups.
        state: the optimizer's state; missing states of parameters that have a gradient are created, after every check
            has passed.
        shapes: of every group.
        backend: ``"auto"`` or a backend's name.
        state_dtype: dtype of new states; None: the parameter's.
        scales: multipliers (learning rate, weight decay) by parameter.

    Raises:
        RuntimeError: if a gradient or a state does not fit its parameter, or the named backend cannot step it; nothing has
            been changed then.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        shapes: list[Shape],
        backend: str,
        state_dtype: torch.dtype | None,
        scales: Mapping[Tensor, tuple[float, float]],
    ) -> None:
        self.shapes = shapes
        self._created: list[tuple[Tensor, str]] = []
        chosen: dict[tuple[str, Rule, Any], list[Member]] = {}
        index = 0
        for g, (group, shape) in enumerate(zip(param_groups, shapes)):
            for i, p in enumerate(group["params"]):
                name = name_of(group, g, i)
                tensors = [local(tensor) for tensor in self._look(name, shape, p, state.get(p, {}))]
                shard = Shard(name, p, shape.noisy) if is_spread(p) else None
                of_p = self._choose(name, shape, backend, tensors, shard is not None)
                # A launch is on one GPU and in one arithmetic.
                lane = (p.device, p.dtype == torch.float64) if _counts_there(of_p, p) else None
                key = (of_p, shape.rule, lane)
                tensor = p if shard is None else shard.tensor
                member = Member(tensor, g, index, name, None, None, None, False, *scales.get(p, (1.0, 1.0)), shard)
                chosen.setdefault(key, []).append(member)
                index += 1
        for (name, rule, _), members in chosen.items():
            for member in members:
                self._fill(member, rule, param_groups[member.group], state, state_dtype, name)

        self.shards = [member.shard for members in chosen.values() for member in members if member.shard is not None]
        for shard in self.shards:
            shard.lend()
        noisy = any(shape.noisy for shape in shapes)
        self.buckets = [
            backends.get(name).Bucket(rule, members, param_groups, state, noisy)
            for (name, rule, _), members in chosen.items()
        ]
        #: Of all buckets, if they can leave numbers there that the host need not know.
        devices = {getattr(bucket, "device", None) for bucket in self.buckets}
        self.device: torch.device | None = devices.pop() if len(devices) == 1 else None
        self._norm2 = None if self.device is None else torch.zeros((), dtype=torch.float64, device=self.device)
        # The reference cannot tell that nothing changed; alone, planning anew each step is what costs least.
        self.lasting = any(name != "reference" for name, *_ in chosen)

    @staticmethod
    def _look(name: str, shape: Shape, p: Tensor, of_p: Mapping[str, Any]) -> list[Tensor]:
        if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape)):
            raise RuntimeError(
                f"parameter {name} has elements that share memory (strides {p.stride()}), which cannot be written one by "
                f"one; clone() it before making it a parameter"
            )
        step = of_p.get("step") if shape.rule.counts_steps else None
        if step is not None and not (
            isinstance(step, Tensor)
            and step.numel() == 1
            and step.dtype in (torch.float32, torch.float64)
            and step.device in (torch.device("cpu"), p.device)
        ):
            raise RuntimeError(
                f"parameter {name} has {step!r} as its state 'step'; it must be a float32 or float64 tensor of one element "
                f"on the CPU or on {p.device}"
            )
        tensors = [p]
        if p.grad is not None:
            if p.grad.is_sparse and shape.rule.counts_steps:
                raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
            _check(name, "gradient", p.grad, p)
            tensors.append(p.grad)
        for slot in (*shape.rule.states, *([AVERAGE] if shape.averaged else [])):
            if of_p.get(slot) is not None:
                _check(name, f"state {slot!r}", of_p[slot], p)
                tensors.append(of_p[slot])
        return tensors

    @staticmethod
    def _choose(name: str, shape: Shape, backend: str, tensors: Sequence[Tensor], shard: bool) -> str:
        def unsupported(module: Any) -> str | None:
            there = getattr(module, "counts_there", None)
            if shard and (not hasattr(module.Bucket, "norms") or (there and there(tensors[0]))):
                return "a shard of a DTensor; it cannot add up norms over processes"
            return module.unsupported(shape.rule, tensors, shape.noisy)

        if backend != "auto":
            module = backends.get(backend)
            if reason := module.unavailable() or unsupported(module):
                raise RuntimeError(
                    f"backend {backend!r} cannot step parameter {name}: {reason}. backend='auto' takes one that can"
                )
            return backend
        for candidate in backends.BACKENDS:
            module = backends.get(candidate)
            if (candidate, tensors[0].device.type) in backends.UNSEEN:
                continue
            if reason := module.unavailable():
                if tensors[0].device.type in module.DEVICES:
                    warn_once(f"fused_opt runs without its {candidate} backend: {reason}")
            elif unsupported(module) is None:
                return candidate
        raise AssertionError("the reference backend supports everything")

    def _fill(
        self,
        member: Member,
        rule: Rule,
        group: Mapping[str, Any],
        state: dict[Tensor, Any],
        dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        """Point the member at its states; a parameter that has a gradient gets those it lacks."""
        p, averaged = member.parameter, group["averaging"] is not None
        hold = local if member.shard is None else member.shard.hold
        slots = [*(["step"] if rule.counts_steps else []), *rule.states, *([AVERAGE] if averaged else [])]
        if not slots:
            member.states = []
            return
        for slot in slots:
            if p.grad is None or (p in state and state[p].get(slot) is not None):
                continue
            if slot == "step":
                default = torch.promote_types(torch.get_default_dtype(), torch.float32)
                state[p][slot] = torch.tensor(0.0, dtype=default)
            else:
                wanted = torch.promote_types(p.dtype, torch.float32) if slot == AVERAGE else dtype
                wanted = None if p.is_complex() else wanted
                state[p][slot] = torch.zeros_like(
                    p, memory_format=torch.preserve_format, dtype=wanted, requires_grad=False
                )
                member.fresh |= slot != AVERAGE
                if slot == AVERAGE:  # earlier samples of the period found the parameter as it is now
                    counts = (group[count] for count in ("steps", "samples", "periods"))
                    state[p][slot].copy_(p).div_(group["averaging"].normalizer(*counts))
            self._created.append((p, slot))
        of_p = state.get(p, {})
        for slot in rule.states:
            if of_p.get(slot) is not None and of_p[slot].is_sparse:  # torch.optim.SGD's, after sparse gradients
                of_p[slot] = of_p[slot].to_dense()
        if of_p.get("step") is not None and _counts_there(backend, p):
            of_p["step"] = of_p["step"].to(device=p.device, dtype=torch.float32)
        if all(of_p.get(slot) is not None for slot in slots):
            member.states = [hold(of_p[slot]) for slot in rule.states]
            member.step = of_p["step"] if rule.counts_steps else None
            member.average = hold(of_p[AVERAGE]) if averaged else None

    @property
    def creates(self) -> bool:
        """Whether states were created for the coming step."""
        return bool(self._created)

    def undo(self, state: dict[Tensor, Any]) -> None:
        """Take away the states that were created for a step that is not made."""
        for p, slot in self._created:
            del state[p][slot]
            if not state[p]:
                del state[p]
        self._created.clear()
        for shard in self.shards:
            shard.give_back()

    def gather(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]
    ) -> list[list[tuple[int, float]]] | None:
        """Find this step's gradients: (group, step count) pairs per bucket, or None: the plan must be made anew."""
        if self.shards and not all([shard.lend() for shard in self.shards]):  # noqa: C419  # every one is asked
            return None
        keys = []
        for bucket in self.buckets:
            if (of_bucket := bucket.gather(param_groups, state)) is None:
                return None
            keys.append(of_bucket)
        return keys

    def sum_gradients(self) -> Tensor:
        """The sum of squares of all gradients, left on the device."""
        assert self._norm2 is not None
        if self._norm2.is_cuda and torch.cuda.is_current_stream_capturing():
            _captured.append(self._norm2)
        for place, bucket in enumerate(self.buckets):
            bucket.sum_gradients(self._norm2, place > 0)
        return self._norm2

    def nonfinite(self) -> list[str]:
        """The parameters whose gradient is not finite, in whatever process."""
        members = [m for bucket in self.buckets for m in bucket.members if m.tensor.grad is not None]
        bad = [float(not m.tensor.grad.isfinite().all()) for m in members]
        cut = [i for i, member in enumerate(members) if member.shard is not None]
        for i, (count,) in zip(cut, add_up([[bad[i]] for i in cut], [members[i].parameter for i in cut])):
            bad[i] = count
        return [m.name for m, count in zip(members, bad) if count]

    def run(self, rows: Sequence[Sequence[Row]], signals: Signals | None = None) -> None:
        """Step every bucket, with a row for every pair that ``gather`` returned."""
        for bucket, of_bucket in zip(self.buckets, rows):
            if self.device is not None:
                bucket.signals = signals or Signals()
            bucket.run(of_bucket)
        self._created.clear()
        for shard in self.shards:
            if shard.tensor.grad is not None:
                shard.written()
            shard.give_back()
