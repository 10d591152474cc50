"""Cyclical batch sizes and noise on a word model, with a fixed batch of as many updates beside them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

import fused_opt

from .data import Data, Split, kjv, language, standard_library, words
from .harness import Arm, Study
from .training import bits, scheduled, set_rate

SEQUENCES, LENGTH, VOCABULARY, EPOCHS = 512, 20, 400, 8
SMALL, LEVELS = 16, 4
LONG = 16  # epochs, in which four cycles end
ENSEMBLE = ", ensemble of 4"  # how the names of arms end whose states at these ends are kept
CYCLE = fused_opt.CyclicalBatchSize(SMALL, levels=LEVELS, width=1)
BATCHES = {
    "fixed 16": fused_opt.CyclicalBatchSize(SMALL, levels=1),
    "fixed 36": fused_opt.CyclicalBatchSize(36, levels=1),  # as many updates as a cycle
    "cyclical 16 to 128": CYCLE,
    "one rise 16 to 128": fused_opt.CyclicalBatchSize(SMALL, levels=LEVELS, width=EPOCHS / LEVELS),
    "fixed 16, cyclical noise": fused_opt.CyclicalBatchSize(SMALL, levels=1),
}


class Ensemble(nn.Module):
    """The mean prediction of a model with several states."""

    def __init__(self, model: nn.Module, states: list[dict[str, Any]]) -> None:
        super().__init__()
        self.model, self.states = model, states

    def forward(self, x: Tensor) -> Tensor:
        """Logarithms of the mean probabilities, which are scores as well."""
        return fused_opt.average_predictions(self.model, self.states, x).log()


class WordModel(nn.Module):
    """A feed-forward model of the next word, by the embeddings of the last four."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 24)
        self.hidden = nn.Linear(4 * 24, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next word, (batch, length, classes); before the first word there are zeros."""
        known = nn.functional.pad(self.embedding(x), (0, 0, 3, 0))
        last = torch.cat([known[:, back : back + x.shape[1]] for back in range(4)], -1)
        return self.head(nn.functional.relu(self.hidden(last)))


def train(
    options: Mapping[str, Any], lr: float, seed: int, data: Split, held_out: Split, classes: int
) -> dict[str, Any]:
    """SGD with momentum, gradients clipped in the step; the rate follows the examples seen, not the updates."""
    epochs, batch = options.get("epochs", EPOCHS), BATCHES[options["batch"]]
    model, states = WordModel(classes), []
    order = RandomSampler(range(len(data.targets)), generator=torch.Generator().manual_seed(seed))
    sampler = fused_opt.CyclicalBatchSampler(order, batch)
    noise = None
    if "noise" in options["batch"]:
        period = sum(1 for _ in range(0, len(data.targets), SMALL)) * LEVELS
        noise = fused_opt.WeightNoise(1e-3, schedule="cycle", period=period, seed=seed)
    optimizer = fused_opt.SGD(model.parameters(), lr, momentum=0.9, max_grad_norm=1.0, noise=noise)
    seen = updates = 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for rows in sampler:
            x, y = data.inputs[rows], data.targets[rows]
            set_rate(optimizer, lr * scheduled(options["schedule"], seen / (epochs * len(data.targets))))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
            seen, updates = seen + len(rows), updates + 1
        if options.get("ensemble") and CYCLE.cycles(epoch + 1) > len(states):
            states.append(copy.deepcopy(model.state_dict()))
    judged = Ensemble(model, states) if states else model
    return {"score": bits(judged, held_out, classes), "examples": seen, "updates": updates}


def ensembles() -> list[Arm]:
    """Four cycles, a fixed batch with as many updates, and the ensembles of their states at the cycles' ends.

    A rate that falls is beside them: what is usually done instead.
    """
    fixed, cyclical, linear = "fixed 36", "cyclical 16 to 128", "fixed 36, linear rate"
    against = {
        fixed: (),
        fixed + ENSEMBLE: (fixed, linear),
        cyclical: (fixed,),
        cyclical + ENSEMBLE: (cyclical, fixed + ENSEMBLE, linear),
        linear: (fixed,),
    }
    return [
        Arm(
            "16 epochs",
            name,
            (-2, -1, 0),
            {
                "schedule": "linear" if name == linear else "constant",
                "batch": cyclical if name.startswith(cyclical) else fixed,
                "epochs": LONG,
                "ensemble": name.endswith(ENSEMBLE),
            },
            others,
            same_rate=name.endswith(ENSEMBLE),
        )
        for name, others in against.items()
    ]


def load(given: Path | None) -> Data:
    """512 sequences of 20 words, and twice as many to choose and to test with."""
    return language(words(kjv(given)), VOCABULARY, LENGTH, SEQUENCES, 2 * SEQUENCES)


def study(quick: bool = False) -> Study:
    """The study, or the least of it that runs everything."""
    schedules, names, grid, options = ("constant", "linear"), list(BATCHES), (-1, 0, 1), {}
    if quick:
        schedules, names, grid, options = ("constant",), ["fixed 16", "cyclical 16 to 128"], (-1, 0), {"epochs": 4}
    against = {"fixed 16": (), "fixed 36": ("fixed 16",), "fixed 16, cyclical noise": ("fixed 16",)}
    return Study(
        name="cyclical",
        title="Cyclical batch sizes and noise",
        arms=[
            Arm(
                f"{schedule} rate",
                name,
                grid,
                {"schedule": schedule, "batch": name, **options},
                against.get(name, ("fixed 36", "fixed 16")),
                same_rate=name != "fixed 16",
            )
            for schedule in schedules
            for name in (names if schedule == "constant" else names[:3])
        ]
        + ([] if quick else ensembles()),
        metric="test bits a word",
        higher=False,
        load=(lambda given: language(words(standard_library()), 100, LENGTH, 128, 64)) if quick else load,
        train=train,
        digits=3,
    )
