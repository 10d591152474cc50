r"""RAdam, Adam whose first steps are rectified, as torch.optim.RAdam defines it.

.. math::
    g_t &\leftarrow g_t + \mathrm{coupled} \cdot \mathrm{weight\_decay} \cdot p_{t-1} \\
    m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    \rho_t &= \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad \rho_\infty = \frac{2}{1 - \beta_2} - 1 \\
    r_t &= \sqrt{\frac{(\rho_t - 4) (\rho_t - 2) \rho_\infty}{(\rho_\infty - 4) (\rho_\infty - 2) \rho_t}}
        \cdot \sqrt{1 - \beta_2^t} \\
    d_t &= \frac{m_t}{1 - \beta_1^t} \cdot \frac{r_t}{\sqrt{v_t} + \mathrm{eps}}
        \quad\text{or, while } \rho_t \le 5, \quad \frac{m_t}{1 - \beta_1^t} \\
    u_t &= d_t + (1 - \mathrm{coupled}) \cdot \mathrm{weight\_decay} \cdot p_{t-1} \\
    p_t &= p_{t-1} - \mathrm{lr} \cdot u_t
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_betas, check_decay, check_lr, check_number, check_switches
from ..optimizer import Extras, FusedOptimizer, ParamsT
from ..rule import Rule, number, square_root


def _radam(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    unbias1: float,
    rectified: float,
    eps: float,
) -> tuple[Tensor, ...]:
    m = m.lerp(g, one_minus_beta1)
    v = beta2 * v + one_minus_beta2 * g * g
    return (rectified * m / (v.sqrt() + eps) if rectified else unbias1 * m), m, v


def _coefficients(group: Mapping[str, Any]) -> tuple[float, ...]:
    beta1, beta2 = (number(group, beta) for beta in group["betas"])
    return 1 - beta1, beta2, 1 - beta2, beta1, 0.0, float(group["eps"])


def _at_step(coefficients: Sequence[float], step: float) -> Sequence[float]:
    one_minus_beta1, beta2, one_minus_beta2, beta1, _, eps = coefficients
    unbias1, left = 1 / (1 - beta1**step), 1 - beta2**step
    longest = 2 / one_minus_beta2 - 1
    length = longest - 2 * step * (1 - left) / left
    rectified = 0.0
    if length > 5:
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        rectified = unbias1 * square_root(ratio * left)
    return one_minus_beta1, beta2, one_minus_beta2, unbias1, rectified, eps


RADAM_RULE = Rule(
    "radam",
    ("exp_avg", "exp_avg_sq"),
    _coefficients,
    _radam,
    _at_step,
    counts_steps=True,
    refuses_sparse="RAdam does not support sparse gradients",
    unsigned=("exp_avg_sq",),
)


class RAdam(FusedOptimizer):
    """RAdam: torch.optim.RAdam with one word changed.

    Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (arXiv 1908.03265). The arguments, the state and
    the state_dict are those of :class:`torch.optim.RAdam`, whose documentation gives the update.

    Args:
        params: tensors, dicts of groups, or ``(name, tensor)`` pairs; float32, float64, bfloat16, float16 or complex.
        lr: learning rate, a float or a 1-element Tensor, at least 0.
        betas: decay rates of the two moments, both floats or both 1-element Tensors, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0; added to the gradient, or to the direction with ``decoupled_weight_decay``.
        decoupled_weight_decay: AdamW's decay, ``decay="decoupled"``; False leaves it to ``decay``.
        foreach, capturable, differentiable, fused: as :class:`fused_opt.Adam`; torch.optim.RAdam has no ``fused``.
        maximize: ascend instead.
        **extras: see :class:`fused_opt.FusedOptimizer`.

    Raises:
        ValueError: for a hyper-parameter out of its range, in torch.optim's words where it has them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fused_opt.RAdam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight  # the first steps are those of an average of the gradients
        Parameter containing:
        tensor([0.8000, 0.8000], requires_grad=True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **extras)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RADAM_RULE

    def _decouples(self, group: Mapping[str, Any]) -> bool:
        return bool(group["decoupled_weight_decay"])

    def _check(self, options: Mapping[str, Any]) -> None:
        check_lr(options)
        check_number("Invalid epsilon value", options["eps"], lambda x: x >= 0.0)
        check_betas(options)
        check_decay(options)
        check_switches(options)
