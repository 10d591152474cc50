"""What is queued on a device: launches, and copies of what is new."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

#: As nvcc compiles csrc/cuda/: a multiplication and an addition are two roundings, so the bits are the native backend's.
OPTIONS = {"enable_fp_fusion": False}
_SPARES = 2  # graphs that may be captured without an eager step between them
_captured: list[Any] = []  # what CUDA graphs refer to, which may outlive the plan


def launch(function: Any, device: torch.device, programs: int, *arguments: Any) -> Any:
    """Run that many programs on the device, on torch's current stream there.

    Returns:
        What can be launched in the function's place with arguments that differ in no type, alignment and constant: what
        Triton has compiled for these, for which it need not look up. None, or a function: only that.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if isinstance(function, CompiledKernel):
            function[programs, 1, 1](*arguments)
            return function
        return function[(programs,)](*arguments, **OPTIONS)


def copy(to: Tensor, what: Tensor) -> None:
    """Queue a copy."""
    to.copy_(what, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Whether what is queued goes into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep(*what: Any) -> None:
    """For good: a graph refers to it, and nobody says when that ends."""
    _captured.extend(what)


class Mirror:
    """A table of 8-byte words that follows the host's: it is sent where something in it is new.

    Args:
        size: in words, at most.
        device: where it is.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._device = size, device
        self.table = self._memory()
        self._key: Any = None  # what is in it
        self._part: Tensor | None = None  # as much of it as was sent last
        # A copy that is in a graph reads its memory at every replay. Memory is not pinned in a capture, so before one.
        self._spares: list[tuple[Tensor, Tensor]] = []
        self._provide()

    def _memory(self) -> tuple[Tensor, Tensor]:
        """As integers, and as floats."""
        words = torch.zeros(self._size, dtype=torch.int64, device=self._device)
        return words, words.view(torch.float64)

    def _provide(self) -> None:
        while self._device.type == "cuda" and len(self._spares) < _SPARES:
            self._spares.append(self._spare())

    def _spare(self) -> tuple[Tensor, Tensor]:
        pinned = torch.zeros(self._size, dtype=torch.int64, device="cpu", pin_memory=self._device.type == "cuda")
        return pinned, torch.zeros(self._size, dtype=torch.int64, device=self._device)

    def send(self, key: Any, make: Callable[[], bytearray]) -> tuple[Tensor, Tensor]:
        """The table, as integers and as floats, with what ``key`` stands for in it: ``make`` gives that."""
        if capturing(self._device):
            return self._in_graph(make())
        if key != self._key:
            self._key = None
            self._provide()
            words = make()
            if self._part is None or 8 * self._part.numel() != len(words):
                self._part = self.table[0][: len(words) // 8]
            host = torch.frombuffer(words, dtype=torch.int64)
            if self._device.type == "cuda":  # torch keeps the pinned memory until the copy is done
                host = host.pin_memory()
            copy(self._part, host)
            self._key = key
        return self.table

    def _in_graph(self, words: bytearray) -> tuple[Tensor, Tensor]:
        """A table of the graph's own, which replays fill with these words."""
        host, table = self._spares.pop() if self._spares else self._spare()
        count = len(words) // 8
        host[:count].copy_(torch.frombuffer(words, dtype=torch.int64))
        copy(table[:count], host[:count])
        keep(host, table)
        return table, table.view(torch.float64)
