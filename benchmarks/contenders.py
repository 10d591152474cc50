"""What contenders are made of: options, an optimizer's step, and public optimizers to compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.nn import Parameter

from .harness import Call, Make

SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
ADAM: dict[str, Any] = {"lr": 1e-3}
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2}
MUON: dict[str, Any] = {"lr": 0.02}


def stepping(make: Callable[..., torch.optim.Optimizer], parameters: list[Parameter], **options: Any) -> Call:
    """The bound ``step`` of an optimizer."""
    return make(parameters, **options).step


# Public optimizers to compare with; those that can be imported are timed.
PEERS = {
    "AdamW": ("bitsandbytes.optim.AdamW", "optimi.AdamW"),
    "AdamW of large tensors": ("deepspeed.ops.adam.DeepSpeedCPUAdam",),  # compiles itself when first made
    "8 bits": ("bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW8bit"),
    "bfloat16": ("optimi.AdamW", "torchao.optim._AdamW"),
    "LARS": ("timm.optim.Lars", "torch_optimizer.LARS", "bitsandbytes.optim.LARS"),
    "LAMB": ("apex.optimizers.FusedLAMB", "timm.optim.Lamb", "torch_optimizer.Lamb", "bitsandbytes.optim.LAMB"),
}


def importable(kind: str) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """The public ones that are installed here."""
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {}
    for module, _, name in (path.rpartition(".") for path in PEERS[kind]):
        try:
            make = getattr(import_module(module), name)
        except Exception:  # whatever an extension built for another machine may raise
            continue
        found[f"{module.partition('.')[0]} {name}"] = make
    return found


def peers(kind: str, **options: Any) -> dict[str, Make]:
    """Their steps."""
    return {label: partial(stepping, make, **options) for label, make in importable(kind).items()}


def copy_of_memory(elements: int, device: torch.device | str = "cpu") -> Call:
    """As many float32s read and written: 8 bytes of each."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
