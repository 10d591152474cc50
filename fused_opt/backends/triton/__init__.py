"""The Triton backend: the same step on a GPU where no compiler is installed, NVIDIA's or another's.

One launch steps all parameters of the same dtypes; two do where norms of gradients, directions or unknown weights must
come first. The launches read tables in device memory; what is new in a step (the gradients' addresses, a rate) goes there in
one small copy from pinned memory, and nothing is read back. Counts of steps are on the device, and so is what they decide, so
that a step can be captured in a CUDA graph. The host waits for the GPU only where the interface gives it numbers: in
``grad_norm2`` (``nonfinite``), ``accumulate`` (``track_parts("microbatch")``), ``ratios`` (``trust_ratios()``) and
``counts`` (of replays); for the same reason a trust ratio that cannot be formed is 1 without a warning.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...rule import Rule
from .. import native, reference
from ..interface import DeviceScalars, ParamEntry, PartNorms, Standard, StepArgs, StepKey, is_known
from ..pointers import unreachable

try:
    import triton  # noqa: F401

    from . import arguments, columns, device, kernel, looks, noise, rules, table  # noqa: F401
    from .table import INTERPRETED, TYPES, Scalars, Table, arithmetic

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
    coefficients, most = len(function.arg_names) - 1 - states, columns.MOST_COEFFICIENTS
    if (states, coefficients) != (len(rule.states), rule.coefficient_count) or coefficients > most:
        raise RuntimeError(
            f"rule {rule.name!r} has {len(rule.states)} states and {rule.coefficient_count} coefficients in Python; in "
            f"Triton it has {states} states and {coefficients} coefficients, of which {most} are the most"
        )
    if rule.counts_steps and rule.at_step is not Rule.at_step and table.at_step(rule) is None:
        raise RuntimeError(
            f"rule {rule.name!r} has coefficients that change from step to step, and there is no {rule.name}_at_step in "
            f"fused_opt/backends/triton/rules.py"
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
    for tensor in tensors:
        if reason := unreachable(tensor, DEVICES, coded):
            return reason
        if _strides(tensor) != _strides(tensors[0]):
            return f"strides {tensor.stride()} beside {tensors[0].stride()}; it steps tensors that lie alike in memory"
    if not _dense(tensors[0]):
        return f"a tensor with gaps (strides {tensors[0].stride()}); it steps those that fill one stretch of memory"
    if device.capturing(tensors[0].device):
        return (
            "a CUDA graph is being captured, and the tables of these tensors would have to be made in it; step once with "
            "gradients like these before the capture"
        )
    return None


def steps_on_device(p: Tensor) -> bool:
    """Its steps are counted on its device, in float32, as torch.optim's fused ones are."""
    return True


def standard(p: Tensor) -> Standard | None:
    """The reference on the CPU."""
    return Standard(reference.bucket, exact=False, compiles=True)


def accumulate(total: Tensor | None, part: Tensor) -> tuple[float, float]:
    """``total += part`` in one pass with the sums of squares of both."""
    size = kernel.chunk_size(part.numel())
    chunks = max(1, -(-part.numel() // size))
    sums = torch.empty(2, chunks, dtype=torch.float64, device=part.device)
    device.launch(
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
    """The parameters on one device in tables, one for each combination of dtypes."""

    def __init__(
        self,
        rule: Rule,
        members: Sequence[ParamEntry],
        param_groups: list[dict[str, Any]],
        state: Mapping[Tensor, Any],
    ) -> None:
        self.members = members
        self.device = members[0].tensor.device
        self.seen = native.seen(param_groups, state) or looks.Seen(param_groups, state)
        self.idle = [m.tensor for m in members if m.tensor.grad is None]
        self.spread = any(m.shard is not None for m in members)
        self.groups = list(dict.fromkeys(m.group for m in members))
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, m in enumerate(members):
            if m.tensor.grad is not None:
                operands = (m.tensor, m.tensor.grad, *(m.states or ()))
                average, exact = (None if kept is None else kept.dtype for kept in (m.average, m.exact))
                alike.setdefault((average, exact, *(tensor.dtype for tensor in operands)), []).append(place)
        self.tables = [
            Table(rule, [members[place] for place in places], places, len(self.groups)) for places in alike.values()
        ]
        self.rates = torch.zeros(4 * len(self.groups), dtype=torch.float64, device=self.device)  # and decays, by row
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)
        # Of groups, by slot: steps as the device has them after what the host has queued; what samples and periods may be.
        self.known: dict[int, tuple[int, set[tuple[int, int]]]] = {}
        self.whole: Tensor | None = None  # the norms of the whole tensors in the coming step
        self.scalars = DeviceScalars()  # kept until the next step's
        # What a step was told last, and how it is sent; None: it may be another number next time.
        self.told: tuple[Sequence[StepArgs] | None, list[arguments.Row]] = None, []

    def collect_gradients(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any] | None
    ) -> list[StepKey] | None:
        """Find this step's gradients: the keys that ``run`` needs arguments for, or None: plan anew.

        ``state``: None: no one else has had any of it since the bucket was made, and it is not looked at.
        """
        self.whole = None
        if not self.seen.unchanged(param_groups, state):
            return None
        if any(p.grad is not None for p in self.idle):
            return None
        keys: dict[StepKey, int] = {}
        found = all([table.collect_gradients(keys, state is not None) for table in self.tables])  # noqa: C419  # of few
        self.of_rows = [key[0] for key in keys]
        return list(keys) if found else None

    def set_part_norms(self, norms: Sequence[PartNorms | None]) -> None:
        """For every member the sum of its gradient's parts' norms and the gradient's sum of squares, where known."""
        if self.spread:  # the gradient's, too, is summed there, and then over processes
            norms = [None if known is None else PartNorms(known.sum_of_norms) for known in norms]
        for table in self.tables:
            table.set_part_norms([norms[place] for place in table.places])

    def norms(
        self, args: Sequence[StepArgs], gradients: bool, directions: bool, scalars: DeviceScalars | None = None
    ) -> Tensor:
        """Squared norms by member, as far as a step with these arguments needs them, in a new tensor on the device."""
        if self.capturing():
            raise RuntimeError(
                "a step of DTensors whose norms are added up over processes was asked for while a CUDA graph is captured, "
                "and a graph would refer to sums that are new in every step. Step outside of the graph"
            )
        found = torch.zeros(len(self.members), 3, dtype=torch.float64, device=self.device)
        rows, on_device = self._rows(args), self._on_device(scalars)
        for table in self.tables:
            table.norms(rows, on_device, gradients, directions, found)
        return found if self.whole is None else torch.cat([self.whole[:, :2], found[:, 2:]], dim=1)

    def set_norms(self, norms: Tensor) -> None:
        """What the norms of the whole tensors are, where the members are shards of them; the kernels read them there."""
        self.whole = norms.to(self.device).contiguous()

    def sum_gradients(self, norm2: Tensor, add: bool) -> None:
        """Put the sum of squares of all gradients into ``norm2``, or add it to what is there, without waiting for it."""
        if self.whole is not None:
            norm2.copy_(self.whole[:, 1].sum() + norm2 if add else self.whole[:, 1].sum())
            return
        for table in self.tables:
            table.sum_gradients(norm2, add)
            add = True
        if not add:
            norm2.zero_()

    def grad_norm2(self) -> float:
        """Sum of squares of all gradients, as they lie in memory."""
        if self.capturing():
            raise RuntimeError(
                "a step that is captured in a CUDA graph cannot wait for the GPU, as nonfinite='skip' and 'raise' must. Take "
                "such steps outside of the graph"
            )
        self.sum_gradients(self.total, False)
        return self.total.item()

    def _on_device(self, scalars: DeviceScalars | None) -> Scalars:
        """Where a step's scalars are on this device."""
        self.scalars = (scalars or DeviceScalars()).on(self.device)
        return Scalars(*self.scalars.addresses(), 0 if self.whole is None else self.whole.data_ptr())

    def _rows(self, args: Sequence[StepArgs]) -> list[arguments.Row]:
        """The arguments as they are sent; a rate or a decay that is on the device stays there."""
        captured, rows, begun = self.capturing(), [], set[int]()
        told, of_told = self.told
        if args is told and not captured:
            return of_told
        for r, (group, of_row) in enumerate(zip(self.of_rows, args)):
            of_row, lr, decay = arguments.without_tensors(of_row)
            at = [0, 0]
            for k, number in enumerate((lr, decay)):
                if number is not None:
                    kept = self.rates[2 * r + k]
                    device.copy(kept, number)
                    at[k] = kept.data_ptr()
            rows.append(arguments.Row(of_row, self.groups.index(group), group not in begun, at[0], at[1], captured))
            begun.add(group)
        on_host = not captured and not any([row.lr_at or row.decay_at for row in rows])  # noqa: C419  # of few
        self.told = args if on_host else None, rows
        return rows

    def run(self, args: Sequence[StepArgs], scalars: DeviceScalars | None = None) -> None:
        """Queue the step of every parameter that has a gradient."""
        rows, captured = self._rows(args), self.capturing()
        on_device = self._on_device(scalars)
        if captured:
            self._check_capture(rows)
            device.keep(self.scalars, self.rates)
        stepped = [table.run(rows, on_device) for table in self.tables]
        for row in rows if any(stepped) and not captured else ():
            if (counted := row.args.counted) is not None and row.advances:
                _, steps, n, periods = counted
                self.known[row.slot] = steps + 1, {(n, periods), (n + 1, periods), (0, periods + 1)}

    def _check_capture(self, rows: Sequence[arguments.Row]) -> None:
        """Raise where replays could not do what this step does."""
        for row in rows:
            counted, (steps, counts) = row.args.counted, self.known.get(row.slot, (None, set[tuple[int, int]]()))
            if counted is None and ((row.noise is not None and row.noise.sigma != 0) or row.averages):
                raise RuntimeError(
                    "a step whose noise or averaging is a class of your own, or ScheduleFree, cannot be captured in a CUDA "
                    "graph: every replay would repeat what Python computed for this step. The others of fused_opt are "
                    "computed on the GPU, and can be; or step outside of the graph"
                )
            here = counted is not None and counted.steps == steps and (counted.samples, counted.periods) in counts
            if counted is not None and is_known(counted.steps) and not here:
                raise RuntimeError(
                    "a step with noise or averaging is captured in a CUDA graph, and what it counts was changed since the "
                    "last step: the graph would set it back in every replay. Step once outside of the graph before the "
                    "capture"
                )

    def capturing(self) -> bool:
        """Whether a step would go into a CUDA graph now."""
        return device.capturing(self.device)

    def counts(self) -> list[tuple[int, int, int, int]]:
        """Of every group in captured steps: its number, steps replayed since the last call, samples, periods; waits."""
        found = []
        tables = [table.counts[columns.GROUPS.value :].view(-1, 4).tolist() for table in self.tables if table.captured]
        for slot, group in enumerate(self.groups if tables else ()):
            steps, samples, periods, _ = max(of_table[slot] for of_table in tables)
            before = self.known.get(slot, (0,))[0]
            self.known[slot] = steps, {(samples, periods)}
            found.append((group, steps - before, samples, periods))
        return found

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
