"""What a step leaves on the GPU that has it, and when the host must know it after all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .extras.clipping import PASS


def host_decides(groups: Sequence[Mapping[str, Any]], found_inf: Tensor | None) -> bool:
    """Whether the host must know what a GPU knows: to skip or raise, and to count steps for noise and averages."""
    counts = any(group["noise"] is not None or group["averaging"] is not None for group in groups)
    return groups[0]["nonfinite"] != PASS or (found_inf is not None and counts)


def rates(groups: Sequence[Mapping[str, Any]], device: torch.device | None) -> list[float | Tensor]:
    """The groups' learning rates: those that are on the device as they are, others as floats.

    Raises:
        ValueError: for one that is not a number, where the host looks at it.
    """
    if device is None:
        lrs: list[float | Tensor] = [float(group["lr"]) for group in groups]
    else:
        lrs = [lr if getattr(lr, "device", None) == device else float(lr) for lr in (group["lr"] for group in groups)]
    if any([lr != lr for lr in lrs if isinstance(lr, float)]):  # noqa: C419  # of one or two, a list is faster
        raise ValueError("Invalid learning rate: nan")
    return lrs


def norm_reader(norm2: Tensor, scale: Tensor | None) -> Callable[[], float]:
    """Reads, and waits for, the norm of gradients that were multiplied with a scale, from the sum of their squares."""
    scale = None if scale is None else scale.clone()  # a GradScaler writes its own after the step
    return lambda: math.sqrt(norm2.item()) / (1.0 if scale is None else scale.item())
