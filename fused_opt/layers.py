"""Multipliers of the learning rate and the weight decay for single parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from .plan import Plan

Scales: TypeAlias = dict[str, dict[Tensor, tuple[float, float]]]  # by source: of learning rate and weight decay


class WithLayers(torch.optim.Optimizer):
    """The part of FusedOptimizer that scales layers."""

    _scales: Scales
    _plan: Plan | None

    def scale_layers(
        self,
        *,
        lr: Mapping[Tensor, float] | None = None,
        weight_decay: Mapping[Tensor, float] | None = None,
        source: str = "user",
    ) -> None:
        """Set multipliers of the learning rate or the weight decay for single parameters; no parameter groups needed.

        They take effect at the next step, multiply the groups' values at that time, and stay until set again; parameters
        not named keep theirs, 1 at first. They travel with pickle and deepcopy but not in the state_dict.

        Args:
            lr: multipliers of the learning rate, at least 0.
            weight_decay: multipliers of the weight decay, at least 0.
            source: who sets them: a parameter's multiplier is the product over all sources, of which each has its own.
                :class:`TempBalance` has ``"temp_balance"``.

        Raises:
            ValueError: for a multiplier that is negative or not finite, or a tensor that is not optimized here.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = fused_opt.SGD([weight], lr=0.1)
            >>> optimizer.scale_layers(lr={weight: 0.5})
            >>> weight.sum().backward()
            >>> optimizer.step()
            >>> weight.data
            tensor([0.9500, 0.9500])
        """
        known = {p for group in self.param_groups for p in group["params"]}
        scales = dict(self._scales.get(source, {}))
        for index, given in enumerate((lr or {}, weight_decay or {})):
            for p, scale in given.items():
                if p not in known:
                    raise ValueError(f"a multiplier for a tensor of shape {tuple(p.shape)} that is not optimized here")
                if not 0 <= scale < float("inf"):
                    raise ValueError(f"Invalid multiplier: {scale}; it must be finite and at least 0")
                old = scales.get(p, (1.0, 1.0))
                scales[p] = (float(scale), old[1]) if index == 0 else (old[0], float(scale))
        self._scales = {**self._scales, source: scales}
        self._plan = None

    def _multipliers(self) -> dict[Tensor, tuple[float, float]]:
        """Of learning rate and weight decay, by parameter; those of parameters that have left are forgotten."""
        known = {p for group in self.param_groups for p in group["params"]}
        self._scales = {
            source: {p: scale for p, scale in of_source.items() if p in known}
            for source, of_source in self._scales.items()
        }
        product: dict[Tensor, tuple[float, float]] = {}
        for of_source in self._scales.values():
            for p, (lr, decay) in of_source.items():
                before = product.get(p, (1.0, 1.0))
                product[p] = before[0] * lr, before[1] * decay
        return product
