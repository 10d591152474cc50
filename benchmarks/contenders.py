"""What contenders are made of: options, an optimizer's step, and public optimizers to compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
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


def pairs(parameters: list[Parameter]) -> list[tuple[Tensor, Tensor]]:
    """Parameters and gradients as plain tensors."""
    return [(p.data, p.grad) for p in parameters if p.grad is not None]


def foreach_lars(of: list[Parameter]) -> Call:
    """LARS from torch's multi-tensor operations, as one would write it without kernels."""
    parameters, gradients = map(list, zip(*pairs(of)))
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
