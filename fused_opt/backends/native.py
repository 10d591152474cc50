"""The native backend: csrc/ through pybind11 and DLPack, one call a step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import Member, Row, warn_not_finite
from ..rule import Rule

try:
    from . import _native  # type: ignore[attr-defined]

    _native.connect(torch.Tensor)
    _reason = None
except ImportError as error:
    _reason = f"its compiled core is not installed ({error}); reinstall where a C++ compiler is found"
except AttributeError:
    _reason = f"torch {torch.__version__} has no DLPack C exchange API; torch 2.10 or newer has"

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Only these two reach a raw pointer: what a subclass's data pointer means is its own business (DTensor, FakeTensor).
PLAIN = (Tensor, torch.nn.Parameter)


def unavailable() -> str | None:
    """Why the compiled core cannot run here, or None."""
    wanted = os.environ.get("FUSED_OPT_CPU")
    if _reason is None and wanted is not None and wanted not in (sets := _native.instruction_sets()):
        return f"this processor does not run FUSED_OPT_CPU={wanted!r}; it runs {', '.join(map(repr, sets))}"
    return _reason


def unsupported(rule: Rule | None, tensors: Sequence[Tensor], noisy: bool = False) -> str | None:
    """Why a parameter, its gradient or its states cannot be stepped here, or None."""
    if _reason:
        return _reason
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return f"{type(tensor).__name__} is a tensor subclass; it steps torch.Tensor and torch.nn.Parameter"
        if tensor.layout != torch.strided:
            return f"a {tensor.layout} tensor; it steps strided ones"
        if not tensor.is_cpu:
            return f"a tensor on {tensor.device}; it was built for the CPU"
        if tensor.dtype not in DTYPES:
            return f"a {tensor.dtype} tensor; it steps {', '.join(str(dtype) for dtype in DTYPES)}"
        if tensor.is_neg():
            return "a tensor with a lazy negation"
    return None


def accumulate(total: Tensor | None, part: Tensor) -> tuple[float, float]:
    """``total += part`` in one pass with the sums of squares of both."""
    sums = _native.accumulate(total, part, torch.get_num_threads())
    if total is not None:
        torch.autograd.graph.increment_version(total)
    return sums


class Bucket:
    """The parameters as a plan in C++."""

    def __init__(
        self,
        rule: Rule,
        members: Sequence[Member],
        param_groups: list[dict[str, Any]],
        state: Mapping[Tensor, Any],
        noisy: bool,
    ) -> None:
        self.members = members
        rows = [
            (
                *(m.tensor, m.tensor.grad, m.group, m.fresh, m.states, m.step, m.average),
                *(m.index, m.lr_scale, m.decay_scale, m.place),
            )
            for m in members
        ]
        self.core = _native.Plan(rule.name, os.environ.get("FUSED_OPT_CPU"), rows, param_groups, state, noisy)
        # The gradient's edge refers to the parameter from C++, which makes looking at the parameter three times cheaper
        # (see Held in bindings.cpp) and, unlike other references, is one that torch.utils.swap_tensors allows.
        self.edges = [torch.autograd.graph.get_gradient_edge(m.tensor) for m in members if m.tensor.requires_grad]
        self.gather = self.core.gather
        self.know = self.core.know
        self.know_norms = self.core.know_norms
        self.ratios = self.core.ratios

    def grad_norm2(self) -> float:
        """Sum of squares of all gradients, as they lie in memory."""
        return self.core.grad_norm2(torch.get_num_threads())

    def norms(self, rows: Sequence[Row], gradients: bool, directions: bool) -> list[tuple[float, float, float]]:
        """Squared norms of weights, gradient and direction by member, as far as a step with these rows wants them."""
        return self.core.norms(rows, gradients, directions, torch.get_num_threads())

    def run(self, rows: Sequence[Row]) -> None:
        """Step every parameter that has a gradient, on torch's threads."""
        for index in self.core.run(rows, torch.get_num_threads()):
            warn_not_finite(self.members[index])
        # Raw pointers tell autograd nothing; without this a backward through the old weights would pass unnoticed.
        torch.autograd.graph.increment_version(self.core.touched())


def instruction_set() -> str:
    """The instruction set that steps on this CPU use: FUSED_OPT_CPU if set, else the widest that the processor has."""
    return os.environ.get("FUSED_OPT_CPU") or _native.instruction_sets()[0]
