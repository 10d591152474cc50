r"""Rounding at random of what is stored in 16 bits, so that its mean is what was computed.

A float32 x between two neighbouring numbers a and b of the stored dtype, :math:`|a| \le |x| < |b|`, becomes b with
probability :math:`(|x| - |a|) / (|b| - |a|)`, else a, in steps of :math:`2^{-16}`: as Gupta et al., "Deep Learning with
Limited Numerical Precision" (arXiv 1502.02551), section 2. An update of a hundredth of the distance moves one weight of a
hundred, where rounding to the nearest moves none. For bfloat16, and for float16 that is not denormal, the steps are exact.

The bits are a hash of the element's place: with i = l + 2**32 h, the element's row-major index in parameter k, in step t,
counted from 0,

    x = l ^ a;  x = (x ^ x >> 16) * 0x85EBCA6B;  x = (x ^ x >> 13) + b + h * 0x9E3779B9;  x = x * 0xC2B2AE35;  x ^= x >> 16

modulo 2**32, which is the end of MurmurHash3 (Appleby 2011, fmix32) with a key before each multiplication. The keys (a, b)
are the first two words of Philox4x32-10, the generator that draws noise, at the counter ``(s * 2**61, k, t)`` under the key
``seed``. So the bits are independent of backend, threads, chunks and memory layout, and the same after a resume, and those
of an element are uniform over steps. A word x (s = 1) has the bits of four numbers that are stored, in the order of the
rule's states, the parameter, and the parameter once more where an average moves it: those of the first begin at bit 0, of
the second at 16, of the third at 8, of the fourth at 24 (and end at bit 7); a fifth has those of the next word (s = 2). Two
numbers of an element so share a byte, the higher one of one and the lower one of the other: whether both become b has a
covariance of at most 2**-10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..backends.interface import RoundingArgs
from ..checks import whole
from .extra import Extra
from .noise import multiply, philox

NEAREST, STOCHASTIC = "nearest", "stochastic"


@dataclass(frozen=True)
class StochasticRounding:
    """What is stored in bfloat16 or float16, parameters and states, is rounded at random and without bias.

    ``rounding="stochastic"`` is this with seed 0. Numbers beyond the largest finite one, infinities and NaN are what rounding
    to the nearest makes of them; no other number becomes infinite. In a step in which every learning rate is 0, and of an
    average that is stored in 16 bits, rounding is to the nearest, and so is that of Muon's momentum.

    Args:
        seed: key of the bits, 0 to 2**64 - 1; ranks that share it draw alike, as replicas must.

    Raises:
        ValueError: for a seed out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        >>> optimizer = fused_opt.SGD([weight], lr=2.0**-11, rounding=fused_opt.StochasticRounding(seed=1))
        >>> weight.grad = torch.ones_like(weight)
        >>> for _ in range(64):
        ...     optimizer.step()
        >>> round(weight.float().mean().item(), 2)  # 1 - 64 / 2048; to the nearest it would stay 1
        0.97
    """

    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole("seed", self.seed, 0))
        if self.seed >= 2**64:
            raise ValueError(f"Invalid seed: {self.seed}; 0 to 2**64 - 1")


Rounding: TypeAlias = Literal["nearest", "stochastic"] | StochasticRounding


def rounds_at_random(rounding: Any) -> bool:
    """Whether ``rounding=`` says so."""
    return rounding not in (None, NEAREST)


def rounded(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Numbers in a dtype of 16 bits, rounded at random by ``bits``, int64 in [0, 2**16) and of the same shape."""
    info, x = torch.finfo(dtype), x.float()
    wide = x.double()
    exponent = torch.frexp(wide).exponent - 1
    unit = torch.ldexp(
        torch.ones_like(wide), exponent.clamp(min=round(math.log2(info.tiny))) + round(math.log2(info.eps))
    )
    units = wide.abs() / unit
    up = ((units - units.floor()) * 2**16).floor() + bits >= 2**16
    return (
        torch.where(wide.abs() <= info.max, torch.copysign((units.floor() + up) * unit, wide), wide).float().to(dtype)
    )


def words(seed: int, index: int, t: int, elements: Tensor, word: int = 0) -> Tensor:
    """The hashes of a parameter's elements, int64 by their places in it, that :func:`bits_of` takes bits of."""
    counter = [elements.new_tensor(c) for c in (0, 1 + word << 29, index, t)]
    first, second, _, _ = philox(counter, seed)
    x = elements & 0xFFFFFFFF ^ first
    x = multiply(x ^ x >> 16, 0x85EBCA6B)[1]
    x = (x ^ x >> 13) + second + (elements >> 32) * 0x9E3779B9 & 0xFFFFFFFF
    x = multiply(x, 0xC2B2AE35)[1]
    return x ^ x >> 16


def bits_of(args: RoundingArgs, index: int, elements: Tensor, place: int) -> Tensor:
    """The bits of a parameter's elements, by their places in it, for the number that is stored in this place."""
    x, begin = words(args.seed, index, args.step, elements, place // 4), place % 2 * 16 + place // 2 % 2 * 8
    return (x >> begin | x << 32 - begin) & 0xFFFF


def _check(rounding: Any) -> None:
    if rounding not in (None, NEAREST, STOCHASTIC) and not isinstance(rounding, StochasticRounding):
        raise ValueError(
            f"Invalid rounding: {rounding!r}; there are 'nearest', 'stochastic' and fused_opt.StochasticRounding(seed=...)"
        )


def _args(rounding: Any, step: int) -> RoundingArgs | None:
    if not rounds_at_random(rounding):
        return None
    return RoundingArgs(0 if rounding == STOCHASTIC else rounding.seed, step % 2**32)


ROUNDING = Extra(
    "rounding",
    _check,
    """``"nearest"``, as None is, or ``"stochastic"``: what is stored in bfloat16 or float16 is rounded at random, see
            :class:`StochasticRounding`, which takes a seed.""",
    settings=(StochasticRounding,),
    words=(NEAREST, STOCHASTIC),
    args=lambda group, lr: _args(group["rounding"], group["steps"]),
    of_all_parameters=True,  # as noise
)
