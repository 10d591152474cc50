"""The native backend: csrc/ through pybind11 and DLPack, one call a step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..plan import Member, Row, Signals, warn_not_finite
from ..rule import Rule
from . import reference

try:
    from . import _native  # type: ignore[attr-defined]

    _native.connect(torch.Tensor)
    _reason = None
except ImportError as error:
    _reason = f"its compiled core is not installed ({error}); reinstall where a C++ compiler is found"
except AttributeError:
    _reason = f"torch {torch.__version__} has no DLPack C exchange API; torch 2.10 or newer has"

DEVICES = ("cpu", "cuda")
IN_ITS_PLACE = "gpu"  # FUSED_OPT_CPU for tests: what is on the CPU goes through the kernels for GPUs, run by the host
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Only these two reach a raw pointer: what a subclass's data pointer means is its own business (DTensor, FakeTensor).
PLAIN = (Tensor, torch.nn.Parameter)


def unavailable() -> str | None:
    """Why the compiled core cannot run here, or None."""
    wanted = os.environ.get("FUSED_OPT_CPU")
    if _reason is None and wanted not in (None, IN_ITS_PLACE, *(sets := _native.instruction_sets())):
        return f"this processor does not run FUSED_OPT_CPU={wanted!r}; it runs {', '.join(map(repr, sets))}"
    return _reason


@lru_cache
def gpu_unavailable(number: int = -1) -> str | None:
    """Why the GPU of that number cannot be used, or any for -1, or None."""
    return _reason or _native.unavailable(number) or None


def _number(tensor: Tensor) -> int | None:
    """Of the GPU that steps a tensor; -1: the host in its place; None: the CPU's own kernels do."""
    if tensor.is_cuda:
        return tensor.device.index
    # Asked for every part of a gradient: `in` is a third of what `get` costs where there is nothing to get.
    return -1 if "FUSED_OPT_CPU" in os.environ and os.environ["FUSED_OPT_CPU"] == IN_ITS_PLACE else None


def counts_there(p: Tensor) -> bool:
    """Whether the steps of a parameter are counted on its device, in float32, as torch.optim's fused ones are."""
    return _number(p) is not None


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
            if not tensor.is_cuda:
                return f"a tensor on {tensor.device}; it steps those on {' and '.join(DEVICES)}"
            if reason := gpu_unavailable(tensor.device.index):
                return f"a tensor on {tensor.device}, and {reason}"
        if tensor.dtype not in DTYPES:
            return f"a {tensor.dtype} tensor; it steps {', '.join(str(dtype) for dtype in DTYPES)}"
        if tensor.is_neg():
            return "a tensor with a lazy negation"
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return (
            "a CUDA graph is being captured, and the tables of these tensors would have to be made in it; step once with "
            "gradients like these before the capture"
        )
    return None


def accumulate(total: Tensor | None, part: Tensor) -> tuple[float, float]:
    """``total += part`` in one pass with the sums of squares of both; on a GPU it is waited for."""
    number = _number(part)
    if number is None:
        sums = _native.accumulate(total, part, torch.get_num_threads())
    else:
        scratch = torch.zeros(_native.scratch_words(part.numel()), dtype=torch.float64, device=part.device)
        with _current(part.device):
            if not _native.accumulate_there(number, total, part, scratch):  # they do not lie alike in memory
                return reference.accumulate(total, part)
        sums = tuple(scratch[:2].tolist())
    if total is not None:
        torch.autograd.graph.increment_version(total)
    return sums


def _current(device: torch.device) -> Any:
    """Within the block a GPU is torch's current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Bucket:
    """Parameters that torch's threads step, as a plan in C++; those on a GPU make a :class:`GPUBucket`."""

    def __new__(cls, rule: Rule, members: Sequence[Member], *rest: Any) -> Bucket:
        """Of the kind that the parameters, all on one device, need."""
        return super().__new__(cls if _number(members[0].tensor) is None else GPUBucket)

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
        self.core = self._plan(rule.name, rows, param_groups, state, noisy)
        # The gradient's edge refers to the parameter from C++, which makes looking at the parameter three times cheaper
        # (see Held in view.h) and, unlike other references, is one that torch.utils.swap_tensors allows.
        self.edges = [torch.autograd.graph.get_gradient_edge(m.tensor) for m in members if m.tensor.requires_grad]
        self.gather = self.core.gather
        self.know = self.core.know
        self.know_norms = self.core.know_norms

    def _plan(self, rule: str, *rest: Any) -> Any:
        return _native.Plan(rule, os.environ.get("FUSED_OPT_CPU"), *rest)

    def grad_norm2(self) -> float:
        """Sum of squares of all gradients, as they lie in memory."""
        return self.core.grad_norm2(torch.get_num_threads())

    def norms(self, rows: Sequence[Row], gradients: bool, directions: bool) -> list[tuple[float, float, float]]:
        """Squared norms of weights, gradient and direction by member, as far as a step with these rows wants them."""
        return self.core.norms(rows, gradients, directions, torch.get_num_threads())

    def run(self, rows: Sequence[Row]) -> None:
        """Step every parameter that has a gradient, on torch's threads."""
        # Raw pointers tell autograd nothing; without this a backward through the old weights would pass unnoticed.
        torch.autograd.graph.increment_version(self.core.touched())
        for index in self.core.run(rows, torch.get_num_threads()):
            warn_not_finite(self.members[index])

    def ratios(self) -> list[float]:
        """The trust ratio of every member in the last step."""
        return self.core.ratios()


class GPUBucket(Bucket):
    """Parameters on one GPU, all of them float64 or none.

    A step is queued on torch's current stream and never waited for, except where the host is asked for a number:
    ``grad_norm2``, ``ratios``, and making the plan. For the same reason nobody warns of a ratio that cannot be formed.
    """

    def __init__(self, rule: Rule, members: Sequence[Member], *rest: Any) -> None:
        self.device = members[0].tensor.device
        self.signals = Signals()
        super().__init__(rule, members, *rest)

    def _plan(self, rule: str, *rest: Any) -> Any:
        number = _number(torch.empty(0, device=self.device))
        with _current(self.device):
            try:
                return _native.DevicePlan(rule, number, *rest)
            except MemoryError:  # torch keeps what it has freed
                torch.cuda.empty_cache()
                return _native.DevicePlan(rule, number, *rest)

    def sum_gradients(self, norm2: Tensor, add: bool) -> None:
        """Put the sum of squares of all gradients into ``norm2``, or add it to what is there, without waiting for it."""
        with _current(self.device):
            self.core.sum_gradients(norm2.data_ptr(), add)

    def grad_norm2(self) -> float:
        """Sum of squares of all gradients, as they lie in memory."""
        with _current(self.device):
            return self.core.grad_norm2()

    def run(self, rows: Sequence[Row]) -> None:
        """Queue the step of every parameter that has a gradient."""
        found_inf, grad_scale, norm2, max_norm = self.signals
        scalars = [
            None if scalar is None else scalar.to(self.device, torch.float32, non_blocking=True)
            for scalar in (found_inf, grad_scale)
        ]
        addresses = [0 if scalar is None else scalar.data_ptr() for scalar in (*scalars, norm2)]
        with _current(self.device):
            torch.autograd.graph.increment_version(self.core.touched())
            self.core.run(rows, *addresses, max_norm)

    def ratios(self) -> list[float]:
        """The trust ratio of every member in the last step."""
        with _current(self.device):
            return self.core.ratios()


def instruction_set() -> str:
    """The instruction set that steps on this CPU use: FUSED_OPT_CPU if set, else the widest that the processor has."""
    return os.environ.get("FUSED_OPT_CPU") or _native.instruction_sets()[0]
