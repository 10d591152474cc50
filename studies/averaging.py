"""Averages of the weights: EMA and the periodic ones, with SGD and Adam, at rates that are constant and that fall to zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import nn

import fused_opt

from .data import Data, Split, digits, fashion_mnist, with_wrong_labels
from .harness import Arm, Study
from .training import accuracy, batches, scheduled, set_rate

IMAGES, WIDTH, BATCH, EPOCHS = 4000, 64, 64, 10
LAST, SEEN = 5, 3000  # epochs whose ends are scored for the mean and the wobble, and with how many images

#: Made for periods of one epoch, in updates.
AVERAGES: dict[str, Callable[[int], fused_opt.Averaging | None]] = {
    "last weights": lambda period: None,
    "EMA .98": lambda period: fused_opt.EMA(0.98),
    "EMA .998": lambda period: fused_opt.EMA(0.998),
    "EMA .998, warmup": lambda period: fused_opt.EMA(0.998, warmup=True),
    "PSWA": lambda period: fused_opt.PSWA(period, fraction=0.5),
    "PWALKS 10x2": lambda period: fused_opt.PWALKS(period, samples=10, interval=2),
    "PSWA, states zeroed": lambda period: fused_opt.PSWA(period, fraction=0.5, on_write_back="zero"),
    "PSWM .5": lambda period: fused_opt.PSWM(period, beta=0.5, fraction=0.5),
    "SWM .98": lambda period: fused_opt.SWM(period, beta=0.98),
}
AGAINST: dict[str, tuple[str, ...]] = {"last weights": (), "EMA .998, warmup": ("last weights", "EMA .998")}
FALLING = ("last weights", "EMA .98", "PSWA")
#: What is trained with, and on: the optimizer, the schedule, the share of wrong labels, and the arms.
SETTINGS: dict[str, tuple[str, str, float, tuple[str, ...]]] = {
    "constant rate": ("SGD", "constant", 0.0, tuple(AVERAGES)),
    "cosine rate": ("SGD", "cosine", 0.0, FALLING),
    "constant rate, Adam": ("Adam", "constant", 0.0, tuple(AVERAGES)),
    "cosine rate, Adam": ("Adam", "cosine", 0.0, FALLING),
    "constant rate, 40 % of the labels wrong": ("SGD", "constant", 0.4, tuple(AVERAGES)),
    "cosine rate, 40 % of the labels wrong": ("SGD", "cosine", 0.4, FALLING),
}
GRIDS = {"SGD": (-4, -3, -2), "Adam": (-7, -6, -5)}


def network(split: Split, classes: int) -> nn.Module:
    """Two layers, without normalization, whose statistics would need an average of their own."""
    inputs = split.inputs[0].numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))


def train(
    options: Mapping[str, Any], lr: float, seed: int, data: Split, held_out: Split, classes: int
) -> dict[str, Any]:
    """SGD with momentum, or Adam; the averages are scored where the arm has one that is not written back."""
    epochs = options.get("epochs", EPOCHS)
    model, steps = network(data, classes), len(data.targets) // BATCH
    averaging = AVERAGES[options["averaging"]](steps)
    optimizer: fused_opt.FusedOptimizer
    if options["optimizer"] == "SGD":
        optimizer = fused_opt.SGD(model.parameters(), lr, momentum=0.9, averaging=averaging)
    else:
        optimizer = fused_opt.Adam(model.parameters(), lr, averaging=averaging)
    ends = []
    for update, x, y in batches(data, BATCH, epochs, seed):
        set_rate(optimizer, lr * scheduled(options["schedule"], update / (steps * epochs)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if (update + 1) % steps == 0 and (update + 1) // steps > epochs - LAST:
            with optimizer.averaged_weights(model) if isinstance(averaging, fused_opt.EMA) else nullcontext():
                ends.append(accuracy(model, held_out, SEEN))
                score = accuracy(model, held_out) if len(ends) == LAST else 0.0
    return {
        "score": score,
        "examples": steps * BATCH * epochs,
        "updates": steps * epochs,
        "mean of last epochs": mean(ends),
        "wobble": stdev(ends),
    }


def load(given: Path | None) -> dict[str, Data]:
    """4,000 images to train on; the labels that are wrong are so in training alone."""
    right = fashion_mnist(given, IMAGES, 3000)
    return {setting: with_wrong_labels(right, wrong) for setting, (*_, wrong, _) in SETTINGS.items()}


def study(quick: bool = False) -> Study:
    """The study, or the least of it that runs everything."""
    settings = {"constant rate, Adam": SETTINGS["constant rate, Adam"]} if quick else SETTINGS
    options = {"epochs": LAST} if quick else {}
    return Study(
        name="averaging",
        title="Averages of the weights",
        arms=[
            Arm(
                setting,
                name,
                GRIDS[optimizer][: 2 if quick else None],
                {"averaging": name, "optimizer": optimizer, "schedule": schedule, **options},
                AGAINST.get(name, ("last weights",)),
                same_rate=name != "last weights",
            )
            for setting, (optimizer, schedule, _, names) in settings.items()
            for name in (FALLING if quick else names)
        ],
        metric="test accuracy, per cent",
        higher=True,
        load=(lambda given: digits()) if quick else load,
        train=train,
        extras=("mean of last epochs", "wobble"),
        digits=2,
    )
