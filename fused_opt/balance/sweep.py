"""One pass over the layers' spectra, as fast or as unobtrusive as asked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .hill import layer_alphas
from .layers import Layer
from .spectrum import workers
from .team import Team


class Mark(NamedTuple):
    """What a weight was computed from, for seeing whether it is still the same."""

    version: list[tuple[int, int]]
    sample: Tensor


class Task(NamedTuple):
    """A layer to compute.

    Attributes:
        layer: whose exponent.
        cost: estimated operations.
        team: the processes that divide it and others between them; None: this one computes it.
    """

    layer: Layer
    cost: float
    team: Team | None


class Job(NamedTuple):
    """What a thread computes."""

    marks: dict[str, Mark]
    weights: list[Tensor]
    future: Future[list[float]]
    process: int

    @property
    def lost(self) -> bool:
        """Whether this is the child of a fork, which has no threads."""
        return self.process != os.getpid()


class Sweep:
    """Exponents of layers, computed a portion at each call, in this thread or in another.

    Args:
        tasks: what can be computed, by module name; to be set anew where the model has changed.
        estimator: keyword arguments of :func:`~fused_opt.balance.hill.layer_alphas`.
        budget: largest share of the operations in one portion.
        background: compute in a thread, on copies.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        estimator: dict[str, Any],
        budget: float,
        background: bool,
    ) -> None:
        self.tasks, self._estimator = tasks, estimator
        self._budget, self._background = budget, background
        self._queue: list[list[str]] = []
        self._found: dict[str, float] = {}
        self._job: Job | None = None
        self._known: dict[str, tuple[Mark, float]] = {}
        self.busy = False

    def begin(self, names: Sequence[str]) -> None:
        """Start over with these layers, in portions of the budget; a layer above it is one itself."""
        self._queue, self._found, self.busy = [], {}, True
        allowance = self._budget * sum(self.tasks[name].cost for name in names) * (1 + 1e-9)
        spent = float("inf")
        for name in names:
            spent += self.tasks[name].cost
            if spent > allowance:
                self._queue.append([])
                spent = self.tasks[name].cost
            self._queue[-1].append(name)

    def advance(self) -> dict[str, float] | None:
        """Do a portion; the exponents of all layers when that was the last one and all is done."""
        self._collect(wait=False)
        if not self.busy:
            return None
        self.busy = False  # whatever raises ends the sweep, and the next one starts over
        if self._queue and self._job is None:
            self._compute([name for name in self._queue.pop(0) if name in self.tasks])
        self.busy = bool(self._queue) or self._job is not None
        return None if self.busy else self._found

    def forget(self) -> None:
        """Take every layer for changed."""
        self._known.clear()

    def state_dict(self) -> dict[str, Any]:
        """What is done and what is left, as plain types; waits for the thread."""
        self._collect(wait=True)
        return {
            "busy": self.busy,
            "queue": [list(portion) for portion in self._queue],
            "found": dict(self._found),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._collect(wait=True)
        self.busy, self._found = state["busy"], dict(state["found"])
        self._queue = [list(portion) for portion in state["queue"]]
        self.forget()

    def _compute(self, names: list[str]) -> None:
        together: dict[Team | None, list[str]] = {}
        for name in names:
            together.setdefault(self.tasks[name].team, []).append(name)
        for team, of_team in together.items():
            if team is None:
                self._compute_here(of_team)
                continue
            divided = team.divide([self.tasks[name].cost for name in of_team])
            shares = [[of_team[i] for i in share] for share in divided]
            if team.cut:
                self._compute_cut(shares, team.place)
            else:
                self._compute_here(shares[team.place])
            mine = [self._found[name] if name in shares[team.place] else 0.0 for name in of_team]
            self._found |= zip(of_team, team.exchange(mine), strict=True)

    def _compute_cut(self, shares: list[list[str]], place: int) -> None:
        """All gather one weight after the other, of which each keeps its own; never more than two are whole anywhere."""
        for turn in zip_longest(*shares):
            kept: dict[str, Tensor] = {}
            for taker, name in enumerate(turn):
                if name is not None:
                    whole = self.tasks[name].layer.weight()
                    if taker == place:
                        kept[name] = whole
                    del whole  # before the next one comes
            self._found |= zip(kept, layer_alphas(list(kept.values()), **self._estimator), strict=True)

    def _compute_here(self, names: list[str]) -> None:
        layers = {name: self.tasks[name].layer for name in names}
        marks = {name: Mark(layer.version(), layer.sample()) for name, layer in layers.items()}
        same = {name: self._known[name][1] for name, mark in marks.items() if self._unchanged(name, mark)}
        self._found |= same
        marks = {name: mark for name, mark in marks.items() if name not in same}
        weights = [layers[name].weight() for name in marks]
        if not self._background:
            self._keep(marks, layer_alphas(weights, **self._estimator))
            return
        copies = [weight.clone() for weight in weights]  # training goes on while the thread reads
        devices = {copy.device for copy in copies if copy.is_cuda}
        copied = [torch.cuda.current_stream(device).record_event() for device in devices]
        future = workers(1).submit(_on_side_streams, copies, copied, self._estimator)
        self._job = Job(marks, copies, future, os.getpid())

    def _unchanged(self, name: str, mark: Mark) -> bool:
        # of a sharded weight this process sees a part, and all processes have to gather it or none
        if name not in self._known or self.tasks[name].layer.sharded():
            return False
        before, _ = self._known[name]
        return mark.version == before.version and torch.equal(mark.sample, before.sample)

    def _collect(self, wait: bool) -> None:
        if self._job is not None and (wait or self._job.lost or self._job.future.done()):
            job, self._job, self.busy = self._job, None, False
            self._keep(job.marks, layer_alphas(job.weights, **self._estimator) if job.lost else job.future.result())
            self.busy = True

    def _keep(self, marks: dict[str, Mark], alphas: list[float]) -> None:
        self._found |= zip(marks, alphas, strict=True)
        self._known |= {name: (mark, self._found[name]) for name, mark in marks.items()}


def _on_side_streams(weights: list[Tensor], copied: list[torch.cuda.Event], estimator: dict[str, Any]) -> list[float]:
    with contextlib.ExitStack() as streams:
        for device in {weight.device for weight in weights if weight.is_cuda}:
            streams.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
            for event in copied:
                torch.cuda.current_stream(device).wait_event(event)
        return layer_alphas(weights, **estimator)
