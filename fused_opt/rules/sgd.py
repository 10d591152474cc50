r"""Stochastic gradient descent with momentum, as torch.optim.SGD defines it.

.. math::
    d_t &= g_t + \mathrm{weight\_decay} \cdot p_{t-1} \\
    m_t &= \mathrm{momentum} \cdot m_{t-1} + \mathrm{keep} \cdot d_t,
        \qquad \mathrm{keep} = 1 - \mathrm{dampening},\ \text{and } 1 \text{ at } t = 1 \\
    u_t &= m_t \quad\text{or, with Nesterov's momentum,}\quad d_t + \mathrm{momentum} \cdot m_t \\
    p_t &= p_{t-1} - \mathrm{lr} \cdot u_t
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_decay, check_lr, check_number, check_switches
from ..optimizer import Extras, FusedOptimizer, ParamsT
from ..rule import Rule, number


def _sgd(g: Tensor) -> tuple[Tensor, ...]:
    return (g,)


def _momentum_sgd(d: Tensor, m: Tensor, momentum: float, keep: float, nesterov: float) -> tuple[Tensor, ...]:
    m = momentum * m + keep * d
    return (d + nesterov * m if nesterov else m), m


def _momentum_sgd_coefficients(group: Mapping[str, Any]) -> tuple[float, ...]:
    momentum = number(group, group["momentum"])
    return momentum, 1.0 - group["dampening"], momentum if group["nesterov"] else 0.0


def _momentum_sgd_at_step(coefficients: Sequence[float], step: float) -> Sequence[float]:
    momentum, keep, nesterov = coefficients
    return (0.0, 1.0, nesterov) if step == 1 else (momentum, keep, nesterov)


SGD_RULE = Rule("sgd", (), lambda group: (), _sgd)
MOMENTUM_SGD_RULE = Rule(
    "momentum_sgd", ("momentum_buffer",), _momentum_sgd_coefficients, _momentum_sgd, _momentum_sgd_at_step
)


class SGD(FusedOptimizer):
    """Stochastic gradient descent: torch.optim.SGD with one word changed.

    The arguments, the state and the state_dict are those of :class:`torch.optim.SGD`, whose documentation gives the
    update; the momentum follows Sutskever et al., "On the importance of initialization and momentum in deep learning",
    ICML 2013, with the learning rate outside the buffer.

    Args:
        params: tensors, dicts of groups, or ``(name, tensor)`` pairs; float32, float64, bfloat16, float16 or complex.
        lr: learning rate, a float or a 1-element Tensor, at least 0.
        momentum: at least 0.
        dampening: taken from each gradient after the first before it enters the momentum.
        weight_decay: coupled (L2) decay, at least 0.
        nesterov: Nesterov's momentum; needs a momentum and no dampening.
        maximize: ascend instead.
        foreach: accepted as torch.optim accepts it; changes nothing, every step is fused.
        differentiable: whether autograd follows the step, in plain PyTorch, to the weights before it, the gradients, and
            an ``lr`` and ``weight_decay`` that are tensors. As in torch.optim, parameters are then tensors that may be
            written in place (clones, no leaves). Trust ratios, clipping and relative noise are not followed, and refused.
        fused: accepted as torch.optim accepts it; every step is fused. As there, ``True`` has torch.amp.GradScaler leave the
            unscaling of gradients to the step, which saves a pass over them; Lightning does not clip such gradients.
        **extras: see :class:`fused_opt.FusedOptimizer`.

    Raises:
        ValueError: for a hyper-parameter out of its range, in torch.optim's words where it has them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fused_opt.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        Parameter containing:
        tensor([0.8000, 0.8000], requires_grad=True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **extras)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return MOMENTUM_SGD_RULE if group["momentum"] != 0 else SGD_RULE

    def _check(self, options: Mapping[str, Any]) -> None:
        check_lr(options)
        check_number("Invalid momentum value", options["momentum"], lambda x: x >= 0.0)
        check_decay(options)
        check_number("Invalid dampening value", options["dampening"], lambda x: -math.inf < x < math.inf)
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        check_switches(options)
