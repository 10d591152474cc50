"""The tables of one launch: made once, checked in every step, and made anew when something moved."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate, compress
from operator import or_
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
from .looks import Looks

INTERPRETED = not isinstance(kernel.update, triton.JITFunction)  # decided from the environment when Triton was imported
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CODE_TYPES = {torch.int8: tl.int8, torch.uint8: tl.uint8}
KEPT_TYPES = {torch.int16: tl.int16, torch.float32: tl.float32}
NO_NORM = Norm(0)


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
        of_all = ((*(m.states or ()), m.average, m.exact, m.step, m.scalar, *m.scales) for m in members)
        held = [tensor for of_one in of_all for tensor in of_one if tensor is not None]
        # Where the compiled core is installed it looks at all of them in one call, a fifth of the time.
        self.looks = native.looks(self.parameters, held) or Looks(self.parameters, held)
        self.gradients = b""  # their addresses, as it saw them last
        self.here: list[bool] | None = None  # which of them there were; None: all
        self.counts_steps = rule.counts_steps
        self._find_keys()
        self.nothing = [UNKNOWN] * len(members)  # norms that were not set
        self.nobody = [False] * len(members)
        self.everybody = [True] * len(members)
        self.nothing_wanted = [0] * len(members)

        words, self.chunks = self._columns()
        self.tensors = torch.tensor(words, dtype=torch.int64, device="cpu").to(self.device)
        self.layers = self.tensors.view(torch.float64)
        size = (
            columns.HEADER.value + columns.ROWS.value * len(members) + columns.WIDTH.value * 2 * groups
        )  # first steps, and others
        self.ahead, self.step = Mirror(size, self.device), Mirror(size, self.device)  # of sums ahead of it, and of it
        # Of even width, so that every row is aligned to 16 bytes: Triton compiles a kernel anew for other alignments.
        self.sums = torch.zeros(4, self.chunks + self.chunks % 2, dtype=torch.float64, device=self.device)
        self.of_weights = [self.sums[0], self.sums[1]]
        self.of_others = self.sums[2], self.sums[3]  # of gradients or directions, and of agreements
        self.ratios = torch.ones(2 * len(members), dtype=torch.float64, device=self.device)
        self.counts = torch.zeros(columns.GROUPS.value + 4 * groups, dtype=torch.int64, device=self.device)
        self.stepped = [False] * len(members)  # in the last step
        self.memory = (self.tensors, self.sums, self.ratios, self.counts, *self.ahead.table, *self.step.table)
        self.stream = self._stream()
        self.captured = False  # a graph's replays write the weights, and nobody sees it
        self.turn = 0  # which of the first two rows of `sums` holds the carried sums of squares
        self.kept = self.nobody  # of whom those sums are, as the last step left the weights
        self.needs_key: Any = None
        self.wanted_of: list[bool] | None = None
        self.passes_of: Sequence[int] | None = None
        self.flags_of: Sequence[Row] | None = None
        self.packed: dict[int, tuple[Sequence[Any], bytes]] = {}  # pieces of what was sent
        self.compiled: dict[Any, Any] = {}  # by Triton, for arguments like these and what differs in them

        self.rule, self.at_step = getattr(rules, rule.name), at_step(rule)
        types, p = TYPES | CODE_TYPES, self.parameters[0]
        assert p.grad is not None
        self.arithmetic = arithmetic(p.dtype)
        self.types = tuple(types[t.dtype] for t in (p, p.grad, *(members[0].states or ())))
        self.average_type = None if members[0].average is None else TYPES[members[0].average.dtype]
        self.exact_type = None if members[0].exact is None else KEPT_TYPES[members[0].exact.dtype]
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

    def _find_keys(self) -> None:
        """The key of every member; where there is no count the first step is 1, and every other one 2."""
        members = self.members
        self.any_new = any(m.states_are_new for m in members)
        counts = [UNKNOWN if self.counts_steps else 1.0 if m.states_are_new else 2.0 for m in members]
        self.keys: list[StepKey] = [(m.group, n, 1.0, 0) for m, n in zip(members, counts)]
        self.distinct = list(dict.fromkeys(self.keys))
        self.numbered: list[int] | None = None

    def collect_gradients(self, keys: dict[StepKey, int], with_states: bool = True) -> bool:
        """Find the gradients, and number their keys; False: something has changed."""
        if (found := self.looks.gradients(with_states)) is None:
            return False
        if found is not self.gradients:
            self.gradients, self.here = found, self.looks.here()
        if self.here is not None:
            self.rows = [keys.setdefault(k, len(keys)) if here else -1 for k, here in zip(self.keys, self.here)]
        else:
            numbered = [keys.setdefault(key, len(keys)) for key in self.distinct]
            if numbered != self.numbered:
                row_of = dict(zip(self.distinct, numbered))
                self.numbered, self.all_rows = numbered, [row_of[key] for key in self.keys]
            self.rows = self.all_rows
        self.parts = self.grad2 = self.nothing
        self.summed = NO_NORM  # of what members want, what is in `sums`
        return True

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

        def words() -> bytearray:
            head = _integers([*scalars[:3], 0, scalars.known, len(rows), total, add])
            at = 8 * columns.MAX_NORM.value
            return bytearray().join((
                head[:at], _floats([scalars.max_norm]), head[at + 8 :], self.gradients, self._packed(0, _integers, self.rows),
                self._packed(1, _integers, wanted), self._packed(2, _floats, self.parts),
                self._packed(3, _floats, self.grad2), self._packed(4, _rows, rows),
            ))  # fmt: skip

        # Lists that are those of the step before are not compared.
        key = (scalars, total, add, self.gradients, self.rows, wanted, self.parts, self.grad2, rows)
        return self.tensors, self.layers, *mirror.send(key, words), self.counts

    def _packed(self, place: int, make: Callable[[Sequence[Any]], bytes], of: Sequence[Any]) -> bytes:
        """Their words, which most often are those of the step before."""
        before, packed = self.packed.get(place, (None, b""))
        if before is not of:
            packed = make(of)
            self.packed[place] = of, packed
        return packed

    def _launch(self, function: Any, differs: tuple[Any, ...], *arguments: Any) -> None:
        """Launch, by what Triton has compiled before where it has; ``differs``: what may be another argument next time."""
        key = function.__name__, differs
        launched = self.compiled.get(key, function)
        self.compiled[key] = device.launch(launched, self.device, self.chunks, *arguments) or launched

    def _sum(self, tables: tuple[Tensor, ...], wanted: int, total: bool = False, masked: bool = False) -> None:
        """Sum what the words say of every tensor, as far as it is in these bits: Triton's compiler takes no Norm."""
        differs = total, wanted, masked
        self._launch(
            kernel.norms, differs, *tables, self.of_weights[self.turn], *self.of_others, len(self.members), self.rule,
            self.at_step, self.types, self.arithmetic, self.coefficients, *differs, self.exact_type,
        )  # fmt: skip

    def _sum_all(self, tables: tuple[Tensor, ...], wanted: Sequence[int], rows: Sequence[Row]) -> None:
        """Sum whatever is wanted, in two passes where a mask's scale enters directions."""
        if wanted is not self.passes_of:
            together = int(reduce(or_, set(wanted)))
            second = together & Norm.DIRECTION.value if together & Norm.AGREEMENT.value else 0
            self.passes_of, self.passes = wanted, [bits for bits in (together & ~second, second) if bits]
        for bits in self.passes:
            self._sum(tables, bits, masked=any([row.masked for row in rows]))  # noqa: C419  # of few

    def sum_gradients(self, norm2: Tensor, add: bool) -> None:
        """Put the sum of squares of the gradients into ``norm2``, or add it to what is there."""
        wanted = [Norm.GRADIENT * (row >= 0 and not is_known(known)) for row, known in zip(self.rows, self.grad2)]
        known2 = sum(known for row, known in zip(self.rows, self.grad2) if row >= 0 and is_known(known))
        if any(wanted):
            self._sum(
                self._send(self.ahead, wanted, (), Scalars(), norm2.data_ptr(), add), Norm.GRADIENT.value, total=True
            )
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
            kernel.collect, self.device, len(self.members), self.tensors, tables[2], self.of_weights[self.turn],
            self.of_others[0], found, len(self.members),
        )  # fmt: skip
        self.summed |= Norm.WEIGHT | Norm.GRADIENT | Norm.AGREEMENT | (Norm.DIRECTION if directions else Norm(0))

    def run(self, rows: Sequence[Row], scalars: Scalars) -> bool:
        """Step every parameter that has a gradient; False: none has."""
        if self.here is not None and not any(self.here):
            self.stepped = self.here
            return False
        self.stepped = self.everybody if self.here is None else self.here
        if rows is not self.flags_of:
            self.flags_of, (self.any_sums, *flags) = rows, [any(of_rows) for of_rows in zip(*map(_flags, rows))]
            self.flags = self.average_type if flags[0] else None, *flags[1:]
        wanted = self._wanted(rows) if self.any_sums else self.nothing_wanted
        tables = self._send(self.step, wanted, rows, scalars)
        if self.any_sums:
            self._sum_all(tables, wanted, rows)
        carried = self.any_sums and self.any_carries
        average, counted, noisy, masked, rounded = self.flags
        self._launch(
            kernel.update, (*self.flags, carried), *tables, self.of_weights[self.turn], self.of_weights[1 - self.turn],
            *self.of_others, self.ratios, len(self.members), self.rule, self.at_step, self.types, average, self.arithmetic,
            self.coefficients, self.counts_steps, counted, self.cut, noisy, carried, masked, rounded, self.exact_type,
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
            self.any_carries = any(self.carries)
            self.beside = [int(need & ~Norm.WEIGHT) for need in needs]
            self.wanted_of = None
        kept = self.nobody if self.captured or device.capturing(self.device) else self.kept
        if kept is not self.nobody and (written := self.looks.written()):
            kept = [k and place not in written for place, k in enumerate(kept)]
        if kept is not self.wanted_of:
            self.wanted_of = kept
            weights = [carried and not k for carried, k in zip(self.carries, kept)]
            self.wanted = [bits | (Norm.WEIGHT.value * wants) for bits, wants in zip(self.beside, weights)]
        return [bits & ~self.summed.value for bits in self.wanted] if self.summed else self.wanted

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
        self.kept = self.nobody
        if carried:
            self.kept = self.keeps
            self.looks.remember(self.keeps)

    def written_states(self) -> list[Tensor]:
        """What a step has written besides the parameters, and autograd has not seen."""
        written = (
            (*(m.states or ()), *m.scales, m.average, m.step, m.scalar, m.exact)
            for m, row in zip(self.members, self.rows)
            if row >= 0
        )
        return [tensor for of_member in written for tensor in of_member if tensor is not None]


def _integers(numbers: Sequence[int]) -> bytes:
    return array("q", numbers).tobytes()


def _floats(numbers: Sequence[float]) -> bytes:
    return array("d", numbers).tobytes()


def _rows(rows: Sequence[Row]) -> bytes:
    return b"".join(map(pack, rows))


def _flags(row: Row) -> tuple[bool, ...]:
    """What of a row the kernels are compiled for: sums ahead, averages, counts, noise, masks, rounding at random."""
    counted, rounded = row.args.counted is not None, row.args.rounding is not None
    return row.sums, row.averages, counted, row.noise is not None, row.masked, rounded


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
