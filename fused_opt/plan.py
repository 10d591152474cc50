"""Parameter groups -> buckets that one backend steps; kept until a pointer, a state or a group changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import backends
from .backends import matrices, self_check
from .backends.interface import Backend, Bucket, DeviceBucket, DeviceScalars, ParamEntry, StepArgs, StepKey
from .backends.self_check import Variant
from .groups import GroupSpec, name_of
from .rule import Rule
from .shards import Shard, add_up, is_spread, local, spread_of
from .states import NewStates, StateDtype, check_codes, check_parameter, dtype_for, not_in_8_bits
from .tensors import norm2, share_memory
from .warn import warn_once

_captured: list[Tensor] = []  # what CUDA graphs refer to, which may outlive the plan


class _Key(NamedTuple):
    """What parameters of one bucket have in common."""

    turn: int
    backend: str
    rule: Rule
    device: torch.device | None  # of a device bucket: a launch is on one GPU
    wide: bool  # and in one arithmetic


class Plan:
    """Which backend steps which parameters.

    Args:
        param_groups: the optimizer's groups.
        state: the optimizer's state; missing states of parameters that have a gradient are created, after every check
            has passed.
        specs: of every group.
        backend: ``"auto"`` or a backend's name.
        state_dtype: of new states.
        scales: multipliers (learning rate, weight decay) by parameter.
        first: the place of the first parameter among all of the optimizer's.

    Raises:
        RuntimeError: if a gradient or a state does not fit its parameter, or the named backend cannot step it; nothing has
            been changed then.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        specs: list[GroupSpec],
        backend: str,
        state_dtype: StateDtype,
        scales: Mapping[Tensor, tuple[float, float]],
        first: int = 0,
    ) -> None:
        self.specs = specs
        self.new_states = NewStates(state, state_dtype)
        chosen, skipped = _grouped(param_groups, state, specs, backend, state_dtype, scales, first)
        self.shards = [entry.shard for members in chosen.values() for entry in members if entry.shard is not None]
        self.buckets: list[Bucket] = []
        self._matrices: list[matrices.Bucket] = []
        try:
            for key, members in chosen.items():
                for entry in members:
                    self.new_states.fill(
                        entry, specs[entry.group], param_groups[entry.group], count_on_device=key.device is not None
                    )
            for shard in self.shards:
                shard.bind()
            for key, members in chosen.items():
                bucket = _bucket(key, members, param_groups, state)
                self.buckets.append(bucket)
                if isinstance(bucket, matrices.Bucket):
                    self._matrices.append(bucket)
        except BaseException:
            self.undo()
            raise
        self.binds = bool(self.shards or self._matrices)  # something for every step, which ``unbind`` ends
        #: Of all buckets, if they can leave numbers there that the host need not know.
        devices = {bucket.device for bucket in self.buckets}
        self.device = devices.pop() if len(devices) == 1 else None
        self.on_devices = [cast(DeviceBucket, bucket) for bucket in self.buckets if bucket.device is not None]
        blind = all(key.backend in ("native", "triton") and key.rule.matrices is None for key in chosen)
        self._state = None if blind else state  # what buckets look at that no one else has had; None: nothing
        self.sums: dict[Any, Any] = {}  # what shard_norms.py keeps of one step for the next
        self._norm2 = None if self.device is None else torch.zeros((), dtype=torch.float64, device=self.device)
        #: Whether it notices what changes; one bucket that looks at all parameters and states is enough.
        self.reusable = not skipped and any(backends.get(key.backend).REUSABLE for key in chosen)

    def undo(self) -> None:
        """Take away what was made for a step that is not made."""
        if self.new_states.before:
            self.new_states.take_back()
        self.unbind()

    def unbind(self) -> None:
        """Let go of the gradients of shards."""
        for shard in self.shards:
            shard.unbind()
        for bucket in self._matrices:
            bucket.unbind()

    def collect_gradients(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any] | None
    ) -> list[list[StepKey]] | None:
        """Find this step's gradients: keys per bucket, or None: the plan must be made anew.

        ``state``: None: nobody but this package has had any of it, so that nothing there was replaced or moved.
        """
        if self.shards and not all([shard.bind() for shard in self.shards]):  # noqa: C419  # every one is asked
            return None
        keys: list[list[StepKey]] = []
        looked_at: Any = self._state if state is None else state
        for bucket in self.buckets:
            if (of_bucket := bucket.collect_gradients(param_groups, looked_at)) is None:
                return None
            keys.append(of_bucket)
        return keys

    def grad_norm2(self) -> float:
        """The sum of squares of all gradients, as they lie in memory."""
        return sum(bucket.grad_norm2() for bucket in self.buckets)

    def sum_gradients(self) -> Tensor:
        """The sum of squares of all gradients, left on the device."""
        assert self._norm2 is not None
        if self._norm2.is_cuda and torch.cuda.is_current_stream_capturing():
            _captured.append(self._norm2)
        for place, bucket in enumerate(self.buckets):
            cast(DeviceBucket, bucket).sum_gradients(self._norm2, place > 0)
        return self._norm2

    def capturing(self) -> bool:
        """Whether a step would go into a CUDA graph now."""
        return any([bucket.capturing() for bucket in self.on_devices])  # noqa: C419  # of one or two

    def read_counts(self, param_groups: list[dict[str, Any]]) -> None:
        """Add what replays of captured steps have counted to what the groups count; waits."""
        replayed = 0
        for bucket in self.on_devices:
            for g, steps, samples, periods in bucket.counts():
                replayed = max(replayed, steps)
                if param_groups[g]["averaging"] is not None:
                    param_groups[g].update(samples=samples, periods=periods)
        for group in param_groups:
            group["steps"] += replayed

    def nonfinite(self) -> list[str]:
        """The parameters whose gradient is not finite in any process."""
        members, bad = [], []
        for member in (member for bucket in self.buckets for member in bucket.members):
            if (grad := member.tensor.grad) is not None:
                members.append(member)
                bad.append(float(not math.isfinite(norm2(grad))))
        together: dict[Any, list[int]] = {}
        for i, member in enumerate(members):
            if member.shard is not None:
                together.setdefault(spread_of(member.parameter), []).append(i)
        for (mesh, cut), places in together.items():
            here = torch.tensor([bad[i] for i in places], dtype=torch.float64, device=mesh.device_type)
            for i, count in zip(places, add_up(here, mesh, cut).tolist()):
                bad[i] = count
        return [m.name for m, count in zip(members, bad) if count]

    def run(self, args: Sequence[Sequence[StepArgs]], scalars: DeviceScalars | None = None) -> None:
        """Step every bucket, with arguments for every pair that ``collect_gradients`` returned."""
        if self._matrices:  # which may raise, before any parameter is stepped
            for bucket, of_bucket in zip(self.buckets, args):
                if isinstance(bucket, matrices.Bucket):
                    bucket.prepare(of_bucket, scalars)
        for bucket, of_bucket in zip(self.buckets, args):
            if scalars is None:
                bucket.run(of_bucket)
            else:
                bucket.run(of_bucket, scalars)  # type: ignore[call-arg]  # a DeviceBucket's
        if self.new_states.before:
            self.new_states.keep()
        for shard in self.shards:
            if shard.tensor.grad is not None:
                shard.written()

    def count_writes_to_states(self) -> None:
        """Have a backward through states that the step has written fail, as it does after torch.optim's."""
        written = [state for bucket in self.buckets for state in bucket.written_states()]
        written += [state for shard in self.shards if shard.tensor.grad is not None for state in shard.states]
        torch.autograd.graph.increment_version(written)


def _bucket(
    key: _Key, members: list[ParamEntry], param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]
) -> Bucket:
    backend = backends.get(key.backend)
    if key.rule.matrices is not None:
        return matrices.Bucket(backend, key.rule, key.rule.matrices, members, param_groups, state)
    return backend.bucket(key.rule, members, param_groups, state)


def _grouped(
    param_groups: list[dict[str, Any]],
    state: Mapping[Tensor, Any],
    specs: Sequence[GroupSpec],
    backend: str,
    state_dtype: StateDtype,
    scales: Mapping[Tensor, tuple[float, float]],
    first: int,
) -> tuple[dict[_Key, list[ParamEntry]], bool]:
    """The parameters of each bucket, in the order of the buckets' turns, and whether any was left out."""
    index, skipped, extras = first - 1, False, self_check.extras_of(param_groups)
    entries: list[tuple[ParamEntry, str]] = []
    seen: Counter[Tensor] = Counter()
    written: list[list[Tensor]] = []
    for g, (group, spec) in enumerate(zip(param_groups, specs)):
        if why := not_in_8_bits(state_dtype, spec.rule, spec.differentiable):
            raise RuntimeError(f"group {g}: {why}")
        for i, p in enumerate(group["params"]):
            index += 1
            if p.grad is None and _has_no_elements_yet(p):
                skipped = True
                continue
            name = name_of(group, g, i)
            if p.grad is not None and p.device.type == "meta" and group.get("fused"):
                raise RuntimeError(
                    f"`fused=True` requires all the params to be floating point Tensors of supported devices: cpu, cuda, but "
                    f"parameter {name} is {p.dtype} and {p.device.type}"
                )
            tensors = [local(tensor) for tensor in check_parameter(name, spec, p, state.get(p, {}))]
            shard = Shard(name, p, spec.noisy) if is_spread(p) else None
            if shard is not None and spec.counts:
                raise RuntimeError(
                    f"parameter {name} is a shard of a DTensor, and a scaled mask counts the elements of whole tensors. "
                    f"Cautious(..., scaled=False) masks every element by itself"
                )
            variants = partial(_variants, spec.rule, group, p, state.get(p, {}), state_dtype, extras)
            coded = check_codes(name, state_dtype, spec.rule, p, state.get(p, {}))
            of_p = _choose(name, spec, backend, tensors, shard is not None, coded, variants)
            entry = ParamEntry(p if shard is None else shard.tensor, g, index, name, noisy=spec.noisy, shard=shard)
            entry.differentiable = spec.differentiable
            entry.earlier = seen[p]
            seen[p] += 1
            entry.lr_scale, entry.decay_scale = scales.get(p, (1.0, 1.0))
            entries.append((entry, of_p))
            written.append([tensor for tensor in tensors if tensor is not local(p.grad)])
    return _by_key(entries, written, specs), skipped


def _by_key(
    entries: Sequence[tuple[ParamEntry, str]], written: Sequence[Sequence[Tensor]], specs: Sequence[GroupSpec]
) -> dict[_Key, list[ParamEntry]]:
    """Parameters that are stepped together, of entries with their backends and the tensors that each step writes."""
    chosen: dict[_Key, list[ParamEntry]] = {}
    turns, within = _turns(written)
    for k in within:
        if any(share_memory(a, b) for a, b in combinations(written[k], 2)):
            raise RuntimeError(
                f"parameter {entries[k][0].name} and its states share memory, or two of its states do; one would be written "
                f"with the values of the other. clone() the state"
            )
    for (entry, of_p), turn in zip(entries, turns):
        entry.exclusive = turn is None
        on_device = backends.get(of_p).steps_on_device(entry.tensor)
        device, wide = (entry.tensor.device, entry.tensor.dtype == torch.float64) if on_device else (None, False)
        chosen.setdefault(_Key(turn or 0, of_p, specs[entry.group].rule, device, wide), []).append(entry)
    return dict(sorted(chosen.items(), key=lambda item: item[0].turn))


def _has_no_elements_yet(p: Tensor) -> bool:
    """Whether it is a parameter of a Lazy module, or one without strides: nothing is asked of it without a gradient."""
    return is_lazy(p) or p.layout != torch.strided


def _variants(
    rule: Rule,
    group: Mapping[str, Any],
    p: Tensor,
    state: Mapping[str, Any],
    dtype: StateDtype,
    extras: frozenset[str],
) -> list[Variant]:
    """What a parameter asks of kernels; ``dtype``: of states that are to be made."""
    found = {slot: state[slot].dtype for slot in rule.states if state.get(slot) is not None}
    states = [found.get(slot) or dtype_for(dtype, rule, slot, p) or p.dtype for slot in rule.states]
    of_gradient = (p.dtype if p.grad is None else p.grad.dtype, *states)
    if rule.matrices is None:
        return [Variant(rule, (p.dtype, *of_gradient), extras)]
    between = matrices.dtype(rule.matrices, group, p)
    return [
        Variant(rule, (between, *of_gradient), extras),
        Variant(rule.matrices.apply, (p.dtype, between), extras),
    ]


def _choose(
    name: str,
    spec: GroupSpec,
    backend: str,
    tensors: Sequence[Tensor],
    sharded: bool,
    coded: bool,
    variants: Callable[[], list[Variant]],
) -> str:
    """The backend of a parameter: the named one, or the first that can."""
    if spec.rule.matrices is not None and sharded:
        raise RuntimeError(
            f"parameter {name} is a DTensor, and rule {spec.rule.name!r} needs whole matrices in every process. What would "
            f"work: torch.nn.parallel.DistributedDataParallel, or AdamW for this parameter"
        )
    if spec.differentiable:
        if backend not in ("auto", "reference") or sharded:
            what = "a DTensor" if sharded else f"backend {backend!r}"
            raise RuntimeError(
                f"differentiable=True was asked for parameter {name}, and autograd cannot follow the step of {what}; that of "
                f"backend='reference', on a plain tensor, it can"
            )
        return "reference"
    if backend != "auto":
        module = backends.get(backend)
        reason = module.unavailable() or module.unsupported(spec.rule, tensors, spec.noisy, sharded, coded)
        if reason := reason or _failure(backend, module, tensors[0], variants):
            raise RuntimeError(
                f"backend {backend!r} cannot step parameter {name}: {reason}. backend='auto' takes one that can"
            )
        return backend
    device = tensors[0].device.type
    failures: list[str] = []
    for candidate in backends.BACKENDS:
        module = backends.get(candidate)
        if reason := module.unavailable():
            if device in module.DEVICES:
                warn_once(f"fused_opt runs without its {candidate} backend: {reason}")
        elif module.unsupported(spec.rule, tensors, spec.noisy, sharded, coded) is None:
            if not (failure := _failure(candidate, module, tensors[0], variants)):
                for text in failures:
                    warn_once(f"{text}; the {candidate} backend steps in its place")
                return candidate
            failures.append(f"fused_opt does not use its {candidate} backend: {failure}")
    raise AssertionError("the reference backend supports everything")


def _failure(backend: str, module: Backend, p: Tensor, variants: Callable[[], list[Variant]]) -> str | None:
    """Why a backend must not step a parameter, of which its self-check says no."""
    if module.standard(p) is None:
        return None
    found = (self_check.failure(backend, module, p, lambda variant=variant: variant) for variant in variants())  # type: ignore[misc]
    return next(filter(None, found), None)


def _turns(written: Sequence[Sequence[Tensor]]) -> tuple[list[int | None], set[int]]:
    """In which turn each parameter is stepped, since those that share memory must be stepped in their order.

    Args:
        written: what a step writes, by parameter.

    Returns:
        None for a parameter whose memory is its own, which is the rule; else a turn after that of every earlier
        parameter whose memory overlaps. Tensors whose elements alternate in memory count as overlapping. And which
        parameters have tensors that so overlap one another.
    """
    spans = []
    for k, tensors in enumerate(written):
        for tensor in tensors:
            if tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.numel():
                start = tensor.data_ptr()
                last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape))
                spans.append((str(tensor.device), start, start + (last + 1) * tensor.element_size(), k))
    spans.sort()
    within: set[int] = set()
    before: dict[int, set[int]] = {}  # earlier parameters that overlap, and an empty set for the first of them
    open_spans: list[tuple[str, int, int, int]] = []
    for span in spans:
        device, start, _, k = span
        open_spans = [other for other in open_spans if other[0] == device and other[2] > start]
        for *_, other in open_spans:
            if other == k:
                within.add(k)
            else:
                before.setdefault(max(k, other), set()).add(min(k, other))
                before.setdefault(min(k, other), set())
        open_spans.append(span)
    turns: list[int | None] = [None] * len(written)
    for k in sorted(before):
        turns[k] = max([1 + (turns[other] or 0) for other in before[k]], default=0)
    return turns, within
