r"""Periodic sampling over weight distributions: averages of the weights, made in the pass that updates them.

*Improving Model Training by Periodic Sampling over Weight Distributions* (arXiv 1905.05774). The names are the paper's;
the equations of the variants are our definition. US patent 11,922,316 covers the method.

After the update of step t a sample of the weights is taken if the step lies in the last ``fraction`` of its period, on
the grid of ``interval`` steps that ends with the period, and a draw with ``probability`` succeeds. Every variant is one
recurrence, ``v <- (restart ? 0 : v) + add * (w - share * v)``, and at a period's end ``w <- v`` where anything was sampled:

.. math::
    \text{PSWA, PWALKS}:\quad & v_n = v_{n-1} + (w - v_{n-1}) / n
        && \text{the mean of the period's samples} \\
    \text{SWM, EMA}:\quad & v \leftarrow v + (1 - \beta) (w - v), && v = w \text{ first} \\
    \text{PSWM}:\quad & v \leftarrow \beta v + (1 - \beta)\, \mathrm{mean}, && v = \mathrm{mean} \text{ in the first period}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..backends.interface import Fold
from ..checks import real, whole
from ..exact import exact_weights, set_exact_weights, slot_of
from ..tensors import restore
from .extra import Extra, check_setting
from .noise import uniform, uniforms

AVERAGE = "average"  # the slot in a parameter's state
LR_SQUARES = "lr_squares"  # in a group: the sum over its steps, which weighs those of ScheduleFree

_LEAST = {"start": 0, "interval": 1, "period": 1, "samples": 1, "seed": 0}
_POSITIVE: tuple[Callable[[float], bool], str] = lambda x: 0 < x <= 1, "in (0, 1]"
_RANGES = {"fraction": _POSITIVE, "probability": _POSITIVE, "beta": (lambda x: 0 <= x < 1, "in [0, 1)")}


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """What all variants share.

    Args:
        start: steps before the first period.
        fraction: only the last fraction of a period is sampled, in (0, 1].
        probability: of taking a sample where one is due, in (0, 1]; drawn from a counter, alike on every rank.
        interval: steps between samples, at least 1.
        on_write_back: ``"keep"`` the optimizer's states, or ``"zero"``: they begin anew, as in a new optimizer.
        seed: key of the draws.

    Raises:
        ValueError: for a number out of its range.
    """

    start: int = 0
    fraction: float = 1.0
    probability: float = 1.0
    interval: int = 1
    on_write_back: Literal["keep", "zero"] = "keep"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.on_write_back not in ("keep", "zero"):
            raise ValueError(f"Invalid on_write_back: {self.on_write_back!r}; it must be 'keep' or 'zero'")
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in _LEAST:
                object.__setattr__(self, name, whole(name, value, _LEAST[name]))
            elif name in _RANGES:
                object.__setattr__(self, name, real(name, value, *_RANGES[name]))

    def _window(self) -> float:
        """Steps at the end of a period that can be sampled."""
        return round(self.fraction * self.period, 6)  # type: ignore[attr-defined]  # 0.07 * 100 is more than 7

    def sampled(self, t: int) -> bool:
        """Whether the weights after step ``t``, counted from 1, are a sample."""
        left = -(t - self.start) % self.period  # type: ignore[attr-defined]
        return t > self.start and left < self._window() and left % self.interval == 0 and self._drawn(t)

    def _drawn(self, t: int) -> bool:
        return self.probability == 1 or uniform(self.seed, t) < self.probability

    def weight(self, t: int, count: int, periods: int) -> tuple[float, float, bool]:
        """``(add, share, restart)`` of the ``count``-th sample of its period, after ``periods`` that were written back."""
        return 1 / count, 1.0, count == 1

    def fold(self, t: int, count: int, periods: int) -> Fold | None:
        """What step ``t`` does, with ``count`` samples so far in its period, and ``periods`` written back before it."""
        sampled = self.sampled(t)
        ends = t > self.start and (t - self.start) % self.period == 0 and count + sampled > 0  # type: ignore[attr-defined]
        if not sampled:
            return Fold(0.0, 0.0, False, True) if ends else None
        return Fold(*self.weight(t, count + 1, periods), ends)

    def of_step(self, group: Mapping[str, Any], lr: Any) -> Fold | None:
        """What the coming step of a group does."""
        return self.fold(group["steps"] + 1, group["samples"], group["periods"])

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied with."""
        return 1.0

    def normalizer(self, t: int, count: int, periods: int) -> float:
        """What the average must be multiplied with to be one in the middle of a period."""
        return 1.0


@dataclass(frozen=True)
class PSWA(Averaging):
    """Periodically Sampled Weight Averaging: at each period's end the weights become the mean of the period's samples.

    Args:
        period: steps, at least 1.
        start, fraction, probability, interval, on_write_back, seed: see :class:`Averaging`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = fused_opt.SGD([weight], lr=1.0, averaging=fused_opt.PSWA(period=2))
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([-1.0])
        ...     optimizer.step()
        >>> weight.item()  # the mean of 1 and 2
        1.5
    """

    period: int


@dataclass(frozen=True)
class PWALKS(Averaging):
    """Periodic Weight Averaging over Last K Samples: PSWA of the period's last ``samples`` samples, one every ``interval``.

    Args:
        period: steps, at least 1.
        samples: K, at least 1.
        start, probability, interval, on_write_back, seed: see :class:`Averaging`.
    """

    period: int
    samples: int

    def _window(self) -> float:
        return min(self.samples * self.interval, super()._window())


@dataclass(frozen=True)
class PSWM(Averaging):
    """Periodically Sampled Weight Momentum: at each period's end v <- beta * v + (1 - beta) * mean, and the weights become v.

    Args:
        period: steps, at least 1.
        beta: in [0, 1).
        start, fraction, probability, interval, on_write_back, seed: see :class:`Averaging`.
    """

    period: int
    beta: float

    def weight(self, t: int, count: int, periods: int) -> tuple[float, float, bool]:
        """One buffer serves for v and the mean, since the number of the period's samples is known before they are taken."""
        n = _samples(self, (t - self.start - 1) // self.period)
        if periods == 0:
            return 1 / n, 0.0, count == 1
        return (1 - self.beta) / n, float(n) if count == 1 else 0.0, False

    def normalizer(self, t: int, count: int, periods: int) -> float:
        """Part of the mean is still to come."""
        if count == 0:
            return 1.0
        part = count / _samples(self, (t - self.start - 1) // self.period)
        return 1 / (part if periods == 0 else self.beta + (1 - self.beta) * part)


@lru_cache(maxsize=16)
def _samples(averaging: PSWM, period: int) -> int:
    """How many samples are taken in a period, counted from 0."""
    last = averaging.start + (period + 1) * averaging.period
    steps = range(last, last - math.ceil(averaging._window()), -averaging.interval)
    if averaging.probability == 1:
        return len(steps)
    return sum(draw < averaging.probability for draw in uniforms(averaging.seed, steps))


@dataclass(frozen=True)
class SWM(Averaging):
    """Sampled Weight Momentum: v <- beta * v + (1 - beta) * w at each sample; at each period's end the weights become v.

    Args:
        period: steps, at least 1.
        beta: in [0, 1).
        start, fraction, probability, interval, on_write_back, seed: see :class:`Averaging`.
    """

    period: int
    beta: float

    def weight(self, t: int, count: int, periods: int) -> tuple[float, float, bool]:
        """V is kept from period to period."""
        first = count == 1 and periods == 0
        return 1.0 if first else 1 - self.beta, 1.0, first


@dataclass(frozen=True)
class EMA(Averaging):
    """Exponential moving average of the weights, for evaluation: it is never written back.

    Args:
        beta: in [0, 1).
        warmup: the n-th sample, counted from 0, takes ``min(beta, (1 + n) / (10 + n))`` in the place of ``beta``, as
            diffusers' ``EMAModel`` does by default: the average spans about a tenth of all samples until ``beta`` is
            less. Without it, an average contains the first weights for some ``1 / (1 - beta)`` samples.
        start, probability, interval, seed: see :class:`Averaging`; there are no periods.

    Raises:
        ValueError: for a number out of its range, or a ``warmup`` that is not True or False.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = fused_opt.SGD([weight], lr=1.0, averaging=fused_opt.EMA(beta=0.75))
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([-1.0])
        ...     optimizer.step()
        >>> with optimizer.averaged_weights():
        ...     weight.item()  # 1 first, then 0.75 * 1 + 0.25 * 2
        1.25
        >>> weight.item()
        2.0
    """

    beta: float
    warmup: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.warmup, bool):
            raise ValueError(f"Invalid warmup: {self.warmup!r}; it must be True or False")

    def sampled(self, t: int) -> bool:
        """Every ``interval`` steps."""
        return t > self.start and (t - self.start) % self.interval == 0 and self._drawn(t)

    def fold(self, t: int, count: int, periods: int) -> Fold | None:
        """As SWM, without an end."""
        if not self.sampled(t):
            return None
        beta = min(self.beta, (1 + count) / (10 + count)) if self.warmup else self.beta
        return Fold(1 - beta if count else 1.0, 1.0, count == 0, False)


@dataclass(frozen=True)
class ScheduleFree(Averaging):
    r"""Schedule-free training: gradients are taken between an iterate and its average, which needs no decaying rate.

    Defazio et al., "The Road Less Scheduled" (arXiv 2405.15682). The parameters hold y, the average x, in every step, and
    ``averaged_weights()`` has the x to evaluate; nothing is switched for training. With the rule's direction u at y:

    .. math::
        z_{t+1} &= z_t - \mathrm{lr}_t\, u_t, \qquad c_t = \mathrm{lr}_t^2 / \textstyle\sum_{i \le t} \mathrm{lr}_i^2 \\
        x_{t+1} &= (1 - c_t)\, x_t + c_t\, z_{t+1} \\
        y_{t+1} &= (1 - \beta)\, z_{t+1} + \beta\, x_{t+1}

    z is not stored, since ``z = (y - beta x) / (1 - beta)``: the pass steps by ``(1 - beta) lr`` from y, and then moves
    x by ``c / (1 - beta)`` of its distance to that point, and y by ``beta`` times as much. So 16-bit parameters round in z
    ``1 / (1 - beta)`` times as much as in y. Take SGD without momentum or AdamW with ``betas=(0, beta2)``: ``beta`` is in
    the place of the momentum. The authors' AdamW has the ``sqrt(1 - beta2**t)`` of its bias correction in the rate, and so in
    c; and their code weighs a step by the largest rate so far. Warm the rate up with any scheduler.

    Args:
        beta: where between z (0) and x (1) gradients are taken, in [0, 1).
        start, fraction, probability, interval, on_write_back, seed: at their defaults; every step counts.

    Raises:
        ValueError: for a number out of its range, or another one of these set.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = fused_opt.SGD([weight], lr=1.0, averaging=fused_opt.ScheduleFree(beta=0.5))
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([-1.0])
        ...     optimizer.step()
        >>> weight.item()  # between z = 2 and x = (1 + 2) / 2
        1.75
        >>> with optimizer.averaged_weights():
        ...     weight.item()
        1.5
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(Averaging):
            if (value := getattr(self, field.name)) != field.default:
                raise ValueError(f"ScheduleFree averages every step, and has no {field.name}; got {value!r}")

    @property
    def rate(self) -> float:
        """Of the step from y, of which (1 - beta) is z."""
        return 1 - self.beta

    def of_step(self, group: Mapping[str, Any], lr: Any) -> Fold | None:
        """By this step's share of all squared rates; one on a GPU is waited for."""
        if not (square := float(lr) ** 2):
            return None
        return Fold(square / (group[LR_SQUARES] + square) / (1 - self.beta), 1.0, False, False, self.beta)


def initial(group: Mapping[str, Any], p: Tensor) -> Tensor:
    """The average of a parameter that joins now: earlier samples of the period found it as it is."""
    normalizer = group["averaging"].normalizer(*(group[count] for count in ("steps", "samples", "periods")))
    average = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
    return average.copy_(p).div_(normalizer)


def finish(
    group: dict[str, Any],
    state: Mapping[Tensor, Any],
    fold: Fold,
    slots: Sequence[str],
    lr: Any,
    released: Container[Tensor] = (),
) -> None:
    """Count a sample, and what goes with it; ``slots``: the states that a write-back may begin anew; ``lr``: the step's.

    ``released``: parameters that were stepped with gradients that they no longer have.

    A sample is of all weights: those that this step did not move are folded in, and written back, here.
    """
    if idle := [p for p in group["params"] if p.grad is None and p not in released and AVERAGE in state.get(p, {})]:
        _fold_idle(idle, state, fold, group["master_weights"])
    group["samples"] += fold.add > 0
    if isinstance(group["averaging"], ScheduleFree):
        group[LR_SQUARES] += float(lr) ** 2
    if fold.write_back:
        group["samples"] = 0
        group["periods"] += 1
        if group["averaging"].on_write_back == "zero":
            for p in group["params"]:
                for slot in slots if p in state else ():
                    state[p].pop(slot, None)


@torch.no_grad()
def _fold_idle(idle: Sequence[Tensor], state: Mapping[Tensor, Any], fold: Fold, has_exact: bool) -> None:
    add, share, restart, write_back, follow = fold
    for p in idle:
        average = state[p][AVERAGE]
        before = average.clone() if follow else average
        kept = state[p].get(slot_of(p) or "") if has_exact else None
        weights = p if kept is None else exact_weights(p, kept)
        average.mul_(0.0 if restart else 1.0 - add * share).add_(weights.to(average.dtype), alpha=add)
        moved = average if write_back else weights + follow * (average - before) if follow else None
        if moved is None:
            continue
        if kept is None:
            p.copy_(moved)
        else:
            set_exact_weights(p, kept, moved)


@contextmanager
def swapped_in(groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Any]) -> Iterator[None]:
    """Within the block the groups' parameters hold their averages, and afterwards what they held before."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for group in groups:
                samples, periods = group["samples"], group["periods"]
                factor = group["averaging"].normalizer(group["steps"], samples, periods)
                for p in group["params"] if samples or periods else ():
                    if (average := state.get(p, {}).get(AVERAGE)) is not None:
                        before.append((p, p.detach().clone()))
                        p.copy_(average * factor)
        yield
    finally:
        restore(before)


AVERAGING = Extra(
    "averaging",
    check_setting("averaging", Averaging),
    ":class:`PSWA`, :class:`PWALKS`, :class:`PSWM`, :class:`SWM`, :class:`EMA` or :class:`ScheduleFree`, or None.",
    settings=(PSWA, PWALKS, PSWM, SWM, EMA, ScheduleFree),
    args=lambda group, lr: group["averaging"].of_step(group, lr),
    counts=("samples", "periods", LR_SQUARES),
)
