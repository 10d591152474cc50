r"""Layer-wise trust ratios: one factor s of the learning rate per parameter tensor, p <- p - lr * s * direction.

.. math::
    \text{lars}:\quad & s = \frac{\mathrm{coefficient} \cdot \|w\|}
        {\|g\| + \mathrm{weight\_decay} \cdot \|w\| + \mathrm{eps}} \\
    \text{clars}:\quad & s = \frac{\mathrm{coefficient} \cdot \|w\|}{A + \mathrm{eps}},
        \qquad A = \sum_j \|c_j\| \ \text{ where }\ g = \sum_j c_j \\
    \text{lamb}:\quad & s = \frac{\mathrm{coefficient} \cdot \|w\|}{\|u\| + \mathrm{eps}},
        \qquad u \text{ the rule's direction, decay included}

and then ``min(cap, s)``, with s = 1 where either norm is zero or not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from torch import Tensor

from ..backends.interface import Kind, RatioArgs
from ..checks import real, whole
from ..warn import warn_once
from .extra import Extra, check_setting

RatioKind = Literal["lars", "clars", "lamb"]
KINDS = get_args(RatioKind)
_COEFFICIENTS = {"lars": 0.001, "clars": 0.01, "lamb": 1.0}


@dataclass(frozen=True)
class TrustRatio:
    """Scale the learning rate of every parameter tensor by the ratio of its norm to that of its gradient or direction.

    LARS: You et al., "Large Batch Training of Convolutional Networks" (arXiv 1708.03888). CLARS: "Large Batch Training
    Does Not Need Warmup" (arXiv 2002.01576), whose denominator is the sum of the norms of the parts that the gradient is
    a sum of (:meth:`fused_opt.FusedOptimizer.track_parts`; our definition of the parts contains the paper's). Without
    tracked parts the gradient is one part. LAMB: You et al., "Large Batch Optimization for Deep Learning" (arXiv
    1904.00962).

    Args:
        kind: ``"lars"``, ``"clars"`` or ``"lamb"``.
        coefficient: numerator's factor; None: 0.001 for LARS, 0.01 for CLARS, 1 for LAMB, as published.
        cap: largest ratio; None: 0.1 for CLARS, as its authors' code has it, and none for the others. Where CLARS's binds on
            most tensors of a group in step 20, a warning says so, once: there it is the plain rule at a tenth of the rate.
            On a GPU the host waits for that one step.
        eps: added to the denominator; None: 1e-6 for CLARS, 0 for the others.
        exempt: tensors of at most this many dimensions keep ratio 1: biases and normalization weights; -1 exempts none.

    Raises:
        ValueError: for an unknown kind, or a number out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.full((2, 2), 2.0))
        >>> ratio = fused_opt.TrustRatio("lars", coefficient=0.5)
        >>> optimizer = fused_opt.SGD([("weight", weight)], lr=1.0, trust_ratio=ratio)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> optimizer.trust_ratios()
        {'weight': 1.0}
    """

    kind: RatioKind
    coefficient: float | None = None
    cap: float | None = None
    eps: float | None = None
    exempt: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Invalid trust ratio: {self.kind!r}; there are {', '.join(map(repr, KINDS))}")
        clars = self.kind == "clars"
        defaults = {
            "coefficient": _COEFFICIENTS[self.kind],
            "cap": 0.1 if clars else math.inf,
            "eps": 1e-6 if clars else 0.0,
        }
        for name, default in defaults.items():
            value = default if getattr(self, name) is None else getattr(self, name)
            object.__setattr__(self, name, real(f"{name} of a trust ratio", value, lambda x: x >= 0, "at least 0"))
        object.__setattr__(self, "exempt", whole("exempt", self.exempt, -1))

    @cached_property
    def args(self) -> RatioArgs:
        """The numbers that a backend needs."""
        assert self.coefficient is not None
        assert self.cap is not None
        assert self.eps is not None
        return RatioArgs(Kind[self.kind.upper()], self.coefficient, self.cap, self.eps, self.exempt)


LOOK = 20  # the step in which caps are looked at: early, and after a first few that may be unlike the rest


def warn_of_cap(trust_ratio: TrustRatio, ratios: Iterable[tuple[Tensor, float]]) -> None:
    """Say once that CLARS's cap binds on most tensors, given the ratios of a group's parameters in a step."""
    of_step = [ratio for p, ratio in ratios if p.ndim > trust_ratio.exempt and not math.isnan(ratio)]
    assert trust_ratio.cap is not None
    at_cap = sum(math.isclose(ratio, trust_ratio.cap, rel_tol=1e-6) for ratio in of_step)
    if 2 * at_cap > len(of_step):
        warn_once(
            f"CLARS's cap of {trust_ratio.cap:g} binds on {at_cap} of {len(of_step)} tensors in step {LOOK}: they are "
            f"stepped by the plain rule at {trust_ratio.cap:g} times the learning rate. Their gradients are short beside "
            f"their weights; cap=math.inf lifts it, cap={trust_ratio.cap * 10:g} moves it; tune the rate anew for either"
        )


TRUST_RATIO = Extra(
    "trust_ratio",
    check_setting("trust_ratio", TrustRatio),
    "a :class:`TrustRatio`, or None.",
    settings=(TrustRatio,),
    args=lambda group, lr: group["trust_ratio"].args,
)
