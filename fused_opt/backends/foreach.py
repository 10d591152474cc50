"""torch's foreach operations, many tensors at a time: what "auto" takes where no compiled backend can step.

The rules that torch.optim has are stepped so, in the operations and the order of its own foreach steps, as long as a step has
neither trust ratio nor noise; anything else, and complex parameters, is stepped as the reference does it, tensor by tensor.
16-bit parameters are stepped in float32 and rounded once, by torch's fused steps or in copies; where neither is as fast as
torch.optim's operations, by operations, each of which computes in float32 and rounds what it stores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors as _unflatten

from ..rule import Rule
from . import reference
from .foreach_updates import (
    DECOUPLED,
    FUSED,
    SIXTEEN_BITS,
    UPDATES,
    Numbers,
    Tensors,
    by_operations_in_16_bits,
    fused_in_16_bits,
    step,
)
from .interface import ParamEntry, StepArgs, StepKey
from .reference import DEVICES, accumulate, standard, steps_on_device, unavailable, unsupported

__all__ = ["DEVICES", "REUSABLE", "accumulate", "bucket", "standard", "steps_on_device", "unavailable", "unsupported"]

REUSABLE = True
_MOST = 1 << 26  # elements of one list, so that copies in another dtype take little memory
_MOST_ON_CPU = 1 << 18  # so that what the next operation reads is still in the cache
_LONGEST_ON_CPU = 1 << 22  # of a list that is stepped in pieces of so many, or whole where the cache gains nothing
_PLAIN = Tensor, torch.nn.Parameter


class _Copies(NamedTuple):
    """Memory for the copies of tensors in the arithmetic's dtype."""

    flat: Tensor
    shaped: Tensors  # the same, as the tensors


class _Together(NamedTuple):
    """Parameters that are stepped with the same numbers, and what they are stepped with."""

    row: int  # of the step's arguments
    members: list[ParamEntry]
    params: list[Tensor]
    states: list[list[Tensor]]  # by slot
    steps: list[Tensor]
    dtype: torch.dtype  # of the arithmetic
    converted: bool  # something is of another dtype
    by_operations: bool  # in 16 bits, where torch.optim has the step
    fusible: bool  # by torch's fused step
    wide: list[_Copies]  # by slot, where they are kept
    runs: list[slice]  # that fit in the cache


class _Alike:
    """What tensors are asked to be, step after step: of the type, layout, dtype, device and shape of the first ones."""

    def __init__(self, kinds: list[Any]) -> None:
        self.kinds = kinds
        self.times = 0
        self.guard: Any = None

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are; the guard of torch.compile asks more in a tenth of the time."""
        if self.guard is not None and self.guard.check(*tensors):
            return True
        if _kinds(tensors) != self.kinds:
            return False
        self.times += 1
        if self.times == 2:
            self.guard = _guard(tensors)
        return True


class Bucket(reference.Bucket):
    """Parameters that are stepped together as far as torch's foreach operations can.

    It is kept from step to step, and so notices what is replaced; what it finds out about its tensors holds until then.
    """

    def __init__(
        self,
        rule: Rule,
        members: Sequence[ParamEntry],
        param_groups: list[dict[str, Any]],
        state: Mapping[Tensor, Any],
    ) -> None:
        super().__init__(rule, members)
        self.groups = param_groups
        self.update = UPDATES.get(rule.name)
        self.seen = objects(param_groups, state)
        self.params = [member.tensor for member in members]
        self.written = self.params + [tensor for member in members for tensor in member.states or ()]
        self.alike = _Alike(_kinds(self.written))
        self.planned = {i: _kinds([p.grad])[0] for i, p in enumerate(self.params) if p.grad is not None}
        self.absent: list[bool] | None = None  # gradients, in the last step
        self.present: list[ParamEntry] = []  # those that have one
        self.alike_grads = _Alike([])
        self.counting = True  # the keys change from step to step
        self.keys: list[StepKey] = []
        self.arranged: Any = None  # for which rows and arguments the next three hold
        self.alone: list[tuple[ParamEntry, int]] = []
        self.together: list[_Together] = []
        self.ones: dict[int, float] = {}  # the ratios of the latter
        self.scratch: dict[torch.dtype, list[Tensor]] = {}  # of the CPU, for copies of one list

    def collect_gradients(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]
    ) -> list[StepKey] | None:
        """Find this step's gradients: the keys that ``run`` needs arguments for, or None: plan anew."""
        found = objects(param_groups, state)
        if len(found) != len(self.seen) or not all(map(is_, found, self.seen)):
            return None
        grads = [p.grad for p in self.params]
        absent = [g is None for g in grads]
        if absent != self.absent and not self._select(absent):
            return None
        if not self.alike_grads.are([g for g in grads if g is not None]) or not self.alike.are(self.written):
            return None
        self._norms.clear()
        self._parts = {}
        if self.counting:
            keys: dict[StepKey, int] = {}
            self.active = [(member, keys.setdefault(member.key(), len(keys))) for member in self.present]
            self.keys = list(keys)
            self.counting = any(m.states_are_new or m.step is not None or m.scalar is not None for m in self.present)
        return self.keys

    def _select(self, absent: list[bool]) -> bool:
        """Take the members that have a gradient; False: one had none, or no states, when this was planned."""
        places = [i for i, none in enumerate(absent) if not none]
        if any(i not in self.planned or self.members[i].states is None for i in places):
            return False
        self.absent, self.counting, self.arranged = absent, True, None
        self.present = [self.members[i] for i in places]
        self.alike_grads = _Alike([self.planned[i] for i in places])
        return True

    @torch.no_grad()
    def run(self, args: Sequence[StepArgs]) -> None:
        """Step every parameter that has a gradient."""
        of_rows = [(self._able(of_row), math.inf if of_row.ratio is None else of_row.ratio.exempt) for of_row in args]
        arranged = of_rows, [row for _, row in self.active]
        if arranged != self.arranged:
            self._arrange(of_rows)
            self.arranged = arranged
        self._ratios = dict(self.ones)
        for member, row in self.alone:
            self._step(member, args[row])
            member.advance(args[row])
        for part in self.together:
            self._step_together(part, args[part.row])

    def _able(self, args: StepArgs) -> bool:
        """Whether the operations of a list can step with these arguments."""
        if self.update is None or args.cautious is not None or args.independent_decay or args.rounding is not None:
            return False
        return not (args.noise and args.noise.sigma)

    def _arrange(self, of_rows: Sequence[tuple[bool, float]]) -> None:
        """Part the members into those that are stepped alone and those that are stepped together."""
        self.alone, self.ones = [], {}
        lists: dict[tuple[Any, ...], list[ParamEntry]] = {}
        for member, row in self.active:
            p, g = member.tensor, member.tensor.grad
            assert g is not None
            plain = g.layout == torch.strided and not g._is_zerotensor() and not p.is_complex()
            plain = plain and member.exact is None and not member.coded
            plain = plain and not any(t.is_neg() for t in (p, *(member.states or ())))
            able, exempt = of_rows[row]
            if not able or p.ndim > exempt or not plain:
                self.alone.append((member, row))
                continue
            dtypes = p.dtype, g.dtype, *[state.dtype for state in member.states or ()]
            alike = row, member.lr_scale, member.decay_scale, p.device, dtypes, _fusible(self.rule, member)
            self.ones[member.index] = 1.0
            lists.setdefault(alike, []).append(member)
        self.together = [
            part
            for (row, *_, fusible), members in lists.items()
            for part in _together(self.rule.name, row, fusible, members)
        ]

    def _step_together(self, part: _Together, args: StepArgs) -> None:
        first = part.members[0]
        decay = float(args.coupled_decay + args.decoupled_decay) * first.decay_scale
        lr, decoupled = float(args.lr) * first.lr_scale, bool(args.decoupled_decay)
        count = self.keys[part.row][1]
        numbers = Numbers(
            self.groups[first.group], args.coefficients, count, first.states_are_new, lr, decay, decoupled
        )
        scale = args.grad_scale
        as_torch_has_it = abs(scale) == 1 and (self.rule.name in DECOUPLED or not (decay and decoupled))
        fused = FUSED.get(self.rule.name) if as_torch_has_it else None
        given = [part.params, [p.grad for p in part.params], *part.states]
        if fused and part.fusible:
            fused(numbers, scale < 0, *given)
        else:
            copied = part.converted and not (part.by_operations and as_torch_has_it)
            whole = not copied and (part.by_operations or (self.rule.name == "sgd" and not decay))
            for piece in [given] if whole else _pieces(given, part.runs):
                self._step_piece(part, numbers, scale, fused, piece, copied)
        if part.steps and part.steps[0].is_cpu:  # where adding to a number takes five times as long
            torch._foreach_copy_(part.steps, [part.steps[0].new_full((), count)] * len(part.steps))
        elif part.steps:
            torch._foreach_add_(part.steps, 1)
        if first.states_are_new or first.scalar is not None:
            for member in part.members:
                member.states_are_new = False
                if member.scalar is not None:
                    member.scalar.fill_(args.coefficients[-1])
        if args.fold is not None:
            for member in part.members:
                self._fold(member, args, member.tensor.to(part.dtype))

    def _step_piece(
        self, part: _Together, numbers: Numbers, scale: float, fused: Any, given: list[Any], copied: bool
    ) -> None:
        """What fits in the cache, or a whole list."""
        assert self.update is not None
        wide = self._wide(part, given) if copied else []
        for copies, of_kind in zip(wide, given):
            torch._foreach_copy_(copies.shaped, of_kind)
        tensors: list[Any] = [[copies.flat] for copies in wide] or given
        if fused and wide and wide[0].flat.is_cpu:
            fused(numbers, scale < 0, *tensors)
        else:
            grads = tensors[1] if scale == 1 else torch._foreach_mul(tensors[1], scale)
            step(numbers, self.update, tensors[0], grads, *tensors[2:])
        for place, copies in enumerate(wide):
            if place != 1:
                torch._foreach_copy_(given[place], copies.shaped)

    def _wide(self, part: _Together, given: list[Any]) -> list[_Copies]:
        """By slot; on the CPU the lists, which are short there, share memory that is kept."""
        whole = len(given[0]) == len(part.params) and given[0][0] is part.params[0]
        if whole and part.wide:
            return part.wide
        elements, device = sum(p.numel() for p in given[0]), given[0][0].device
        kept = device.type == "cpu" and elements <= _MOST_ON_CPU
        make = partial(torch.empty, dtype=part.dtype, device=device)
        if kept and part.dtype not in self.scratch:
            self.scratch[part.dtype] = [make(_MOST_ON_CPU) for _ in given]
        flats = [flat[:elements] for flat in self.scratch[part.dtype]] if kept else [make(elements) for _ in given]
        wide = [_Copies(flat, _unflatten(flat, of_kind)) for flat, of_kind in zip(flats, given)]
        if whole and kept:
            part.wide.extend(wide)
        return wide


def objects(param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> list[Any]:
    """What would make a bucket stale if it were replaced."""
    of_groups = chain.from_iterable(group["params"] for group in param_groups)
    return [*param_groups, *of_groups, *state, *chain.from_iterable(of_p.values() for of_p in state.values())]


_look = attrgetter("layout", "dtype", "device", "shape")


def _guard(tensors: Sequence[Tensor]) -> Any:
    """Torch's own check that others are like these; None where this version has it not, or not for such tensors."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError, SystemError):
        return None


def _kinds(tensors: Sequence[Tensor]) -> list[Any]:
    """What a bucket was made for; that memory overlaps it was asked then, and another backend steps what is not lazy."""
    strides = [t.stride() if t.layout == torch.strided else () for t in tensors]
    lazily = map(Tensor.is_neg, tensors), map(Tensor._is_zerotensor, tensors)
    return list(zip(map(type, tensors), map(_look, tensors), strides, *lazily))


def _fusible(rule: Rule, member: ParamEntry) -> bool:
    """Whether torch's fused step, which walks memory, can step it.

    In 32 and 64 bits its last bits depend on where in its tensor an element is, so that it is for 16 bits alone.
    """
    p = member.tensor
    if p.dtype not in SIXTEEN_BITS or not fused_in_16_bits(rule.name, p.device.type):
        return False
    tensors: list[Any] = [p, p.grad, *(member.states or ())]
    dense = p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)
    as_it_is = all(type(t) in _PLAIN and t.dtype == p.dtype and t.stride() == p.stride() for t in tensors)
    return dense and as_it_is and not tensors[1].is_neg()


def _runs(tensors: Sequence[Tensor], most: int) -> Iterator[slice]:
    """Runs of tensors of so many elements together, or of one that has more."""
    start = elements = 0
    for place, tensor in enumerate(tensors):
        if place > start and elements + tensor.numel() > most:
            yield slice(start, place)
            start, elements = place, 0
        elements += tensor.numel()
    yield slice(start, len(tensors))


def _pieces(given: list[Any], runs: list[slice]) -> Iterator[list[Any]]:
    """Parameters, gradients and states in these runs, and of a tensor that is larger than a run as much at a time."""
    for run in runs:
        some = [of_kind[run] for of_kind in given] if len(runs) > 1 else given
        p = some[0][0]
        count = math.ceil(p.numel() / _MOST_ON_CPU) if p.is_cpu and type(p) in _PLAIN else 1
        if count > 1 and all(of_kind[0].is_contiguous() for place, of_kind in enumerate(some) if place != 1):
            for piece in zip(*[tensor.reshape(-1).chunk(count) for (tensor,) in some]):
                yield [[tensor] for tensor in piece]
        else:
            yield some


def _together(rule: str, row: int, fusible: bool, members: list[ParamEntry]) -> Iterator[_Together]:
    """Lists of members that are alike."""
    p, on_cpu = members[0].tensor, members[0].tensor.is_cpu
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    of_one: list[Any] = [p, p.grad, *(members[0].states or ())]
    converted = any(tensor.dtype != dtype for tensor in of_one)
    by_operations = p.dtype in SIXTEEN_BITS and all(tensor.dtype == p.dtype for tensor in of_one)
    by_operations = by_operations and not fused_in_16_bits(rule, p.device.type)
    by_operations = by_operations and by_operations_in_16_bits(rule, p.dtype)
    most = most_at_once = _MOST_ON_CPU if on_cpu else _MOST
    if on_cpu and (by_operations or not converted):
        most = _LONGEST_ON_CPU // 4 if by_operations and rule != "sgd" else _LONGEST_ON_CPU  # a quarter with new memory
    for run in _runs([member.tensor for member in members], most):
        some = members[run]
        params = [member.tensor for member in some]
        states = [list(of_slot) for of_slot in zip(*[member.states or () for member in some])]
        steps = [member.step for member in some if member.step is not None]
        runs = list(_runs(params, most_at_once))
        yield _Together(row, some, params, states, steps, dtype, converted, by_operations, fusible, [], runs)


def bucket(
    rule: Rule,
    members: Sequence[ParamEntry],
    param_groups: list[dict[str, Any]],
    state: Mapping[Tensor, Any],
) -> Bucket:
    """The parameters, and what must not have changed until the next step."""
    return Bucket(rule, members, param_groups, state)
