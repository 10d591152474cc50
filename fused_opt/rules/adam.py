r"""Adam, AMSGrad and AdamW, as torch.optim defines them.

.. math::
    g_t &\leftarrow g_t + \mathrm{coupled} \cdot \mathrm{weight\_decay} \cdot p_{t-1} \\
    m_t &= m_{t-1} + (1 - \beta_1) (g_t - m_{t-1}) \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    \hat v_t &= v_t \quad\text{or, for AMSGrad,}\quad \max(\hat v_{t-1}, v_t) \\
    u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v_t / (1 - \beta_2^t)} + \mathrm{eps}}
        + (1 - \mathrm{coupled}) \cdot \mathrm{weight\_decay} \cdot p_{t-1} \\
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
from ..rule import Rule, number, square_root


def _adam(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    unbias1: float,
    unbias2: float,
    eps: float,
) -> tuple[Tensor, ...]:
    m = m.lerp(g, one_minus_beta1)
    v = beta2 * v + one_minus_beta2 * g * g
    return unbias1 * m / (unbias2 * v.sqrt() + eps), m, v


def _amsgrad(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    largest: Tensor,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    unbias1: float,
    unbias2: float,
    eps: float,
) -> tuple[Tensor, ...]:
    m = m.lerp(g, one_minus_beta1)
    v = beta2 * v + one_minus_beta2 * g * g
    largest = torch.maximum(largest, v)
    return unbias1 * m / (unbias2 * largest.sqrt() + eps), m, v, largest


def _coefficients(group: Mapping[str, Any]) -> tuple[float, ...]:
    beta1, beta2 = (number(group, beta) for beta in group["betas"])
    return 1 - beta1, beta2, 1 - beta2, beta1, beta2, float(group["eps"])


def _at_step(coefficients: Sequence[float], step: float) -> Sequence[float]:
    one_minus_beta1, beta2, one_minus_beta2, beta1, _, eps = coefficients
    unbias1, unbias2 = 1 / (1 - beta1**step), 1 / square_root(1 - beta2**step)
    return one_minus_beta1, beta2, one_minus_beta2, unbias1, unbias2, eps


_MOMENTS = ("exp_avg", "exp_avg_sq")
_COUNTED: dict[str, Any] = {
    "at_step": _at_step,
    "counts_steps": True,
    "refuses_sparse": "Adam does not support sparse gradients, please consider SparseAdam instead",
}
ADAM_RULE = Rule("adam", _MOMENTS, _coefficients, _adam, unsigned=("exp_avg_sq",), **_COUNTED)
_MOST = "max_exp_avg_sq"
AMSGRAD_RULE = Rule("amsgrad", (*_MOMENTS, _MOST), _coefficients, _amsgrad, unsigned=("exp_avg_sq", _MOST), **_COUNTED)


class Adam(FusedOptimizer):
    """Adam: torch.optim.Adam with one word changed.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization" (arXiv 1412.6980), with AMSGrad (Reddi et al., "On the
    Convergence of Adam and Beyond", ICLR 2018) by ``amsgrad=True``. The arguments, the state and the state_dict are
    those of :class:`torch.optim.Adam`, whose documentation gives the update.

    Args:
        params: tensors, dicts of groups, or ``(name, tensor)`` pairs; float32, float64, bfloat16, float16 or complex.
        lr: learning rate, a float or a 1-element Tensor, at least 0.
        betas: decay rates of the two moments, both floats or both 1-element Tensors, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0; added to the gradient, or to the direction with ``decoupled_weight_decay``.
        amsgrad: divide by the largest second moment so far.
        foreach: accepted as torch.optim accepts it; changes nothing, every step is fused.
        maximize: ascend instead.
        capturable: accepted as torch.optim accepts it; changes nothing. On a GPU the native backend's steps can always be
            captured in a CUDA graph, and the others' never.
        differentiable: as :class:`fused_opt.SGD`; ``betas`` can be tensors that require grad, too.
        fused: accepted as torch.optim accepts it; every step is fused. As there, ``True`` has torch.amp.GradScaler leave the
            unscaling of gradients to the step, which saves a pass over them; Lightning does not clip such gradients.
        decoupled_weight_decay: AdamW's decay, ``decay="decoupled"``; False leaves it to ``decay``.
        **extras: see :class:`fused_opt.FusedOptimizer`.

    Raises:
        ValueError: for a hyper-parameter out of its range, in torch.optim's words where it has them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fused_opt.Adam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        Parameter containing:
        tensor([0.9000, 0.9000], requires_grad=True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **extras)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return AMSGRAD_RULE if group["amsgrad"] else ADAM_RULE

    def _decouples(self, group: Mapping[str, Any]) -> bool:
        return bool(group["decoupled_weight_decay"])

    def _check(self, options: Mapping[str, Any]) -> None:
        if options["foreach"] and not options["capturable"]:
            for name, value in zip(("lr", "betas[0]", "betas[1]"), (options["lr"], *options["betas"])):
                if isinstance(value, Tensor):
                    raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
        check_lr(options)
        check_number("Invalid epsilon value", options["eps"], lambda x: x >= 0.0)
        check_betas(options)
        check_decay(options)
        check_switches(options)


class AdamW(Adam):
    """AdamW: torch.optim.AdamW with one word changed.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101): Adam whose weight decay enters
    neither moment. The arguments are those of :class:`torch.optim.AdamW`.

    Args:
        params, lr, betas, eps, amsgrad, maximize, foreach, capturable, differentiable, fused: as :class:`fused_opt.Adam`.
        weight_decay: at least 0; the weights shrink by ``lr * weight_decay`` of themselves in every step.
        **extras: as :class:`fused_opt.Adam`.

    Raises:
        ValueError: for a hyper-parameter out of its range, in torch.optim's words where it has them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fused_opt.AdamW([weight], lr=0.1, weight_decay=0.5)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        Parameter containing:
        tensor([0.8500, 0.8500], requires_grad=True)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **extras,
        )

    def _check(self, options: Mapping[str, Any]) -> None:
        super()._check(
            {**options, "decoupled_weight_decay": False}
        )  # which decay= may overrule: it is no argument here

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # As torch.optim.AdamW: a checkpoint of Adam loaded here does not turn the decay back.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
