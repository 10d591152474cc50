"""What is timed of forms of states and weights, as data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

import fused_opt

from .contenders import ADAMW, importable, peers, stepping
from .harness import Call, Case
from .shapes import SHAPES
from .targets import Target


def in_bfloat16(make: Callable[..., torch.optim.Optimizer], parameters: list[Parameter], **options: Any) -> Call:
    """An optimizer of the same parameters in bfloat16, with gradients that are so, too."""
    halves = []
    for p in parameters:
        halves.append(Parameter(p.detach().to(torch.bfloat16)))
        halves[-1].grad = None if p.grad is None else p.grad.to(torch.bfloat16)
    return stepping(make, halves, **options)


def precision(model: str) -> list[Case]:
    """Forms of states and weights over a model's shapes: a case for each of three questions."""
    # Peers that are not installed are in no target.
    ours, theirs = fused_opt.AdamW, partial(torch.optim.AdamW, fused=True)
    plain, large = partial(stepping, ours, **ADAMW), model == "GPT-2 small"
    # A step of theirs takes seconds on GPT-2's shapes.
    slow = {} if large else importable("8 bits")
    peers_8_bits = {label: partial(stepping, make, **ADAMW) for label, make in slow.items()}
    eight = [Target("8-bit states", "time", 1, "float32 states")] if large else []
    if "bitsandbytes AdamW8bit" in peers_8_bits:
        eight.append(Target("8-bit states", "speed", 10, "bitsandbytes AdamW8bit"))
    half = partial(in_bfloat16, ours, **ADAMW)
    kahan = {"optimi AdamW": {}, "torchao _AdamW": {"bf16_stochastic_round": True}}
    peers_bfloat16 = {
        label: partial(in_bfloat16, make, **ADAMW, **kahan[label]) for label, make in importable("bfloat16").items()
    }
    return [
        Case(
            f"{model}, 8-bit states",
            SHAPES[model],
            {"8-bit states": partial(plain, state_dtype="8bit"), "float32 states": plain, **peers_8_bits},
            "float32 states",
            tuple(eight),
            weighs=True,
        ),
        Case(
            f"{model}, bfloat16 states",
            SHAPES[model],
            {
                "bfloat16 states": partial(plain, state_dtype=torch.bfloat16),
                "float32 states": plain,
                "torch fused": partial(stepping, theirs, **ADAMW),
                **peers("AdamW", **ADAMW),
            },
            "torch fused",
            (Target("bfloat16 states", "time", 0.8, "float32 states"),) if large else (),
            weighs=True,
        ),
        Case(
            f"{model}, bfloat16 weights",
            SHAPES[model],
            {
                "to the nearest": half,
                "stochastic": partial(half, rounding="stochastic"),
                "remainder": partial(half, master_weights=True),
                "remainder, 8-bit states": partial(half, master_weights=True, state_dtype="8bit"),
                "torch fused": partial(in_bfloat16, theirs, **ADAMW),
                **peers_bfloat16,
            },
            "torch fused",
            (
                Target("stochastic", "time", 1.25, "to the nearest"),
                Target("remainder", "time", 1.2, "to the nearest"),
            )
            if large
            else (),
            weighs=True,
        ),
    ]
