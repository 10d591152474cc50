"""What rides in the step against the same thing done beside it, at ResNet-50's shapes, float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_opt
from fused_opt import backends

from .against_torch import normal, stepping
from .harness import Call, Case, Table, Target
from .shapes import SHAPES, Shape

SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
CLARS: dict[str, Any] = {**SGD, "cap": 0.1}
ours = partial(stepping, fused_opt.SGD, **SGD)
theirs = partial(stepping, torch.optim.SGD, **SGD, fused=True)


def clars_of_parts(shapes: Sequence[Shape]) -> Call:
    """CLARS as it is used: a backward has left the norms of the gradient's parts, and keeps leaving the same."""
    parameters = [torch.nn.Parameter(normal(shape)) for shape in shapes]
    optimizer = fused_opt.CLARS(parameters, **CLARS)
    parts = optimizer.track_parts("microbatch")
    sum((p * normal(p.shape)).sum() for p in parameters).backward()
    parts.reset = lambda: None  # type: ignore[method-assign]
    return optimizer.step


def foreach_lars(shapes: Sequence[Shape]) -> Call:
    """A LARS without kernels, over new parameters."""
    return foreach_lars_of([normal(shape) for shape in shapes], [normal(shape) for shape in shapes])


def foreach_lars_of(parameters: list[Tensor], gradients: list[Tensor]) -> Call:
    """LARS from torch's multi-tensor operations, as one would write it without kernels."""
    buffers = [torch.zeros_like(p) for p in parameters]
    lr, momentum, decay = SGD["lr"], SGD["momentum"], SGD["weight_decay"]

    @torch.no_grad()
    def step() -> None:
        weights, norms = torch._foreach_norm(parameters), torch._foreach_norm(gradients)
        denominators = torch._foreach_add(norms, weights, alpha=decay)
        ratios: list[Tensor] = list(torch._foreach_div(torch._foreach_mul(weights, 0.001 * lr), denominators))
        directions = torch._foreach_add(gradients, parameters, alpha=decay)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, directions)
        torch._foreach_sub_(parameters, torch._foreach_mul(buffers, ratios))

    return step


def accumulate(shapes: Sequence[Shape]) -> Call:
    """A micro-batch's gradients added, with both sums of squares, in one pass."""
    pairs = [(normal(shape), normal(shape)) for shape in shapes]
    return lambda: [backends.accumulate(total, part) for total, part in pairs]


def add_then_norm(shapes: Sequence[Shape]) -> Call:
    """The same in two, and without the norm of the sum."""
    pairs = [(normal(shape), normal(shape)) for shape in shapes]
    return lambda: [(total.add_(part), torch.linalg.vector_norm(part).item()) for total, part in pairs]


def averaged_model(shapes: Sequence[Shape], step: bool = True) -> Call:
    """Torch's fused step, and its exponential moving average beside it; or the average alone."""
    model = torch.nn.ParameterList([torch.nn.Parameter(normal(shape)) for shape in shapes])
    for p in model.parameters():
        p.grad = normal(p.shape)
    optimizer = torch.optim.SGD(model.parameters(), **SGD, fused=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    if not step:
        return lambda: average.update_parameters(model)
    return lambda: (optimizer.step(), average.update_parameters(model))


def clip_then_step(shapes: Sequence[Shape]) -> Call:
    """Torch's clipping, then torch's fused step. The limit clips every time: the gradients are renewed by no one."""
    parameters = [torch.nn.Parameter(normal(shape)) for shape in shapes]
    for p in parameters:
        p.grad = normal(p.shape)
    optimizer = torch.optim.SGD(parameters, **SGD, fused=True)
    return lambda: (torch.nn.utils.clip_grad_norm_(parameters, 1.0), optimizer.step())


def case(name: str, contenders: dict[str, Any], baseline: str, *targets: Target) -> Case:
    return Case(name, SHAPES["ResNet-50"], contenders, baseline, targets)


TABLES = [
    Table(
        "one_pass",
        "What rides in the step, ResNet-50's shapes, float32",
        [
            case(
                "CLARS",
                {
                    "CLARS, parts tracked": clars_of_parts,
                    "CLARS, one part": partial(stepping, fused_opt.CLARS, **CLARS),
                    "LARS": partial(stepping, fused_opt.LARS, **SGD),
                    "fused_opt.SGD": ours,
                    "torch fused SGD": theirs,
                    "foreach LARS": foreach_lars,
                },
                "torch fused SGD",
                Target("CLARS, parts tracked", 1.15, "fused_opt.SGD"),
                Target("CLARS, parts tracked", 1.1, "torch fused SGD"),
                Target("CLARS, parts tracked", 1 / 2.5, "foreach LARS"),
            ),
            case(
                "accumulation with norms",
                {"accumulate": accumulate, "add, then norm": add_then_norm},
                "add, then norm",
                Target("accumulate", 1 / 1.5, "add, then norm"),
            ),
            case(
                "EMA",
                {
                    "EMA in the step": partial(stepping, fused_opt.SGD, **SGD, averaging=fused_opt.EMA(0.999)),
                    "fused_opt.SGD": ours,
                    "AveragedModel": partial(averaged_model, step=False),
                    "torch fused and AveragedModel": averaged_model,
                },
                "torch fused and AveragedModel",
                Target("EMA in the step", 1 / 2, "AveragedModel", beyond="fused_opt.SGD"),
            ),
            case(
                "clipping",
                {
                    "clipping in the step": partial(stepping, fused_opt.SGD, **SGD, max_grad_norm=1.0),
                    "clip_grad_norm_ and torch fused": clip_then_step,
                },
                "clip_grad_norm_ and torch fused",
                Target("clipping in the step", 0.7, "clip_grad_norm_ and torch fused"),
            ),
            case(
                "noise",
                {
                    "SGD with noise": partial(stepping, fused_opt.SGD, **SGD, noise=fused_opt.WeightNoise(std=1e-6)),
                    "fused_opt.SGD": ours,
                },
                "fused_opt.SGD",
                Target("SGD with noise", 1.5, "fused_opt.SGD"),
            ),
        ],
    )
]
