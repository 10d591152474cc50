"""The benchmark of a GPU, a line of JSON for every figure: ``python -m benchmarks.gpu.bench DONE``, DONE a JSON list.

Contenders take turns, each around several copies of its parameters and states, so that no cache holds what it reads next.
A turn is the GPU's time of one step on each copy, then the host's. Figures are medians over the turns. A copy of memory
takes turns with them: what a step's smallest traffic takes, over what the copy's bandwidth would take for it, is its share.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter

from ..contenders import copy_of_memory
from ..harness import Call, Case, quartiles, take_turns
from ..machine import backends_here
from ..targets import ON_GPU as TARGETS
from . import DEVICE, ON_CPU, UNUSABLE
from .cases import on_gpu
from .children import say
from .clock import Clock, copies_for, launches, profiler_sees, synchronize

WARM_UP = 1 if ON_CPU else 3
TURNS, SECONDS, AT_MOST = (1, 0.0, 1.0) if ON_CPU else (8, 1.2, 6.0)  # so many turns and seconds, or the most seconds
COPIED = 2**28 if not ON_CPU else 2**10  # float32s in the copy of memory, the ceiling: a gigabyte
COPY = "copy of memory"
COUNTED_MODEL = "ResNet-50"
COUNTED = {(case, target.contender) for case, _, target in TARGETS if target.quantity == "launches"}
OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


def parameters_of(gradients: Sequence[torch.Tensor]) -> list[Parameter]:
    """New parameters with the given gradients, which contenders share: no step writes one."""
    parameters = [Parameter(torch.randn_like(gradient)) for gradient in gradients]
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient
    return parameters


class Contenders:
    """Those of a case that run here, ready."""

    def __init__(self, case: Case, done: set[str], reasons: dict[str, str | None], counting: bool) -> None:
        self.case, self.done, self.reasons, self.counting = case, done, reasons, counting
        self.calls: dict[str, list[Call]] = {}
        self.launches: dict[str, dict[str, Any]] = {}
        self.host: dict[str, float] = {}
        self.count = copies_for(case.bytes_touched)
        self.gradients = [[torch.randn(shape, device=DEVICE) for shape in case.shapes] for _ in range(self.count)]

    def name(self, label: str) -> str:
        """What the lines call it."""
        return f"{self.case.model}: {self.case.name}: {label}"

    def prepare(self, clock: Clock) -> None:
        """Make each contender and step it a few times; who cannot is left out, with the reason."""
        for label, make in self.case.contenders.items():
            name, reason = self.name(label), self.reasons.get(f"{label.split()[0]}, {DEVICE}")
            if name in self.done:
                continue
            say(begin=name)
            if reason:
                say(id=name, outcome="skipped", text=reason)
                continue
            try:
                calls = [make(parameters_of(gradients)) for gradients in self.gradients]
                for _ in range(WARM_UP):
                    for call in calls:
                        call()
                self.host[label] = statistics.median(clock.host(calls))
                # The profiler takes a while: launches are counted for one model, and wherever a target asks.
                asked = self.case.model == COUNTED_MODEL or (self.case.name, label) in COUNTED
                self.launches[label] = launches(calls[0]) if self.counting and asked else {}
                synchronize()
                self.calls[label] = calls
            except OUT_OF_MEMORY as error:
                say(id=name, outcome="skipped", text=f"out of memory: {error}")
            except Exception as error:
                fail(name, error)
        self.calls[COPY] = [copy_of_memory(COPIED, DEVICE)] * self.count
        self.host[COPY] = 1e-5


def fail(name: str, error: Exception) -> None:
    """Say so; leave where the GPU answers no more, so that the rest can be timed by a new process."""
    say(id=name, outcome="failed", text=f"{type(error).__name__}: {error}"[-4000:])
    try:
        synchronize()
    except Exception:
        os._exit(UNUSABLE)  # what Python does on its way out would fail, too


def measure(contenders: Contenders, clock: Clock) -> Iterator[dict[str, Any]]:
    """Let them take turns; one line of figures for each."""
    gpu: dict[str, list[float]] = {label: [] for label in contenders.calls}
    host: dict[str, list[float]] = {label: [] for label in contenders.calls}
    waited = dict.fromkeys(contenders.calls, 0)

    def turn(label: str, calls: list[Call]) -> None:
        seconds, late = clock.gpu(calls, contenders.host[label])
        gpu[label].append(seconds)
        waited[label] += late
        host[label] += clock.host(calls)

    gc.collect()
    turns = take_turns([partial(turn, *of) for of in contenders.calls.items()], TURNS, SECONDS, AT_MOST)
    case = contenders.case
    bandwidth = 8 * COPIED / statistics.median(gpu[COPY])
    for label in contenders.calls:
        moved = 8 * COPIED if label == COPY else case.budget * case.elements
        yield {
            "id": contenders.name(label),
            "outcome": "measured",
            "shape": case.model,
            "case": case.name,
            "contender": label,
            "elements": case.elements,
            "tensors": len(case.shapes),
            "copies": contenders.count,
            "turns": turns,
            "budget_bytes": moved,
            "gpu_us": quartiles(gpu[label]),
            "host_us": quartiles(host[label]),
            "gpu_waited_for_host": round(waited[label] / turns, 3),
            "launches": contenders.launches.get(label, {}),
            "gigabytes_per_second": round(moved / statistics.median(gpu[label]) / 1e9, 2),
            "share_of_copy": round(moved / statistics.median(gpu[label]) / bandwidth, 4),
        }


def main() -> None:
    """All cases that are not done."""
    done = set(json.loads(sys.argv[1]))
    clock, counting, reasons = Clock(), profiler_sees(), backends_here()
    say(note={"launches": "counted" if counting else "not counted: the profiler does not see a launch that was made"})
    for case in on_gpu():
        whole = f"{case.model}: {case.name}"
        if whole in done:
            continue
        contenders = None
        try:
            contenders = Contenders(case, done, reasons, counting)
            contenders.prepare(clock)
            say(begin=whole)
            for line in measure(contenders, clock):
                say(**line)
            say(id=whole, outcome="passed")
        except Exception as error:
            fail(whole, error)
        finally:
            del contenders
            gc.collect()
            if not ON_CPU:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
