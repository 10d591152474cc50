"""Cases as data, and the loop in which their contenders take turns.

A case names the shapes, the contenders, the one that the others are compared with, and the targets.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Parameter

from .models import Training
from .shapes import Shape, tiny
from .targets import Target

Call = Callable[[], object]
Make = Callable[[list[Parameter]], Call]
WARM_UP, ROUNDS, SECONDS, LONGEST, TURN = 5, 15, 3.0, 15.0, 4
NUMBERS = torch.randn(2**20, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """What is timed.

    Args:
        name: unique within its table, or among the cases of its model.
        shapes: those of the parameters.
        contenders: label -> a function that makes an optimizer of parameters with gradients, and returns the call to time.
            The first one is ours.
        baseline: the label that the picture and the column of speeds compare with; empty: none.
        targets: judged by medians.
        before: called before every timed call, untimed.
        training: in place of shapes, makes a model, of small sizes if it is told so, and its loss: timed is an iteration,
            with the contender's call in it and by itself.
        threads: torch's; 0: as they are.
        model: the name of the shapes.
        budget: bytes that a step has to move for each element.
        weighs: whether the bytes of the states are figures, too; the calls are bound steps of optimizers then.
    """

    name: str
    shapes: Sequence[Shape]
    contenders: Mapping[str, Make]
    baseline: str = ""
    targets: tuple[Target, ...] = ()
    before: Call = lambda: None
    training: Callable[[bool], Training] | None = None
    threads: int = 0
    model: str = ""
    budget: int = 0
    weighs: bool = False

    @property
    def elements(self) -> int:
        """The number of elements of all parameters."""
        return sum(map(math.prod, self.shapes))

    @property
    def bytes_touched(self) -> int:
        """By a step in float32: the budget counts all but the gradients twice, since they are read and written."""
        return self.elements * (self.budget + 4) // 2


@dataclass(frozen=True)
class Table:
    """Cases that belong on one page; ``name`` names the files."""

    name: str
    title: str
    cases: Sequence[Case]


@dataclass(frozen=True)
class Result:
    """The seconds that every contender's calls took; ``parts``: those of iterations that were the contender's own.

    ``states``: bytes of the contenders' states for each element, where the case weighs them.
    """

    case: Case
    seconds: dict[str, list[float]]
    parts: dict[str, list[float]] = field(default_factory=dict)
    states: dict[str, float] = field(default_factory=dict)

    def median(self, label: str) -> float:
        """Seconds."""
        return float(np.median(self.seconds[label]))

    def part(self, label: str) -> float:
        """Seconds of an iteration that were the optimizer's."""
        return float(np.median(self.parts[label]))

    def speed(self, label: str) -> float:
        """How many times as fast as the baseline."""
        return self.median(self.case.baseline) / self.median(label)

    def met(self, target: Target) -> bool:
        """Whether the medians keep to it."""
        return target.met(self.found(target))

    def found(self, target: Target) -> float:
        """What the target bounds, by medians."""
        return target.found(self.part if target.of_part else self.median)


def normal(shape: Shape) -> torch.Tensor:
    """Normal numbers, a million drawn and then repeated: drawing them all would take longer than the benchmark."""
    size = math.prod(shape)
    numbers = NUMBERS if size <= len(NUMBERS) else NUMBERS.repeat(size // len(NUMBERS) + 1)
    return numbers[:size].clone().view(shape)


def parameters_of(shapes: Sequence[Shape]) -> list[Parameter]:
    """New parameters with gradients."""
    parameters = [Parameter(normal(shape)) for shape in shapes]
    for p in parameters:
        p.grad = normal(p.shape)
    return parameters


def graph_of(parameters: Iterable[Parameter]) -> list[GradientEdge]:
    """What a loop's loss keeps alive during a step: autograd's graph, which refers to the parameters."""
    return [get_gradient_edge(p) for p in parameters]


def take_turns(turns: Sequence[Call], rounds: int, seconds: float, at_most: float = math.inf) -> int:
    """Call A B C A B C ... for so many rounds or seconds, whichever is more, and begin no round after ``at_most`` seconds.

    Returns:
        The number of rounds.
    """
    gc.disable()  # a collection would land in whichever call comes next
    try:
        began, done = time.perf_counter(), 0
        while (done < rounds or time.perf_counter() - began < seconds) and time.perf_counter() - began < at_most:
            for turn in turns:
                turn()
            done += 1
        return done
    finally:
        gc.enable()


def measure(case: Case, *, quick: bool = False) -> Result:
    """Time a case on the CPU, in turns, for 15 rounds or 3 seconds, whichever is more; no round begins after 15 seconds.

    An iteration is a turn. Of steps alone a turn is four calls, of which the last is timed: the first ones pay for the caches
    that the contender before it left cold, which would otherwise be a matter of the order. What ``case.before`` leaves cold
    is in the figures.

    Args:
        case: the case.
        quick: one round, every dimension cut to at most 8; the figures mean nothing then.
    """
    if not quick:
        gc.collect()  # what the last case held
    warm_up, rounds, at_least = (1, 1, 0.0) if quick else (WARM_UP, ROUNDS, SECONDS)
    shapes = tiny(case.shapes) if quick else case.shapes
    parts: dict[str, list[float]] = {label: [] for label in case.contenders if case.training}
    calls: dict[str, Call] = {}
    graph: list[GradientEdge] = []
    for label, make in case.contenders.items():
        if case.training is None:
            parameters = parameters_of(shapes)
            graph += graph_of(parameters)
            calls[label] = make(parameters)
        else:
            torch.manual_seed(0)
            calls[label] = iteration(*case.training(quick), make, parts[label])
    seconds: dict[str, list[float]] = {label: [] for label in calls}

    def turn(label: str, call: Call) -> None:
        for _ in range(0 if case.training else TURN - 1):
            call()
        case.before()
        start = time.perf_counter()
        call()
        seconds[label].append(time.perf_counter() - start)

    with threads(0 if quick else case.threads):
        for _ in range(warm_up):
            for call in calls.values():
                case.before()
                call()
        for of_label in parts.values():
            of_label.clear()
        take_turns([partial(turn, label, call) for label, call in calls.items()], rounds, at_least, LONGEST)
    del graph
    elements = sum(map(math.prod, shapes))
    return Result(
        case, seconds, parts, {label: state_bytes(call) / elements for label, call in calls.items() if case.weighs}
    )


def state_bytes(call: Any) -> int:
    """Of the states of the optimizer whose bound step this is."""
    tensors = [value for of_p in call.__self__.state.values() for value in of_p.values()]
    return sum(map(_nbytes, tensors))


def _nbytes(tensor: Any) -> int:
    """Of a state; a subclass of tensor may be several of them (torchao's codes and scales)."""
    if not isinstance(tensor, torch.Tensor):
        return 0
    parts = getattr(tensor, "__tensor_flatten__", None)
    return sum(_nbytes(getattr(tensor, name)) for name in parts()[0]) if parts else tensor.nbytes


def iteration(model: torch.nn.Module, loss: Callable[[], torch.Tensor], make: Make, parts: list[float]) -> Call:
    """An iteration of training; the seconds of the optimizer's part go into the list."""
    parameters = list(model.parameters())
    step = make(parameters)

    def call() -> None:
        model.zero_grad()
        of_batch = loss()  # referred to until the step is over, as in a user's loop
        of_batch.backward()
        start = time.perf_counter()
        step()
        parts.append(time.perf_counter() - start)

    return call


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many of torch's within the block; 0: as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quartiles(seconds: Sequence[float]) -> dict[str, float]:
    """Minimum, quartiles and median, in microseconds; of nothing none."""
    if not seconds:
        return {}
    values = np.quantile(seconds, [0, 0.25, 0.5, 0.75]).tolist()
    return {
        name: round(1e6 * x, 3) for name, x in zip(("minimum", "lower_quartile", "median", "upper_quartile"), values)
    }


def figures(results: Sequence[Result], here: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for a CSV: one for each case and contender, in microseconds, with the machine and the versions in each."""
    return [
        {
            **here,
            "case": result.case.name,
            "contender": label,
            "calls": len(seconds),
            **{f"{name}_us": f"{x:.2f}" for name, x in quartiles(seconds).items()},
            **({"state_bytes": f"{result.states[label]:.3f}"} if result.states else {}),
            **{f"part_{name}_us": f"{x:.2f}" for name, x in quartiles(result.parts.get(label, ())).items()},
        }
        for result in results
        for label, seconds in result.seconds.items()
    ]
