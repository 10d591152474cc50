"""GradInit on a residual network without normalization, beside what is usually done to its initialization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor, manual_seed, nn

import fused_opt

from .data import Data, Split, digits, fashion_mnist
from .harness import Arm, Study
from .training import accuracy, batches, scheduled, set_rate

BLOCKS, UNITS, IMAGES, BATCH, EPOCHS = 16, 64, 2048, 64, 3
SETTING = "residual network without normalization"
EXTRA = "loss after GradInit's trial steps"


class Block(nn.Module):
    """Two layers beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(UNITS, UNITS)
        self.last = nn.Linear(UNITS, UNITS)

    def forward(self, x: Tensor) -> Tensor:
        """As many units."""
        return x + self.last(nn.functional.relu(self.first(nn.functional.relu(x))))


def network(init: str, seed: int, data: Split, classes: int) -> nn.Module:
    """Sixteen blocks of 64 units: initialized by He, by PyTorch, or so with the last layer of each block at zero."""
    manual_seed(seed)
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

    def __init__(self, data: Split, seed: int) -> None:
        self.data, self.seed = data, seed + 10_000

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _, x, y in batches(self.data, BATCH // 2, 100, self.seed):
            yield x, y


@lru_cache(maxsize=64)
def _learned(init: str, iterations: int, seed: int, data: Split, classes: int) -> tuple[nn.Module, float | None]:
    """A model whose scales are learned, and the mean of the last losses after a trial step; the same for all rates."""
    model = network(init, seed, data, classes)
    if not iterations:
        return model, None
    source = HalfBatches(data, seed)
    found = fused_opt.gradinit(model, nn.functional.cross_entropy, source, iterations=iterations, progress=False)
    updated = [seen.updated_loss for seen in found.history if seen.updated_loss is not None]
    return model, mean(updated[-10:]) if updated else None


def train(
    options: Mapping[str, Any], lr: float, seed: int, data: Split, held_out: Split, classes: int
) -> dict[str, Any]:
    """SGD with momentum, linear decay. What GradInit reads is not in the budget of examples."""
    learned, updated = _learned(options["init"], options["gradinit"], seed, data, classes)
    model = network(options["init"], seed, data, classes)
    model.load_state_dict(learned.state_dict())
    optimizer = fused_opt.SGD(model.parameters(), lr, momentum=0.9)
    steps = len(data.targets) // BATCH * EPOCHS
    for update, x, y in batches(data, BATCH, EPOCHS, seed):
        set_rate(optimizer, lr * scheduled("linear", update / steps))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = {"score": accuracy(model, held_out), "examples": steps * BATCH, "updates": steps}
    return {**found, EXTRA: "" if updated is None else updated}


def load(given: Path | None) -> Data:
    """2,048 images to train on."""
    return fashion_mnist(given, IMAGES, 3000)


def study(quick: bool = False) -> Study:
    """The study, or the least of it that runs everything."""
    few, many = (3, 5) if quick else (120, 390)
    arms = {
        "He": ("He", 0, ()),
        f"He, GradInit {few}": ("He", few, ("He", "PyTorch")),
        f"He, GradInit {many}": ("He", many, ("He", "PyTorch")),
        "PyTorch": ("PyTorch", 0, ("He",)),
        f"PyTorch, GradInit {few}": ("PyTorch", few, ("PyTorch",)),
        "last layers zero": ("zero", 0, ("PyTorch",)),
    }
    names = list(arms)[:2] if quick else list(arms)
    return Study(
        name="gradinit",
        title="GradInit",
        arms=[
            Arm(SETTING, name, (-5, -4, -3), {"init": init, "gradinit": iterations}, against)
            for name in names
            for init, iterations, against in [arms[name]]
        ],
        metric="test accuracy, per cent",
        higher=True,
        load=(lambda given: digits(128, 100)) if quick else load,
        train=train,
        extras=(EXTRA,),
        seeds=tuple(range(1, 11)),
        digits=2,
    )
