"""What the parameter groups say: checked when they are made, and again when a step finds them changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import native
from .extras import COUNTS, EXTRAS, IN_ARGS
from .extras.averaging import AVERAGE
from .extras.clipping import wants_norm
from .extras.rounding import rounds_at_random
from .rule import Rule
from .warn import warn_once

# Types whose values cannot be written in place.
_FIXED = (float, int, bool, str, type(None), *(setting for extra in EXTRAS for setting in extra.settings))


def name_of(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """What to call a parameter: what ``name_parameters`` or ``(name, tensor)`` pairs call it, or its place."""
    names = group.get("param_names")
    return names[index] if names else f"{index} of group {group_index}"


class GroupSpec(NamedTuple):
    """What of a group's hyper-parameters decides how its parameters are stepped."""

    rule: Rule
    decay: str  # what the weight decay is, as ``decay=`` says it
    noisy: bool  # elements draw random numbers, by their places
    averaged: bool
    counts: bool  # the elements of whole tensors
    has_args: bool  # of extras
    differentiable: bool  # autograd follows the step
    exact: bool  # there are float32 weights behind parameters of 16 bits

    @property
    def slots(self) -> tuple[str, ...]:
        """The per-element states, beside the step count."""
        return (*self.rule.states, *([AVERAGE] if self.averaged else []))


class Groups:
    """The groups of an optimizer as they were when they were checked last.

    Attributes:
        specs: of every group.
        wants_norm: whether a step needs the norm of all gradients.
        counted: whether the counts decide on what a step does: on noise, averages and rounding at random.
    """

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        # Of the rate, which schedulers change in every step, the step looks at every value.
        keys = [key for key in defaults if key not in ("lr", *COUNTS)]
        self._settings: Callable[[Mapping[str, Any]], tuple[Any, ...]] = itemgetter(*keys)
        self._seen: list[tuple[Any, ...]] | None = None
        self._fixed = False  # a step needs no norm of all gradients, and no setting can be written in place
        self._watch = native.watch({"params", *COUNTS})
        self.specs: list[GroupSpec] = []
        self.wants_norm = self.counted = False

    def look(self, groups: Sequence[Mapping[str, Any]], optimizer: Any) -> bool:
        """Check what has changed.

        Returns:
            Whether nothing has, the rates included, so that the step is the one before with other gradients and counts.
            False where that cannot be told.

        Raises:
            TypeError, ValueError: as the constructor of the optimizer.
        """
        if self._watch is not None and self._watch.unchanged(groups):
            return True
        found = [self._settings(group) for group in groups]
        try:
            changed = found != self._seen
        except RuntimeError:  # a tensor of several elements, which the checks refuse
            changed = True
        if changed:
            self._check(groups, found, optimizer)
        if self._watch is not None:
            fixed = self._fixed and all([type(group["lr"]) in (float, int) for group in groups])  # noqa: C419  # of few
            self._watch.keep(groups if fixed else [])
        return False

    def _check(self, groups: Sequence[Mapping[str, Any]], found: list[tuple[Any, ...]], optimizer: Any) -> None:
        for group in groups:
            optimizer._check_all({**group, "lr": 0.0})
        self.wants_norm = wants_norm(groups)
        self.specs = [
            GroupSpec(
                optimizer._rule(group),
                optimizer._decay(group),
                group["noise"] is not None or rounds_at_random(group["rounding"]),
                group["averaging"] is not None,
                group["cautious"] is not None and group["cautious"].args.scaled,
                any(group[key] is not None for key, _ in IN_ARGS),
                bool(group.get("differentiable")),
                group["master_weights"],
            )
            for group in groups
        ]
        self.counted = any(spec.noisy or spec.averaged for spec in self.specs)
        self._fixed = not self.wants_norm and all(map(_is_fixed, chain.from_iterable(found)))
        self._seen = found


def _is_fixed(value: Any) -> bool:
    return all(map(_is_fixed, value)) if type(value) is tuple else type(value) in _FIXED


def extras_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The extras of some options, defaults where they say nothing."""
    return {extra.key: options.get(extra.key, extra.default) for extra in EXTRAS}


class WithGroups(torch.optim.Optimizer):
    """An optimizer that checks a group before it adds it."""

    _given: set[int] | None = None  # parameters of the groups so far, by id, while the constructor adds groups

    def _check_all(self, options: Mapping[str, Any]) -> None:
        """Raise where a hyper-parameter is out of its range."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does, after its hyper-parameters were found in range."""
        if isinstance(param_group, dict):
            for key in param_group.keys() - self.defaults.keys() - {"params", "param_names"}:
                for near in get_close_matches(key, self.defaults, 1, cutoff=0.8):
                    warn_once(f"a parameter group has {key!r}, which nothing reads. Did you mean {near!r}?")
            self._check_all({**self.defaults, **param_group})
            if self.param_groups:  # it joins the others' count of steps
                oldest = self.param_groups[0]
                alike = param_group.get("averaging", self.defaults["averaging"]) == oldest["averaging"]
                param_group.update({name: oldest[name] for name in (COUNTS if alike else ("steps", "skipped_steps"))})
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            if not isinstance(param_group["params"], set):
                param_group["params"] = params  # an iterator is spent now
            ids = [id(one[1] if isinstance(one, tuple) and len(one) > 1 else one) for one in params]
            if self._given is not None and self._given.isdisjoint(ids):
                self._given.update(ids)
                self._append(param_group)
                return
        super().add_param_group(param_group)

    def _append(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters that are in no other: torch would look at those of all others, for every group."""
        groups = self.param_groups
        self.param_groups = groups[:1]  # with or without names, like the others
        try:
            super().add_param_group(param_group)
            groups.append(self.param_groups[-1])
        finally:
            self.param_groups = groups
