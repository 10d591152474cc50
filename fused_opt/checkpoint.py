"""What travels with a checkpoint, a pickle or a copy, and what may come back in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .extras import pack, unpack
from .plan import AVERAGE, Plan, name_of
from .rule import Rule

# Plain numbers in the groups: load_state_dict would cast tensors in the state to the parameter's dtype.
COUNTS = ("steps", "samples", "periods", "skipped_steps")


class Checkpoints(torch.optim.Optimizer):
    """The part of FusedOptimizer that saves and loads."""

    backend: str
    state_dtype: torch.dtype | None
    _scales: dict[Tensor, tuple[float, float]]
    _plan: Plan | None
    _last: Plan | None

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        raise TypeError(f"{type(self).__name__} is not an optimizer by itself; fused_opt.SGD is one")

    def __getstate__(self) -> dict[str, Any]:
        own = {"backend": self.backend, "state_dtype": self.state_dtype, "_scales": self._scales}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan = self._last = None
        self.__dict__.setdefault("_parts", None)
        self.__dict__.setdefault("_partial", False)
        before: list[dict[str, Any]] = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for group, was in zip(self.param_groups, before or [{}] * len(self.param_groups)):
            for key, value in group.items():
                group[key] = unpack(value)
            for key, value in self.defaults.items():  # a checkpoint of torch.optim, or one older than the key
                group.setdefault(key, value if key in COUNTS else was.get(key, value))
            for of_p in (self.state[p] for p in group["params"] if p in self.state):
                # What torch.distributed.checkpoint makes of a state that a flattened checkpoint lacks.
                for slot in [slot for slot, value in of_p.items() if isinstance(value, dict) and not value]:
                    del of_p[slot]
                step = of_p.get("step")
                if step is not None and getattr(step, "dtype", None) not in (torch.float32, torch.float64):
                    of_p["step"] = torch.tensor(float(step))

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, in plain types: ``torch.load(weights_only=True)`` reads it, and so does torch.optim."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group.update({key: pack(value) for key, value in group.items()})
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim's class of the same name.

        Raises:
            ValueError: if the groups do not match, or a saved state has another shape than its parameter, or only one of
                the two is sharded; nothing has been changed then.
        """
        found: list[tuple[Tensor, str, Tensor]] = []

        def check(_: torch.optim.Optimizer, adapted: dict[str, Any]) -> None:
            ids = [index for group in adapted["param_groups"] for index in group["params"]]
            named = [
                (p, name_of(group, g, i))
                for g, group in enumerate(self.param_groups)
                for i, p in enumerate(group["params"])
            ]
            slots = {slot for group in self.param_groups for slot in self._rule(group).states}
            for (p, name), index in zip(named, ids):
                of_p = adapted["state"].get(index, {})
                for slot in (*slots, AVERAGE):
                    value = of_p.get(slot)
                    if not isinstance(value, Tensor):
                        continue
                    if value.shape != p.shape:
                        raise ValueError(
                            f"state {slot!r} of parameter {name} has shape {tuple(value.shape)} in the loaded state_dict, "
                            f"and the parameter {tuple(p.shape)}; load the state of a model of the same shapes"
                        )
                    if value.is_complex() != p.is_complex() or not (value.is_floating_point() or value.is_complex()):
                        raise ValueError(
                            f"state {slot!r} of parameter {name} is {value.dtype} in the loaded state_dict, and the "
                            f"parameter {p.dtype}, which do not go together"
                        )
                    if hasattr(value, "placements") != hasattr(p, "placements"):
                        kinds = ["a DTensor" if hasattr(t, "placements") else "a plain tensor" for t in (value, p)]
                        raise ValueError(
                            f"state {slot!r} of parameter {name} is {kinds[0]} in the loaded state_dict, and the parameter "
                            f"{kinds[1]}; torch.distributed.checkpoint.state_dict.set_optimizer_state_dict shards and gathers"
                        )
                    found.append((p, slot, value))

        handle = self.register_load_state_dict_pre_hook(check)  # after the user's, which may adapt what is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for p, slot, value in found:  # torch has cast them to the parameter's dtype
            if slot == AVERAGE:
                self.state[p][slot] = value.to(device=p.device)
            elif self.state_dtype is not None and not p.is_complex():
                self.state[p][slot] = value.to(device=p.device, dtype=self.state_dtype)
