"""Time of the GPU, time of the host, and launches, of one step. On the CPU, for a rehearsal, by the host's clock."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import DEVICE, ON_CPU

Call = Callable[[], object]


def synchronize() -> None:
    """Wait for the GPU."""
    if not ON_CPU:
        torch.cuda.synchronize()


class Clock:
    """Times calls; made once, since it first measures what a cycle of the GPU is."""

    def __init__(self) -> None:
        self.cycles_per_second = 0.0
        if not ON_CPU:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cycles = 20_000_000
            for _ in range(2):  # the first one wakes the clocks
                self.start.record()
                torch.cuda._sleep(cycles)
                self.end.record()
                self.end.synchronize()
            self.cycles_per_second = cycles / (self.start.elapsed_time(self.end) * 1e-3)

    def gpu(self, calls: Sequence[Call], host: float) -> tuple[float, bool]:
        """Seconds of the GPU for each call, back to back, and whether it had to wait for the host.

        The GPU is kept asleep while the host issues the calls, so that what lies between the two events is the GPU's work
        and not the host's. Where the host takes longer than foreseen (``host``: seconds for one call), or the queue of
        launches is full, the GPU wakes before the last call: the second value says so.
        """
        if ON_CPU:
            return min(self.host(calls)), False
        torch.cuda._sleep(int((1e-4 + min(0.1, 2 * host * len(calls))) * self.cycles_per_second))
        self.start.record()
        for call in calls:
            call()
        waited = self.start.query()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3 / len(calls), waited

    def host(self, calls: Sequence[Call]) -> list[float]:
        """Seconds that each call keeps the host: without waiting for the GPU, which has nothing to do before it."""
        seconds = []
        for call in calls:
            synchronize()
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        return seconds


def launches(call: Call) -> dict[str, Any]:
    """What a call has the GPU do, as the profiler sees it: numbers of kernels, copies and fills, and the kernels' names."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not ON_CPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(errors="replace"))["traceEvents"]
    kinds = Counter(event.get("cat") for event in events)
    names = Counter(event["name"][:60] for event in events if event.get("cat") == "kernel")
    return {
        "kernels": kinds["kernel"],
        "copies": kinds["gpu_memcpy"],
        "fills": kinds["gpu_memset"],
        "names": dict(names.most_common(5)),
    }


def profiler_sees() -> bool:
    """Whether launches can be counted at all: whether the profiler sees one that is certainly made."""
    ones = torch.ones(1024, device=DEVICE)
    return [launches(lambda: ones.add_(1))["kernels"] for _ in range(2)][-1] == 1  # the first one starts the profiler


def copies_for(bytes_touched: float) -> int:
    """How many copies of its operands a step goes around, so that no cache holds what the next step reads."""
    return max(1, min(8, math.ceil(2**30 / bytes_touched))) if not ON_CPU else 2
