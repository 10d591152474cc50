"""Our optimizers against torch.optim's fused and foreach steps, float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import fused_opt

from .harness import Call, Case, Table, Target
from .shapes import SHAPES, Shape


def normal(shape: Shape) -> torch.Tensor:
    """Normal numbers, a million drawn and then repeated: drawing them all would take longer than the benchmark."""
    size = math.prod(shape)
    return NUMBERS.repeat(size // len(NUMBERS) + 1)[:size].clone().view(shape)


def stepping(make: Callable[..., torch.optim.Optimizer], shapes: Sequence[Shape], **options: Any) -> Call:
    """The bound ``step`` of an optimizer over new parameters whose gradients are set once."""
    parameters = [torch.nn.Parameter(normal(shape)) for shape in shapes]
    for p in parameters:
        p.grad = normal(p.shape)
    return make(parameters, **options).step


def parallel_region() -> None:
    """Wake torch's threads, as a backward does just before a step."""
    torch.mm(MATRIX, MATRIX)


MATRIX = torch.ones(512, 512)
NUMBERS = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"lr": 1e-3, "momentum": 0.9}, "AdamW": {"lr": 1e-3}}
FASTER = {
    "SGD": {"300 of 8x8": 10, "300 of 64x64": 5, "30 of 1024x1024": 1.2},
    "AdamW": {"300 of 8x8": 15, "300 of 64x64": 5, "30 of 1024x1024": 1.1},
}


def table(name: str) -> Table:
    """The table of one optimizer: every shape, then the small ones again right after a parallel region of torch's."""
    ours, theirs = getattr(fused_opt, name), getattr(torch.optim, name)
    contenders = {
        "fused_opt": partial(stepping, ours, **OPTIONS[name]),
        "torch fused": partial(stepping, theirs, **OPTIONS[name], fused=True),
        "torch foreach": partial(stepping, theirs, **OPTIONS[name], foreach=True),
    }
    cases = []
    for key, shapes in SHAPES.items():
        factor = FASTER[name].get(key)
        targets = (Target("fused_opt", 1 / factor, "torch fused"),) if factor else ()
        cases.append(Case(key, shapes, contenders, "torch fused", targets))
    for key in FASTER[name]:
        after = f"{key}, after a matmul"
        cases.append(Case(after, SHAPES[key], contenders, "torch fused", before=parallel_region))
    what = ", ".join(f"{option}={value:g}" for option, value in OPTIONS[name].items())
    return Table(name.lower(), f"{name}({what}), one step, float32", cases)


TABLES = [table(name) for name in OPTIONS]
