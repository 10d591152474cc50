r"""LARS and CLARS: momentum SGD with a trust ratio per parameter tensor.

.. math::
    d_t &= g_t + \mathrm{weight\_decay} \cdot p_{t-1} \\
    m_t &= \mathrm{momentum} \cdot m_{t-1} + d_t \\
    p_t &= p_{t-1} - \mathrm{lr} \cdot s_t \cdot m_t

The ratio s is that of :class:`fused_opt.TrustRatio`; neither it nor the learning rate is inside the buffer. (Other LARS
put the learning rate inside, or leave the decay out of the denominator.)
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..extras import ExtrasBesideRatio
from ..extras.trust_ratio import RatioKind, TrustRatio
from ..optimizer import ParamsT
from .sgd import SGD


class Options(ExtrasBesideRatio, total=False):
    """What LARS passes on to SGD."""

    maximize: bool
    foreach: bool | None
    differentiable: bool
    fused: bool | None


class RatioOptions(Options, total=False):
    """What CLARS passes on to LARS."""

    coefficient: float | None
    cap: float | None
    eps: float | None
    exempt: int


class LARS(SGD):
    """LARS: layer-wise adaptive rate scaling, for large batches.

    You et al., "Large Batch Training of Convolutional Networks" (arXiv 1708.03888); the defaults are the paper's.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov: as :class:`fused_opt.SGD`.
        coefficient, cap, eps, exempt: as :class:`fused_opt.TrustRatio` with kind ``"lars"``.
        maximize, foreach, differentiable, fused: as :class:`fused_opt.SGD`.
        **extras: as :class:`fused_opt.SGD`.

    Raises:
        ValueError: for a hyper-parameter out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.full((2, 2), 2.0))
        >>> optimizer = fused_opt.LARS([weight], lr=1.0, coefficient=0.5, weight_decay=0.0)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight[0].tolist()  # the ratio is 0.5 * 4 / 2
        [1.0, 1.0]
    """

    kind: ClassVar[RatioKind] = "lars"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float | Tensor = 5e-4,
        nesterov: bool = False,
        *,
        coefficient: float | None = None,
        cap: float | None = None,
        eps: float | None = None,
        exempt: int = 1,
        **extras: Unpack[Options],
    ) -> None:
        ratio = TrustRatio(self.kind, coefficient, cap, eps, exempt)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, trust_ratio=ratio, **extras)


class CLARS(LARS):
    """CLARS: complete layer-wise adaptive rate scaling, large batches without warmup.

    "Large Batch Training Does Not Need Warmup" (arXiv 2002.01576); the defaults are those of its authors' code. Call
    :meth:`track_parts` to divide by the norms of the gradient's parts; without it the gradient is one part, and CLARS is
    LARS with the decay outside the norm and a cap.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov: as :class:`fused_opt.SGD`.
        coefficient, cap, eps, exempt: as :class:`fused_opt.TrustRatio` with kind ``"clars"``.
        maximize, foreach, differentiable, fused: as :class:`fused_opt.SGD`.
        **extras: as :class:`fused_opt.SGD`.

    Raises:
        ValueError: for a hyper-parameter out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.full((1, 2), 2.0))
        >>> optimizer = fused_opt.CLARS([weight], lr=1.0, coefficient=0.1, cap=1.0, eps=0.0, weight_decay=0.0)
        >>> parts = optimizer.track_parts("microbatch")
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> (weight * torch.tensor([-3.0, 4.0])).sum().backward()
        >>> optimizer.step()  # the parts' norms are 5 and 5, the weight's sqrt(8), the gradient (0, 8)
        >>> [round(x, 4) for x in weight[0].tolist()]
        [2.0, 1.7737]
    """

    kind = "clars"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float | Tensor = 2e-4,
        nesterov: bool = False,
        **extras: Unpack[RatioOptions],
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **extras)
