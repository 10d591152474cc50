"""The Triton backend: the same step on a GPU where no compiler is installed, NVIDIA's or another's.

One launch steps all parameters of the same dtypes; two do where norms of gradients, directions or unknown weights must
come first. The launches read tables in device memory; what changes from step to step (the gradients' addresses, the
coefficients) goes there in one small copy from pinned memory, and nothing is read back. The host waits for the GPU only
where the interface of a backend gives it numbers: in ``grad_norm2`` (``max_grad_norm``, ``nonfinite``), ``accumulate``
(``track_parts("microbatch")``) and ``ratios`` (``trust_ratios()``), and once for step counts that are kept on the GPU; for
the same reason a trust ratio that cannot be formed is 1 without a warning. The coefficients are the host's, so a step
cannot be captured in a CUDA graph, and refuses to be.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ...rule import Rule
from .. import reference
from ..interface import ParamEntry, PartNorms, Standard, StepArgs, StepKey
from ..pointers import unreachable

try:
    import triton  # noqa: F401

    from . import kernel, rules, table  # noqa: F401
    from .table import INTERPRETED, TYPES, Table, arithmetic, launch

    _reason = None
except ImportError as error:
    _reason = f"Triton is not installed ({error}); the torch wheels for GPUs bring it, or pip install triton"
    INTERPRETED = False

DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)  # torch calls AMD's GPUs so, too
REUSABLE = True


def unavailable() -> str | None:
    """Why Triton cannot run here, or None."""
    if _reason is None and not INTERPRETED and not torch.cuda.is_available():
        return "torch finds no GPU (for tests, TRITON_INTERPRET=1 in the environment has Triton interpret on the CPU)"
    return _reason


def _strides(tensor: Tensor) -> list[tuple[int, int]]:
    """Stride and size of the dimensions whose stride matters."""
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1 and tensor.numel()]


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one contiguous range of memory, in any order."""
    expected = 1
    for stride, size in sorted(_strides(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


@lru_cache
def _unsupported_rule(rule: Rule) -> str | None:
    function = getattr(rules, rule.name, None)
    if function is None:
        return f"no rule {rule.name!r} in fused_opt/backends/triton/rules.py"
    returned: Any = ast.parse(textwrap.dedent(inspect.getsource(function.fn))).body[0]
    states = len(returned.body[-1].value.elts) - 1
    coefficients = len(function.arg_names) - 1 - states
    if (states, coefficients) != (len(rule.states), rule.coefficient_count) or coefficients > kernel.MOST_COEFFICIENTS:
        raise RuntimeError(
            f"rule {rule.name!r} has {len(rule.states)} states and {rule.coefficient_count} coefficients in Python; in "
            f"Triton it has {states} states and {coefficients} coefficients, of which {kernel.MOST_COEFFICIENTS} are the most"
        )
    return None


def unsupported(
    rule: Rule | None, tensors: Sequence[Tensor], noisy: bool = False, sharded: bool = False, coded: bool = False
) -> str | None:
    """Why a parameter, its gradient or its states cannot be stepped here, or None."""
    if reason := unavailable():
        return reason
    if rule is not None and (reason := _unsupported_rule(rule)):
        return reason
    if sharded:
        return "a shard of a DTensor; it adds up no norms over processes (the native backend does, if built with nvcc)"
    for tensor in tensors:
        if reason := unreachable(tensor, DEVICES, coded):
            return reason
        if _strides(tensor) != _strides(tensors[0]):
            return f"strides {tensor.stride()} beside {tensors[0].stride()}; it steps tensors that lie alike in memory"
    if not _dense(tensors[0]):
        return f"a tensor with gaps (strides {tensors[0].stride()}); it steps those that fill one stretch of memory"
    if noisy and not tensors[0].is_contiguous():
        return (
            f"noise or rounding at random with strides {tensors[0].stride()}; it counts the elements of contiguous ones"
        )
    return None


def steps_on_device(p: Tensor) -> bool:
    """No: the host computes the coefficients."""
    return False


def standard(p: Tensor) -> Standard | None:
    """The reference on the CPU."""
    return Standard(reference.bucket, exact=False, compiles=True)


def accumulate(total: Tensor | None, part: Tensor) -> tuple[float, float]:
    """``total += part`` in one pass with the sums of squares of both."""
    size = kernel.chunk_size(part.numel())
    chunks = max(1, -(-part.numel() // size))
    sums = torch.empty(2, chunks, dtype=torch.float64, device=part.device)
    launch(
        kernel.accumulate, part.device, chunks, sums, 0 if total is None else total.data_ptr(), part.data_ptr(), part.numel(),
        size, None if total is None else TYPES[total.dtype], TYPES[part.dtype],
        arithmetic(part.dtype if total is None else torch.promote_types(total.dtype, part.dtype)),
    )  # fmt: skip
    part2, total2 = sums.sum(dim=1).tolist()
    if total is None:
        return part2, part2
    torch.autograd.graph.increment_version(total)
    return part2, total2


class Bucket:
    """The parameters in tables, one for each device and combination of dtypes."""

    device = None

    def __init__(
        self,
        rule: Rule,
        members: Sequence[ParamEntry],
        param_groups: list[dict[str, Any]],
        state: Mapping[Tensor, Any],
    ) -> None:
        _refuse_capture(members)
        self.members = members
        self.seen = [*_everything(param_groups, state)]
        self.idle = [m.tensor for m in members if m.tensor.grad is None]
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, m in enumerate(members):
            if m.tensor.grad is not None:
                operands = (m.tensor, m.tensor.grad, *(m.states or ()))
                average, exact = (None if kept is None else kept.dtype for kept in (m.average, m.exact))
                counted = None if m.step is None else m.step.device
                key = (m.tensor.device, average, exact, counted, *(tensor.dtype for tensor in operands))
                alike.setdefault(key, []).append(place)
        self.tables = [Table(rule, [members[place] for place in places], places) for places in alike.values()]

    def collect_gradients(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]
    ) -> list[StepKey] | None:
        """Find this step's gradients: the keys that ``run`` needs arguments for, or None: plan anew."""
        _refuse_capture(self.members)
        if not all(map(is_, _everything(param_groups, state), self.seen)):
            return None
        if any(p.grad is not None for p in self.idle):
            return None
        keys: dict[StepKey, int] = {}
        return list(keys) if all(table.collect_gradients(keys) for table in self.tables) else None

    def set_part_norms(self, norms: Sequence[PartNorms | None]) -> None:
        """For every member the sum of its gradient's parts' norms and the gradient's sum of squares, where known."""
        for table in self.tables:
            table.set_part_norms([norms[place] for place in table.places])

    def grad_norm2(self) -> float:
        """Sum of squares of all gradients, as they lie in memory."""
        return sum(table.grad_norm2() for table in self.tables)

    def run(self, args: Sequence[StepArgs]) -> None:
        """Step every parameter that has a gradient."""
        for table in self.tables:
            table.run(args)

    def written_states(self) -> list[Tensor]:
        """What ``run`` has written besides the parameters, and autograd has not seen."""
        return [state for table in self.tables for state in table.written_states()]

    def ratios(self) -> list[float]:
        """The trust ratio of every member in the last step; NaN where it was not stepped."""
        ratios = [math.nan] * len(self.members)
        for table in self.tables:
            for place, ratio, stepped in zip(table.places, table.ratios.tolist(), table.stepped):
                ratios[place] = ratio if stepped else math.nan
        return ratios


def bucket(
    rule: Rule,
    members: Sequence[ParamEntry],
    param_groups: list[dict[str, Any]],
    state: Mapping[Tensor, Any],
) -> Bucket:
    """The parameters in tables."""
    return Bucket(rule, members, param_groups, state)


def _refuse_capture(members: Sequence[ParamEntry]) -> None:
    if members[0].tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend 'triton' was asked for a step while a CUDA graph is captured, and its coefficients are the host's: "
            "every replay would repeat this step's. Step outside of the graph, or take backend='native'"
        )


def _everything(param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> Iterator[Any]:
    """Every object whose replacement makes a plan stale, and an end that only as many objects have in their place."""
    groups = chain.from_iterable((group, *group["params"]) for group in param_groups)
    return chain(groups, state, chain.from_iterable(map(dict.values, state.values())), (Ellipsis,))
