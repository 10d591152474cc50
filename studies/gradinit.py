"""GradInit on a residual network without normalization and on a Post-LN transformer, beside what is usually done."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

from torch import Tensor, manual_seed, nn, no_grad

import fused_opt

from .data import Data, Split, digits, fashion_mnist
from .harness import Arm, Study
from .training import accuracy, batches, loss_of, scheduled, set_rate
from .transformer import Transformer, characters

BLOCKS, UNITS, LAYERS, WIDTH, EXAMPLES = 16, 64, 8, 32, 2048  # blocks of units; layers of the transformer of that width
RESIDUAL, POST_LN = "residual network without normalization", "Post-LN transformer"
EXTRAS = (
    "GradInit's first norm over gamma",
    "loss after GradInit's trial steps",
    "spread of scores over inputs, untrained",
)


class Task(NamedTuple):
    """What is trained: on batches of that size, for so many epochs, with SGD or Adam, which GradInit is told, too."""

    batch: int
    epochs: int
    algorithm: Literal["sgd", "adam"]


TASKS = {RESIDUAL: Task(64, 3, "sgd"), POST_LN: Task(16, 1, "adam")}


class Block(nn.Module):
    """Two layers beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(UNITS, UNITS)
        self.last = nn.Linear(UNITS, UNITS)

    def forward(self, x: Tensor) -> Tensor:
        """As many units."""
        return x + self.last(nn.functional.relu(self.first(nn.functional.relu(x))))


def network(task: str, init: str, seed: int, data: Split, classes: int) -> nn.Module:
    """Initialized by He, by PyTorch, or so with the last layer of each block at zero; a transformer always by PyTorch."""
    manual_seed(seed)
    if task == POST_LN:
        return Transformer(classes, WIDTH, LAYERS, pre=False)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(data.inputs[0].numel(), UNITS),
        *(Block() for _ in range(BLOCKS)),
        nn.ReLU(),
        nn.Linear(UNITS, classes),
    )
    for module in model.modules():
        if init == "He" and isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        if init == "zero" and isinstance(module, Block):
            nn.init.zeros_(module.last.weight)
            nn.init.zeros_(module.last.bias)
    return model


class HalfBatches:
    """In an order that is none of the training's; they can be started again."""

    def __init__(self, data: Split, size: int, seed: int) -> None:
        self.data, self.size, self.seed = data, size, seed + 10_000

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _, x, y in batches(self.data, self.size, 100, self.seed):
            yield x, y


@lru_cache(maxsize=64)
def _learned(
    task: str, init: str, iterations: int, seed: int, data: Split, classes: int
) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose scales are learned, and what it was like before it was trained; the same for all rates.

    That is the gradient's norm at first over the bound, the mean of the last losses after a trial step, and the standard
    deviation of a class's scores over inputs.
    """
    model = network(task, init, seed, data, classes)
    norm: Any = ""
    updated: Any = ""
    if iterations:
        algorithm, source = TASKS[task].algorithm, HalfBatches(data, TASKS[task].batch // 2, seed)
        gamma = math.sqrt(sum(p.numel() for p in model.parameters())) if algorithm == "adam" else 1.0  # the defaults
        options = {"algorithm": algorithm, "gamma": gamma, "iterations": iterations, "progress": False}
        history = fused_opt.gradinit(model, loss_of, source, **options).history
        norm = history[0].gradient_norm / gamma
        losses = [seen.updated_loss for seen in history if seen.updated_loss is not None]
        updated = mean(losses[-10:]) if losses else ""
    with no_grad():
        scores = model(data.inputs[:64]).flatten(0, -2)
    return model, dict(zip(EXTRAS, (norm, updated, scores.std(0).mean().item())))


def train(
    options: Mapping[str, Any], lr: float, seed: int, data: Split, held_out: Split, classes: int
) -> dict[str, Any]:
    """Linear decay, after a warmup or without. What GradInit reads is not in the budget of examples."""
    size, epochs, algorithm = TASKS[options["task"]]
    learned, before = _learned(options["task"], options["init"], options["gradinit"], seed, data, classes)
    model = copy.deepcopy(learned)
    optimizer: fused_opt.FusedOptimizer
    if algorithm == "sgd":
        optimizer = fused_opt.SGD(model.parameters(), lr, momentum=0.9)
    else:
        optimizer = fused_opt.Adam(model.parameters(), lr)
    steps = len(data.targets) // size * epochs
    for update, x, y in batches(data, size, epochs, seed):
        set_rate(optimizer, lr * scheduled("linear", update / steps, options["warmup"]))
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    return {"score": accuracy(model, held_out), "examples": steps * size, "updates": steps, **before}


def load(given: Path | None) -> dict[str, Data]:
    """2,048 images to train on, and as many sequences."""
    return {RESIDUAL: fashion_mnist(given, EXAMPLES, 3000), POST_LN: characters(given, EXAMPLES)}


def arms(few: int, many: int) -> list[Arm]:
    """Of both settings; the transformer's are judged at the rate of warmup, or of nothing, too."""
    found = {
        RESIDUAL: {
            "He": ("He", 0, 0.0, ()),
            f"He, GradInit {few}": ("He", few, 0.0, ("He", "PyTorch")),
            f"He, GradInit {many}": ("He", many, 0.0, ("He", "PyTorch")),
            "PyTorch": ("PyTorch", 0, 0.0, ("He",)),
            f"PyTorch, GradInit {few}": ("PyTorch", few, 0.0, ("PyTorch",)),
            "last layers zero": ("zero", 0, 0.0, ("PyTorch",)),
        },
        POST_LN: {
            "PyTorch": ("PyTorch", 0, 0.0, ()),
            "PyTorch, warmup": ("PyTorch", 0, 0.2, ("PyTorch",)),
            f"PyTorch, GradInit {few}": ("PyTorch", few, 0.0, ("PyTorch, warmup", "PyTorch")),
            f"PyTorch, GradInit {many}": ("PyTorch", many, 0.0, ("PyTorch, warmup", "PyTorch")),
        },
    }
    return [
        Arm(
            task,
            name,
            {RESIDUAL: (-5, -4, -3), POST_LN: (-6, -5, -4)}[task],
            {"task": task, "init": init, "gradinit": iterations, "warmup": warmup},
            against,
            same_rate=task == POST_LN and bool(against),
        )
        for task, of_task in found.items()
        for name, (init, iterations, warmup, against) in of_task.items()
    ]


def study(quick: bool = False) -> Study:
    """The study, or the least of it that runs everything."""
    return Study(
        name="gradinit",
        title="GradInit",
        arms=arms(3, 5)[:2] if quick else arms(120, 390),
        metric="test accuracy, per cent",
        higher=True,
        load=(lambda given: digits(128, 100)) if quick else load,
        train=train,
        extras=EXTRAS,
        seeds=tuple(range(1, 11)),
        digits=2,
    )
