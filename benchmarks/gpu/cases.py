"""What is timed on a GPU: shapes, optimizers and their extras, and the peers. Data, in the order of what matters first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.nn import Parameter

import fused_opt

from .. import one_pass
from ..shapes import Shape, gpt2_medium, llama_1b, resnet50
from . import BACKENDS, ON_CPU
from .clock import Call

Make = Callable[[list[Parameter]], Call]
SHAPES: dict[str, list[Shape]] = {
    "ResNet-50": resnet50(),
    "Llama-1B": llama_1b(),
    "1 G flat": [(10**9,)],
    "GPT-2 medium": gpt2_medium(),
}
if ON_CPU:
    SHAPES = {"ResNet-50": [tuple(min(n, 8) for n in shape) for shape in resnet50()[:2]]}
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
ADAM: dict[str, Any] = {"lr": 1e-3}
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2}
SGD_BYTES, ADAM_BYTES = 20, 28  # for each parameter and step, float32: read p, g and the states, write p and the states
# What one tries for a peer, in this order; all that can be imported are timed.
PEERS: dict[str, list[tuple[str, str]]] = {
    "LARS": [("timm.optim", "Lars"), ("torch_optimizer", "LARS"), ("bitsandbytes.optim", "LARS")],
    "LAMB": [
        ("apex.optimizers", "FusedLAMB"),
        ("timm.optim", "Lamb"),
        ("torch_optimizer", "Lamb"),
        ("bitsandbytes.optim", "LAMB"),
    ],
}
NEVER = 10**9  # steps


@dataclass(frozen=True)
class Case:
    """Contenders that take turns over the same shapes; the copy of memory is always one of them.

    Args:
        shape: one of SHAPES.
        name: of the case.
        contenders: label -> what makes its step from parameters that have gradients.
        budget: bytes for each parameter that a step has to move.
        operands: tensors as large as the parameters that a step touches at least.
    """

    shape: str
    name: str
    contenders: dict[str, Make]
    budget: int
    operands: int

    @property
    def shapes(self) -> list[Shape]:
        """Of all parameters."""
        return SHAPES[self.shape]

    @property
    def elements(self) -> int:
        """Their number."""
        return sum(map(math.prod, self.shapes))


def stepping(make: Callable[..., torch.optim.Optimizer], parameters: list[Parameter], **options: Any) -> Call:
    """The bound ``step`` of an optimizer."""
    return make(parameters, **options).step


def clars(parameters: list[Parameter], **options: Any) -> Call:
    """CLARS where the norms of the gradient's parts are known, as they are after backwards that it has watched."""
    optimizer = fused_opt.CLARS(parameters, **options)
    optimizer.track_parts("probe").set(dict.fromkeys(parameters, 1.0))
    return optimizer.step


def layer_rates(parameters: list[Parameter], **options: Any) -> Call:
    """A learning rate and a decay of its own for every parameter."""
    optimizer = fused_opt.SGD(parameters, **options)
    scales = {p: 1 + i / len(parameters) for i, p in enumerate(parameters)}
    optimizer.scale_layers(lr=scales, weight_decay=scales)
    return optimizer.step


def foreach_lars(parameters: list[Parameter]) -> Call:
    """What one writes without kernels."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return one_pass.foreach_lars_of([p.data for p in parameters], gradients)


def ours(name: str, **options: Any) -> dict[str, Make]:
    """One of our optimizers on every backend."""
    return {f"{b} {name}": partial(stepping, getattr(fused_opt, name), backend=b, **options) for b in BACKENDS}


def torchs(name: str, **options: Any) -> dict[str, Make]:
    """Torch's, fused and foreach."""
    make = getattr(torch.optim, name)
    return {f"torch {kind} {name}": partial(stepping, make, **{kind: True}, **options) for kind in ("fused", "foreach")}


def peers(kind: str, **options: Any) -> dict[str, Make]:
    """The public ones that are installed here."""
    found: dict[str, Make] = {}
    for module, name in PEERS[kind]:
        try:
            make = getattr(import_module(module), name)
        except Exception:  # whatever an extension built for another machine may raise
            continue
        found[f"{module.partition('.')[0]} {name}"] = partial(stepping, make, **options)
    return found


def extras_of_sgd(b: str) -> dict[str, Make]:
    """Everything that may ride in a step of SGD."""
    sgd = partial(stepping, fused_opt.SGD, backend=b, **SGD)
    return {
        f"{b} SGD": sgd,
        f"{b} SGD, noise": partial(sgd, noise=fused_opt.WeightNoise(std=1e-6)),
        f"{b} SGD, EMA between samples": partial(sgd, averaging=fused_opt.EMA(0.999, start=NEVER)),
        f"{b} SGD, EMA": partial(sgd, averaging=fused_opt.EMA(0.999)),
        f"{b} SGD, relative noise": partial(sgd, noise=fused_opt.WeightNoise(std=1e-6, relative=True)),
        f"{b} SGD, clipping": partial(sgd, max_grad_norm=1.0),
        f"{b} SGD, nonfinite skip": partial(sgd, nonfinite="skip"),
        f"{b} SGD, layer rates": partial(layer_rates, backend=b, **SGD),
    }


def extras_of_adamw(b: str) -> dict[str, Make]:
    """The same for AdamW."""
    adamw = partial(stepping, fused_opt.AdamW, backend=b, **ADAMW)
    return {
        f"{b} AdamW": adamw,
        f"{b} AdamW, noise": partial(adamw, noise=fused_opt.WeightNoise(std=1e-6)),
        f"{b} AdamW, EMA": partial(adamw, averaging=fused_opt.EMA(0.999)),
        f"{b} AdamW, clipping": partial(adamw, max_grad_norm=1.0),
    }


def layerwise() -> dict[str, Make]:
    """LARS and CLARS beside SGD, on which they are to cost next to nothing, and beside their peers."""
    contenders = {**ours("SGD", **SGD)}
    for b in BACKENDS:
        contenders[f"{b} CLARS"] = partial(clars, backend=b, **SGD)
        contenders[f"{b} LARS"] = partial(stepping, fused_opt.LARS, backend=b, **SGD)
    return {**contenders, "foreach LARS": foreach_lars, **peers("LARS", **SGD)}


def cases() -> Iterator[Case]:
    """All of them, those with targets first."""
    for shape in SHAPES:
        yield Case(shape, "SGD", {**ours("SGD", **SGD), **torchs("SGD", **SGD)}, SGD_BYTES, 3)
        yield Case(shape, "AdamW", {**ours("AdamW", **ADAMW), **torchs("AdamW", **ADAMW)}, ADAM_BYTES, 4)
        yield Case(shape, "LARS", layerwise(), SGD_BYTES, 3)
    for shape in SHAPES:
        for b in BACKENDS:
            yield Case(shape, f"SGD with extras, {b}", extras_of_sgd(b), SGD_BYTES, 3)
        lamb = {**ours("LAMB", **ADAMW), **torchs("AdamW", **ADAMW), **peers("LAMB", **ADAMW)}
        yield Case(shape, "LAMB", lamb, ADAM_BYTES, 4)
    for shape in SHAPES:
        for b in BACKENDS:
            yield Case(shape, f"AdamW with extras, {b}", extras_of_adamw(b), ADAM_BYTES, 4)
        yield Case(shape, "Adam", {**ours("Adam", **ADAM), **torchs("Adam", **ADAM)}, ADAM_BYTES, 4)


def parameters_of(gradients: Sequence[torch.Tensor]) -> list[Parameter]:
    """New parameters with the given gradients, which contenders share: no step writes one."""
    parameters = [Parameter(torch.randn_like(gradient)) for gradient in gradients]
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient
    return parameters
