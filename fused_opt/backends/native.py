"""The native backend: csrc/ through pybind11 and DLPack, one call a step."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, get_num_threads
from torch.autograd.graph import increment_version

from ..rule import Rule
from . import interface, reference
from .interface import DeviceScalars, ParamEntry, PartNorms, Standard, StepArgs, StepKey, norms_table
from .pointers import unreachable

try:
    from . import _native  # type: ignore[attr-defined]

    _native.connect(torch.Tensor, interface)
    _reason = None
except ImportError as error:
    _reason = f"its compiled core is not installed ({error}); reinstall where a C++ compiler is found"
except AttributeError:
    _reason = f"torch {torch.__version__} has no DLPack C exchange API; torch 2.10 or newer has"

DEVICES = ("cpu", "cuda")
REUSABLE = True
#: For tests: tensors on the CPU are stepped by the source of the GPU kernels, run by the host.
EMULATE_GPU = os.environ.get("FUSED_OPT_EMULATE_GPU") == "1"
#: The instruction set of the CPU's kernels; None: the widest that the processor has.
INSTRUCTION_SET = os.environ.get("FUSED_OPT_CPU")
_HOST = -1  # in place of a GPU's number


def unavailable() -> str | None:
    """Why the compiled core cannot run here, or None."""
    if _reason is None and INSTRUCTION_SET not in (None, *(sets := _native.instruction_sets())):
        return f"this processor does not run FUSED_OPT_CPU={INSTRUCTION_SET!r}; it runs {', '.join(map(repr, sets))}"
    return _reason


def looks(parameters: Sequence[Tensor], others: Sequence[Tensor]) -> Any:
    """For another backend, what looks at its tensors: ``Looks`` in csrc/python/looks.h; None without a compiled core."""
    return None if unavailable() else _native.Looks(parameters, others)


def seen(param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> Any:
    """Likewise, what tells whether groups and states hold the same objects: ``Seen`` there."""
    return None if unavailable() else _native.Seen(param_groups, state)


def watch(left_out: set[str]) -> Any:
    """What tells whether groups still say the same: ``Watch`` in csrc/python/looks.h; None without a compiled core."""
    return None if unavailable() else _native.Watch(left_out)


@lru_cache
def gpu_unavailable(number: int = -1) -> str | None:
    """Why the GPU of that number cannot be used, or any for -1, or None."""
    # Asked about a GPU, the core makes it the current one. It is torch that goes back to the one before, since it starts no
    # context where this process has none, which would take some hundred MB of that GPU's memory.
    with nullcontext() if number < 0 else _current(torch.device("cuda", number)):
        return _reason or _native.unavailable(number) or None


def _device_number(tensor: Tensor) -> int | None:
    """The number of the GPU that steps a tensor, or _HOST for the emulated one; None: the CPU's own kernels do."""
    if tensor.is_cuda:
        return tensor.device.index
    return _HOST if EMULATE_GPU else None


def steps_on_device(p: Tensor) -> bool:
    """Whether the steps of a parameter are counted on its device, in float32, as torch.optim's fused ones are."""
    return _device_number(p) is not None


def _baseline(rule: Rule, members: Sequence[ParamEntry], groups: list[dict[str, Any]], state: Any) -> CPUBucket:
    return CPUBucket(_native.CPUBucket(rule, members, groups, state, "baseline"), members)


def standard(p: Tensor) -> Standard | None:
    """The kernels that every CPU runs, where the kernels for GPUs step."""
    return Standard(_baseline, exact=True, compiles=False) if steps_on_device(p) else None


@lru_cache
def _unsupported_rule(rule: Rule) -> str | None:
    if rule.name not in _native.rules():
        return f"no rule {rule.name!r} in csrc/rules.h"
    _native.check_rule(rule)
    return None


def unsupported(
    rule: Rule | None, tensors: Sequence[Tensor], noisy: bool = False, sharded: bool = False, coded: bool = False
) -> str | None:
    """Why a parameter, its gradient or its states cannot be stepped here, or None."""
    if _reason:
        return _reason
    if rule is not None and (reason := _unsupported_rule(rule)):
        return reason
    if coded and steps_on_device(tensors[0]):
        return (
            "states in 8 bits: a scale is of 128 elements, which many threads have in their registers, and its kernels for "
            "GPUs exchange nothing between load and store (Triton's do)"
        )
    for tensor in tensors:
        if reason := unreachable(tensor, DEVICES, coded):
            return reason
        if tensor.is_cuda and (reason := gpu_unavailable(tensor.device.index)):
            return f"a tensor on {tensor.device}, and {reason}"
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return (
            "a CUDA graph is being captured, and the tables of these tensors would have to be made in it; step once with "
            "gradients like these before the capture"
        )
    return None


def accumulate(total: Tensor | None, part: Tensor) -> tuple[float, float]:
    """``total += part`` in one pass with the sums of squares of both; on a GPU it is waited for."""
    number = _device_number(part)
    if number is None:
        sums = _native.accumulate(total, part, get_num_threads(), INSTRUCTION_SET)
    else:
        scratch = torch.zeros(_native.scratch_words(part.numel()), dtype=torch.float64, device=part.device)
        with _current(part.device):
            if not _native.accumulate_on_device(number, total, part, scratch):  # they do not lie alike in memory
                return reference.accumulate(total, part)
        sums = tuple(scratch[:2].tolist())
    if total is not None:
        increment_version(total)
    return sums


def _current(device: torch.device) -> Any:
    """Within the block a GPU is torch's current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Bucket:
    """What is the same on every device.

    Args:
        core: the bucket in C++.
        members: its parameters.
    """

    def __init__(self, core: Any, members: Sequence[ParamEntry]) -> None:
        self.core = core
        self.members = members

    def collect_gradients(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any] | None
    ) -> list[StepKey] | None:
        """Find this step's gradients: the keys that ``run`` needs arguments for, or None: plan anew.

        ``state``: None: no one else has had any of it since the bucket was made, and it is not looked at.
        """
        return self.core.collect_gradients(param_groups, state)

    def set_part_norms(self, norms: Sequence[PartNorms | None]) -> None:
        """For every member the sum of its gradient's parts' norms and the gradient's sum of squares, where known."""
        self.core.set_part_norms(norms)

    def written_states(self) -> list[Tensor]:
        """What ``run`` has written besides the parameters, and autograd has not seen."""
        return self.core.written_states()


class CPUBucket(_Bucket):
    """Parameters that torch's threads step."""

    device = None

    def grad_norm2(self) -> float:
        """Sum of squares of all gradients, as they lie in memory."""
        return self.core.grad_norm2(get_num_threads())

    def norms(
        self, args: Sequence[StepArgs], gradients: bool, directions: bool, scalars: DeviceScalars | None = None
    ) -> Tensor:
        """Squared norms of weights, gradient and direction by member, as far as a step with these arguments needs them."""
        return norms_table(self.core.norms(args, gradients, directions, get_num_threads()))

    def set_norms(self, norms: Tensor) -> None:
        """What the norms of the whole tensors are, where the members are shards of them."""
        self.core.set_norms(norms.tolist())

    def run(self, args: Sequence[StepArgs]) -> None:
        """Step every parameter that has a gradient, on torch's threads."""
        # Autograd sees no writes through pointers; uncounted, a backward through the old weights would not be detected.
        for index in self.core.run(args, get_num_threads(), increment_version):
            self.members[index].warn_not_finite()

    def ratios(self) -> list[float]:
        """The trust ratio of every member in the last step; NaN where it was not stepped."""
        return self.core.ratios()


class GPUBucket(_Bucket):
    """Parameters on one GPU, all of them float64 or none.

    A step is queued on torch's current stream and never waited for, except where the host is asked for a number:
    ``grad_norm2``, ``ratios``, and making the plan. For the same reason a ratio that cannot be formed gives no warning.
    """

    device: torch.device

    def __init__(self, core: Any, members: Sequence[ParamEntry]) -> None:
        super().__init__(core, members)
        self.device = members[0].tensor.device
        self._norms: Tensor | None = None  # of the shards, by member; the kernels keep those of the weights in it
        self._whole: Tensor | None = None  # those of the whole tensors in the coming step
        if any(m.shard is not None for m in members):
            self._norms = torch.zeros(len(members), 3, dtype=torch.float64, device=self.device)
            core.keep_norms(self._norms.data_ptr())

    def collect_gradients(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any] | None
    ) -> list[StepKey] | None:
        """As of every bucket; the norms of whole tensors are those of the step before."""
        self._whole = None
        return self.core.collect_gradients(param_groups, state)

    def set_part_norms(self, norms: Sequence[PartNorms | None]) -> None:
        """For every member the sum of its gradient's parts' norms and the gradient's sum of squares, where known."""
        if self._norms is not None:  # the gradient's, too, is summed there, and then over processes
            norms = [None if known is None else PartNorms(known.sum_of_norms) for known in norms]
        super().set_part_norms(norms)

    def norms(
        self, args: Sequence[StepArgs], gradients: bool, directions: bool, scalars: DeviceScalars | None = None
    ) -> Tensor:
        """Squared norms by member, as far as a step with these arguments needs them, in a new tensor on the device."""
        assert self._norms is not None
        if self._norms.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step of DTensors whose norms are added up over processes was asked for while a CUDA graph is captured, "
                "and a graph would refer to sums that are new in every step. Step outside of the graph"
            )
        with _current(self.device):
            if self._whole is None:
                self._norms[:, 1:] = 0  # nothing of the step before; what the weights' are is still so
            self.core.sum_norms(args, self._on_device(scalars), gradients, directions)
            if self._whole is None:
                return self._norms.clone()
            return torch.cat([self._whole[:, :2], self._norms[:, 2:]], dim=1)

    def set_norms(self, norms: Tensor) -> None:
        """What the norms of the whole tensors are, where the members are shards of them; the kernels read them there."""
        self._whole = norms.to(self.device).contiguous()

    def __del__(self) -> None:
        # The core frees memory of that GPU, on whichever thread this is; on one that has used no GPU yet CUDA would start a
        # context on the first, which takes some hundred MB there.
        if not sys.is_finalizing():
            with _current(self.device):
                del self.core

    def sum_gradients(self, norm2: Tensor, add: bool) -> None:
        """Put the sum of squares of all gradients into ``norm2``, or add it to what is there, without waiting for it."""
        with _current(self.device):
            if self._whole is None:
                self.core.sum_gradients(norm2.data_ptr(), add)
            else:
                norm2.copy_(self._whole[:, 1].sum() + norm2 if add else self._whole[:, 1].sum())

    def grad_norm2(self) -> float:
        """Sum of squares of all gradients, as they lie in memory."""
        with _current(self.device):
            return self.core.grad_norm2() if self._whole is None else float(self._whole[:, 1].sum())

    def _on_device(self, scalars: DeviceScalars | None) -> tuple[int, int, int, float]:
        """The addresses of a step's scalars on this device, 0 for those that there are not, and the norm to clip to."""
        self._scalars = (scalars or DeviceScalars()).on(self.device)  # kept until the next step's
        return self._scalars.addresses()

    def run(self, args: Sequence[StepArgs], scalars: DeviceScalars | None = None) -> None:
        """Queue the step of every parameter that has a gradient."""
        with _current(self.device):
            known = 0 if self._whole is None else self._whole.data_ptr()
            self.core.run(args, self._on_device(scalars), known, increment_version)

    def capturing(self) -> bool:
        """Whether a step would go into a CUDA graph now."""
        return self.core.capturing()

    def counts(self) -> list[tuple[int, int, int, int]]:
        """Of every group in captured steps: its number, steps replayed since the last call, samples, periods; waits."""
        with _current(self.device):
            return self.core.counts()

    def ratios(self) -> list[float]:
        """The trust ratio of every member in the last step; NaN where it was not stepped."""
        with _current(self.device):
            return self.core.ratios()


def bucket(
    rule: Rule,
    members: Sequence[ParamEntry],
    param_groups: list[dict[str, Any]],
    state: Mapping[Tensor, Any],
) -> CPUBucket | GPUBucket:
    """A bucket in C++ for parameters that are all on the CPU or all on one GPU."""
    number, device = _device_number(members[0].tensor), members[0].tensor.device
    if number is None:
        return CPUBucket(_native.CPUBucket(rule, members, param_groups, state, INSTRUCTION_SET), members)
    with _current(device):
        try:
            core = _native.DeviceBucket(rule, members, param_groups, state, number)
        except MemoryError:  # torch keeps what it has freed
            torch.cuda.empty_cache()
            core = _native.DeviceBucket(rule, members, param_groups, state, number)
    return GPUBucket(core, members)


def instruction_set() -> str:
    """The instruction set that steps on this CPU use: FUSED_OPT_CPU if set, else the widest that the processor has."""
    return INSTRUCTION_SET or _native.instruction_sets()[0]
