r"""Norms of the gradients of single samples without the gradients, module by module.

With a gradient :math:`g = \sum_i c_i` over the samples i of a batch, CLARS wants :math:`A = \sum_i \|c_i\|`. No
:math:`c_i` need be formed for it: where a module multiplies its weight with T vectors :math:`a_t` per sample and receives
the output gradients :math:`e_t`,

.. math::
    c_i = \sum_t e_t a_t^\top, \qquad
    \|c_i\|^2 = \sum_{t, t'} (a_t \cdot a_{t'}) (e_t \cdot e_{t'}) = \sum \left( a a^\top \odot e e^\top \right)

and the cheaper of the two is taken: of order T * T * (in + out) or T * in * out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm


class Factors(NamedTuple):
    """A weight's gradient by sample as a product, ``e^T a`` in every group."""

    a: Tensor  # samples x groups x T x in
    e: Tensor  # samples x groups x T x out


class Rows(NamedTuple):
    """A table's gradient by sample: each value added to the row of its index."""

    rows: Tensor  # samples x T
    values: Tensor  # samples x T x width


def _sum_to_last(t: Tensor, k: int) -> Tensor:
    return t if t.ndim == k + 1 else t.flatten(1, -k - 1).sum(1)


def _sum_to_channels(t: Tensor) -> Tensor:
    return t if t.ndim == 2 else t.flatten(2).sum(2)


def _linear(m: Any, x: Tensor, e: Tensor) -> Factors:
    x, e = (t.unsqueeze(1) if t.ndim == 2 else t.flatten(1, -2) for t in (x, e))
    return Factors(x.unsqueeze(1), e.unsqueeze(1))


def _convolution(m: Any, x: Tensor, e: Tensor) -> Factors:
    x = F.pad(x, m._reversed_padding_repeated_twice, "constant" if m.padding_mode == "zeros" else m.padding_mode)
    n = len(m.kernel_size)
    for i in range(n):
        x = x.unfold(2 + i, m.dilation[i] * (m.kernel_size[i] - 1) + 1, m.stride[i])
    taps: Any = (..., *(slice(None, None, step) for step in m.dilation))
    x = x[taps].unflatten(1, (m.groups, -1)).movedim(2, 2 + n)
    x = x.flatten(2 + n).flatten(2, 1 + n)
    return Factors(x, e.flatten(2).unflatten(1, (m.groups, -1)).transpose(2, 3))


def _embedding(m: Any, x: Tensor, e: Tensor) -> Rows:
    if m.padding_idx is not None:
        e = e.masked_fill((x == m.padding_idx).unsqueeze(-1), 0)
    return Rows(x.flatten(1), e.flatten(1, -2)) if x.ndim > 1 else Rows(x.unsqueeze(1), e.unsqueeze(1))


def _batch_norm(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, m.running_mean, m.running_var, eps=m.eps)


def _instance_norm(m: Any, x: Tensor) -> Tensor:
    own = m.training or not m.track_running_stats
    mean, var = (None, None) if own else (m.running_mean, m.running_var)
    return F.instance_norm(x, mean, var, use_input_stats=own, eps=m.eps)


Part: TypeAlias = Factors | Rows | Tensor  # a tensor: samples x the parameter's shape
Form: TypeAlias = Callable[[Any, Tensor, Tensor], Part]


def _over_channels(normalized: Callable[[Any, Tensor], Tensor]) -> tuple[int, dict[str, Form]]:
    return 2, {
        "weight": lambda m, x, e: _sum_to_channels(normalized(m, x) * e),
        "bias": lambda m, x, e: _sum_to_channels(e),
    }


# By what a module calls: dimensions that its input has at least, and the form of each parameter's gradients.
FORMS: dict[Any, tuple[int, dict[str, Form]]] = {
    nn.Linear.forward: (2, {"weight": _linear, "bias": lambda m, x, e: _sum_to_last(e, 1)}),
    nn.Embedding.forward: (1, {"weight": _embedding}),
    nn.LayerNorm.forward: (
        2,
        {
            "weight": lambda m, x, e: _sum_to_last(F.layer_norm(x, m.normalized_shape, eps=m.eps) * e, m.weight.ndim),
            "bias": lambda m, x, e: _sum_to_last(e, m.bias.ndim),
        },
    ),
    nn.GroupNorm.forward: _over_channels(lambda m, x: F.group_norm(x, m.num_groups, eps=m.eps)),
    _InstanceNorm.forward: _over_channels(_instance_norm),
    _BatchNorm.forward: _over_channels(_batch_norm),
    **{
        kind.forward: (n + 2, {"weight": _convolution, "bias": lambda m, x, e: _sum_to_channels(e)})
        for n, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)
    },
}


_CONVOLVE = {kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def forms_of(module: nn.Module) -> tuple[int, dict[str, Form]]:
    """The entry of a module, by the identity of what runs when it is called; without forms where that is not known."""
    ndim, forms = FORMS.get(getattr(module.forward, "__func__", None), (1, {}))
    own = isinstance(module, _ConvNd) and getattr(module._conv_forward, "__func__", None) not in _CONVOLVE
    return ndim, {} if own else forms


def _dense(p: Tensor, part: Part) -> Tensor:
    """The gradients by sample: samples x the parameter's shape."""
    if isinstance(part, Factors):
        return (part.e.mT @ part.a).reshape(-1, *p.shape)
    if isinstance(part, Rows):
        table = part.values.new_zeros(len(part.rows), *p.shape)
        return table.scatter_add_(1, part.rows.unsqueeze(-1).expand_as(part.values), part.values)
    return part


def _through_gram(part: Factors) -> bool:
    t, a, e = part.a.shape[2], part.a.shape[3], part.e.shape[3]
    return t * (a + e) < a * e


def size(p: Tensor, part: Part) -> int:
    """Elements of what is made on the way to the norm."""
    if isinstance(part, Factors):
        return part.a.numel() + (part.a.shape[1] * part.a.shape[2] ** 2 if _through_gram(part) else p.numel())
    return part.values.numel() if isinstance(part, Rows) else part.numel()


def norm2(p: Tensor, part: Part) -> Tensor:
    """Squared norm of the gradient of every sample."""
    if isinstance(part, Factors) and _through_gram(part):
        return ((part.a @ part.a.mT) * (part.e @ part.e.mT)).sum((1, 2, 3))
    if isinstance(part, Rows):  # a token that repeats within a sample adds to one row
        samples, rows = len(part.rows), p.shape[0]
        keys = part.rows + rows * torch.arange(samples, device=p.device).unsqueeze(1)
        keys, inverse = keys.flatten().unique(return_inverse=True)
        sums = part.values.new_zeros(len(keys), p.shape[1]).index_add_(0, inverse, part.values.flatten(0, 1))
        return sums.new_zeros(samples).index_add_(0, keys // rows, sums.square().sum(1))
    return _dense(p, part).flatten(1).square().sum(1)


def total(p: Tensor, part: Part) -> Tensor:
    """The sum of the gradients of all samples, without those of each; of rows, a sparse tensor."""
    if isinstance(part, Factors):
        a, e = (t.transpose(0, 1).flatten(1, 2) for t in part)
        return (e.mT @ a).reshape(p.shape)
    if isinstance(part, Rows):
        return torch.sparse_coo_tensor(
            part.rows.flatten()[None], part.values.flatten(0, 1), p.shape, check_invariants=False
        )
    return part.sum(0)


def together(p: Tensor, parts: Sequence[Part]) -> Part:
    """The sum of the gradients, still as a product or as rows where all are."""
    kinds = {type(part) for part in parts}
    if len(parts) == 1:
        return parts[0]
    if kinds == {Factors}:
        return Factors(*(torch.cat(of_all, 2) for of_all in zip(*parts)))
    if kinds == {Rows}:
        return Rows(*(torch.cat(of_all, 1) for of_all in zip(*parts)))
    return sum((_dense(p, part) for part in parts[1:]), _dense(p, parts[0]))
