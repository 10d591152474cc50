r"""Muon: the momentum of a matrix, orthogonalized; AdamW for what is no matrix.

.. math::
    m_t &= \mathrm{momentum} \cdot m_{t-1} + (1 - \mathrm{momentum})\, g_t \\
    n_t &= m_t \quad\text{or, with Nesterov's momentum,}\quad
        (1 - \mathrm{momentum})\, g_t + \mathrm{momentum} \cdot m_t \\
    X_0 &= n_t / \max(\|n_t\|_F, \mathrm{eps}), \qquad
        X_{k+1} = a X_k + (b A + c A^2) X_k \ \text{ with }\ A = X_k X_k^T, \qquad u_t = X_{\mathrm{ns\_steps}} \\
    u_t &= U S^{\mathrm{power}} V^T \ \text{ where }\ \mathrm{power} > 0, \qquad n_t = U S V^T \\
    p_t &= p_{t-1} - \mathrm{lr} \cdot \left(s\, u_t + \mathrm{weight\_decay} \cdot p_{t-1}\right), \qquad
        s = \sqrt{\max(1, \mathrm{rows} / \mathrm{columns})} \ \text{ or }\ 0.2 \sqrt{\max(\mathrm{rows}, \mathrm{columns})}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..checks import check_betas, check_number, real, whole
from ..extras.decay import COUPLED
from ..optimizer import Extras, FusedOptimizer, ParamsT
from ..rule import Matrices, Rule
from .adam import ADAM_RULE
from .sgd import SGD_RULE

_ADJUSTMENTS = (None, "original", "match_rms_adamw")
_ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def _muon(g: Tensor, m: Tensor, one_minus_momentum: float, share: float) -> tuple[Tensor, ...]:
    m = m.lerp(g, one_minus_momentum)
    return g.lerp(m, share), m


def _coefficients(group: Mapping[str, Any]) -> tuple[float, ...]:
    momentum = float(group["momentum"])
    return 1 - momentum, momentum if group["nesterov"] else 1.0


def _orthogonalized(updates: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Of every matrix of a stack: Newton and Schulz's iteration, or a power of the singular values."""
    if group["power"]:
        u, s, v = torch.linalg.svd(updates, full_matrices=False)
        return (u * s.pow(group["power"]).unsqueeze(-2)) @ v
    a, b, c = group["ns_coefficients"]
    x = updates.bfloat16()
    tall = x.shape[1] > x.shape[2]  # the smaller of the two products
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _scale(group: Mapping[str, Any], rows: int, columns: int) -> float:
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(1, columns)))


def _dtype(group: Mapping[str, Any]) -> torch.dtype:
    return torch.float32 if group["power"] else torch.bfloat16


MUON_RULE = Rule(
    "muon",
    ("momentum_buffer",),
    _coefficients,
    _muon,
    refuses_sparse="Muon does not support sparse gradients",
    matrices=Matrices(_orthogonalized, _scale, _dtype, SGD_RULE),
    not_in_8_bits={"momentum_buffer": "the matrices that are made of it are stepped in two buckets"},
)


class Muon(FusedOptimizer):
    """Muon for the matrices of a network and AdamW for the rest: torch.optim.Muon with one word changed, for whole models.

    Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), as :class:`torch.optim.Muon` has
    it. A parameter is stepped by Muon if it is real, has at least two dimensions and is not in ``exclude``, and by AdamW
    otherwise; of a convolution's weight the matrix has a row for each output channel. Each group given is
    divided so into two, first the matrices; ``use_muon=True`` or ``False`` in a group decides for all of its parameters.

    The momentum is computed in one pass, all matrices of one shape are multiplied together by torch, and a second pass moves
    the weights, with the decay, noise and averages. Between steps each matrix has 2 bytes of working memory an element,
    and during a step as much again as its momentum, which returns to what it was where the products raise.

    Args:
        params: tensors, dicts of groups, or ``(name, tensor)`` pairs; float32, float64, bfloat16 or float16.
        lr: learning rate, a float or a 1-element Tensor, at least 0.
        weight_decay: decoupled decay, at least 0.
        momentum: at least 0, the share that the momentum keeps; its gradient enters with ``1 - momentum``.
        nesterov: Nesterov's momentum.
        ns_coefficients: a, b and c of the Newton-Schulz iteration, in bfloat16.
        eps: least norm that a matrix is divided by, at least 0.
        ns_steps: iterations, 0 to 99.
        adjust_lr_fn: what the update is scaled with: ``"original"`` or None, ``sqrt(max(1, rows / columns))``;
            ``"match_rms_adamw"``, ``0.2 * sqrt(max(rows, columns))`` (Liu et al., "Muon is Scalable for LLM Training", arXiv
            2502.16982), with which AdamW's learning rate and decay can be used.
        power: 0, or HTMuon ("HTMuon: Improving Muon via Heavy-Tailed Spectral Correction", arXiv 2603.10067): the singular
            values of the momentum to this power, 0.125 to 0.25 there, at most 1, by a singular value decomposition in float32
            (float64 for float64), which takes many times as long.
        exclude: matrices that AdamW steps, too: embeddings and the output layer.
        adamw: hyper-parameters of the groups that AdamW steps; without it, those of torch.optim.AdamW: lr 1e-3, betas (0.9,
            0.999), eps 1e-8, weight_decay 1e-2.
        maximize: ascend instead.
        foreach, fused: as :class:`fused_opt.SGD`.
        capturable, differentiable: False; a step is neither captured in a CUDA graph nor followed by autograd.
        **extras: see :class:`fused_opt.FusedOptimizer`. Of the trust ratios only ``"lamb"`` is one of a matrix: an
            orthogonalized update does not have the gradient's norm.

    Raises:
        ValueError: for a hyper-parameter out of its range, in torch.optim's words where it has them, or a parameter of fewer
            than two dimensions in a group with ``use_muon=True``.
        TypeError: for a key in ``adamw`` that is none of a group's.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 10))
        >>> outer = [*model[0].parameters(), *model[2].parameters()]
        >>> optimizer = fused_opt.Muon(model.named_parameters(), lr=0.02, exclude=outer, adamw={"lr": 3e-4})
        >>> [(group["use_muon"], group["lr"], group["param_names"]) for group in optimizer.param_groups]
        [(True, 0.02, ['1.weight']), (False, 0.0003, ['0.weight', '1.bias', '2.weight', '2.bias'])]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        power: float = 0.0,
        exclude: Iterable[Tensor] = (),
        adamw: Mapping[str, Any] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "power": power,
            "use_muon": True,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        self._adamw = {**_ADAMW, **(adamw or {})}
        self._exclude = set(exclude)
        super().__init__(params, defaults, **extras)
        self._exclude = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adamw": self._adamw, "_exclude": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("betas", self._adamw["betas"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or two where it has both matrices and others and does not say ``use_muon``."""
        if unknown := self._adamw.keys() - self.defaults.keys() - {"betas"}:
            raise TypeError(f"adamw has {min(unknown)!r}, which is no key of a parameter group")
        before = len(self.param_groups)
        try:
            for part in self._divided(param_group):
                super().add_param_group(part)
        except BaseException:
            del self.param_groups[before:]
            raise

    def _divided(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        if not isinstance(group, dict) or isinstance(group["params"], set):
            return [group]  # torch refuses it
        given = group["params"]
        group = {**group, "params": [given] if isinstance(given, Tensor) else list(given)}
        if "use_muon" in group:
            return [{"betas": self._adamw["betas"], **({} if group["use_muon"] else self._adamw), **group}]
        matrices: list[Any] = []
        others: list[Any] = []
        for item in group["params"]:
            p = item[1] if isinstance(item, tuple) else item
            (matrices if _is_matrix(p) and p not in self._exclude else others).append(item)
        first = {"betas": self._adamw["betas"], **group, "params": matrices, "use_muon": True}
        second = {**group, **self._adamw, "params": others, "use_muon": False}
        return [part for part in (first, second) if part["params"]] or [first]

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return MUON_RULE if group["use_muon"] else ADAM_RULE

    def _decouples(self, group: Mapping[str, Any]) -> bool:
        return True

    def _check(self, options: Mapping[str, Any]) -> None:
        lr = options["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        for what, value in (
            ("Learning rate", lr),
            ("momentum", options["momentum"]),
            ("weight decay", options["weight_decay"]),
            ("eps", options["eps"]),
        ):
            check_number(f"{what} should be >= 0 but is", value, lambda x: x >= 0.0)
        if options["adjust_lr_fn"] not in _ADJUSTMENTS:
            raise ValueError(f"Adjust learning rate function {options['adjust_lr_fn']} is not supported")
        coefficients = options["ns_coefficients"]
        if len(coefficients) != 3 or not all(isinstance(x, Real) for x in coefficients):
            raise ValueError(f"Coefficients must be a tuple of exactly 3 values, not {coefficients!r}")
        if whole("ns_steps", options["ns_steps"], 0) >= 100:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")
        real("power", options["power"], lambda x: 0 <= x <= 1, "in [0, 1]")
        if "betas" in options:
            check_betas(options)
        for switch in ("capturable", "differentiable"):
            if options[switch]:
                raise ValueError(
                    f"{switch}=True: a step of Muon is neither captured in a CUDA graph nor followed by autograd. "
                    f"fused_opt.AdamW has {switch}"
                )
        self._check_matrices(options)

    def _check_matrices(self, options: Mapping[str, Any]) -> None:
        if not options["use_muon"]:
            return
        if (ratio := options.get("trust_ratio")) is not None and ratio.kind != "lamb":
            raise ValueError(
                f"trust_ratio={ratio.kind!r} divides by norms of the gradient, which an orthogonalized update does not have. "
                f"What would work: 'lamb', or trust_ratio in adamw= or in a group with use_muon=False"
            )
        if options.get("decay") == COUPLED:
            raise ValueError(
                "decay='coupled' is decay that the rule sees, and Muon's update has the same size whatever it is given. What "
                "would work: 'decoupled' or 'independent', or decay in adamw= or in a group with use_muon=False"
            )
        if (cautious := options.get("cautious")) is not None and cautious.args.update:
            raise ValueError(
                f"cautious={cautious!r} compares every element of the update with the gradient's, which says nothing of an "
                f"orthogonalized update. What would work: Cautious('decay'), or a group with use_muon=False"
            )
        for item in options.get("params", ()):
            p = item[1] if isinstance(item, tuple) else item
            if isinstance(p, Tensor) and not _is_matrix(p):
                kind = "a complex one" if p.is_complex() else "one"
                raise ValueError(
                    f"use_muon=True: Muon steps real parameters of at least two dimensions whereas we found {kind} with "
                    f"size: {p.size()}. use_muon=False in its group has AdamW step it"
                )


def _is_matrix(p: Any) -> bool:
    return not isinstance(p, Tensor) or (p.ndim >= 2 and not p.is_complex())
