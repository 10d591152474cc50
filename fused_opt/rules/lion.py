r"""Lion: the sign of an interpolation between the gradient and its average.

.. math::
    u_t &= \mathrm{sign}\left(\beta_1 m_{t-1} + (1 - \beta_1) g_t\right) \\
    m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t \\
    p_t &= p_{t-1} - \mathrm{lr} \cdot (u_t + \mathrm{weight\_decay} \cdot p_{t-1})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_betas, check_decay, check_lr, check_switches
from ..optimizer import Extras, FusedOptimizer, ParamsT
from ..rule import Rule, number


def _lion(g: Tensor, m: Tensor, one_minus_beta1: float, one_minus_beta2: float) -> tuple[Tensor, ...]:
    return m.lerp(g, one_minus_beta1).sign(), m.lerp(g, one_minus_beta2)


def _coefficients(group: Mapping[str, Any]) -> tuple[float, ...]:
    beta1, beta2 = (number(group, beta) for beta in group["betas"])
    return 1 - beta1, 1 - beta2


LION_RULE = Rule("lion", ("exp_avg",), _coefficients, _lion)


class Lion(FusedOptimizer):
    """Lion: evolved sign momentum, one state for each parameter.

    Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), algorithm 2. Every weight moves by the
    learning rate, so that of Lion is 3 to 10 times smaller than AdamW's, and its weight decay as much larger (section 5).

    Args:
        params: tensors, dicts of groups, or ``(name, tensor)`` pairs; float32, float64, bfloat16, float16 or complex.
        lr: learning rate, a float or a 1-element Tensor, at least 0.
        betas: decay rates of the interpolation and of the average, both floats or both 1-element Tensors, each in [0, 1).
        weight_decay: decoupled decay, at least 0.
        maximize: ascend instead.
        foreach, differentiable, fused: as :class:`fused_opt.SGD`.
        **extras: see :class:`fused_opt.FusedOptimizer`.

    Raises:
        ValueError: for a hyper-parameter out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fused_opt.Lion([weight], lr=0.1, weight_decay=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        Parameter containing:
        tensor([0.8500, 0.8500], requires_grad=True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **extras)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return LION_RULE

    def _decouples(self, group: Mapping[str, Any]) -> bool:
        return True

    def _check(self, options: Mapping[str, Any]) -> None:
        check_lr(options)
        check_betas(options)
        check_decay(options)
        check_switches(options)
