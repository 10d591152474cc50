r"""Noise on the weights, added after the update and not through the momentum: w <- w + sigma * z, z standard normal.

The z of element i (row-major) of parameter k in step t is lane ``i % 4`` of Philox4x32-10 at the counter
``(i // 4, k, t)`` under the key ``seed``, by Box-Muller: independent of backend, threads, chunks and memory layout, and
the same after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..backends.interface import NoiseArgs
from ..checks import real, whole
from .extra import Extra, check_setting

SCHEDULES = (None, "decay", "cycle")
BLOCK = 1024  # draws for single steps that are made at once
DECAY = 0.55  # gamma of arXiv 1511.06807


@dataclass(frozen=True)
class WeightNoise:
    r"""Normal noise of standard deviation sigma on every weight, every step.

    ``std`` alone is constant. ``schedule="decay"``: the variance is ``std**2 / (1 + t)**0.55`` in step t, counted from 0
    (Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", arXiv 1511.06807, there on the
    gradient). ``schedule="cycle"``: sigma falls linearly from ``std`` to zero over ``period`` steps and is injected again,
    after the abstract of "Parameter Re-Initialization through Cyclical Batch Size Schedules" (arXiv 1812.01216), "weight
    re-initialization by repeated annealing and injection of noise"; the shape is our definition. ``temperature``:
    Langevin dynamics, ``sigma = sqrt(2 * lr * temperature)``, with the group's learning rate.

    Args:
        std: standard deviation, at least 0; exactly one of ``std`` and ``temperature``.
        temperature: at least 0.
        schedule: None, ``"decay"`` or ``"cycle"``; multiplies sigma, however it was given.
        period: steps of one cycle, at least 1; with ``"cycle"`` only.
        relative: multiply sigma by the root mean square of the tensor's weights before the step.
        seed: key of the noise, 0 to 2**64 - 1; ranks that share it draw alike.

    Raises:
        ValueError: for a number out of its range, or a combination that means nothing.

    Example:
        >>> fused_opt.WeightNoise(std=0.1, schedule="cycle", period=4).sigma(t=3, lr=0.1)
        0.025
    """

    std: float | None = None
    temperature: float | None = None
    schedule: Literal["decay", "cycle"] | None = None
    period: int | None = None
    relative: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.std is None) == (self.temperature is None):
            raise ValueError(f"WeightNoise takes either std or temperature; got {self.std} and {self.temperature}")
        for name in ("std", "temperature"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, real(name, value, lambda x: 0 <= x < math.inf, "at least 0 and finite"))
        if self.schedule not in SCHEDULES:
            raise ValueError(f"Invalid schedule: {self.schedule!r}; there are {', '.join(map(repr, SCHEDULES))}")
        if (self.schedule == "cycle") != (self.period is not None):
            raise ValueError(
                f"Invalid period: {self.period} with schedule {self.schedule!r}; 'cycle' takes one, at least 1"
            )
        if self.period is not None:
            object.__setattr__(self, "period", whole("period", self.period, 1))
        object.__setattr__(self, "seed", whole("seed", self.seed, 0))
        if self.seed >= 2**64:
            raise ValueError(f"Invalid seed: {self.seed}; 0 to 2**64 - 1")

    def sigma(self, t: int, lr: float) -> float:
        """Standard deviation in step ``t``, counted from 0, before ``relative``."""
        sigma = self.std if self.std is not None else math.sqrt(2 * float(lr) * (self.temperature or 0.0))
        if self.schedule == "decay":
            return sigma / (1 + t) ** (DECAY / 2)
        if self.schedule == "cycle":
            assert self.period is not None
            return sigma * (1 - t % self.period / self.period)
        return sigma

    def args(self, t: int, lr: float) -> NoiseArgs:
        """The noise of step ``t``, counted from 0."""
        return NoiseArgs(self.sigma(t, lr), self.relative, self.seed, t % 2**32)


def multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product of 32-bit words; int64 cannot hold it, so in two halves of 16 bits."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    carry = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (carry >> 16), ((carry & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counters: list[Tensor], seed: int) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on four int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = counters
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        (high0, low0), (high1, low1) = multiply(c0, 0xD2511F53), multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def normal(seed: int, index: int, t: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """The noise of elements 0 to ``numel - 1`` of parameter ``index`` in step ``t``, float64."""
    return _fours(seed, index, t, torch.arange((numel + 3) // 4, device=device)).flatten()[:numel]


def normal_at(seed: int, index: int, t: int, elements: Tensor) -> Tensor:
    """The noise of these elements, int64, of a shard, by their place in the whole parameter."""
    return _fours(seed, index, t, elements // 4).gather(1, (elements % 4)[:, None])[:, 0]


def _fours(seed: int, index: int, t: int, counter: Tensor) -> Tensor:
    """What the four elements that share a counter draw, for every counter."""
    words = [counter & 0xFFFFFFFF, counter >> 32, torch.full_like(counter, index), torch.full_like(counter, t)]
    drawn = philox(words, seed)
    lanes = []
    for w0, w1 in (drawn[:2], drawn[2:]):
        r = (-2 * (((w0 >> 9).double() + 0.5) * 2.0**-23).log()).sqrt()
        # Of w1 the sign of the cosine, who gets the cosine, and an angle between -pi / 4 and pi / 4 in two's complement.
        angle = (((w1 << 2) + 2**31) % 2**32 - 2**31).double() * (math.pi / 2 * 2.0**-32)
        cosine, sine = r * angle.cos() * torch.where(w1 >> 31 == 1, -1.0, 1.0), r * angle.sin()
        swap = w1 >> 30 & 1 == 1
        lanes += [torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)]
    return torch.stack(lanes, dim=1)


def uniforms(seed: int, steps: Sequence[int]) -> list[float]:
    """For every step, modulo 2**32, a draw in [0, 1) that is the same on every rank and after every resume."""
    t = torch.tensor([step % 2**32 for step in steps], dtype=torch.int64, device="cpu")
    zero = torch.zeros_like(t)
    return (philox([zero, zero, zero + 0xFFFFFFFF, t & 0xFFFFFFFF], seed)[0].double() * 2.0**-32).tolist()


@lru_cache(maxsize=256)
def _uniform_block(seed: int, block: int) -> list[float]:
    return uniforms(seed, range(BLOCK * block, BLOCK * (block + 1)))


def uniform(seed: int, step: int) -> float:
    """One of ``uniforms``; neighbours are drawn together."""
    return _uniform_block(seed, step // BLOCK)[step % BLOCK]


NOISE = Extra(
    "noise",
    check_setting("noise", WeightNoise),
    "a :class:`WeightNoise`, or None.",
    settings=(WeightNoise,),
    args=lambda group, lr: group["noise"].args(group["steps"], lr),
    of_all_parameters=True,  # the key of a draw is the parameter's place among all
)
