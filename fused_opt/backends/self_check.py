"""Kernels are proven at their first use on a device: what they compute there is compared with the CPU's results.

Before a backend for GPUs steps a parameter, it takes a few steps on small tensors of the check's own, with the rule, the
dtypes and the extras of that parameter: tensors that begin beside a boundary of 16 bytes, that end within a vector, with
strides and with gaps, in several groups; trust ratios, noise, averages, clipping; norms that are carried from step to step.
All memory is compared, also what lies between the tensors. Every variant is checked once in a process. Where one fails,
``backend="auto"`` does not use the backend on that device any more, and a backend that was asked for by name raises.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from threading import Lock
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..eight_bits import CODES, blocks_of, scale_of
from ..exact import KEPT, exact_weights, set_exact_weights
from ..rule import Rule
from .interface import (
    Average,
    Backend,
    Bucket,
    CautiousArgs,
    Counted,
    DeviceBucket,
    DeviceScalars,
    Fold,
    Kind,
    NoiseArgs,
    ParamEntry,
    PartNorms,
    RatioArgs,
    RoundingArgs,
    Schedule,
    Standard,
    StepArgs,
    StepKey,
)

#: ``FUSED_OPT_SELF_CHECK=0`` in the environment leaves the checks out.
ENABLED = os.environ.get("FUSED_OPT_SELF_CHECK") != "0"
NOISE, RELATIVE_NOISE, AVERAGE, CLIPPING, MASKS = "noise", "relative noise", "averaging", "clipping", "masks"
ROUNDING, EXACT = "rounding at random", "exact weights"
EXTRAS = frozenset([*(kind.name for kind in Kind), NOISE, RELATIVE_NOISE, AVERAGE, CLIPPING, MASKS, ROUNDING, EXACT])


class Variant(NamedTuple):
    """What a parameter asks of a backend's kernels."""

    rule: Rule | None  # None: ``accumulate``
    dtypes: tuple[torch.dtype, ...]  # of parameter, gradient and states; of the total, if there is one, and the part
    extras: frozenset[str] = frozenset()

    def __str__(self) -> str:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(self.dtypes))
        return f"{'accumulate' if self.rule is None else f'rule {self.rule.name!r}'} in {dtypes}"


_passed: set[tuple[str, torch.device, Variant]] = set()
_failed: dict[tuple[str, torch.device], str] = {}
_lock = Lock()


def extras_of(groups: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The extras that parameter groups use."""
    found = set()
    for group in groups:
        if (ratio := group["trust_ratio"]) is not None:
            found.add(ratio.args.kind.name)
        if (noise := group["noise"]) is not None:
            found.add(RELATIVE_NOISE if noise.relative else NOISE)
        if group["averaging"] is not None:
            found.add(AVERAGE)
        if group["max_grad_norm"] is not None or group["nonfinite"] != "pass":
            found.add(CLIPPING)
        if group["cautious"] is not None or group["decay"] == "independent":
            found.add(MASKS)
        if group["rounding"] not in (None, "nearest"):
            found.add(ROUNDING)
        if group["master_weights"]:
            found.add(EXACT)
    return frozenset(found)


def failure(name: str, backend: Backend, p: Tensor, asked: Callable[[], Variant]) -> str | None:
    """Why a backend must not step a tensor, or None; the first time it is found out.

    In the capture of a CUDA graph nothing is found out, and the answer is no.
    """
    standard = backend.standard(p)
    if standard is None or not ENABLED:
        return None
    variant = asked()
    if not standard.compiles:
        variant = variant._replace(extras=EXTRAS)
    if (key := (name, p.device, variant)) in _passed and (name, p.device) not in _failed:
        return None
    with _lock:
        if (name, p.device) not in _failed:
            if p.is_cuda and torch.cuda.is_current_stream_capturing():
                return (
                    f"its self-check on {p.device} ({variant}) cannot run while a CUDA graph is captured; step once "
                    f"before the capture"
                )
            if (found := run(backend, standard, p.device, variant)) is None:
                _passed.add(key)
                return None
            _failed[name, p.device] = f"its self-check on {p.device} failed: {variant}: {found}"
        return _failed[name, p.device]


@torch.inference_mode(False)  # tensors made within it could not be written through addresses
@torch.no_grad()
def run(backend: Backend, standard: Standard, device: torch.device, variant: Variant) -> str | None:
    """What is wrong with a variant on a device, or None. Random numbers, streams and settings stay as they are."""
    try:
        if variant.rule is None:
            return _accumulate(backend, device, variant.dtypes)
        return _Comparison(backend, standard, device, variant, variant.rule).steps()
    except (MemoryError, torch.OutOfMemoryError):  # says nothing about the kernels
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# ---- what is stepped


class _Layout(NamedTuple):
    """How a tensor lies in memory; without strides it is contiguous."""

    name: str
    shape: tuple[int, ...]
    offset: int = 0  # in elements, from an aligned address
    strides: tuple[int, ...] | None = None
    gradient_offset: int = 0  # and from there
    gradient_strides: tuple[int, ...] | None = None

    def view(self, memory: Tensor, start: int, gradient: bool = False) -> Tensor:
        strides = (self.gradient_strides if gradient else None) or self.strides
        if strides is None:
            strides = torch.empty(self.shape, device="meta").stride()
        start += self.offset + (self.gradient_offset if gradient else 0)
        return memory.as_strided(self.shape, strides, start)

    def scales(self, memory: Tensor, start: int) -> Tensor:
        """Of a state in 8 bits; ``memory``: with one for every ``_ROOM`` codes, which is more than there are."""
        return memory[start // _ROOM :][: blocks_of(math.prod(self.shape))]


# The first is of two chunks, in CUDA and in Triton.
_LAYOUTS = (
    _Layout("vectors and a tail", (5, 821)),
    _Layout("a head, vectors and a tail", (3, 67), offset=3),
    _Layout("a head of four", (9, 13), offset=4),
    _Layout("a gradient that is not aligned with it", (9, 7), gradient_offset=1),
    _Layout("one number", ()),
    _Layout("no elements", (0, 3)),
    _Layout("transposed", (6, 7), strides=(1, 6)),
    _Layout("another layout than the gradient's", (6, 7), gradient_strides=(1, 6)),
    _Layout("with gaps", (5, 4), strides=(12, 2)),
)
_ROOM = 64  # between tensors at least a quarter of it; a multiple of every boundary


class _Row(NamedTuple):
    """The extras of a group."""

    kind: Kind | None = None
    noise: str | None = None
    average: bool = False
    masks: CautiousArgs | None = None
    scheduled: Average | None = None  # noise that falls and this average, which a device computes from its counts
    rounding: bool = False  # at random
    exact: bool = False  # float32 weights behind 16 bits

    def within(self, extras: frozenset[str]) -> _Row:
        return _Row(
            self.kind if self.kind is not None and self.kind.name in extras else None,
            self.noise if self.noise in extras else None,
            self.average and AVERAGE in extras,
            self.masks if MASKS in extras else None,
            self.scheduled if extras & {NOISE, AVERAGE, ROUNDING} else None,
            self.rounding and ROUNDING in extras,
            self.exact and EXACT in extras,
        )

    @property
    def noisy(self) -> bool:
        return self.noise is not None or self.rounding

    @property
    def norms(self) -> bool:
        return self.kind is not None or self.noise == RELATIVE_NOISE


_ROWS = (
    _Row(),
    _Row(noise=NOISE, average=True, scheduled=Average.EXPONENTIAL),
    _Row(Kind.LARS, noise=RELATIVE_NOISE),
    _Row(Kind.CLARS, average=True, scheduled=Average.MEAN),
    _Row(Kind.LAMB, noise=NOISE, average=True),
    _Row(masks=CautiousArgs(True, True, True)),
    _Row(Kind.LAMB, masks=CautiousArgs(True, False, True)),
    _Row(average=True, rounding=True),
    _Row(average=True, scheduled=Average.EXPONENTIAL, rounding=True),
    _Row(Kind.LAMB, average=True, exact=True),
)
_RATIOS = {
    Kind.LARS: RatioArgs(Kind.LARS, 0.5, math.inf, 0.0625, 0),
    Kind.CLARS: RatioArgs(Kind.CLARS, 0.5, 0.75, 0.03125, 0),
    Kind.LAMB: RatioArgs(Kind.LAMB, 0.25, 2.0, 0.0, 0),
}
# What rules make coefficients of, in even rows and in odd ones. The powers of the betas are exact.
_SETTINGS: tuple[defaultdict[str, Any], ...] = (
    defaultdict(lambda: 0.5, betas=(0.75, 0.875, 0.9375), eps=0.0625, momentum=0.75, dampening=0.5, nesterov=True),
    defaultdict(lambda: 0.5, betas=(0.25, 0.5, 0.75), eps=0.0, momentum=0.5, dampening=0.25, nesterov=False),
)
_LR, _DECAY, _SIGMA, _SEED, _COUNT = 0.125, 0.1875, 0.0625, 0x9E3779B97F4A7C15, 4
_CYCLE, _PERIOD, _BETA = 4, 2, 0.875
_STEPS = 3  # and then one that is clipped, and one that is not made


@cache
def _settings(rule: Rule, odd: int) -> Mapping[str, Any]:
    """With as many betas as the rule takes."""
    for count in (2, 3):
        settings = _SETTINGS[odd] | {"betas": _SETTINGS[odd]["betas"][:count]}
        try:
            rule.coefficients(settings)
        except ValueError:
            continue
        return settings
    raise ValueError(f"rule {rule.name!r} takes neither two betas nor three")


class _Run:
    """The tensors of a check on one device, in one stretch of memory for each operand, and the bucket that steps them.

    Args:
        values: of every operand, on the CPU.
        groups: for every tensor its group, its layout and where it is.
    """

    def __init__(
        self,
        make: Any,
        rule: Rule,
        rows: Sequence[_Row],
        device: torch.device,
        values: Mapping[str, Tensor],
        places: Sequence[tuple[int, _Layout, int]],
        count_there: bool,
    ) -> None:
        self.rule, self.rows, self.places = rule, rows, places
        self.memory = {name: tensor.to(device, copy=True) for name, tensor in values.items()}
        memory = self.memory
        if rule.counts_steps:
            where = device if count_there else torch.device("cpu")
            memory["step count"] = torch.full((len(places),), _COUNT, dtype=torch.float32, device=where)
            if rule.scalar:
                memory["scalar"] = torch.ones_like(memory["step count"])
        self.gradients = [memory.pop("gradient"), torch.empty_like(values["gradient"], device=device)]
        self.members = []
        for index, (row, layout, start) in enumerate(places):
            p = layout.view(memory["parameter"], start)
            p.grad_dtype = values["gradient"].dtype
            entry = ParamEntry(p, row, index, layout.name, noisy=rows[row].noisy, states_are_new=True)
            entry.states = [layout.view(memory[slot], start) for slot in rule.states]
            scales = [memory.get(scale_of(slot)) for slot in rule.states]
            entry.scales = [None if of_slot is None else layout.scales(of_slot, start) for of_slot in scales]
            entry.step = memory["step count"][index] if rule.counts_steps else None
            entry.scalar = memory["scalar"][index] if rule.scalar else None
            entry.average = layout.view(memory["average"], start) if rows[row].average else None
            exact = rows[row].exact and "exact weights" in memory
            entry.exact = layout.view(memory["exact weights"], start) if exact else None
            entry.lr_scale, entry.decay_scale = ((1.0, 1.0), (0.5, 3.0))[index % 2]
            self.members.append(entry)
        self.groups: list[dict[str, Any]] = [
            {"params": [m.tensor for m in self.members if m.group == row]} for row in range(len(rows))
        ]
        self.turn(0, values["gradient"])
        self.bucket: Bucket = make(rule, self.members, self.groups, {})

    def turn(self, n: int, gradients: Tensor) -> None:
        """Give the tensors the gradients of a step: in other memory than in the last one, and one of them none."""
        memory = self.gradients[n % 2].copy_(gradients)
        for member, (_, layout, start) in zip(self.members, self.places):
            member.tensor.grad = layout.view(memory, start, gradient=True)
        if n == 1:
            self.members[0].tensor.grad = None

    def collect(self) -> list[StepKey]:
        keys = self.bucket.collect_gradients(self.groups, {})
        if keys is None:
            raise RuntimeError("it did not recognize tensors that had not moved")
        self.bucket.set_part_norms([PartNorms(2.5, 7.0) if m.index % 2 else None for m in self.members])
        return keys

    def args(
        self,
        n: int,
        keys: Sequence[StepKey],
        lr: float | Tensor = _LR,
        scale: float = 1,
        decay: float | Tensor = _DECAY,
    ) -> list[StepArgs]:
        return [self._of_row(n, key, lr, scale, decay) for key in keys]

    def _of_row(
        self, n: int, key: StepKey, lr: float | Tensor, scale: float, decay: float | Tensor = _DECAY
    ) -> StepArgs:
        row, step, scalar, earlier = key
        odd, (kind, noise, average, masks, scheduled, at_random, _) = row % 2, self.rows[row]
        made = NoiseArgs(_SIGMA, noise == RELATIVE_NOISE, _SEED, n) if noise else None
        fold, counted = None, None
        if average and n != 1:
            fold = Fold(0.375, 0.875, n == 0, n == 2 and bool(odd), 0.5 * (n == 2 and not odd))
        if scheduled is not None:
            made, fold, counted = _by_schedule(scheduled, n, noise is not None, average)
            if self.bucket.device is None:
                counted = None
            else:
                made = fold = None
        return StepArgs(
            lr,
            scale * (-0.5 if odd else 0.75),
            0.0 if odd or masks else decay,
            decay if odd else 0.0,
            decay if masks and not odd else 0.0,
            self.rule.numbers(_settings(self.rule, odd), step, scalar, earlier),
            None if kind is None else _RATIOS[kind],
            made,
            fold,
            masks,
            RoundingArgs(_SEED, n) if at_random else None,
            counted,
        )


def _by_schedule(
    average: Average, n: int, noisy: bool, averaged: bool
) -> tuple[NoiseArgs | None, Fold | None, Counted]:
    """Step n, counted from 0, of noise that falls in a cycle and of an average, and what a device computes both from."""
    mean = average == Average.MEAN
    samples, periods = (n % _PERIOD, n // _PERIOD) if mean and averaged else (n, 0)
    schedule = Schedule(
        sigma=_SIGMA if noisy else 0.0,
        cycle=_CYCLE if noisy else 0,
        noise_seed=_SEED if noisy else 0,
        average=average if averaged else 0,
        period=_PERIOD if mean and averaged else 0,
        window=float(_PERIOD) if mean and averaged else 0.0,
        beta=_BETA,
    )
    noise = NoiseArgs(_SIGMA * (1 - n % _CYCLE / _CYCLE), False, _SEED, n) if noisy else None
    fold = Fold(1 if n == 0 else 1 - _BETA, 1.0, n == 0, False)
    if mean:
        fold = Fold(1 / (samples + 1), 1.0, samples == 0, samples == _PERIOD - 1)
    return noise, fold if averaged else None, Counted(schedule, n, samples, periods)


# ---- what is compared


class _Comparison:
    """A backend on a device beside what it must agree with on the CPU."""

    def __init__(
        self, backend: Backend, standard: Standard, device: torch.device, variant: Variant, rule: Rule
    ) -> None:
        self.exact, self.clips = standard.exact, CLIPPING in variant.extras
        p_dtype, self.g_dtype, *state_dtypes = variant.dtypes
        self.wide = p_dtype == torch.float64
        rows = list(dict.fromkeys(row.within(variant.extras) for row in _ROWS))
        slots = ("parameter", "gradient", *rule.states, "average")
        places, begins, end = [], [], 0
        for row in range(len(rows)):
            begins.append(end)
            for layout in _LAYOUTS:
                places.append((row, layout, end))
                reach = sum(s * (n - 1) for s, n in zip(layout.strides or (), layout.shape)) + math.prod(layout.shape)
                end += (reach + layout.offset + layout.gradient_offset + _ROOM // 4 + _ROOM - 1) // _ROOM * _ROOM
        # Where numbers need not agree in every bit, and up to which bound around 1. Norms are sums in float64, whose last
        # bit depends on their order, and bias corrections are computed where the count is: float32's arithmetic does not
        # show that, and float64's does.
        self.rounded = torch.full((end,), not self.exact, device="cpu")
        for of_row, start, stop in zip(rows, begins, [*begins[1:], end]):
            self.rounded[start:stop] |= self.wide and (of_row.norms or rule.counts_steps)
        self.codes = [slot for slot, dtype in zip(rule.states, state_dtypes) if dtype in CODES]
        floats = [p_dtype, *(d for d in state_dtypes if d not in CODES), *([] if self.wide else [torch.float32])]
        eps = [torch.finfo(dtype).eps for dtype in floats]
        self.bound = 64 * torch.finfo(torch.float64).eps
        if not self.exact:  # normal numbers are float32's in the kernels, and float64's in the reference
            self.bound = 4 * max(eps) + (1e-6 * _SIGMA if any(row.noise for row in rows) else 0.0)
            if self.codes:  # a number between two codes may become the other one
                self.bound = max(self.bound, 2.0**-6)
        generator = torch.Generator("cpu").manual_seed(0)
        self.base = torch.randn(end, dtype=torch.float64, device="cpu", generator=generator)
        if not self.exact:  # few digits, so that no sign depends on a rounding
            self.base = self.base.mul(64).round().div(64)
        values = {"parameter": self.base.to(p_dtype), "gradient": self._gradients(0)}
        values.update({s: torch.zeros(end, dtype=d, device="cpu") for s, d in zip(rule.states, state_dtypes)})
        values.update({scale_of(s): torch.zeros(end // _ROOM, dtype=torch.float32, device="cpu") for s in self.codes})
        if any(row.average for row in rows):
            values["average"] = self.base.roll(5).to(torch.promote_types(p_dtype, torch.float32))

        if any(row.exact for row in rows) and p_dtype in KEPT:
            values["exact weights"] = torch.zeros(end, dtype=KEPT[p_dtype][1], device="cpu")
            set_exact_weights(values["parameter"], values["exact weights"], self.base.float())
        memory = {name: torch.empty_like(tensor, device=device) for name, tensor in values.items() if name in slots}

        def steppable(row: int, layout: _Layout, start: int) -> bool:
            tensors = [layout.view(memory[name], start, name == "gradient") for name in memory]
            if self.codes and not tensors[0].is_contiguous():
                return False
            return backend.unsupported(rule, tensors, rows[row].noisy, coded=bool(self.codes)) is None

        places = [place for place in places if steppable(*place)]
        there = backend.steps_on_device(torch.empty(0, dtype=p_dtype, device=device))
        self.rows = rows
        self.ours = _Run(backend.bucket, rule, rows, device, values, places, there)
        self.theirs = _Run(standard.bucket, rule, rows, torch.device("cpu"), values, places, False)

    def _gradients(self, n: int) -> Tensor:
        """Of step n; in the first two the group without extras has some that are not finite."""
        gradients = self.base.roll(17 * n + 17).to(self.g_dtype)
        if n < 2:
            gradients[: 4 * 40 : 40] = torch.tensor([math.nan, math.inf, -math.inf, -0.0], device="cpu")
        return gradients

    def _turn(self, n: int) -> None:
        gradients = self._gradients(n)
        for side in (self.ours, self.theirs):
            side.turn(n, gradients)

    def steps(self) -> str | None:
        """Take all of them; says what differs first."""
        for n in range(_STEPS):
            self._turn(n)
            for side in (self.ours, self.theirs):
                side.bucket.run(side.args(n, side.collect()))
            if found := self._difference(f"after step {n + 1}"):
                return found
        return self._clipped() if self.clips else None

    def _clipped(self) -> str | None:
        """One step whose gradients are clipped, by the device itself where it can; and one with an overflow there."""
        ours, theirs = self.ours, self.theirs
        self.rounded |= self.wide
        self._turn(_STEPS)
        our_keys, their_keys = ours.collect(), theirs.collect()
        expected, limit = theirs.bucket.grad_norm2(), 3.0
        device = ours.bucket.device
        if device is None:
            norm2, scale = ours.bucket.grad_norm2(), 1.0
        else:
            bucket, scale = cast(DeviceBucket, ours.bucket), 0.5
            sums = torch.full((), 1.0, dtype=torch.float64, device=device)
            bucket.sum_gradients(sums, True)
            if not math.isclose(sums.item() - 1.0, expected, rel_tol=1e-9):
                return (
                    f"the gradients' sum of squares is {sums.item() - 1.0!r} and not {expected!r}, where it is added up"
                )
            bucket.sum_gradients(sums, False)
            norm2 = sums.item()
        if not math.isclose(norm2, expected, rel_tol=1e-12):
            return f"the gradients' sum of squares is {norm2!r} and not {expected!r}"
        factor = scale * min(1.0, limit / (scale * math.sqrt(expected) + 1e-6))
        theirs.bucket.run(theirs.args(_STEPS, their_keys, scale=factor))
        if device is None:
            ours.bucket.run(ours.args(_STEPS, our_keys, scale=factor))
            return self._difference("after a step that is clipped")
        lr, decay, grad_scale, found_inf = (
            torch.tensor(x, dtype=torch.float32, device=device) for x in (_LR, _DECAY, 1 / scale, 0.0)
        )
        bucket.run(ours.args(_STEPS, our_keys, lr, decay=decay), DeviceScalars(found_inf, grad_scale, sums, limit))
        if found := self._difference("after a step that is clipped"):
            return found
        bucket.run(ours.args(_STEPS, ours.collect()), DeviceScalars(found_inf.fill_(1.0)))
        return self._difference("after an overflow, in which nothing is stepped")

    def _difference(self, when: str) -> str | None:
        """What differs first, in words."""
        bound = 1e-12 if self.exact else 1e-5
        for member, ratio, expected in zip(self.ours.members, self.ours.bucket.ratios(), self.theirs.bucket.ratios()):
            left_alone = math.isnan(ratio) and math.isnan(expected)
            if not left_alone and not math.isclose(ratio, expected, rel_tol=bound):
                return f"{when} the trust ratio of a tensor with {member.name} is {ratio!r} and not {expected!r}"
        for name, memory in self.ours.memory.items():
            mine, other = memory.cpu(), self.theirs.memory[name]
            if name == "exact weights" and not self.exact:
                mine, other = (
                    exact_weights(side.memory["parameter"], side.memory[name]).cpu()
                    for side in (self.ours, self.theirs)
                )
            same = _same(mine, other)
            of_blocks = name in map(scale_of, self.codes)
            if name in self.codes and not self.exact:
                same |= (mine.int() - other.int()).abs() <= 1
            elif of_blocks and not self.exact:
                same |= torch.isclose(mine, other, rtol=self.bound, atol=0.0)
            elif not same.all() and name != "step count":
                same |= self.rounded & torch.isclose(mine, other, rtol=self.bound, atol=self.bound, equal_nan=True)
            if not same.all():
                at = int((~same).nonzero()[0])
                row, layout, _ = (
                    self.ours.places[at] if name == "step count" else self._at(at * _ROOM if of_blocks else at)
                )
                return (
                    f"{when} {int((~same).sum())} of {len(same)} numbers differ in the {name}; the first one, of a tensor "
                    f"with {layout.name} and {self.rows[row]}, is {mine[at].item()!r} and not {other[at].item()!r}"
                )
        return None

    def _at(self, element: int) -> tuple[int, _Layout, int]:
        """The last tensor that does not begin after an element."""
        return max((place for place in self.ours.places if place[2] <= element), key=lambda place: place[2])


def _same(mine: Tensor, other: Tensor) -> Tensor:
    """Where two tensors agree in every bit, or neither has a number."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[mine.element_size()]
    return (mine.view(bits) == other.view(bits)) | (mine.isnan() & other.isnan())


def _accumulate(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    generator = torch.Generator("cpu").manual_seed(0)
    for layout in _LAYOUTS:
        length = 64 + 3 * math.prod(layout.shape)
        here = [
            torch.randn(length, dtype=torch.float64, device="cpu", generator=generator).to(dtype) for dtype in dtypes
        ]
        there = [tensor.to(device, copy=True) for tensor in here]
        operands = [
            [layout.view(memory, 0, gradient=k == len(dtypes) - 1) for k, memory in enumerate(side)]
            for side in (there, here)
        ]
        (*total, part), (*our_total, our_part) = operands
        if backend.unsupported(None, [*total, part]) is not None:
            continue
        sums = backend.accumulate(total[0] if total else None, part)
        if our_total:
            our_total[0].add_(our_part)
        expected = [float(tensor.double().square().sum()) for tensor in (our_part, *our_total)]
        for mine, other in zip(there, here):
            if not (same := _same(mine.cpu(), other)).all():
                return f"{int((~same).sum())} numbers of a tensor with {layout.name} differ"
        for found, wanted in zip(sums, expected):
            if not math.isclose(found, wanted, rel_tol=1e-12):
                return f"the sum of squares of a tensor with {layout.name} is {found!r} and not {wanted!r}"
    return None
