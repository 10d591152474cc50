"""What is timed on a GPU, as data; the targets are in targets.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

import fused_opt

from .. import shapes
from ..contenders import ADAM, ADAMW, SGD, foreach_lars, peers, stepping
from ..harness import Call, Case, Make
from . import BACKENDS, ON_CPU

NEVER = 10**9  # steps
MODELS = shapes.ON_GPU if not ON_CPU else {"ResNet-50": shapes.tiny(shapes.resnet50()[:2])}
SGD_BYTES, ADAM_BYTES = 20, 28  # for each element and step, float32: read p, g and the states, write p and the states


def clars_of_probe(parameters: list[Parameter], **options: Any) -> Call:
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


def ours(name: str, **options: Any) -> dict[str, Make]:
    """One of our optimizers on every backend."""
    return {f"{b} {name}": partial(stepping, getattr(fused_opt, name), backend=b, **options) for b in BACKENDS}


def torchs(name: str, **options: Any) -> dict[str, Make]:
    """Torch's, fused and foreach."""
    make = getattr(torch.optim, name)
    return {f"torch {kind} {name}": partial(stepping, make, **{kind: True}, **options) for kind in ("fused", "foreach")}


def extras_of_sgd(b: str) -> dict[str, Make]:
    """Everything that can be fused into a step of SGD."""
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
        contenders[f"{b} CLARS"] = partial(clars_of_probe, backend=b, **SGD)
        contenders[f"{b} LARS"] = partial(stepping, fused_opt.LARS, backend=b, **SGD)
    return {**contenders, "foreach LARS": foreach_lars, **peers("LARS", **SGD)}


def on_gpu() -> Iterator[Case]:
    """All cases of a GPU, those with targets first."""
    sgd, adamw, adam = (
        {**ours(name, **options), **torchs(name, **options)}
        for name, options in (("SGD", SGD), ("AdamW", ADAMW), ("Adam", ADAM))
    )
    lamb = {**ours("LAMB", **ADAMW), **torchs("AdamW", **ADAMW), **peers("LAMB", **ADAMW)}
    first = [("SGD", sgd, SGD_BYTES), ("AdamW", adamw, ADAM_BYTES), ("LARS", layerwise(), SGD_BYTES)]
    second = [(f"SGD with extras, {b}", extras_of_sgd(b), SGD_BYTES) for b in BACKENDS]
    third = [(f"AdamW with extras, {b}", extras_of_adamw(b), ADAM_BYTES) for b in BACKENDS]
    for cases in (first, [*second, ("LAMB", lamb, ADAM_BYTES)], [*third, ("Adam", adam, ADAM_BYTES)]):
        for model, of_model in MODELS.items():
            for name, contenders, budget in cases:
                yield Case(name, of_model, contenders, model=model, budget=budget)
