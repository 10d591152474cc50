"""Parameter groups -> buckets that one backend steps; kept until a pointer, a state or a group changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends
from .rule import Rule

_said: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, once per process and message."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=4)


@dataclass
class Member:
    """One parameter of a bucket."""

    tensor: Tensor
    group: int
    states: list[Tensor] | None  # None until its first gradient
    step: Tensor | None
    fresh: bool  # its states were made for the coming step
    lr_scale: float = 1.0
    decay_scale: float = 1.0

    def count(self) -> float:
        """How many steps it has taken; 0 or 1 where torch.optim keeps no count."""
        return self.step.item() if self.step is not None else float(not self.fresh)

    def advance(self) -> None:
        """Count one more step."""
        self.fresh = False
        if self.step is not None:
            self.step.add_(1)


def name_of(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """What to call a parameter in an error."""
    names = group.get("param_names")
    return f"{names[index]!r}" if names else f"{index} of group {group_index}"


def _check(name: str, what: str, found: Tensor, p: Tensor) -> None:
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


class Plan:
    """Which backend steps which parameters.

    Args:
        param_groups: the optimizer's groups.
        state: the optimizer's state; missing states of parameters that have a gradient are created, after every check
            has passed.
        rule_of: the rule of a group.
        backend: ``"auto"`` or a backend's name.
        state_dtype: dtype of new states; None: the parameter's.
        scales: multipliers (learning rate, weight decay) by parameter.

    Raises:
        RuntimeError: if a gradient or a state does not fit its parameter, or the named backend cannot step it; nothing
            has been changed then.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        rule_of: Callable[[Mapping[str, Any]], Rule],
        backend: str,
        state_dtype: torch.dtype | None,
        scales: Mapping[Tensor, tuple[float, float]],
    ) -> None:
        rules = [rule_of(group) for group in param_groups]
        chosen: dict[tuple[str, Rule], list[tuple[Tensor, int]]] = {}
        for group_index, (group, rule) in enumerate(zip(param_groups, rules)):
            for index, p in enumerate(group["params"]):
                name = name_of(group, group_index, index)
                tensors = self._look(name, rule, p, state.get(p, {}))
                chosen.setdefault((self._choose(name, rule, backend, tensors), rule), []).append((p, group_index))

        self.rules = rules
        self.buckets = []
        for (backend_name, rule), parameters in chosen.items():
            members = []
            for p, group_index in parameters:
                missing = self._create(rule, p, state, state_dtype)
                has_states = p.grad is not None or (p in state and all(n in state[p] for n in rule.states))
                of_p = state[p] if has_states and (rule.states or rule.counts_steps) else {}
                members.append(
                    Member(
                        p,
                        group_index,
                        [of_p[slot] for slot in rule.states] if has_states else None,
                        of_p.get("step") if rule.counts_steps else None,
                        missing,
                        *scales.get(p, (1.0, 1.0)),
                    )
                )
            self.buckets.append(backends.get(backend_name).Bucket(rule, members, param_groups, state))
        # Only the native plan can tell that nothing changed; without one, planning anew each step is what costs least.
        self.lasting = any(backend_name == "native" for backend_name, _ in chosen)

    @staticmethod
    def _look(name: str, rule: Rule, p: Tensor, of_p: Mapping[str, Any]) -> list[Tensor]:
        tensors = [p]
        if p.grad is not None:
            if p.grad.is_sparse and rule.counts_steps:
                raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
            _check(name, "gradient", p.grad, p)
            tensors.append(p.grad)
        for slot in rule.states:
            if of_p.get(slot) is not None:
                _check(name, f"state {slot!r}", of_p[slot], p)
                tensors.append(of_p[slot])
        return tensors

    @staticmethod
    def _choose(name: str, rule: Rule, backend: str, tensors: Sequence[Tensor]) -> str:
        if backend != "auto":
            if reason := backends.get(backend).unsupported(rule, tensors):
                raise RuntimeError(
                    f"backend {backend!r} cannot step parameter {name}: {reason}. backend='auto' takes one that can"
                )
            return backend
        for candidate in backends.BACKENDS:
            module = backends.get(candidate)
            if reason := module.unavailable():
                warn_once(f"fused_opt runs without its {candidate} backend: {reason}")
            elif module.unsupported(rule, tensors) is None:
                return candidate
        raise AssertionError("the reference backend supports everything")

    @staticmethod
    def _create(rule: Rule, p: Tensor, state: dict[Tensor, Any], dtype: torch.dtype | None) -> bool:
        """Create the states that a parameter with a gradient lacks; whether there were any."""
        if p.grad is None or not (rule.states or rule.counts_steps):
            return False
        of_p = state[p]
        if rule.counts_steps and "step" not in of_p:
            of_p["step"] = torch.tensor(0.0, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
        missing = [slot for slot in rule.states if of_p.get(slot) is None]
        for slot in missing:
            of_p[slot] = torch.zeros_like(p, memory_format=torch.preserve_format, dtype=dtype, requires_grad=False)
        return bool(missing)

    def gather(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]
    ) -> list[list[tuple[int, float]]] | None:
        """Find this step's gradients: (group, step count) pairs per bucket, or None: the plan must be made anew."""
        keys = []
        for bucket in self.buckets:
            if (of_bucket := bucket.gather(param_groups, state)) is None:
                return None
            keys.append(of_bucket)
        return keys
