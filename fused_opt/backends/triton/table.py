"""The tables of one launch: made once, checked in every step, and made anew when something moved."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate, compress
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rule import UNKNOWN, Rule
from .. import native
from ..interface import (
    CautiousArgs,
    Fold,
    Kind,
    NoiseArgs,
    Norm,
    ParamEntry,
    PartNorms,
    RatioArgs,
    RoundingArgs,
    StepArgs,
    StepKey,
    is_known,
)
from . import kernel, rules
from .counts import Counts

INTERPRETED = not isinstance(kernel.update, triton.JITFunction)  # decided from the environment when Triton was imported
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CODE_TYPES = {torch.int8: tl.int8, torch.uint8: tl.uint8}
KEPT_TYPES = {torch.int16: tl.int16, torch.float32: tl.float32}
#: As nvcc compiles csrc/cuda/: a multiplication and an addition are two roundings, so the bits are the native backend's.
OPTIONS = {"enable_fp_fusion": False}
NO_RATIO, NO_NOISE, NO_FOLD = (0, 1.0, 0.0, 0.0, 0), NoiseArgs(0.0, False, 0, 0), Fold(0.0, 0.0, False, False)
NO_MASKS, NO_ROUNDING = CautiousArgs(False, False, False), RoundingArgs(0, 0)

_grad, _dtype, _shape, _version = map(attrgetter, ("grad", "dtype", "shape", "_version"))


def arithmetic(dtype: torch.dtype) -> Any:
    """In what parameters of a dtype are computed."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def launch(function: Any, device: torch.device, programs: int, *arguments: Any) -> None:
    """Run that many programs on the device, on torch's current stream there."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        function[(programs,)](*arguments, **OPTIONS)


class Table:
    """The parameters of one launch: on one device, alike in their dtypes, and with a gradient when this was made.

    Args:
        rule: what steps them.
        members: the parameters.
        places: where they are in their bucket.
    """

    def __init__(self, rule: Rule, members: Sequence[ParamEntry], places: list[int]) -> None:
        self.members, self.places = members, places
        self.parameters = [m.tensor for m in members]
        self.device = self.parameters[0].device
        # A tensor that is moved no longer has its alias's address, and the alias keeps that memory from being reused.
        self.held = [*self.parameters, *(s for m in members for s in m.states or ())]
        self.held += [kept for m in members for kept in (m.average, m.exact, *m.scales) if kept is not None]
        self.aliases = [tensor.detach() for tensor in self.held]
        gradients = [_grad(p) for p in self.parameters]
        self.layouts = self._layouts(gradients)
        # Where the compiled core is installed it looks at all of them in one call, a fifth of the time.
        self.looks = native.looks(self.parameters, self.held[len(members) :])
        self.groups = [m.group for m in members]
        self.distinct_groups = list(dict.fromkeys(self.groups))
        self.counts = Counts(members)
        self.nothing = [UNKNOWN] * len(members)  # norms that were not set
        self.unknown = array("d", 2 * self.nothing).tobytes()
        self.nobody: list[int | None] = [None] * len(members)

        columns, self.chunks = self._columns()
        self.tensors = torch.tensor(columns, dtype=torch.int64, device="cpu").to(self.device)
        # Of even width, so that every row is aligned to 16 bytes: Triton compiles a kernel anew for other alignments.
        self.sums = torch.zeros(4, self.chunks + self.chunks % 2, dtype=torch.float64, device=self.device)
        self.ratios = torch.ones(len(members), dtype=torch.float64, device=self.device)
        self.stepped = [False] * len(members)  # in the last step
        self.stream = self._stream()
        self.turn = 0  # which of the first two rows of `sums` holds the carried sums of squares
        self.versions = self.nobody  # of the weights whose sums those are; None: of none

        self.function = getattr(rules, rule.name)
        self.p_dtype = self.parameters[0].dtype
        states = members[0].states or ()
        types = TYPES | CODE_TYPES
        self.types = tuple(types[t.dtype] for t in (self.parameters[0], gradients[0], *states))
        self.average_type = None if members[0].average is None else TYPES[members[0].average.dtype]
        self.kept = None if members[0].exact is None else KEPT_TYPES[members[0].exact.dtype]
        self.coefficients = rule.coefficient_count

    def _columns(self) -> tuple[list[list[int]], int]:
        """The table of what stays as it is from step to step, and the number of all chunks."""
        members = self.members
        sizes = [kernel.chunk_size(p.numel()) for p in self.parameters]
        *firsts, chunks = accumulate((max(1, -(-p.numel() // n)) for p, n in zip(self.parameters, sizes)), initial=0)
        addresses = [[s.data_ptr() for s in of_slot] for of_slot in zip(*(m.states or () for m in members))]
        columns: list[list[int]] = [
            firsts,
            [p.numel() for p in self.parameters],
            sizes,
            [p.ndim for p in self.parameters],
            [m.index for m in members],
            array("q", array("d", [m.lr_scale for m in members]).tobytes()).tolist(),
            array("q", array("d", [m.decay_scale for m in members]).tobytes()).tolist(),
            [p.data_ptr() for p in self.parameters],
            [0 if m.average is None else m.average.data_ptr() for m in members],
            [0 if m.exact is None else m.exact.data_ptr() for m in members],
            *addresses,
        ]
        if members[0].coded:
            columns += [
                [0 if s is None else s.data_ptr() for s in of_slot] for of_slot in zip(*(m.scales for m in members))
            ]
        return columns, chunks

    @staticmethod
    def _layouts(gradients: Sequence[Tensor]) -> list[list[Any]]:
        """What must not change of the gradients, of which there are new ones every step."""
        looks = (type, _dtype, _shape, Tensor.stride, Tensor.is_neg)
        return [list(map(look, gradients)) for look in looks]

    def collect_gradients(self, keys: dict[StepKey, int]) -> bool:
        """Find the gradients, and number their keys; False: something has changed."""
        found = self._look() if self.looks is None else self.looks.gradients()
        if found is None or self.counts.moved():
            return False
        here = [address is not None for address in found] if None in found else None
        self.here = here  # None: every one
        counts = self.counts.read()
        scalars = self.counts.read_scalars()
        earlier = self.counts.earlier
        if (
            self.here is None
            and not any(earlier)
            and counts.count(counts[0]) == scalars.count(scalars[0]) == len(counts)
        ):
            key = (counts[0] + 1, scalars[0], 0)
            row_of = {group: keys.setdefault((group, *key), len(keys)) for group in self.distinct_groups}
            self.rows, self.gradients = list(map(row_of.__getitem__, self.groups)), found
        else:
            self.rows = [
                keys.setdefault((group, n + 1, scalar, before), len(keys)) if address is not None else -1
                for address, group, n, scalar, before in zip(found, self.groups, counts, scalars, earlier)
            ]
            self.gradients = [address or 0 for address in found]
        self.parts = self.grad2 = self.nothing
        self.summed = False  # whether `sums` holds those of the gradients
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

    def _upload(self, wanted: list[int], args: Sequence[StepArgs]) -> None:
        """Tell the device what is new in this step."""
        if (stream := self._stream()) != self.stream:
            self.stream = stream
            for made_on_another in (
                self.tensors,
                self.sums,
                self.ratios,
            ):  # or they might be freed while this one reads them
                made_on_another.record_stream(stream)
        words = array("q", self.gradients + self.rows + wanted).tobytes()
        numbers = self.unknown if self.parts is self.nothing else array("d", self.parts + self.grad2).tobytes()
        host = torch.frombuffer(bytearray(b"".join((words, numbers, *map(pack, args)))), dtype=torch.int64)
        if self.device.type == "cuda":  # torch keeps the pinned memory until the copy is done
            host = host.pin_memory()
        self.words = host.to(self.device, non_blocking=True)

    def _tables(self) -> tuple[Tensor, ...]:
        """The first arguments of the kernels."""
        return self.tensors, self.tensors.view(torch.float64), self.words, self.words.view(torch.float64)

    def _sum(self, wanted: int, masked: bool = False) -> None:
        """Sum what the words say of every tensor, as far as it is in the bits of `wanted`."""
        launch(
            kernel.norms, self.device, self.chunks, *self._tables(), self.sums[self.turn], self.sums[2], self.sums[3],
            len(self.members), self.function, self.types, arithmetic(self.p_dtype), self.coefficients, wanted, masked,
            self.kept,
        )  # fmt: skip

    def grad_norm2(self) -> float:
        """Sum of squares of the gradients."""
        wanted = [Norm.GRADIENT * (row >= 0 and not is_known(known)) for row, known in zip(self.rows, self.grad2)]
        known2 = sum(known for row, known in zip(self.rows, self.grad2) if row >= 0 and is_known(known))
        if not any(wanted):
            return known2
        self.sums[2].zero_()
        self._upload(wanted, ())
        self._sum(Norm.GRADIENT)
        self.summed = True
        return known2 + self.sums[2].sum().item()

    def run(self, args: Sequence[StepArgs]) -> None:
        """Step every parameter that has a gradient."""
        self.stepped = [row >= 0 for row in self.rows]
        if max(self.rows) < 0:
            return
        carries = [False] * len(self.members)
        wanted = [0] * len(self.members)
        if any(_needs_sums(of_row) for of_row in args):
            versions = list(map(_version, self.parameters))
            for i, row in enumerate(self.rows):
                if row >= 0:
                    valid = self.versions[i] == versions[i]
                    carries[i], wanted[i] = self._want(self.members[i], args[row], valid, self.parts[i], self.grad2[i])
        self._upload(wanted, args)
        masked = any(of_row.cautious is not None or of_row.independent_decay for of_row in args)
        if any(wanted):
            together = 0
            for bits in wanted:
                together |= bits
            directions = (
                int(together & Norm.DIRECTION) if together & Norm.AGREEMENT else 0
            )  # a mask's scale enters them
            self._sum(int(together) & ~directions, masked)
            if directions:
                self._sum(directions, masked)
        folds = any(of_row.fold is not None for of_row in args)
        launch(
            kernel.update, self.device, self.chunks, *self._tables(), self.sums[self.turn], self.sums[1 - self.turn],
            self.sums[2], self.sums[3], self.ratios, len(self.members), self.function, self.types,
            self.average_type if folds else None, arithmetic(self.p_dtype), self.coefficients,
            any(of_row.noise is not None for of_row in args), any(carries), masked,
            any(of_row.rounding is not None for of_row in args), self.kept,
        )  # fmt: skip
        self._advance(carries, args)

    def written_states(self) -> list[Tensor]:
        """What a step has written besides the parameters, and autograd has not seen."""
        stepped = [member for member, row in zip(self.members, self.rows) if row >= 0]
        written = [
            tensor
            for m in stepped
            for tensor in (*(m.states or ()), *m.scales, m.average, m.scalar, m.exact)
            if tensor is not None
        ]
        return written + [m.step for m in stepped if m.step is not None and self.counts.cells]

    def _want(self, member: ParamEntry, args: StepArgs, valid: bool, parts: float, grad2: float) -> tuple[bool, int]:
        """Whether the norm of the new weights is carried, and what must be summed before they are made."""
        ratio, noise = args.ratio, args.noise
        kind = ratio.kind if ratio is not None and member.tensor.ndim > ratio.exempt else None
        carries = kind is not None or (noise is not None and noise.relative and noise.sigma > 0)
        wanted = Norm.WEIGHT * (carries and not valid)
        if kind == Kind.LAMB:
            wanted |= Norm.DIRECTION
        elif kind and not (kind == Kind.CLARS and is_known(parts)) and not is_known(grad2) and not self.summed:
            wanted |= Norm.GRADIENT
        if args.cautious is not None and args.cautious.scaled:
            wanted |= Norm.AGREEMENT
        return carries, int(wanted)

    def _advance(self, carries: list[bool], args: Sequence[StepArgs]) -> None:
        """Count the step, here and for autograd."""
        self.counts.advance(self.here)
        if self.counts.scalars:
            self.counts.set_scalars([None if row < 0 else args[row].coefficients[-1] for row in self.rows])
        stepped = self.parameters if self.here is None else list(compress(self.parameters, self.here))
        # Autograd sees no writes through addresses; without this a backward through the old weights would not be detected.
        torch.autograd.graph.increment_version(stepped)
        self.turn = 1 - self.turn
        self.versions = self.nobody
        if any(carries):
            self.versions = [
                m.tensor._version if carried and m.exclusive else None for m, carried in zip(self.members, carries)
            ]


def _needs_sums(args: StepArgs) -> bool:
    """Whether a step with these arguments may have to sum something first."""
    relative = args.noise is not None and args.noise.relative
    return args.ratio is not None or relative or (args.cautious is not None and args.cautious.scaled)


def pack(args: StepArgs) -> bytes:
    """A row of arguments as the kernels read it."""
    coefficients = [*args.coefficients, *[0.0] * (kernel.MOST_COEFFICIENTS - len(args.coefficients))]
    ratio: RatioArgs | tuple[float, ...] = args.ratio or NO_RATIO
    return kernel.ROW_FORMAT.pack(
        *args[:4], *coefficients, *ratio, *(args.noise or NO_NOISE), *(args.fold or NO_FOLD), args.independent_decay,
        *(args.cautious or NO_MASKS), args.rounding is not None, *(args.rounding or NO_ROUNDING),
    )  # fmt: skip
