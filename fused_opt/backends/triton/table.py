"""What one launch knows of its tensors: made once, checked in every step, and made anew when something moved."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, compress
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Member, Row
from ...rule import Rule
from . import kernel
from .counts import Counts
from .rules import RULES

INTERPRETED = not isinstance(kernel.update, triton.JITFunction)  # decided from the environment when Triton was imported
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LARS, CLARS, LAMB = 1, 2, 3
NO_ROW_EXTRAS: tuple[tuple[Any, ...], ...] = ((0, 1.0, 0.0, 0.0, 0), (0.0, False, 0, 0), (0.0, 0.0, False, False))

_grad, _dtype, _shape, _version = map(attrgetter, ("grad", "dtype", "shape", "_version"))


def arithmetic(dtype: torch.dtype) -> Any:
    """In what parameters of a dtype are computed."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def launch(function: Any, device: torch.device, programs: int, *arguments: Any) -> None:
    """Run that many programs on the device, on torch's current stream there."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            function[(programs,)](*arguments)
    else:
        function[(programs,)](*arguments)


class Table:
    """The parameters of one launch: on one device, alike in their dtypes, and with a gradient when this was made.

    Args:
        rule: what steps them.
        members: the parameters.
        places: where they are in their bucket.
    """

    def __init__(self, rule: Rule, members: Sequence[Member], places: list[int]) -> None:
        self.members, self.places = members, places
        self.parameters = [m.tensor for m in members]
        self.device = self.parameters[0].device
        # Whoever moves one of these parts it from its alias, and the alias keeps its memory from being given to another.
        self.held = [*self.parameters, *(s for m in members for s in m.states or ())]
        self.held += [m.average for m in members if m.average is not None]
        self.aliases = [tensor.detach() for tensor in self.held]
        gradients = [_grad(p) for p in self.parameters]
        self.layouts = self._layouts(gradients)
        self.groups = [m.group for m in members]
        self.distinct_groups = list(dict.fromkeys(self.groups))
        self.counts = Counts(members)
        self.nothing = [-1.0] * len(members)  # what is known of norms where nobody said anything
        self.unknown = array("d", 2 * self.nothing).tobytes()
        self.nobody: list[int | None] = [None] * len(members)

        sizes = [kernel.piece_size(p.numel()) for p in self.parameters]
        *firsts, self.pieces = accumulate(
            (max(1, -(-p.numel() // n)) for p, n in zip(self.parameters, sizes)), initial=0
        )
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
            *addresses,
        ]
        self.tensors = torch.tensor(columns, dtype=torch.int64).to(self.device)
        # Of even width, so that every row is aligned to 16 bytes: Triton compiles a kernel anew for other alignments.
        self.sums = torch.zeros(3, self.pieces + self.pieces % 2, dtype=torch.float64, device=self.device)
        self.ratios = torch.ones(len(members), dtype=torch.float64, device=self.device)
        self.turn = 0  # which of the first two rows of `sums` holds the carried sums of squares
        self.versions = self.nobody  # of the weights whose sums those are; None: of none

        self.function = RULES[rule.name]
        self.p_dtype = self.parameters[0].dtype
        states = members[0].states or ()
        self.types = tuple(TYPES[t.dtype] for t in (self.parameters[0], gradients[0], *states))
        self.average_type = None if members[0].average is None else TYPES[members[0].average.dtype]
        self.coefficients = len(self.function.arg_names) - len(self.types)

    @staticmethod
    def _layouts(gradients: Sequence[Tensor]) -> list[list[Any]]:
        """What must not change of the gradients, of which there are new ones every step."""
        looks = (type, _dtype, _shape, Tensor.stride, Tensor.is_neg)
        return [list(map(look, gradients)) for look in looks]

    def gather(self, keys: dict[tuple[int, float], int]) -> bool:
        """Find the gradients, and number the (group, step count) pairs; False: something has changed."""
        gradients, layouts = list(map(_grad, self.parameters)), self.layouts
        here = [gradient is not None for gradient in gradients]
        self.here = None if all(here) else here  # None: every one
        if self.here:
            gradients = list(compress(gradients, here))
            layouts = [list(compress(looks, here)) for looks in layouts]
        try:
            if self._layouts(gradients) != layouts or self.counts.moved():
                return False
            if not all(map(Tensor.is_set_to, self.held, self.aliases)):
                return False
        except RuntimeError:  # a sparse tensor has no strides
            return False
        counts, addresses = self.counts.read(), list(map(Tensor.data_ptr, gradients))
        if self.here is None and counts.count(counts[0]) == len(counts):
            row_of = {group: keys.setdefault((group, counts[0] + 1), len(keys)) for group in self.distinct_groups}
            self.rows, self.gradients = list(map(row_of.__getitem__, self.groups)), addresses
        else:
            pairs, left = zip(here, self.groups, counts), iter(addresses)
            self.rows = [keys.setdefault((group, n + 1), len(keys)) if is_here else -1 for is_here, group, n in pairs]
            self.gradients = [next(left) if is_here else 0 for is_here in here]
        self.parts = self.grad2 = self.nothing
        self.summed = False  # whether `sums` holds those of the gradients
        return True

    def know(self, norms: Sequence[tuple[float, float] | None]) -> None:
        """The sum of the norms of every gradient's parts, and its sum of squares, where known."""
        self.parts, self.grad2 = [*self.parts], [*self.grad2]
        for i, known in enumerate(norms):
            if known is not None:
                self.parts[i], self.grad2[i] = known

    def _upload(self, wanted: list[int], rows: Sequence[Row]) -> None:
        """Tell the device what is new in this step."""
        words = array("q", self.gradients + self.rows + wanted).tobytes()
        numbers = self.unknown if self.parts is self.nothing else array("d", self.parts + self.grad2).tobytes()
        host = torch.frombuffer(bytearray(b"".join((words, numbers, *map(pack, rows)))), dtype=torch.int64)
        if self.device.type == "cuda":  # torch keeps the pinned memory until the copy is done
            host = host.pin_memory()
        self.words = host.to(self.device, non_blocking=True)

    def _tables(self) -> tuple[Tensor, ...]:
        """The first arguments of the kernels."""
        return self.tensors, self.tensors.view(torch.float64), self.words, self.words.view(torch.float64)

    def _sum(self, wanted: int) -> None:
        """Sum what the words say of every tensor, all of it in the bits of `wanted`."""
        launch(
            kernel.norms, self.device, self.pieces, *self._tables(), self.sums[self.turn], self.sums[2],
            len(self.members), self.function, self.types, arithmetic(self.p_dtype), self.coefficients, wanted,
        )  # fmt: skip

    def grad_norm2(self) -> float:
        """Sum of squares of the gradients."""
        wanted = [kernel.WANT_GRAD.value * (row >= 0 and known == -1) for row, known in zip(self.rows, self.grad2)]
        known2 = sum(known for row, known in zip(self.rows, self.grad2) if row >= 0 and known != -1)
        if not any(wanted):
            return known2
        self.sums[2].zero_()
        self._upload(wanted, ())
        self._sum(kernel.WANT_GRAD.value)
        self.summed = True
        return known2 + self.sums[2].sum().item()

    def run(self, rows: Sequence[Row]) -> None:
        """Step every parameter that has a gradient."""
        if max(self.rows) < 0:
            return
        carries = [False] * len(self.members)
        wanted = [0] * len(self.members)
        if any(row.ratio is not None or (row.noise is not None and row.noise[1]) for row in rows):
            versions = list(map(_version, self.parameters))
            for i, row in enumerate(self.rows):
                if row >= 0:
                    valid = self.versions[i] == versions[i]
                    carries[i], wanted[i] = self._want(self.members[i], rows[row], valid, self.parts[i], self.grad2[i])
        self._upload(wanted, rows)
        if any(wanted):
            together = 0
            for bits in wanted:
                together |= bits
            self._sum(together)
        folds = any(row.average is not None for row in rows)
        launch(
            kernel.update, self.device, self.pieces, *self._tables(), self.sums[self.turn], self.sums[1 - self.turn],
            self.sums[2], self.ratios, len(self.members), self.function, self.types,
            self.average_type if folds else None, arithmetic(self.p_dtype), self.coefficients,
            any(row.noise is not None for row in rows), any(carries),
        )  # fmt: skip
        self._advance(carries)

    def _want(self, member: Member, row: Row, valid: bool, parts: float, grad2: float) -> tuple[bool, int]:
        """Whether the norm of the new weights is carried, and what must be summed before they are made."""
        kind = row.ratio[0] if row.ratio is not None and member.tensor.ndim > row.ratio[-1] else 0
        carries = kind != 0 or (row.noise is not None and row.noise[1] and row.noise[0] > 0)
        wanted = kernel.WANT_WEIGHT.value * (carries and not valid)
        if kind == LAMB:
            wanted |= kernel.WANT_DIRECTION.value
        elif kind and not (kind == CLARS and parts >= 0) and grad2 == -1 and not self.summed:
            wanted |= kernel.WANT_GRAD.value
        return carries, wanted

    def _advance(self, carries: list[bool]) -> None:
        """Count the step, here and for autograd."""
        self.counts.advance(self.here)
        stepped = self.parameters if self.here is None else list(compress(self.parameters, self.here))
        # Addresses tell autograd nothing; without this a backward through the old weights would pass unnoticed.
        torch.autograd.graph.increment_version(stepped)
        self.turn = 1 - self.turn
        self.versions = self.nobody
        if any(carries):
            self.versions = [p._version if carried else None for p, carried in zip(self.parameters, carries)]


def pack(row: Row) -> bytes:
    """A row as the kernels read it."""
    no_ratio, no_noise, no_fold = NO_ROW_EXTRAS
    coefficients = [*row.coefficients, *[0.0] * (8 - len(row.coefficients))]
    ratio, (sigma, relative, seed, t) = row.ratio or no_ratio, row.noise or no_noise
    return kernel.ROW_FORMAT.pack(
        row.lr, row.grad_scale, *coefficients, *ratio, sigma, relative, seed, t, *(row.average or no_fold)
    )
