"""How many steps parameters have taken, known to the host without waiting for the device."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import compress
from operator import add, attrgetter
from typing import Any

import torch

from ..interface import ParamEntry

_version, _value = attrgetter("_version"), attrgetter("value")
_CELLS: dict[torch.dtype, Any] = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


class Counts:
    """Those of members whose counts are all of one kind.

    On the CPU they are read and written through their addresses, since torch's own functions cost a microsecond each. Of
    counts on the device, which torch's fused and capturable steps leave in checkpoints, the host keeps a copy, and reads
    them again only after another write to them. Where the rule counts nothing it is 0 before the first step and 1 after it.
    """

    def __init__(self, members: Sequence[ParamEntry]) -> None:
        self.members = members
        self.steps = [m.step for m in members if m.step is not None]
        self.cells = [
            _CELLS[step.dtype].from_address(step.data_ptr()) for step in self.steps if step.device.type == "cpu"
        ]
        scalars = [m.scalar for m in members if m.scalar is not None]  # on the CPU, in float32
        self.scalars = [ctypes.c_float.from_address(scalar.data_ptr()) for scalar in scalars]
        self.ones = [1.0] * len(members)
        self.tensors = self.steps + scalars
        self.addresses = list(map(torch.Tensor.data_ptr, self.tensors))
        self.memory = [
            tensor.detach() for tensor in self.tensors
        ]  # kept alive, so that no other tensor gets the address
        self.known: list[float] = []
        self.versions: list[int] = []
        self.earlier = [
            m.earlier for m in members
        ]  # of a parameter that is there twice, the steps before it in this one
        self.any_new = any(m.states_are_new for m in members)

    def moved(self) -> bool:
        """Whether one of them has moved; for a single element the address is enough."""
        return list(map(torch.Tensor.data_ptr, self.tensors)) != self.addresses

    def read(self) -> list[float]:
        """Of every member."""
        if self.cells:
            self.known = list(map(add, map(_value, self.cells), self.earlier))
        elif not self.steps:
            self.known = self.known or [m.count() for m in self.members]
        elif (versions := list(map(_version, self.steps))) != self.versions:
            self.known, self.versions = torch.stack(self.steps).flatten().tolist(), versions
        return self.known

    def read_scalars(self) -> list[float]:
        """The rule's scalar of every member, 1 where it has none."""
        return list(map(_value, self.scalars)) or self.ones

    def set_scalars(self, values: Sequence[float | None]) -> None:
        """What they become in a step; None: they stay."""
        for cell, value in zip(self.scalars, values):
            if value is not None:
                cell.value = value

    def advance(self, here: Sequence[bool] | None) -> None:
        """Add one to those that are marked in ``here``, or to all for None; after ``read``."""
        here = here or [True] * len(self.members)
        if self.any_new:
            for member in compress(self.members, here):
                member.states_are_new = False
            self.any_new = any(m.states_are_new for m in self.members)
            self.known = self.known if self.steps else []
        if self.cells:
            for cell, n in compress(zip(self.cells, self.known), here):
                cell.value = n + 1
        elif self.steps:
            torch._foreach_add_(list(compress(self.steps, here)), 1.0)
            self.known = [n + is_here for n, is_here in zip(self.known, here)]
            self.versions = list(map(_version, self.steps))
