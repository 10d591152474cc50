"""The norm of all gradients together: clipping, and gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from ..checks import real
from .extra import Extra

Nonfinite = Literal["pass", "skip", "raise"]
PASS, SKIP, RAISE = CHOICES = get_args(Nonfinite)


def _check_limit(limit: Any) -> None:
    if limit is not None:
        real("max_grad_norm", limit, lambda x: x > 0, "positive, or None for no clipping")


def _check_choice(choice: Any) -> None:
    if choice not in CHOICES:
        raise ValueError(f"Invalid nonfinite: {choice!r}; there are {', '.join(map(repr, CHOICES))}")


MAX_GRAD_NORM = Extra(
    "max_grad_norm",
    _check_limit,
    """clip the norm of all gradients together to this, as torch.nn.utils.clip_grad_norm_ before the step
            would, without writing the gradients; the norm is then ``grad_norm``.""",
    of_all_parameters=True,
)
NONFINITE = Extra(
    "nonfinite",
    _check_choice,
    """what to do when a gradient is not finite: ``"pass"`` it on as torch.optim does, ``"skip"`` the step
            (nothing changes; ``skipped_steps`` counts), or ``"raise"`` a RuntimeError that names the parameter.""",
    default=PASS,
    counts=("skipped_steps",),
    of_all_parameters=True,
)


def wants_norm(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a step needs the norm of all gradients.

    Raises:
        ValueError: where the groups differ in a setting that applies to all of them together.
    """
    if not groups:
        return False
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
