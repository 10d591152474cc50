"""From the layers' exponents to their multipliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

Assignment = Literal["linear", "sqrt", "log2", "step", "sigmoid"]
Map = Callable[[Sequence[float], float, float, float], list[float]]


def _linear(alphas: Sequence[float], low: float, high: float, strength: float) -> list[float]:
    least, most = min(alphas), max(alphas)
    return [low + (high - low) * ((alpha - least) / (most - least)) for alpha in alphas]


def _share(of: Callable[[float], float]) -> Map:
    def shares(alphas: Sequence[float], low: float, high: float, strength: float) -> list[float]:
        total = math.fsum(map(of, alphas))
        return [len(alphas) * of(alpha) / total for alpha in alphas]

    return shares


def _step(alphas: Sequence[float], low: float, high: float, strength: float) -> list[float]:
    ranked = sorted(range(len(alphas)), key=alphas.__getitem__)
    by_rank = {i: low + (high - low) * rank / len(alphas) for rank, i in enumerate(ranked)}
    return [by_rank[i] for i in range(len(alphas))]


def _sigmoid(alphas: Sequence[float], low: float, high: float, strength: float) -> list[float]:
    mean = math.fsum(alphas) / len(alphas)
    # sigmoid(x) - 1/2 = tanh(x/2) / 2, which cannot overflow
    return [10 ** (strength * math.tanh(5 * (alpha - mean)) / 2) for alpha in alphas]


MAPS: dict[str, Map] = {
    "linear": _linear,
    "sqrt": _share(math.sqrt),
    "log2": _share(math.log2),
    "step": _step,
    "sigmoid": _sigmoid,
}


def assign(
    alphas: Sequence[float],
    assignment: Assignment = "linear",
    limits: tuple[float, float] = (0.5, 1.5),
    strength: float = 1.0,
) -> list[float]:
    r"""Multipliers of the balanced layers: the heavier the tail (the smaller alpha), the smaller the
    multiplier.

    With ``s1, s2 = limits`` (arXiv 2312.00359; ``sigmoid`` from arXiv 2410.12178)

    .. math::
        \text{linear:}\;& s_1 + (s_2 - s_1) \frac{\alpha - \min}{\max - \min} \qquad
        \text{sqrt, log2:}\; \frac{n f(\alpha)}{\sum f(\alpha)} \\
        \text{step:}\;& s_1 + (s_2 - s_1)\, \mathrm{rank} / n, \quad \mathrm{rank} = 0 \dots n-1 \\
        \text{sigmoid:}\;& 10^{\,\mathrm{strength}\,(\sigma(10 (\alpha - \mathrm{mean})) - 1/2)}

    When all exponents are equal every multiplier is 1 (our definition; the published interpolation gives
    ``s2``).

    Args:
        alphas: finite, greater than 1.
        assignment: ``"linear"``, ``"sqrt"``, ``"log2"``, ``"step"`` or ``"sigmoid"``.
        limits: least and largest multiplier of ``linear`` and ``step``.
        strength: decades between the least and the largest multiplier of ``sigmoid``.

    Raises:
        ValueError: on an unknown assignment, limits that are not 0 <= s1 <= s2, or a negative strength.

    Example:
        >>> assign([2.0, 3.0, 5.0], "linear")
        [0.5, 0.8333333333333333, 1.5]
        >>> assign([4.0, 4.0])
        [1.0, 1.0]
    """
    check_assignment(assignment, limits, strength)
    if not alphas or min(alphas) == max(alphas):
        return [1.0] * len(alphas)
    return MAPS[assignment](alphas, *limits, strength)


def check_assignment(assignment: str, limits: tuple[float, float], strength: float) -> None:
    """Raise ValueError unless the multipliers can be computed."""
    if assignment not in MAPS:
        raise ValueError(f"assignment={assignment!r} is not known; choose from {', '.join(get_args(Assignment))}")
    if not 0 <= limits[0] <= limits[1] < math.inf:
        raise ValueError(f"limits={limits} must be the least and the largest multiplier, 0 <= least <= largest")
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength={strength} must be a number of decades, 0 or more")
