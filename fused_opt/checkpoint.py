"""What a checkpoint, a pickle or a copy contains, and what of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .checks import real, whole
from .eight_bits import CODES, blocks_of, coded, decoded, scale_of
from .exact import KEPT, SAVED, slot_of, viewed
from .extras import COUNTS, EXTRAS, pack, unpack
from .extras.averaging import AVERAGE, LR_SQUARES
from .extras.buffers import AveragedBuffers
from .groups import Groups, name_of
from .in_backward import StepInBackward, Stepped
from .layers import Scales
from .plan import Plan
from .rule import Rule
from .states import StateDtype, WithStates, dtype_for
from .step import Step
from .warn import warn_once

_KEPT = dict(KEPT.values())  # dtypes of what is kept beside parameters of 16 bits, by slot


class Checkpoints(WithStates):
    """The part of FusedOptimizer that saves and loads."""

    backend: str
    state_dtype: StateDtype
    _scales: Scales
    _groups: Groups
    _plan: Plan | None
    _before: Step | None
    _last: Plan | Stepped | None
    _captured: Plan | None
    _in_backward: StepInBackward | None = None
    _buffers: AveragedBuffers | None = None

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        raise TypeError(f"{type(self).__name__} is not an optimizer by itself; fused_opt.SGD is one")

    def _check_all(self, options: Mapping[str, Any]) -> None:
        """Raise where a hyper-parameter is out of its range."""

    def read_counts(self) -> None:
        """Bring what ``param_groups`` count up to date."""

    def __getstate__(self) -> dict[str, Any]:
        self.read_counts()
        own = {"backend": self.backend, "state_dtype": self.state_dtype, "_scales": self._scales}
        # A state may be copied with it, by the same deepcopy or pickle.
        return {**super().__getstate__(), **own, "_states_are_known": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan = self._before = self._last = self._captured = None
        if self._in_backward is not None:
            self._in_backward.forget()
        self.__dict__.setdefault("_parts", None)
        self.__dict__.setdefault("_partial", False)
        self.__dict__.setdefault("_holds_averages", False)
        before: list[dict[str, Any]] = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        self._groups = Groups(self.defaults)
        for group, was in zip(self.param_groups, before or [{}] * len(self.param_groups)):
            for key, value in self.defaults.items():  # a checkpoint of torch.optim, or one older than the key
                group.setdefault(key, value if key in COUNTS else was.get(key, value))
            for of_p in (self._states[p] for p in group["params"] if p in self._states):
                # What torch.distributed.checkpoint makes of a state that a flattened checkpoint lacks.
                for slot in [slot for slot, value in of_p.items() if isinstance(value, dict) and not value]:
                    del of_p[slot]
                for slot in ("step", self._rule(group).scalar):
                    number = of_p.get(slot)
                    if number is not None and getattr(number, "dtype", None) not in (torch.float32, torch.float64):
                        of_p[slot] = torch.tensor(float(number), device="cpu")

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, in plain types: ``torch.load(weights_only=True)`` reads it, and so does torch.optim."""
        self.read_counts()
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group.update({extra.key: pack(extra.key, group[extra.key]) for extra in EXTRAS})
        for index, of_p in state_dict["state"].items():
            if kept := {slot: viewed(of_p[slot], dtype) for slot, dtype in SAVED.items() if slot in of_p}:
                state_dict["state"][index] = {**of_p, **kept}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim's class of the same name.

        States, counts and hyper-parameters come from the state_dict, as in torch.optim. An extra (``averaging``, ``noise``,
        ``trust_ratio``, ``max_grad_norm``, ``nonfinite``) that this program asked for stays as it is; where it asked for
        none, that of the state_dict is taken. One warning names all in which the two differ. What was averaged by
        another class than the group's begins anew. Tensors are copied.

        Raises:
            ValueError: if the groups do not match, a value is none for its key, a saved state has another shape than its
                parameter, or only one of the two is sharded; nothing has been changed then.
        """
        loaded: list[dict[str, Any]] = []

        def adapt(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            _check_form(given)
            adapted = {**given, "param_groups": self._adapted_groups(given["param_groups"])}
            adapted["state"] = self._adapted_state(adapted, given["state"])
            loaded.append(adapted)
            return adapted

        handle = self.register_load_state_dict_pre_hook(adapt)  # after the user's, which may adapt what is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        rules = {p: self._rule(group) for group in self.param_groups for p in group["params"]}
        scalars = {rule.scalar for rule in rules.values()}
        for p, of_p in _by_parameter(self.param_groups, loaded[0]):
            coded_slots = [slot for slot in rules[p].states if self._load_codes(rules[p], slot, p, of_p)]
            done = {name for slot in coded_slots for name in (slot, scale_of(slot))}
            for slot, value in of_p.items():
                if not isinstance(value, Tensor) or slot in done:
                    continue
                # torch has cast all but the step count to the parameter's dtype.
                if slot in _KEPT:
                    self._states[p][slot] = value.to(device=p.device, dtype=_KEPT[slot])
                elif slot in scalars:
                    self._states[p][slot] = value.to(device="cpu", dtype=torch.float32)
                elif slot == AVERAGE or (slot != "step" and not p.is_complex()):
                    dtype = value.dtype if slot == AVERAGE else dtype_for(self.state_dtype, rules[p], slot, p)
                    if dtype is not None:
                        self._states[p][slot] = value.to(device=p.device, dtype=dtype)
                if self._states[p][slot] is value:
                    self._states[p][slot] = value.clone()

    def _load_codes(self, rule: Rule, slot: str, p: Tensor, of_p: Mapping[str, Any]) -> bool:
        """Load a state that is in 8 bits in the checkpoint or here, and say whether it is."""
        value, scales, dtype = of_p.get(slot), of_p.get(scale_of(slot)), dtype_for(self.state_dtype, rule, slot, p)
        if not isinstance(value, Tensor) or not (value.dtype in CODES or dtype in CODES):
            return False
        if isinstance(scales, Tensor) and value.dtype == dtype:
            found = value.clone(), scales.clone()
        else:
            value = decoded(value, scales) if isinstance(scales, Tensor) and value.dtype in CODES else value
            if dtype not in CODES:
                self._states[p].pop(scale_of(slot), None)
                self._states[p][slot] = value.to(device=p.device, dtype=dtype or p.dtype)
                return True
            found = coded(value, dtype)
        self._states[p][slot], self._states[p][scale_of(slot)] = (tensor.to(p.device) for tensor in found)
        return True

    def _adapted_groups(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Groups of a state_dict with the extras of this optimizer, checked."""
        adapted, others = [], {}
        for g, (group, of_saved) in enumerate(zip(self.param_groups, saved)):
            new = dict(of_saved)
            for extra in EXTRAS:
                own = group[extra.key]
                value = unpack(extra.key, of_saved.get(extra.key, own))
                extra.check(value)
                new[extra.key] = value if own == extra.default else own
                if value != own:
                    others[extra.key] = f"{extra.key}={own!r} here and {value!r} there, in group {g}"
                if extra.settings and type(value) is not type(new[extra.key]):
                    new.update(dict.fromkeys(extra.counts, 0))
            for count in COUNTS:
                if count in new:
                    what = f"{count} in the state_dict"
                    new[count] = (
                        real(what, new[count], _finite, "finite and at least 0")
                        if count == LR_SQUARES
                        else whole(what, new[count], 0)
                    )
            self._check_all({**self.defaults, **group, **new})
            adapted.append(new)
        if others:
            warn_once(
                f"load_state_dict: the optimizer and the state_dict differ in {'; '.join(others.values())}. What the program "
                f"asked for stays; where it asked for nothing, the state_dict's is taken. param_groups take others"
            )
        return adapted + saved[len(adapted) :]

    def _adapted_state(self, adapted: dict[str, Any], state: dict[Any, Any]) -> dict[Any, Any]:
        """The state without averages that begin anew.

        Raises:
            ValueError: where a state does not fit its parameter.
        """
        result = dict(state)
        for g, (group, new) in enumerate(zip(self.param_groups, adapted["param_groups"])):
            rule = self._rule({**self.defaults, **group, **new})
            stale = new.get("averaging") is None or (new.get("samples") == 0 and new.get("periods") == 0)
            for i, (p, index) in enumerate(zip(group["params"], new["params"])):
                of_p = state.get(index, {})
                if AVERAGE in of_p and stale:
                    result[index] = of_p = {slot: value for slot, value in of_p.items() if slot != AVERAGE}
                if strange := [
                    slot for slot in _KEPT if slot in of_p and slot != slot_of(p)
                ]:  # of another dtype's parameter
                    result[index] = of_p = {slot: value for slot, value in of_p.items() if slot not in strange}
                if rule.counts_steps:
                    _check_count(f"step count of parameter {name_of(group, g, i)}", of_p.get("step"))
                if (kept := slot_of(p)) and kept in of_p:
                    _check_kept(f"state {kept!r} of parameter {name_of(group, g, i)}", of_p[kept], SAVED[kept], p)
                    result[index] = of_p = {**of_p, kept: viewed(of_p[kept], _KEPT[kept])}
                for slot in (*rule.states, AVERAGE):
                    if isinstance(of_p.get(slot), Tensor):
                        _check_scales(f"state {slot!r} of parameter {name_of(group, g, i)}", slot, of_p, p)
                        _check_state(f"state {slot!r} of parameter {name_of(group, g, i)}", of_p[slot], p)
        return result


def _finite(number: float) -> bool:
    return 0 <= number < float("inf")


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Raise a ValueError unless all is there that torch.optim puts into a state_dict, as mappings."""
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not (
        isinstance(groups, list | tuple) and all(isinstance(group, Mapping) and "params" in group for group in groups)
    ):
        raise ValueError("Invalid state_dict: its 'param_groups' must be a list of dicts that have 'params'")
    if not (isinstance(state, Mapping) and all(isinstance(of_p, Mapping) for of_p in state.values())):
        raise ValueError(
            "Invalid state_dict: its 'state' must be a dict of the states of each parameter, by its number"
        )


def _by_parameter(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    return [(p, state_dict["state"].get(index, {})) for p, index in zip(parameters, ids)]


def _check_count(what: str, value: Any) -> None:
    number: Any = value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value
    if number is None or (isinstance(number, dict) and not number):  # of torch.distributed.checkpoint: none
        return
    if not isinstance(number, Real) or not 0 <= float(number) < float("inf"):
        raise ValueError(f"Invalid {what} in the state_dict: {value!r:.60}; it must be a number, at least 0")


def _check_kept(what: str, value: Any, dtype: torch.dtype, p: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != p.shape:
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} is {found} in the loaded state_dict; it must be {dtype} of shape {tuple(p.shape)}")


def _check_scales(what: str, slot: str, of_p: Mapping[str, Any], p: Tensor) -> None:
    """Raise where a state in 8 bits has no scales that go with it."""
    scales, expected = of_p.get(scale_of(slot)), (blocks_of(p.numel()),)
    if of_p[slot].dtype not in CODES:
        return
    if not isinstance(scales, Tensor) or scales.dtype != torch.float32 or tuple(scales.shape) != expected:
        found = f"{scales.dtype} of shape {tuple(scales.shape)}" if isinstance(scales, Tensor) else scales
        raise ValueError(
            f"{what} is in 8 bits in the loaded state_dict, and {scale_of(slot)!r} beside it is {found}; it must be float32 "
            f"of shape {expected}"
        )


def _check_state(what: str, value: Any, p: Any) -> None:
    if value.shape != p.shape:
        raise ValueError(
            f"{what} has shape {tuple(value.shape)} in the loaded state_dict, and the parameter {tuple(p.shape)}; load the "
            f"state of a model of the same shapes"
        )
    number = value.is_floating_point() or value.is_complex() or value.dtype in CODES
    if value.is_complex() != p.is_complex() or not number:
        raise ValueError(
            f"{what} is {value.dtype} in the loaded state_dict, and the parameter {p.dtype}, which do not go together"
        )
    if hasattr(value, "placements") != hasattr(p, "placements"):
        kinds = ["a DTensor" if hasattr(t, "placements") else "a plain tensor" for t in (value, p)]
        raise ValueError(
            f"{what} is {kinds[0]} in the loaded state_dict, and the parameter {kinds[1]}; "
            f"torch.distributed.checkpoint.state_dict.set_optimizer_state_dict shards and gathers"
        )
