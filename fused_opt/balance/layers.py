"""Which layers of a model are balanced, and which parameters follow each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
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
    """A weight and the modules whose parameters share its multiplier: those it is in, and the norms that follow."""

    name: str
    module: nn.Module
    modules: tuple[nn.Module, ...]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that the modules have now."""
        return list(dict.fromkeys(p for module in self.modules for p in module.parameters()))

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
            return [self.module.weight]  # type: ignore[list-item]  # a layer has one
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
    kinds = _kinds(include)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    modules = [(name, module) for name, module in modules if _is_matrix(module)]
    if not modules:
        return [], None, None
    identity = {name: tuple(map(id, Layer(name, module, ()).sources())) for name, module in modules}
    owner = {sources: name for name, sources in reversed(identity.items())}
    following = _norms_following(model, dict(modules), norms)
    layers = []
    for name, module in modules:
        if owner[identity[name]] != name:
            continue
        tied = [other for alias, other in modules if owner[identity[alias]] == name]
        layers.append(Layer(name, module, (*tied, *following.get(name, []))))
    return layers, owner[identity[modules[0][0]]], owner[identity[modules[-1][0]]]


def left_out(model: nn.Module, include: tuple[type[nn.Module], ...], reasons: Mapping[str, str]) -> str:
    """Why modules with a matrix are not balanced, by kind of module and reason; ``reasons`` are those of layers."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        computed = isinstance(module, _kinds(include)) and computed_from(module)
        matrices = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
        if computed:
            reason = (
                f"the weight is made of {', '.join(computed)} before each forward pass; "
                "torch.nn.utils.parametrizations has forms that can be read"
            )
        elif name in reasons or matrices:
            alias = isinstance(module, _kinds(include))
            reason = reasons.get(name, "its weight is another layer's" if alias else "its type is not among include=")
        else:
            continue
        kinds.setdefault((type(module).__name__, reason), []).append(name)
    return "; ".join(
        f"{len(names)} {kind} ({names[0]!r}{', ...' if names[1:] else ''}): {reason}"
        for (kind, reason), names in kinds.items()
    )


def computed_from(module: nn.Module) -> list[str]:
    """The parameters from which a hook makes the module's weight, as the old ``weight_norm`` and pruning do."""
    own = [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight_")]
    return own if "weight" not in dict(module.named_parameters(recurse=False)) and not _parametrization(module) else []


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
    """As (out, in, ...), where transformers' Conv1D has (in, out)."""
    weight: Tensor = module.weight
    return weight.mT if isinstance(module, _conv1d()) else weight


def _kinds(include: tuple[type[nn.Module], ...]) -> tuple[type[nn.Module], ...]:
    """What is included, and transformers' Conv1D, a Linear by another name, wherever Linear is."""
    return (*include, *_conv1d()) if nn.Linear in include else include


def _conv1d() -> tuple[type[nn.Module], ...]:
    module = sys.modules.get("transformers.pytorch_utils")  # who has a layer of it has imported it
    return () if module is None else (module.Conv1D,)


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
