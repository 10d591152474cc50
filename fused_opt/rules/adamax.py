r"""Adamax, Adam with the infinity norm, as torch.optim.Adamax defines it.

.. math::
    g_t &\leftarrow g_t + \mathrm{weight\_decay} \cdot p_{t-1} \\
    m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
    n_t &= \max(\beta_2 n_{t-1}, |g_t| + \mathrm{eps}) \\
    u_t &= \frac{m_t / (1 - \beta_1^t)}{n_t} \\
    p_t &= p_{t-1} - \mathrm{lr} \cdot u_t
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_betas, check_decay, check_lr, check_number, check_switches
from ..optimizer import Extras, FusedOptimizer, ParamsT
from ..rule import Rule, number


def _adamax(
    g: Tensor, m: Tensor, n: Tensor, one_minus_beta1: float, beta2: float, unbias1: float, eps: float
) -> tuple[Tensor, ...]:
    m = m.lerp(g, one_minus_beta1)
    n = torch.maximum(beta2 * n, g.abs() + eps)
    return unbias1 * m / n, m, n


def _coefficients(group: Mapping[str, Any]) -> tuple[float, ...]:
    beta1, beta2 = (number(group, beta) for beta in group["betas"])
    return 1 - beta1, beta2, beta1, float(group["eps"])


def _at_step(coefficients: Sequence[float], step: float) -> Sequence[float]:
    one_minus_beta1, beta2, beta1, eps = coefficients
    return one_minus_beta1, beta2, 1 / (1 - beta1**step), eps


ADAMAX_RULE = Rule(
    "adamax",
    ("exp_avg", "exp_inf"),
    _coefficients,
    _adamax,
    _at_step,
    counts_steps=True,
    refuses_sparse="Adamax does not support sparse gradients",
    not_in_8_bits={"exp_inf": "a maximum that falls by a thousandth a step, of which codes would lose every one"},
)


class Adamax(FusedOptimizer):
    """Adamax: torch.optim.Adamax with one word changed.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization" (arXiv 1412.6980), section 7.1. The arguments, the state and
    the state_dict are those of :class:`torch.optim.Adamax`, whose documentation gives the update.

    Args:
        params: tensors, dicts of groups, or ``(name, tensor)`` pairs; float32, float64, bfloat16, float16 or complex.
        lr: learning rate, a float or a 1-element Tensor, at least 0.
        betas: decay rates of the average and of the norm, both floats or both 1-element Tensors, each in [0, 1).
        eps: added to the gradient's absolute value, at least 0.
        weight_decay: coupled (L2) decay, at least 0.
        foreach, differentiable, capturable, fused: as :class:`fused_opt.Adam`; torch.optim.Adamax has no ``fused``.
        maximize: ascend instead.
        **extras: see :class:`fused_opt.FusedOptimizer`.

    Raises:
        ValueError: for a hyper-parameter out of its range, in torch.optim's words where it has them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fused_opt.Adamax([weight], lr=0.1)
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
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
            "fused": fused,
        }
        super().__init__(params, defaults, **extras)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return ADAMAX_RULE

    def _check(self, options: Mapping[str, Any]) -> None:
        check_lr(options)
        check_number("Invalid epsilon value", options["eps"], lambda x: x >= 0.0)
        check_betas(options)
        check_decay(options)
        check_switches(options)
