"""Which layers of a model are balanced, and which parameters follow each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

Norms = Literal["none", "batch", "all"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS: dict[str, tuple[type[nn.Module], ...]] = {
    "none": (),
    "batch": BATCH_NORMS,
    "all": (*BATCH_NORMS, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d),
}
SAMPLES = 1024


@dataclass(frozen=True)
class Layer:
    """A weight and the parameters that share its multiplier: its bias, and the norms that follow it."""

    name: str
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]

    def weight(self) -> Tensor:
        """The weight the module computes with; a parametrization is applied, and left as it was."""
        # spectral_norm, for one, takes a step of its power iteration whenever it is read in training mode
        modes = [(part, part.training) for part in _parametrization(self.module)]
        for part, _ in modes:
            part.training = False
        try:
            return _whole(_weight(self.module).detach())
        finally:
            for part, training in modes:
                part.training = training

    def shape(self) -> torch.Size:
        """The weight's; where nothing computes it, no process has to gather it."""
        return self.weight().shape if _parametrization(self.module) else _weight(self.module).shape

    def sources(self) -> list[Tensor]:
        """The tensors that the weight is computed from."""
        parts = _parametrization(self.module)
        if not parts:
            return [_weight(self.module)]
        return [*parts[0].parameters(), *parts[0].buffers()]

    def sharded(self) -> bool:
        """Whether the weight is spread over processes (DTensor)."""
        return any(hasattr(source, "full_tensor") for source in self.sources())

    def version(self) -> list[tuple[int, int]]:
        """What changes when a source is written through autograd's eyes, or replaced."""
        return [(source.data_ptr(), source._version) for source in map(_local, self.sources())]

    def sample(self) -> Tensor:
        """About a thousand elements of every source: what betrays a write through ``.data``."""
        parts = [source.detach().reshape(-1) for source in map(_local, self.sources())]
        return torch.cat([part[:: max(1, part.numel() // SAMPLES)].double() for part in parts])


def find_layers(
    model: nn.Module, include: tuple[type[nn.Module], ...], norms: Norms
) -> tuple[list[Layer], str | None, str | None]:
    """The layers of a model in module order, and the names of the first and the last.

    A tied weight is one layer under the first of its names, and first or last wherever one of its modules is.
    """
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, include)]
    modules = [(name, module) for name, module in modules if _is_matrix(module)]
    if not modules:
        return [], None, None
    identity = {name: tuple(map(id, Layer(name, module, ()).sources())) for name, module in modules}
    owner = {sources: name for name, sources in reversed(identity.items())}
    following = _norms_following(model, dict(modules), norms)
    taken: set[int] = set()
    layers = []
    for name, module in modules:
        if owner[identity[name]] != name:
            continue
        tied = [other for alias, other in modules if owner[identity[alias]] == name]
        parts = [*tied, *following.get(name, [])]
        mine = [p for part in parts for p in part.parameters() if id(p) not in taken]
        taken.update(map(id, mine))
        layers.append(Layer(name, module, tuple(dict.fromkeys(mine))))
    return layers, owner[identity[modules[0][0]]], owner[identity[modules[-1][0]]]


def _norms_following(model: nn.Module, layers: dict[str, nn.Module], norms: Norms) -> dict[str, list[nn.Module]]:
    following: dict[str, list[nn.Module]] = {}
    for name, module, previous in _after(model, layers, NORMS["all"]):
        named = name.replace("bn", "conv")
        owner = named if named in layers else previous
        if owner is None or not isinstance(module, NORMS[norms]):
            continue
        if norms == "all" or isinstance(layers[owner], CONVOLUTIONS):
            following.setdefault(owner, []).append(module)
    return following


def _after(
    model: nn.Module, layers: dict[str, nn.Module], kinds: tuple[type[nn.Module], ...]
) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Modules of these kinds, each with the layer right before it; a second one in a row has none."""
    previous = None
    for name, module in model.named_modules():
        if name in layers:
            previous = name
        elif isinstance(module, kinds):
            yield name, module, previous
            previous = None


def _is_matrix(module: nn.Module) -> bool:
    parts = _parametrization(module)  # asked first: looking for a parametrized weight computes it
    weight = next(parts[0].parameters(), None) if parts else getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim >= 2


def _parametrization(module: nn.Module) -> list[nn.Module]:
    """What computes the module's weight, from the outside in; empty for a plain parameter."""
    return list(module.get_submodule("parametrizations.weight").modules()) if is_parametrized(module, "weight") else []


def _weight(module: Any) -> Tensor:
    return module.weight


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
