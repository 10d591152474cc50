r"""NAdam, Adam with Nesterov's momentum, as torch.optim.NAdam defines it.

.. math::
    g_t &\leftarrow g_t + \mathrm{coupled} \cdot \mathrm{weight\_decay} \cdot p_{t-1} \\
    \mu_t &= \beta_1 \left(1 - \tfrac{1}{2} \cdot 0.96^{t \cdot \mathrm{momentum\_decay}}\right) \\
    m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    u_t &= \frac{\frac{1 - \mu_t}{1 - \prod_{i \le t} \mu_i} g_t
        + \frac{\mu_{t+1}}{1 - \prod_{i \le t+1} \mu_i} m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \mathrm{eps}}
        + (1 - \mathrm{coupled}) \cdot \mathrm{weight\_decay} \cdot p_{t-1} \\
    p_t &= p_{t-1} - \mathrm{lr} \cdot u_t
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from ctypes import c_float
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_betas, check_decay, check_lr, check_number, check_switches
from ..optimizer import Extras, FusedOptimizer, ParamsT
from ..rule import Rule


def _nadam(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    of_gradient: float,
    of_momentum: float,
    unbias2: float,
    eps: float,
    mu_product: float,
) -> tuple[Tensor, ...]:
    m = m.lerp(g, one_minus_beta1)
    v = beta2 * v + one_minus_beta2 * g * g
    return (of_gradient * g + of_momentum * m) / (unbias2 * v.sqrt() + eps), m, v


def _coefficients(group: Mapping[str, Any]) -> tuple[float, ...]:
    beta1, beta2 = map(float, group["betas"])
    decay = 0.96 ** float(group["momentum_decay"])
    return 1 - beta1, beta2, 1 - beta2, beta1, decay, 0.0, float(group["eps"]), 0.0


def _at_step(coefficients: Sequence[float], step: float, mu_product: float) -> Sequence[float]:
    one_minus_beta1, beta2, one_minus_beta2, beta1, decay, _, eps, _ = coefficients
    mu, next_mu = (beta1 * (1 - 0.5 * decay**t) for t in (step, step + 1))
    mu_product = c_float(mu_product * c_float(mu).value).value  # as torch multiplies float32
    of_gradient, of_momentum = (1 - mu) / (1 - mu_product), next_mu / (1 - mu_product * next_mu)
    unbias2 = 1 / math.sqrt(1 - beta2**step)
    return one_minus_beta1, beta2, one_minus_beta2, of_gradient, of_momentum, unbias2, eps, mu_product


NADAM_RULE = Rule(
    "nadam",
    ("exp_avg", "exp_avg_sq"),
    _coefficients,
    _nadam,
    _at_step,
    counts_steps=True,
    scalar="mu_product",
    refuses_sparse="NAdam does not support sparse gradients",
    unsigned=("exp_avg_sq",),
)


class NAdam(FusedOptimizer):
    """NAdam: torch.optim.NAdam with one word changed.

    Dozat, "Incorporating Nesterov Momentum into Adam" (ICLR workshop 2016). The arguments, the state and the state_dict are
    those of :class:`torch.optim.NAdam`, whose documentation gives the update; its ``mu_product`` is a state here, too.

    Args:
        params: tensors, dicts of groups, or ``(name, tensor)`` pairs; float32, float64, bfloat16, float16 or complex.
        lr: learning rate, a float or a 1-element Tensor, at least 0.
        betas: decay rates of the two moments, both floats or both 1-element Tensors, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0; added to the gradient, or to the direction with ``decoupled_weight_decay``.
        momentum_decay: how fast the momentum grows from half of ``betas[0]`` to the whole, at least 0.
        decoupled_weight_decay: AdamW's decay, ``decay="decoupled"``; False leaves it to ``decay``.
        foreach, capturable, fused: as :class:`fused_opt.Adam`; torch.optim.NAdam has no ``fused``.
        differentiable: as :class:`fused_opt.SGD`; ``betas`` are not followed.
        maximize: ascend instead.
        **extras: see :class:`fused_opt.FusedOptimizer`.

    Raises:
        ValueError: for a hyper-parameter out of its range, in torch.optim's words where it has them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fused_opt.NAdam([weight], lr=0.1, betas=(0.0, 0.999))
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        Parameter containing:
        tensor([0.9000, 0.9000], requires_grad=True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        momentum_decay: float = 4e-3,
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
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **extras)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return NADAM_RULE

    def _decouples(self, group: Mapping[str, Any]) -> bool:
        return bool(group["decoupled_weight_decay"])

    def _check(self, options: Mapping[str, Any]) -> None:
        check_lr(options)
        check_number("Invalid epsilon value", options["eps"], lambda x: x >= 0.0)
        check_betas(options)
        check_decay(options)
        check_number("Invalid momentum_decay value", options["momentum_decay"], lambda x: x >= 0.0)
        check_switches(options)
