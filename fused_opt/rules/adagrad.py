r"""Adagrad, as torch.optim.Adagrad defines it.

.. math::
    g_t &\leftarrow g_t + \mathrm{weight\_decay} \cdot p_{t-1} \\
    s_t &= s_{t-1} + g_t^2, \qquad s_0 = \mathrm{initial\_accumulator\_value} \\
    u_t &= \frac{1}{1 + (t - 1) \cdot \mathrm{lr\_decay}} \cdot \frac{g_t}{\sqrt{s_t} + \mathrm{eps}} \\
    p_t &= p_{t-1} - \mathrm{lr} \cdot u_t
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import Unpack

from ..checks import check_decay, check_lr, check_number, check_switches
from ..optimizer import Extras, FusedOptimizer, ParamsT
from ..rule import Rule
from ..states import NewStates


def _adagrad(g: Tensor, s: Tensor, decayed: float, eps: float) -> tuple[Tensor, ...]:
    s = s + g * g
    return decayed * g / (s.sqrt() + eps), s


def _coefficients(group: Mapping[str, Any]) -> tuple[float, ...]:
    return float(group["lr_decay"]), float(group["eps"])


def _at_step(coefficients: Sequence[float], step: float) -> Sequence[float]:
    lr_decay, eps = coefficients
    return 1 / (1 + (step - 1) * lr_decay), eps


ADAGRAD_RULE = Rule(
    "adagrad",
    ("sum",),
    _coefficients,
    _adagrad,
    _at_step,
    counts_steps=True,
    initial=lambda group: float(group["initial_accumulator_value"]),
    not_in_8_bits={"sum": "it grows by ever smaller shares of itself, of which codes would soon lose every one"},
)


class Adagrad(FusedOptimizer):
    """Adagrad: torch.optim.Adagrad with one word changed.

    Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization" (JMLR 2011). The
    arguments, the state and the state_dict are those of :class:`torch.optim.Adagrad`, whose documentation gives the update;
    as there, the states are made with the optimizer and not in the first step. Sparse gradients are made dense.

    Args:
        params: tensors, dicts of groups, or ``(name, tensor)`` pairs; float32, float64, bfloat16, float16 or complex.
        lr: learning rate, a float or a 1-element Tensor, at least 0.
        lr_decay: at least 0; step t is divided by ``1 + (t - 1) * lr_decay``. This is part of the update, so that LAMB's
            trust ratio, which divides by the update's norm, undoes it.
        weight_decay: coupled (L2) decay, at least 0.
        initial_accumulator_value: what the sums begin with, at least 0; a group's own where it has one.
        eps: added to the denominator, at least 0.
        foreach, differentiable, fused: as :class:`fused_opt.SGD`.
        maximize: ascend instead.
        **extras: see :class:`fused_opt.FusedOptimizer`.

    Raises:
        ValueError: for a hyper-parameter out of its range, in torch.optim's words where it has them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fused_opt.Adagrad([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        Parameter containing:
        tensor([0.9000, 0.9000], requires_grad=True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float | Tensor = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **extras)
        states = NewStates(self._states, self.state_dtype)
        for group in self.param_groups:
            for p in group["params"]:
                if not is_lazy(p):
                    states.add(p, ADAGRAD_RULE, group)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return ADAGRAD_RULE

    def _check(self, options: Mapping[str, Any]) -> None:
        check_lr(options)
        check_number("Invalid lr_decay value", options["lr_decay"], lambda x: x >= 0.0)
        check_decay(options)
        check_number(
            "Invalid initial_accumulator_value value", options["initial_accumulator_value"], lambda x: x >= 0.0
        )
        check_number("Invalid epsilon value", options["eps"], lambda x: x >= 0.0)
        check_switches(options)
