r"""RMSprop, centered or with momentum or both, as torch.optim.RMSprop defines it.

.. math::
    g_t &\leftarrow g_t + \mathrm{weight\_decay} \cdot p_{t-1} \\
    v_t &= \alpha v_{t-1} + (1 - \alpha) g_t^2 \\
    a_t &= a_{t-1} + (1 - \alpha) (g_t - a_{t-1}) \quad\text{if centered, otherwise } 0 \\
    d_t &= \frac{g_t}{\sqrt{v_t - a_t^2} + \mathrm{eps}} \\
    u_t &= b_t = \mathrm{momentum} \cdot b_{t-1} + d_t \quad\text{or, without momentum,}\quad d_t \\
    p_t &= p_{t-1} - \mathrm{lr} \cdot u_t
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_decay, check_lr, check_number, check_switches
from ..optimizer import Extras, FusedOptimizer, ParamsT
from ..rule import Rule


def _rmsprop(g: Tensor, v: Tensor, alpha: float, one_minus_alpha: float, eps: float) -> tuple[Tensor, ...]:
    v = alpha * v + one_minus_alpha * g * g
    return g / (v.sqrt() + eps), v


def _centered(
    g: Tensor, v: Tensor, average: Tensor, alpha: float, one_minus_alpha: float, eps: float
) -> tuple[Tensor, ...]:
    v = alpha * v + one_minus_alpha * g * g
    average = average.lerp(g, one_minus_alpha)
    return g / ((v - average * average).sqrt() + eps), v, average


def _momentum(
    g: Tensor, v: Tensor, b: Tensor, alpha: float, one_minus_alpha: float, eps: float, momentum: float
) -> tuple[Tensor, ...]:
    d, v = _rmsprop(g, v, alpha, one_minus_alpha, eps)
    b = momentum * b + d
    return b, v, b


def _centered_momentum(
    g: Tensor,
    v: Tensor,
    b: Tensor,
    average: Tensor,
    alpha: float,
    one_minus_alpha: float,
    eps: float,
    momentum: float,
) -> tuple[Tensor, ...]:
    d, v, average = _centered(g, v, average, alpha, one_minus_alpha, eps)
    b = momentum * b + d
    return b, v, b, average


def _coefficients(group: Mapping[str, Any]) -> tuple[float, ...]:
    alpha = float(group["alpha"])
    return alpha, 1 - alpha, float(group["eps"])


def _with_momentum(group: Mapping[str, Any]) -> tuple[float, ...]:
    return *_coefficients(group), float(group["momentum"])


_COUNTED: dict[str, Any] = {
    "counts_steps": True,
    "refuses_sparse": "RMSprop does not support sparse gradients",
    "unsigned": ("square_avg",),
}
_CENTERED = dict.fromkeys(
    ("square_avg", "grad_avg"), "it divides by a difference of two states, whose rounding could make it negative"
)
#: By whether it has momentum, and whether it is centered.
RMSPROP_RULES = {
    (False, False): Rule("rmsprop", ("square_avg",), _coefficients, _rmsprop, **_COUNTED),
    (False, True): Rule(
        "centered_rmsprop", ("square_avg", "grad_avg"), _coefficients, _centered, not_in_8_bits=_CENTERED, **_COUNTED
    ),
    (True, False): Rule("momentum_rmsprop", ("square_avg", "momentum_buffer"), _with_momentum, _momentum, **_COUNTED),
    (True, True): Rule(
        "centered_momentum_rmsprop",
        ("square_avg", "momentum_buffer", "grad_avg"),
        _with_momentum,
        _centered_momentum,
        not_in_8_bits=_CENTERED,
        **_COUNTED,
    ),
}


class RMSprop(FusedOptimizer):
    """RMSprop: torch.optim.RMSprop with one word changed.

    Hinton, "Neural Networks for Machine Learning", lecture 6e; centered, as in Graves, "Generating Sequences With Recurrent
    Neural Networks" (arXiv 1308.0850). The arguments, the state and the state_dict are those of
    :class:`torch.optim.RMSprop`, whose documentation gives the update.

    Args:
        params: tensors, dicts of groups, or ``(name, tensor)`` pairs; float32, float64, bfloat16, float16 or complex.
        lr: learning rate, a float or a 1-element Tensor, at least 0.
        alpha: decay rate of the averages, at least 0.
        eps: added to the denominator, at least 0.
        weight_decay: coupled (L2) decay, at least 0.
        momentum: of the normalized gradients, at least 0.
        centered: divide by the standard deviation of the gradients and not by their root mean square. Where rounding makes
            the variance negative, as that of a gradient that never changes, the update is NaN, as torch.optim's.
        capturable, foreach, fused: as :class:`fused_opt.Adam`; torch.optim.RMSprop has no ``fused``.
        differentiable: as :class:`fused_opt.SGD`.
        maximize: ascend instead.
        **extras: see :class:`fused_opt.FusedOptimizer`.

    Raises:
        ValueError: for a hyper-parameter out of its range, in torch.optim's words where it has them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fused_opt.RMSprop([weight], lr=0.1, alpha=0.75)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight  # the root mean square is half the gradient
        Parameter containing:
        tensor([0.8000, 0.8000], requires_grad=True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **extras)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RMSPROP_RULES[group["momentum"] > 0, bool(group["centered"])]

    def _check(self, options: Mapping[str, Any]) -> None:
        check_lr(options)
        check_number("Invalid epsilon value", options["eps"], lambda x: x >= 0.0)
        check_number("Invalid momentum value", options["momentum"], lambda x: x >= 0.0)
        check_decay(options)
        check_number("Invalid alpha value", options["alpha"], lambda x: x >= 0.0)
        check_switches(options)
