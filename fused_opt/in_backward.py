"""Gradient release: every parameter is stepped within the backward, as soon as its gradient is complete, and that freed."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import finalize, ref

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .backends.interface import Bucket
from .extras.clipping import wants_norm
from .groups import GroupSpec, name_of
from .parts.tracker import WeakHook
from .plan import Plan
from .step import HostStep

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


class Stepped(NamedTuple):
    """What stands for the plan of a step that was made in parts."""

    buckets: list[Bucket]


class _Place(NamedTuple):
    """Where a parameter is: its group, its place there, and that among all parameters, which keys its noise."""

    group: int
    place: int
    number: int


class _Alone:
    """One parameter as plans see it: in the groups of its optimizer, which have no other, with the states that it has.

    Args:
        groups: the optimizer's.
        states: the optimizer's.
        p: the parameter.
        place: where it is.
    """

    plan: Plan

    def __init__(self, groups: list[dict[str, Any]], states: dict[Tensor, Any], p: Tensor, place: _Place) -> None:
        self.place = place
        self.own: dict[str, Any] = {
            "params": [p],
            "param_names": [name_of(groups[place.group], place.group, place.place)],
        }
        self.groups = [{**group, "params": [], "param_names": []} for group in groups]
        self.states = defaultdict(dict, {p: states[p]} if p in states else {})
        self.groups[place.group].update(self.own)

    def fits(
        self, groups: list[dict[str, Any]], specs: list[GroupSpec], states: dict[Tensor, Any], place: _Place
    ) -> bool:
        """Whether the plan is still about this parameter; takes over what its group says now."""
        self.groups[place.group].update({**groups[place.group], **self.own})
        known = self.states.get(self.own["params"][0]) is states.get(self.own["params"][0])
        return known and self.place == place and len(self.groups) == len(groups) and self.plan.specs == specs


class StepInBackward:
    """What ``optimizer.step_in_backward`` returns; the optimizer is referenced weakly.

    Args:
        optimizer: whose parameters are stepped.
        model: what the backward runs through.
    """

    def __init__(self, optimizer: FusedOptimizer, model: torch.nn.Module) -> None:
        self._optimizer = ref(optimizer)
        self._step: HostStep | None = None  # from the first gradient of a backward to optimizer.step()
        self._stepped: dict[Tensor, list[Bucket]] = {}  # since then
        self._places: dict[Tensor, _Place] = {}
        self._alone: dict[Tensor, _Alone] = {}
        self._scales: Any = None  # the multipliers that the plans were made with
        self._handles: dict[Tensor | None, RemovableHandle] = {}
        _refuse_settings(optimizer)
        _refuse_replicas(model)
        self._look()
        self._add_hooks()
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # it may be wrapped later
            self._handles[None] = model.register_forward_pre_hook(WeakHook(self._before_forward))
        finalize(optimizer, _remove, self._handles).atexit = False

    def __repr__(self) -> str:
        doing = f"{len(self._stepped)} of {len(self._places)} parameters stepped" if self.active else "removed"
        return f"<{type(self).__name__}: {doing}>"

    @property
    def active(self) -> bool:
        """Whether backwards step: it was not removed, and its optimizer exists."""
        optimizer = self._optimizer()
        return optimizer is not None and optimizer._in_backward is self

    def remove(self) -> None:
        """Leave steps to ``optimizer.step()`` again; one that a backward has begun is counted."""
        optimizer = self._optimizer()
        if optimizer is None or not self.active:
            return
        if self._step is not None:
            self.end()
        optimizer._in_backward = None
        _remove(self._handles)
        self._alone.clear()

    def forget(self) -> None:
        """Drop a step that a backward has begun: other states are loaded."""
        self._step, self._stepped = None, {}

    def refuse_open(self) -> None:
        """Raise between a backward and ``optimizer.step()``, where the states are after a step that is not counted yet."""
        if self._stepped:
            raise RuntimeError(
                "the state was asked for within a step: a backward has stepped parameters, and optimizer.step(), which "
                "counts the step, has not been called since. Call it after every backward"
            )

    def end(self) -> None:
        """What is left of a step after the backward: gradients that were set by hand, averages at rest, the counts.

        Raises:
            RuntimeError: where gradients were scaled by a GradScaler.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "torch.amp.GradScaler unscales gradients after the backward, and step_in_backward has stepped with them in "
                "the backward, scaled as they were. What would work: bfloat16 without a scaler, or remove() of the handle"
            )
        step = self._begun(optimizer)
        for p in self._places:
            if p.grad is not None:
                self._take(p)
        optimizer._last = Stepped([bucket for of_p in self._stepped.values() for bucket in of_p])
        optimizer._count(step, self._stepped)
        self.forget()
        self._look()
        self._add_hooks()

    def _begun(self, optimizer: FusedOptimizer) -> HostStep:
        """This step's numbers, the same for every parameter.

        Raises:
            ValueError, RuntimeError: for a setting that was changed to one with which gradients cannot be released.
        """
        if self._step is None:
            _refuse_settings(optimizer)
            self._look()
            if optimizer._scales is not self._scales:
                self._alone.clear()
            optimizer._plan = None
            step = optimizer._begin()
            assert isinstance(step, HostStep)
            self._step = step
        return self._step

    def _look(self) -> None:
        """Find where the parameters are.

        Raises:
            ValueError: for one that is there twice.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        self._places = {}
        for g, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if p in self._places:
                    raise ValueError(
                        f"parameter {name_of(group, g, i)} is in the groups twice, and is to be stepped twice by a gradient "
                        f"that step_in_backward frees after the first. Name it once"
                    )
                self._places[p] = _Place(g, i, len(self._places))

    def _add_hooks(self) -> None:
        for p in [p for p in self._handles if p is not None and p not in self._places]:
            self._handles.pop(p).remove()
            self._alone.pop(p, None)
        for p in self._places:
            if p.requires_grad and p.is_leaf and p not in self._handles:
                self._handles[p] = p.register_post_accumulate_grad_hook(self._take)

    def _before_forward(self, *_: Any) -> None:
        if DistributedDataParallel._get_active_ddp_module() is not None:
            _refuse_replicas(None)

    def _take(self, p: Tensor) -> None:
        """Step a parameter, and free its gradient."""
        optimizer = self._optimizer()
        if optimizer is None or p.grad is None or p not in self._places:
            return
        if p in self._stepped:
            raise RuntimeError(
                f"parameter {self._name(optimizer, p)} has got a second gradient since the last optimizer.step(), and was "
                f"stepped with the first: with step_in_backward gradients are not accumulated. Call optimizer.step() after "
                f"every backward, one that raised included, zero_grad() to drop this gradient; to accumulate, remove() the "
                f"handle"
            )
        try:
            self._step_one(optimizer, self._begun(optimizer), p)
        except BaseException:
            if not self._stepped:
                self._step = None
            raise
        p.grad = None

    def _step_one(self, optimizer: FusedOptimizer, step: HostStep, p: Tensor) -> None:
        assert p.grad is not None
        with step:
            plan = self._planned(optimizer, step, p)
            if plan.capturing():
                raise RuntimeError(
                    "a backward that steps was captured in a CUDA graph: its replays would not be counted. Capture the "
                    "backward without step_in_backward"
                )
            if plan.new_states and not step.stepping and not p.grad.any():
                plan.new_states.keep()  # torch.distributed.checkpoint makes states so: as if it had never stepped
            else:
                step.complete_norms()
                step.clip()
                step.run()
                if optimizer._states_are_known:
                    step.count_writes_to_states()
        alone = self._alone[p]
        if p in alone.states:
            optimizer._states[p] = alone.states[p]
        if not plan.reusable:
            del self._alone[p]
        self._stepped[p] = plan.buckets

    def _planned(self, optimizer: FusedOptimizer, step: HostStep, p: Tensor) -> Plan:
        """Give the step the plan of one parameter, with this gradient."""
        groups, specs, place = optimizer.param_groups, optimizer._groups.specs, self._places[p]
        step.plan, alone = None, self._alone.get(p)
        if alone is not None and alone.fits(groups, specs, optimizer._states, place):
            step.plan = alone.plan
            if (keys := alone.plan.collect_gradients(alone.groups, alone.states)) is not None:
                step.keys = keys
                return alone.plan
        return self._make_plan(optimizer, step, p)

    @torch.inference_mode(False)  # states made within it could not be written outside of it
    @torch.no_grad()
    def _make_plan(self, optimizer: FusedOptimizer, step: HostStep, p: Tensor) -> Plan:
        groups, specs, place = optimizer.param_groups, optimizer._groups.specs, self._places[p]
        self._alone.pop(p, None)
        specs[place.group].rule.numbers(groups[place.group], 1.0)  # raises, where it must, before any state is made
        alone, scales = _Alone(groups, optimizer._states, p, place), optimizer._multipliers()
        self._scales = optimizer._scales
        alone.plan = step.plan = Plan(
            alone.groups, alone.states, specs, optimizer.backend, optimizer.state_dtype, scales, place.number
        )
        found = alone.plan.collect_gradients(alone.groups, alone.states)
        assert found is not None
        step.keys = found
        self._alone[p] = alone
        return alone.plan

    def _name(self, optimizer: FusedOptimizer, p: Tensor) -> str:
        g, i, _ = self._places[p]
        return name_of(optimizer.param_groups[g], g, i)


def _remove(handles: dict[Any, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()


def _refuse_settings(optimizer: FusedOptimizer) -> None:
    """Raise where a step needs more than one parameter's gradient at a time.

    Raises:
        ValueError: that names what was asked for.
    """
    groups, parts = optimizer.param_groups, optimizer._parts
    clipped = wants_norm(groups)
    reasons = {
        "max_grad_norm and nonfinite= look at all gradients before the first parameter moves": clipped,
        "differentiable=True keeps the gradients for autograd": any(group.get("differentiable") for group in groups),
        "track_parts() compares the parts of a gradient with the gradients of a whole step": parts and parts.active,
        "ZeroRedundancyOptimizer adds gradients up over processes after the backward": optimizer._partial,
    }
    if asked := [reason for reason, found in reasons.items() if found]:
        raise ValueError(
            f"step_in_backward frees every gradient as soon as its parameter is stepped, and {'; '.join(asked)}. Leave "
            f"that out, or step with optimizer.step() alone"
        )


def _refuse_replicas(model: torch.nn.Module | None) -> None:
    """Raise where gradients are averaged over processes when the backward is over; None: they are."""
    later = ("DistributedDataParallel", "FullyShardedDataParallel")
    found = [type(module).__name__ for module in model.modules()] if model is not None else later
    if names := [name for name in later if name in found]:
        raise ValueError(
            f"step_in_backward steps with the gradients of this process, and the model is under {names[0]}, which averages "
            f"them over processes only afterwards. FSDP2 (torch.distributed.fsdp.fully_shard) reduces them first"
        )
