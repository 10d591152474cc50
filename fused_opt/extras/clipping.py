"""The norm of all gradients together: clipping, and gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

PASS, SKIP, RAISE = NONFINITE = ("pass", "skip", "raise")


def wants_norm(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether a step needs the norm of all gradients.

    Raises:
        ValueError: where the groups do not agree on what is about all of them together.
    """
    first = groups[0]
    if len(groups) > 1 and any(
        g["max_grad_norm"] != first["max_grad_norm"] or g["nonfinite"] != first["nonfinite"] for g in groups
    ):
        raise ValueError("max_grad_norm and nonfinite are about all gradients together: set them alike in every group")
    return first["max_grad_norm"] is not None or first["nonfinite"] != PASS


def clip_factor(norm: float, limit: float | None) -> float:
    """What torch.nn.utils.clip_grad_norm_ multiplies gradients of this norm with; a NaN or a 0 for one that is not finite."""
    if limit is None:
        return 1.0
    clip = limit / (norm + 1e-6)
    return 1.0 if clip > 1 else clip


def allows(nonfinite: str, norm: float) -> bool:
    """Whether a step may be made with gradients of this norm."""
    return nonfinite == PASS or math.isfinite(norm)
