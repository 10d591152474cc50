r"""LAMB: Adam's direction with a trust ratio per parameter tensor.

.. math::
    u_t &= \frac{\hat m_t}{\sqrt{\hat v_t} + \mathrm{eps}} + \mathrm{weight\_decay} \cdot p_{t-1} \\
    p_t &= p_{t-1} - \mathrm{lr} \cdot \frac{\|p_{t-1}\|}{\|u_t\|} \cdot u_t
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from ..extras import ExtrasBesideRatio
from ..extras.trust_ratio import TrustRatio
from ..optimizer import ParamsT
from .adam import AdamW


class Options(ExtrasBesideRatio, total=False):
    """What LAMB passes on to AdamW."""

    amsgrad: bool
    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None


class LAMB(AdamW):
    """LAMB: AdamW with a trust ratio, for large batches.

    You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (arXiv 1904.00962); the ratio is 1
    where either norm is zero and, unlike the paper's, for tensors of at most one dimension (``exempt=-1`` for none).

    Args:
        params, lr, betas, eps, weight_decay: as :class:`fused_opt.AdamW`.
        coefficient, cap, ratio_eps, exempt: as :class:`fused_opt.TrustRatio` with kind ``"lamb"``.
        amsgrad, maximize, foreach, capturable, differentiable, fused: as :class:`fused_opt.AdamW`.
        **extras: as :class:`fused_opt.AdamW`.

    Raises:
        ValueError: for a hyper-parameter out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.full((2, 2), 2.0))
        >>> optimizer = fused_opt.LAMB([weight], lr=0.25, weight_decay=0.0)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight[0].tolist()  # Adam's first direction is 1 everywhere: the ratio is 4 / 2
        [1.5, 1.5]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float | Tensor = 1e-2,
        *,
        coefficient: float | None = None,
        cap: float | None = None,
        ratio_eps: float | None = None,
        exempt: int = 1,
        **extras: Unpack[Options],
    ) -> None:
        ratio = TrustRatio("lamb", coefficient, cap, ratio_eps, exempt)
        super().__init__(params, lr, betas, eps, weight_decay, trust_ratio=ratio, **extras)
