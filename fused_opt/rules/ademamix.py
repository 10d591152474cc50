r"""AdEMAMix: Adam with a second, slow average of the gradients.

.. math::
    m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
    s_t &= s_{t-1} + (1 - \beta_3(t)) (g_t - s_{t-1}) \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    u_t &= \frac{m_t / (1 - \beta_1^t) + \alpha(t) s_t}{\sqrt{v_t / (1 - \beta_2^t)} + \mathrm{eps}}
        + \mathrm{weight\_decay} \cdot p_{t-1} \\
    p_t &= p_{t-1} - \mathrm{lr} \cdot u_t

with the schedules, T being the steps of the warmup of each,

.. math::
    \alpha(t) &= \min\left(\tfrac{t}{T}, 1\right) \alpha \\
    \beta_3(t) &= \min\left(\exp \frac{\ln \beta_1 \ln \beta_3}
        {\left(1 - \tfrac{t}{T}\right) \ln \beta_3 + \tfrac{t}{T} \ln \beta_1},\ \beta_3\right)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_betas, check_decay, check_lr, check_number, check_switches
from ..optimizer import Extras, FusedOptimizer, ParamsT
from ..rule import Rule


def _ademamix(
    g: Tensor,
    m: Tensor,
    slow: Tensor,
    v: Tensor,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    one_minus_beta3: float,
    unbias1: float,
    unbias2: float,
    alpha: float,
    eps: float,
) -> tuple[Tensor, ...]:
    m = m.lerp(g, one_minus_beta1)
    slow = slow.lerp(g, one_minus_beta3)
    v = beta2 * v + one_minus_beta2 * g * g
    return (unbias1 * m + alpha * slow) / (unbias2 * v.sqrt() + eps), m, slow, v


def _coefficients(group: Mapping[str, Any]) -> tuple[float, ...]:
    beta1, beta2, beta3 = map(float, group["betas"])
    warmups = (float(group[key] or 0) for key in ("beta3_warmup", "alpha_warmup"))
    return 1 - beta1, beta2, 1 - beta2, beta3, *warmups, float(group["alpha"]), float(group["eps"])


def _at_step(coefficients: Sequence[float], step: float) -> Sequence[float]:
    one_minus_beta1, beta2, one_minus_beta2, beta3, beta3_warmup, alpha_warmup, alpha, eps = coefficients
    beta1 = 1 - one_minus_beta1
    if step < beta3_warmup:
        # The half-life, which is proportional to 1 / ln(beta), grows linearly; that of beta = 0 is 0.
        share = step / beta3_warmup
        inverse = sum(part / math.log(beta) for part, beta in ((1 - share, beta1), (share, beta3)) if beta)
        beta3 = min(math.exp(1 / inverse) if inverse else 0.0, beta3)
    if step < alpha_warmup:
        alpha *= step / alpha_warmup
    unbias1, unbias2 = 1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    return one_minus_beta1, beta2, one_minus_beta2, 1 - beta3, unbias1, unbias2, alpha, eps


ADEMAMIX_RULE = Rule(
    "ademamix",
    ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),
    _coefficients,
    _ademamix,
    _at_step,
    counts_steps=True,
    refuses_sparse="AdEMAMix does not support sparse gradients",
    unsigned=("exp_avg_sq",),
    not_in_8_bits={"exp_avg_slow": "it moves by a ten-thousandth a step, of which codes would lose nearly every one"},
)


class AdEMAMix(FusedOptimizer):
    """AdEMAMix: AdamW with a second, slow average, three states for each parameter.

    Pagliardini, Ablin and Grangier, "The AdEMAMix Optimizer: Better, Faster, Older" (arXiv 2409.03137), algorithm 1. The
    arguments, their defaults and the names of the states are those of the authors' code.

    Args:
        params: tensors, dicts of groups, or ``(name, tensor)`` pairs; float32, float64, bfloat16, float16 or complex.
        lr: learning rate, a float or a 1-element Tensor, at least 0.
        betas: decay rates of the average, of the second moment and of the slow average, all floats or all 1-element Tensors,
            each in [0, 1).
        alpha: weight of the slow average, at least 0; 4 to 10 in the paper.
        beta3_warmup: steps in which the slow average's decay rate grows from ``betas[0]``; None: it does not. Together with
            ``alpha_warmup`` in the paper the whole run, since a slow average of the first gradients misleads.
        alpha_warmup: steps in which ``alpha`` grows from 0; None: it does not.
        eps: added to the denominator, at least 0.
        weight_decay: decoupled decay, at least 0.
        maximize: ascend instead.
        foreach, capturable, fused: as :class:`fused_opt.Adam`.
        differentiable: as :class:`fused_opt.SGD`; ``betas`` are not followed.
        **extras: see :class:`fused_opt.FusedOptimizer`.

    Raises:
        ValueError: for a hyper-parameter out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fused_opt.AdEMAMix([weight], lr=0.1, betas=(0.9, 0.999, 0.75), alpha=4.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight  # 1 by the fast average, and 4 times a quarter by the slow one
        Parameter containing:
        tensor([0.8000, 0.8000], requires_grad=True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor, float | Tensor] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "beta3_warmup": beta3_warmup,
            "alpha_warmup": alpha_warmup,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **extras)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return ADEMAMIX_RULE

    def _decouples(self, group: Mapping[str, Any]) -> bool:
        return True

    def _check(self, options: Mapping[str, Any]) -> None:
        check_lr(options)
        if len(options["betas"]) != 3:
            raise ValueError(f"Invalid betas: {options['betas']}; they are three, the last that of the slow average")
        check_betas(options)
        check_number("Invalid alpha value", options["alpha"], lambda x: x >= 0.0)
        for key in ("beta3_warmup", "alpha_warmup"):
            check_number(f"Invalid {key}", 0 if options[key] is None else options[key], lambda x: 0 <= x < math.inf)
        check_number("Invalid epsilon value", options["eps"], lambda x: x >= 0.0)
        check_decay(options)
        check_switches(options)
