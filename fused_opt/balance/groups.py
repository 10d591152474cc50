"""Multipliers of single parameters for any torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

SCALED = ("lr", "weight_decay")


class LayerTable(Protocol):
    """What per-layer methods write to."""

    def scale_layers(
        self,
        *,
        lr: Mapping[Tensor, float] | None = None,
        weight_decay: Mapping[Tensor, float] | None = None,
        source: str = "user",
    ) -> None:
        """Set multipliers of parameters; those not named keep theirs."""


def layer_table(optimizer: torch.optim.Optimizer) -> LayerTable:
    """The optimizer's own layer table, or one that splits its groups.

    Raises:
        TypeError: if it is neither a torch optimizer nor has a layer table.
        ValueError: if it is ``torch.optim.LBFGS``, which has only one learning rate.
    """
    if hasattr(optimizer, "scale_layers"):
        return optimizer
    # Accelerate's wrapper calls itself an Optimizer, and is without the hooks that one has.
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"expected an optimizer of fused_opt or of torch.optim, found {type(optimizer).__name__}; "
            "where it wraps another one, pass the inner optimizer"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS has one learning rate for all parameters; use SGD or Adam to balance layers")
    if optimizer not in _TABLES:
        _TABLES[optimizer] = SplitGroups(optimizer)
    return _TABLES[optimizer]


class SplitGroups:
    """Layer table of an optimizer that has none: its groups are split for the duration of each step.

    A hook before the step replaces every parameter group by one for each multiplier, with ``lr`` and
    ``weight_decay`` multiplied, and a hook after it puts the groups back. So learning-rate schedulers,
    checkpoints and other code that reads ``param_groups`` between steps see the optimizer as it was built, in
    any order of construction, and the state, which belongs to the parameters, is never touched. The additional groups
    cost host time.

    Example:
        >>> w, v = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([w, v], lr=0.1)
        >>> layer_table(optimizer).scale_layers(lr={v: 0.5})
        >>> (w + v).sum().backward()
        >>> optimizer.step()
        >>> round(w.item(), 6), round(v.item(), 6), len(optimizer.param_groups)
        (0.9, 0.95, 1)
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # weak: a parameter that was replaced goes, and its multiplier with it
        self._multipliers = {key: WeakTensorKeyDictionary() for key in SCALED}
        self._whole: list[dict[str, Any]] = []
        self._parts: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: self._split(opt))
        optimizer.register_step_post_hook(lambda opt, args, kwargs: self._join(opt))
        # a step that raises never reaches its post-hook: checkpoints see whole groups nevertheless
        optimizer.register_state_dict_pre_hook(self._join)
        optimizer.register_load_state_dict_pre_hook(lambda opt, state_dict: self._join(opt))

    def scale_layers(
        self,
        *,
        lr: Mapping[Tensor, float] | None = None,
        weight_decay: Mapping[Tensor, float] | None = None,
        source: str = "user",
    ) -> None:
        """Set multipliers from the next step on; parameters not named keep theirs, 1 at first; all sources are one."""
        self._multipliers["lr"].update(lr or {})
        self._multipliers["weight_decay"].update(weight_decay or {})

    def _split(self, optimizer: torch.optim.Optimizer) -> None:
        self._join(optimizer)
        for group in optimizer.param_groups:
            places: dict[tuple[float, ...], list[int]] = {}
            for place, p in enumerate(group["params"]):
                multipliers = tuple(self._multipliers[key].get(p, 1.0) for key in SCALED)
                places.setdefault(multipliers, []).append(place)
            for multipliers, chosen in places.items():
                part = dict(group)
                for key in {"params", "param_names"} & group.keys():
                    part[key] = [group[key][place] for place in chosen]
                for key, multiplier in zip(SCALED, multipliers, strict=True):
                    if multiplier != 1.0:
                        part[key] = group[key] * multiplier
                self._parts.append((group, part, dict(part)))
        self._whole = optimizer.param_groups[:]
        optimizer.param_groups[:] = [part for _, part, _ in self._parts]

    def _join(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._parts:
            return
        for group, part, given in self._parts:
            # some optimizers count or adapt in their groups while they step: that is kept
            for key, value in part.items():
                if value is not given.get(key) and given.get(key) is group.get(key):
                    group[key] = value
        optimizer.param_groups[:] = self._whole
        self._whole, self._parts = [], []


_TABLES: WeakKeyDictionary[torch.optim.Optimizer, SplitGroups] = WeakKeyDictionary()
