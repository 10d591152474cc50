"""What is timed, as data: the tables of ``python -m benchmarks``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_opt
from fused_opt import backends

from . import shapes
from .contenders import ADAMW, MUON, SGD, copy_of_memory, foreach_lars, importable, pairs, peers, stepping
from .harness import Call, Case, Make, Table, normal
from .models import MODELS as TRAINED
from .precision import in_bfloat16, precision
from .shapes import SHAPES, Shape
from .targets import Target

MATRIX = torch.ones(512, 512)

# Contenders: functions of parameters with gradients that return the call to time.


def clars_of_microbatches(parameters: list[Parameter]) -> Call:
    """CLARS as it is used: a backward has left the norms of the gradient's parts, and keeps leaving the same."""
    optimizer = fused_opt.CLARS(parameters, **SGD, cap=0.1)
    parts = optimizer.track_parts("microbatch")
    optimizer.zero_grad()
    sum((p * normal(p.shape)).sum() for p in parameters).backward()
    parts.reset = lambda: None  # type: ignore[method-assign]
    return optimizer.step


def accumulate(parameters: list[Parameter]) -> Call:
    """A micro-batch's gradients added, with both sums of squares, in one pass."""
    tensors = pairs(parameters)
    return lambda: [backends.accumulate(total, part) for total, part in tensors]


def add_then_norm(parameters: list[Parameter]) -> Call:
    """The same in two, and without the norm of the sum."""
    tensors = pairs(parameters)
    return lambda: [(total.add_(part), torch.linalg.vector_norm(part).item()) for total, part in tensors]


def averaged_model(parameters: list[Parameter], step: bool = True) -> Call:
    """Torch's fused step, and its exponential moving average beside it; or the average alone."""
    model = torch.nn.ParameterList(parameters)
    optimizer = torch.optim.SGD(parameters, **SGD, fused=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    if not step:
        return lambda: average.update_parameters(model)
    return lambda: (optimizer.step(), average.update_parameters(model))


def clip_then_step(parameters: list[Parameter]) -> Call:
    """Torch's clipping, then torch's fused step. The limit clips every time: the gradients are renewed by no one."""
    optimizer = torch.optim.SGD(parameters, **SGD, fused=True)
    return lambda: (torch.nn.utils.clip_grad_norm_(parameters, 1.0), optimizer.step())


def clipped_and_averaged(
    make: Callable[..., torch.optim.Optimizer], parameters: list[Parameter], **options: Any
) -> Call:
    """An optimizer between torch's clipping and its exponential moving average, as loops have them."""
    model, optimizer = torch.nn.ParameterList(parameters), make(parameters, **options)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    return lambda: (
        torch.nn.utils.clip_grad_norm_(parameters, 1.0),
        optimizer.step(),
        average.update_parameters(model),
    )


def compiled(parameters: list[Parameter], **options: Any) -> torch.optim.Optimizer:
    """AdamW of torch's default with a compiled step, as in PyTorch's recipe; the compiler runs in the warm-up."""
    torch.compiler.reset()  # or beyond eight optimizers it would leave the step as it is
    optimizer = torch.optim.AdamW(parameters, **options)
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def beside_a_copy(name: str, public: dict[str, Make], **options: Any) -> Case:
    """Steps that memory bounds, and what bounds them: a copy of as many elements, which moves less than a step."""
    contenders = {
        "fused_opt": partial(stepping, getattr(fused_opt, name), **options),
        "torch fused": partial(stepping, getattr(torch.optim, name), **options, fused=True),
        **public,
        "copy of memory": lambda parameters: copy_of_memory(sum(p.numel() for p in parameters)),
    }
    return Case(f"{name}, GPT-2 small", SHAPES["GPT-2 small"], contenders, "copy of memory")


def parallel_region() -> None:
    """Wake torch's threads, as a backward does just before a step."""
    torch.mm(MATRIX, MATRIX)


def against_torch(name: str, options: dict[str, Any], faster: dict[str, float]) -> Table:
    """One optimizer on every shape, then on the small ones again right after a parallel region of torch's."""
    ours, theirs = getattr(fused_opt, name), getattr(torch.optim, name)
    contenders = {
        "fused_opt": partial(stepping, ours, **options),
        "torch fused": partial(stepping, theirs, **options, fused=True),
        "torch foreach": partial(stepping, theirs, **options, foreach=True),
    }
    cases = []
    for key, of_case in SHAPES.items():
        targets = (Target("fused_opt", "speed", faster[key], "torch fused"),) if key in faster else ()
        cases.append(Case(key, of_case, contenders, "torch fused", targets))
    for key in faster:
        after = f"{key}, after a matmul"
        cases.append(Case(after, SHAPES[key], contenders, "torch fused", before=parallel_region))
    what = ", ".join(f"{option}={value:g}" for option, value in options.items())
    return Table(name.lower(), f"{name}({what}), one step, float32", cases)


def without_kernels(what: str, key: str, options: dict[str, Any], start: Callable[..., Call] = stepping) -> Case:
    """What steps where no compiled backend can, beside torch's foreach step, which is its default on GPUs."""
    name = what.split()[0]
    contenders = {
        "fused_opt": partial(start, getattr(fused_opt, name), backend="foreach", **options),
        "torch foreach": partial(start, getattr(torch.optim, name), **options, foreach=True),
    }
    target = Target("fused_opt", "time", 1.1, "torch foreach")
    case = f"{what}, {key}" if start is stepping else f"{what}, bfloat16, {key}"
    return Case(case, SHAPES[key], contenders, "torch foreach", (target,))


def of_small_tensors(name: str) -> Case:
    """One optimizer with its defaults, where torch has no fused step to compare with."""
    ours, theirs = getattr(fused_opt, name), getattr(torch.optim, name)
    contenders = {
        "fused_opt": partial(stepping, ours),
        "torch": partial(stepping, theirs),
        "torch foreach": partial(stepping, theirs, foreach=True),
    }
    return Case(name, SHAPES["300 of 8x8"], contenders, "torch", (Target("fused_opt", "speed", 8, "torch"),))


def muon(key: str, shapes: Sequence[Shape], *targets: Target) -> Case:
    """Muon of matrices, beside torch's."""
    contenders = {
        "fused_opt": partial(stepping, fused_opt.Muon, **MUON),
        "torch": partial(stepping, torch.optim.Muon, **MUON),
    }
    return Case(key, shapes, contenders, "torch", targets)


def one_pass(name: str, contenders: dict[str, Make], baseline: str, *targets: Target) -> Case:
    """A case over ResNet-50's shapes."""
    return Case(name, SHAPES["ResNet-50"], contenders, baseline, targets)


def beside_adamw(name: str, **options: Any) -> Case:
    """A kind of decay or a mask over GPT-2's shapes, beside the plain step."""
    plain = partial(stepping, fused_opt.AdamW, **ADAMW)
    contenders = {name: partial(plain, **options), "fused_opt.AdamW": plain}
    return Case(
        name, SHAPES["GPT-2 small"], contenders, "fused_opt.AdamW", (Target(name, "time", 1.1, "fused_opt.AdamW"),)
    )


def iterations(name: str, count: int) -> list[Case]:
    """Iterations of a model with so many threads, plain, and with clipping and an exponential moving average."""
    theirs = {
        "torch default": partial(torch.optim.AdamW, **ADAMW),
        "torch fused": partial(torch.optim.AdamW, **ADAMW, fused=True),
        "torch compiled": partial(compiled, **ADAMW),
        **{label: partial(make, **ADAMW) for label, make in importable("AdamW").items()},
    }
    ways = {
        "": (partial(stepping, fused_opt.AdamW, **ADAMW), stepping),
        ", clipping and EMA": (
            partial(stepping, fused_opt.AdamW, **ADAMW, max_grad_norm=1.0, averaging=fused_opt.EMA(0.999)),
            clipped_and_averaged,
        ),
    }
    quarter = Target(
        "fused_opt", "speed", 4, "torch fused", of_part=True
    )  # of the host's time, which is all that there is
    return [
        Case(
            f"{name}, {count} thread{'s' if count > 1 else ''}{extras}",
            shapes=(),
            contenders={"fused_opt": step, **{label: partial(loop, make) for label, make in theirs.items()}},
            baseline="torch fused",
            targets=(quarter,) if name == "MLP" else (),
            training=TRAINED[name],
            threads=count,
        )
        for extras, (step, loop) in ways.items()
    ]


OTHERS = "RMSprop", "Adamax", "Adagrad", "NAdam", "RAdam"
WITHOUT_KERNELS: dict[str, dict[str, Any]] = {
    "SGD": SGD,
    "SGD of Nesterov": {**SGD, "nesterov": True},
    "SGD alone": {"lr": SGD["lr"]},
    "AdamW": ADAMW,
}
ours_sgd = partial(stepping, fused_opt.SGD, **SGD)
TABLES = [
    against_torch("SGD", {"lr": 1e-3, "momentum": 0.9}, {"300 of 8x8": 10, "300 of 64x64": 5, "30 of 1024x1024": 1.2}),
    against_torch("AdamW", {"lr": 1e-3}, {"300 of 8x8": 15, "300 of 64x64": 5, "30 of 1024x1024": 1.1}),
    Table(
        "fallback",
        "Without a compiled backend (backend='foreach'), one step",
        [
            without_kernels(what, key, options)
            for what, options in WITHOUT_KERNELS.items()
            for key in ("300 of 8x8", "300 of 64x64", "30 of 1024x1024")
        ]
        + [without_kernels(what, "300 of 64x64", {}) for what in OTHERS]
        + [
            without_kernels(what, key, options, in_bfloat16)
            for what, options in {**WITHOUT_KERNELS, **{key: {} for key in OTHERS}}.items()
            for key in ("300 of 64x64", "30 of 1024x1024")
        ],
    ),
    Table(
        "rules",
        "Other rules, 300 tensors of 8x8, one step, float32",
        list(map(of_small_tensors, OTHERS)),
    ),
    Table(
        "muon",
        "Muon(lr=0.02), one step, float32",
        [
            muon("300 of 8x8", SHAPES["300 of 8x8"], Target("fused_opt", "speed", 3, "torch")),
            # Larger ones take a minute: products in bfloat16, on a processor that converts them.
            muon("ResNet-20", shapes.resnet20(), Target("fused_opt", "speed", 1, "torch")),
            muon("MLP, 784-256-128-10", [(256, 784), (128, 256), (10, 128)], Target("fused_opt", "time", 1.1, "torch")),
            muon("a block of ViT-Ti", shapes.block(192), Target("fused_opt", "time", 1.1, "torch")),
        ],
    ),
    Table(
        "memory",
        "One step beside a copy of memory, float32",
        [
            beside_a_copy("SGD", {}, **SGD),
            beside_a_copy("AdamW", peers("AdamW of large tensors", **ADAMW), **ADAMW),
        ],
    ),
    Table(
        "decay",
        "Kinds of decay and masks, AdamW, GPT-2's shapes, float32",
        [
            beside_adamw("independent decay", decay="independent"),
            beside_adamw("cautious decay", cautious=fused_opt.Cautious("decay")),
            beside_adamw("cautious update, unscaled", cautious=fused_opt.Cautious("update", scaled=False)),
            beside_adamw("cautious update", cautious=fused_opt.Cautious("update")),
        ],
    ),
    Table(
        "precision",
        "Forms of states and weights, AdamW, one step",
        [case for model in ("GPT-2 small", "ResNet-50") for case in precision(model)],
    ),
    Table(
        "one_pass",
        "What is fused into the step, ResNet-50's shapes, float32",
        [
            one_pass(
                "CLARS",
                {
                    "CLARS, parts tracked": clars_of_microbatches,
                    "CLARS, one part": partial(stepping, fused_opt.CLARS, **SGD, cap=0.1),
                    "LARS": partial(stepping, fused_opt.LARS, **SGD),
                    "fused_opt.SGD": ours_sgd,
                    "torch fused SGD": partial(stepping, torch.optim.SGD, **SGD, fused=True),
                    "foreach LARS": foreach_lars,
                },
                "torch fused SGD",
                Target("CLARS, parts tracked", "time", 1.15, "fused_opt.SGD"),
                Target("CLARS, parts tracked", "time", 1.1, "torch fused SGD"),
                Target("CLARS, parts tracked", "speed", 2.5, "foreach LARS"),
            ),
            one_pass(
                "accumulation with norms",
                {"accumulate": accumulate, "add, then norm": add_then_norm},
                "add, then norm",
                Target("accumulate", "speed", 1.5, "add, then norm"),
            ),
            one_pass(
                "EMA",
                {
                    "EMA in the step": partial(ours_sgd, averaging=fused_opt.EMA(0.999)),
                    "fused_opt.SGD": ours_sgd,
                    "AveragedModel": partial(averaged_model, step=False),
                    "torch fused and AveragedModel": averaged_model,
                },
                "torch fused and AveragedModel",
                Target("EMA in the step", "time", 0.5, "AveragedModel", beyond="fused_opt.SGD"),
            ),
            one_pass(
                "clipping",
                {
                    "clipping in the step": partial(ours_sgd, max_grad_norm=1.0),
                    "clip_grad_norm_ and torch fused": clip_then_step,
                },
                "clip_grad_norm_ and torch fused",
                Target("clipping in the step", "time", 0.7, "clip_grad_norm_ and torch fused"),
            ),
            one_pass(
                "noise",
                {
                    "SGD with noise": partial(ours_sgd, noise=fused_opt.WeightNoise(std=1e-6)),
                    "fused_opt.SGD": ours_sgd,
                },
                "fused_opt.SGD",
                Target("SGD with noise", "time", 1.5, "fused_opt.SGD"),
            ),
        ],
    ),
    Table(
        "iterations",
        "Iterations of training and the optimizer's part of them, AdamW, float32",
        [case for name in TRAINED for count in (1, 2) for case in iterations(name, count)],
    ),
]
