"""The tables of one launch: made once, checked in every step, and made anew when something moved."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rule import UNKNOWN, Rule
from .. import native
from ..interface import Kind, Norm, ParamEntry, PartNorms, StepKey, is_known
from . import columns, device, kernel, rules
from .arguments import Row, pack
from .device import Mirror, keep

INTERPRETED = not isinstance(kernel.update, triton.JITFunction)  # decided from the environment when Triton was imported
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CODE_TYPES = {torch.int8: tl.int8, torch.uint8: tl.uint8}
KEPT_TYPES = {torch.int16: tl.int16, torch.float32: tl.float32}

_grad, _dtype, _shape, _version = map(attrgetter, ("grad", "dtype", "shape", "_version"))


class Scalars(NamedTuple):
    """The first words of what is sent: addresses on the device, 0 for what is not there, and what to clip to."""

    found_inf: int = 0
    grad_scale: int = 0
    norm2: int = 0
    max_norm: float = 0.0
    known: int = 0  # the norms of whole tensors


def arithmetic(dtype: torch.dtype) -> Any:
    """In what parameters of a dtype are computed."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def at_step(rule: Rule) -> Any:
    """What makes the coefficients of a step on the device; None: they are the same in every one."""
    return getattr(rules, f"{rule.name}_at_step", None)


class Table:
    """The parameters of one launch: on one device, alike in their dtypes, and with a gradient when this was made.

    Args:
        rule: what steps them.
        members: the parameters.
        places: where they are in their bucket.
        groups: of the whole bucket.
    """

    def __init__(self, rule: Rule, members: Sequence[ParamEntry], places: list[int], groups: int = 1) -> None:
        self.members, self.places = members, places
        self.parameters = [m.tensor for m in members]
        self.device = self.parameters[0].device
        # A tensor that is moved no longer has its alias's address, and the alias keeps that memory from being reused.
        self.held = [*self.parameters, *(s for m in members for s in m.states or ())]
        beside = (kept for m in members for kept in (m.average, m.exact, m.step, m.scalar, *m.scales))
        self.held += [kept for kept in beside if kept is not None]
        self.aliases = [tensor.detach() for tensor in self.held]
        gradients = [_grad(p) for p in self.parameters]
        self.layouts = self._layouts(gradients)
        # Where the compiled core is installed it looks at all of them in one call, a fifth of the time.
        self.looks = native.looks(self.parameters, self.held[len(members) :])
        self.counts_steps = rule.counts_steps
        self._find_keys()
        self.nothing = [UNKNOWN] * len(members)  # norms that were not set
        self.nobody: list[int | None] = [None] * len(members)

        words, self.chunks = self._columns()
        self.tensors = torch.tensor(words, dtype=torch.int64, device="cpu").to(self.device)
        size = (
            columns.HEADER.value + columns.ROWS.value * len(members) + columns.WIDTH.value * 2 * groups
        )  # first steps, and others
        self.ahead, self.step = Mirror(size, self.device), Mirror(size, self.device)  # of sums ahead of it, and of it
        # Of even width, so that every row is aligned to 16 bytes: Triton compiles a kernel anew for other alignments.
        self.sums = torch.zeros(4, self.chunks + self.chunks % 2, dtype=torch.float64, device=self.device)
        self.ratios = torch.ones(2 * len(members), dtype=torch.float64, device=self.device)
        self.counts = torch.zeros(columns.GROUPS.value + 4 * groups, dtype=torch.int64, device=self.device)
        self.stepped = [False] * len(members)  # in the last step
        self.memory = (self.tensors, self.sums, self.ratios, self.counts, *self.ahead.table, *self.step.table)
        self.stream = self._stream()
        self.captured = False  # a graph's replays write the weights, and nobody sees it
        self.turn = 0  # which of the first two rows of `sums` holds the carried sums of squares
        self.versions = self.nobody  # of the weights whose sums those are; None: of none
        self.needs_key: Any = None

        self.rule, self.at_step = getattr(rules, rule.name), at_step(rule)
        self.p_dtype = self.parameters[0].dtype
        types = TYPES | CODE_TYPES
        self.types = tuple(types[t.dtype] for t in (self.parameters[0], gradients[0], *(members[0].states or ())))
        self.average_type = None if members[0].average is None else TYPES[members[0].average.dtype]
        self.kept = None if members[0].exact is None else KEPT_TYPES[members[0].exact.dtype]
        self.coefficients = rule.coefficient_count

    def _columns(self) -> tuple[list[int], int]:
        """What stays as it is from step to step, and the number of all chunks."""
        members = self.members
        sizes = [kernel.chunk_size(p.numel()) for p in self.parameters]
        *firsts, chunks = accumulate((max(1, -(-p.numel() // n)) for p, n in zip(self.parameters, sizes)), initial=0)

        def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
            return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

        of_states = [addresses(of_slot) for of_slot in zip(*(m.states or () for m in members))]
        of_scales = [addresses(of_slot) for of_slot in zip(*(m.scales for m in members))] if members[0].coded else []
        layouts = [_layout(m) for m in members]
        self.cut = any(m.noisy and (m.layout is not None or not m.tensor.is_contiguous()) for m in members)
        before = (columns.STATES.value + len(of_states) + len(of_scales)) * len(members)
        *begins, _ = accumulate(map(len, layouts), initial=before)
        table: list[list[int]] = [
            firsts,
            [p.numel() for p in self.parameters],
            sizes,
            [p.ndim for p in self.parameters],
            [m.index for m in members],
            array("q", array("d", [m.lr_scale for m in members]).tobytes()).tolist(),
            array("q", array("d", [m.decay_scale for m in members]).tobytes()).tolist(),
            addresses(self.parameters),
            addresses([m.average for m in members]),
            addresses([m.exact for m in members]),
            addresses([m.step for m in members]),
            addresses([m.scalar for m in members]),
            begins if self.cut else [0] * len(members),
            self.places,
            *of_states,
            *of_scales,
            *(layouts if self.cut else []),
        ]
        return [word for column in table for word in column], chunks

    @staticmethod
    def _layouts(gradients: Sequence[Tensor]) -> list[list[Any]]:
        """What must not change of the gradients, of which there are new ones every step."""
        looks = (type, _dtype, _shape, Tensor.stride, Tensor.is_neg)
        return [list(map(look, gradients)) for look in looks]

    def _find_keys(self) -> None:
        """The key of every member; where there is no count the first step is 1, and every other one 2."""
        members = self.members
        self.any_new = any(m.states_are_new for m in members)
        counts = [UNKNOWN if self.counts_steps else 1.0 if m.states_are_new else 2.0 for m in members]
        self.keys: list[StepKey] = [(m.group, n, 1.0, 0) for m, n in zip(members, counts)]
        self.distinct = list(dict.fromkeys(self.keys))
        self.numbered: list[int] | None = None

    def collect_gradients(self, keys: dict[StepKey, int]) -> bool:
        """Find the gradients, and number their keys; False: something has changed."""
        found = self._look() if self.looks is None else self.looks.gradients()
        if found is None:
            return False
        if None in found:
            self.here: list[bool] | None = [address is not None for address in found]
            self.gradients = [address or 0 for address in found]
            self.rows = [keys.setdefault(k, len(keys)) if here else -1 for k, here in zip(self.keys, self.here)]
        else:
            self.here, self.gradients = None, found
            numbered = [keys.setdefault(key, len(keys)) for key in self.distinct]
            if numbered != self.numbered:
                row_of = dict(zip(self.distinct, numbered))
                self.numbered, self.all_rows = numbered, [row_of[key] for key in self.keys]
            self.rows = self.all_rows
        self.parts = self.grad2 = self.nothing
        self.summed = Norm(0)  # of what members want, what is in `sums`
        return True

    def _look(self) -> list[int | None] | None:
        """The address of every gradient, None where there is none; or None: a tensor has moved, or lies otherwise."""
        gradients, layouts = list(map(_grad, self.parameters)), self.layouts
        here = [gradient is not None for gradient in gradients]
        present = list(compress(gradients, here))
        if not all(here):
            layouts = [list(compress(looks, here)) for looks in layouts]
        try:
            if self._layouts(present) != layouts or not all(map(Tensor.is_set_to, self.held, self.aliases)):
                return None
        except RuntimeError:  # a sparse tensor has no strides
            return None
        return [None if gradient is None else gradient.data_ptr() for gradient in gradients]

    def set_part_norms(self, norms: Sequence[PartNorms | None]) -> None:
        """The sum of the norms of every gradient's parts, and its sum of squares, where known."""
        self.parts, self.grad2 = [*self.parts], [*self.grad2]
        for i, known in enumerate(norms):
            if known is not None:
                self.parts[i], self.grad2[i] = known

    def _stream(self) -> Any:
        """Torch's current one."""
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _send(
        self,
        mirror: Mirror,
        wanted: Sequence[int],
        rows: Sequence[Row],
        scalars: Scalars,
        total: int = 0,
        add: bool = False,
    ) -> tuple[Tensor, ...]:
        """Tell the device what is new in this step; returns the first arguments of the kernels."""
        if device.capturing(self.device):
            if not self.captured:
                self.captured = True
                keep(*self.memory)
        elif (stream := self._stream()) != self.stream:
            self.stream = stream
            for made_on_another in self.memory:  # or it might be freed while this one reads it
                made_on_another.record_stream(stream)

        def words() -> bytes:
            floats = array("d", [scalars.max_norm]).tobytes()
            head = array("q", [*scalars[:3], 0, scalars.known, len(rows), total, add]).tobytes()
            at = 8 * columns.MAX_NORM.value
            of_tensors = array("q", [*self.gradients, *self.rows, *wanted]).tobytes()
            norms = array("d", self.parts + self.grad2).tobytes()
            return b"".join((head[:at], floats, head[at + 8 :], of_tensors, norms, *map(pack, rows)))

        key = (scalars, total, add, self.gradients, self.rows, wanted, self.parts, self.grad2, [*rows])
        table = mirror.send(key, words)
        return self.tensors, self.tensors.view(torch.float64), *table, self.counts

    def _sum(self, tables: tuple[Tensor, ...], wanted: int, total: bool = False, masked: bool = False) -> None:
        """Sum what the words say of every tensor, as far as it is in the bits of `wanted`."""
        device.launch(
            kernel.norms, self.device, self.chunks, *tables, self.sums[self.turn], self.sums[2], self.sums[3],
            len(self.members), self.rule, self.at_step, self.types, arithmetic(self.p_dtype), self.coefficients, total,
            int(wanted), masked, self.kept,  # Triton's compiler takes no Norm in a condition
        )  # fmt: skip

    def _sum_all(self, tables: tuple[Tensor, ...], wanted: Sequence[int], rows: Sequence[Row]) -> None:
        """Sum whatever is wanted, in two passes where a mask's scale enters directions."""
        together = 0
        for bits in set(wanted):
            together |= bits
        if not together:
            return
        masked = any(row.masked for row in rows)
        directions = int(together & Norm.DIRECTION) if together & Norm.AGREEMENT else 0
        self._sum(tables, together & ~directions, masked=masked)
        if directions:
            self._sum(tables, directions, masked=masked)

    def sum_gradients(self, norm2: Tensor, add: bool) -> None:
        """Put the sum of squares of the gradients into ``norm2``, or add it to what is there."""
        wanted = [Norm.GRADIENT * (row >= 0 and not is_known(known)) for row, known in zip(self.rows, self.grad2)]
        known2 = sum(known for row, known in zip(self.rows, self.grad2) if row >= 0 and is_known(known))
        if any(wanted):
            self._sum(self._send(self.ahead, wanted, (), Scalars(), norm2.data_ptr(), add), Norm.GRADIENT, total=True)
            self.summed |= Norm.GRADIENT
        elif not add:
            norm2.zero_()
        if known2:
            norm2.add_(known2)

    def norms(self, rows: Sequence[Row], scalars: Scalars, gradients: bool, directions: bool, found: Tensor) -> None:
        """Put the norms that a step with these arguments needs into the rows of ``found`` that the members' places are."""
        among = ~Norm(0) if directions else ~Norm.DIRECTION
        wanted = [bits & among for bits in self._wanted(rows)]
        if gradients:
            unknown = zip(wanted, self.rows, self.grad2)
            wanted = [bits | (Norm.GRADIENT * (row >= 0 and not is_known(known))) for bits, row, known in unknown]
        tables = self._send(self.ahead, wanted, rows, scalars)
        self._sum_all(tables, wanted, rows)
        device.launch(
            kernel.collect, self.device, len(self.members), self.tensors, tables[2], self.sums[self.turn], self.sums[2],
            found, len(self.members),
        )  # fmt: skip
        self.summed |= Norm.WEIGHT | Norm.GRADIENT | Norm.AGREEMENT | (Norm.DIRECTION if directions else Norm(0))

    def run(self, rows: Sequence[Row], scalars: Scalars) -> bool:
        """Step every parameter that has a gradient; False: none has."""
        self.stepped = [True] * len(self.members) if self.here is None else self.here
        if max(self.rows) < 0:
            return False
        carried = any(row.sums for row in rows)
        wanted = self._wanted(rows) if carried else [0] * len(self.members)
        tables = self._send(self.step, wanted, rows, scalars)
        if carried:
            self._sum_all(tables, wanted, rows)
        carried = carried and any(self.carries)
        device.launch(
            kernel.update, self.device, self.chunks, *tables, self.sums[self.turn], self.sums[1 - self.turn],
            self.sums[2], self.sums[3], self.ratios, len(self.members), self.rule, self.at_step, self.types,
            self.average_type if any(row.averages for row in rows) else None, arithmetic(self.p_dtype), self.coefficients,
            self.counts_steps, any(row.args.counted is not None for row in rows), self.cut,
            any(row.noise is not None for row in rows), carried, any(row.masked for row in rows),
            any(row.args.rounding is not None for row in rows), self.kept,
        )  # fmt: skip
        self._advance(carried)
        return True

    def _wanted(self, rows: Sequence[Row]) -> list[int]:
        """For every member what must be summed before it is stepped; finds out of which the weights' norm is carried."""
        by = [(row.args.ratio, row.carries, row.args.cautious) for row in rows]
        if (by, self.rows, self.parts, self.grad2) != self.needs_key:
            self.needs_key = by, self.rows, self.parts, self.grad2
            needs = [self._need(i, rows[row]) if row >= 0 else Norm(0) for i, row in enumerate(self.rows)]
            self.carries = [Norm.WEIGHT in need for need in needs]
            self.keeps = [carried and m.exclusive for carried, m in zip(self.carries, self.members)]
            self.beside = [int(need & ~Norm.WEIGHT) for need in needs]
        wanted, again = self.beside, self.captured or device.capturing(self.device)
        versions = list(map(_version, self.parameters))
        if again or versions != self.versions:
            weights = (carried and (again or a != b) for carried, a, b in zip(self.carries, versions, self.versions))
            wanted = [bits | (Norm.WEIGHT.value * wants) for bits, wants in zip(wanted, weights)]
        return [bits & ~self.summed.value for bits in wanted] if self.summed else wanted

    def _need(self, i: int, row: Row) -> Norm:
        """The norms that a step of a member needs."""
        ratio, need = row.args.ratio, Norm(0)
        kind = ratio.kind if ratio is not None and self.parameters[i].ndim > ratio.exempt else None
        if kind is not None or row.carries:
            need |= Norm.WEIGHT
        if kind == Kind.LAMB:
            need |= Norm.DIRECTION
        elif kind and not (kind == Kind.CLARS and is_known(self.parts[i])) and not is_known(self.grad2[i]):
            need |= Norm.GRADIENT
        if row.args.cautious is not None and row.args.cautious.scaled:
            need |= Norm.AGREEMENT
        return need

    def _advance(self, carried: bool) -> None:
        """Count the step, here and for autograd."""
        if self.any_new:
            for member in self.members if self.here is None else compress(self.members, self.here):
                member.states_are_new = False
            self._find_keys()
        stepped = self.parameters if self.here is None else list(compress(self.parameters, self.here))
        # Autograd sees no writes through addresses; without this a backward through the old weights would not be detected.
        torch.autograd.graph.increment_version(stepped)
        self.turn = 1 - self.turn
        self.versions = self.nobody
        if carried:
            versions = map(_version, self.parameters)
            self.versions = [version if kept else None for version, kept in zip(versions, self.keeps)]

    def written_states(self) -> list[Tensor]:
        """What a step has written besides the parameters, and autograd has not seen."""
        written = (
            (*(m.states or ()), *m.scales, m.average, m.step, m.scalar, m.exact)
            for m, row in zip(self.members, self.rows)
            if row >= 0
        )
        return [tensor for of_member in written for tensor in of_member if tensor is not None]


def _layout(member: ParamEntry) -> list[int]:
    """Where its elements, in the order of its memory, are in the row-major order of the whole tensor: see noise.py."""
    p, layout = member.tensor, member.layout
    strides = torch.empty(p.shape, device="meta").stride() if layout is None else layout.strides
    dimensions = sorted(zip(p.stride(), p.shape, strides))
    run = p.numel() if layout is None else layout.run
    words = [
        0 if layout is None else layout.offset,
        run if p.is_contiguous() else 1,
        0 if layout is None else layout.elsewhere,
    ]
    return [*words, len(dimensions), *(word for _, size, stride in dimensions for word in (size, stride))]
