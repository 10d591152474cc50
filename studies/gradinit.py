"""GradInit on networks without normalization and with it in an awkward place, beside what is usually done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import fused_opt

from .data import Data, Split, digits, fashion_mnist, kjv, language, standard_library
from .harness import Arm, Study
from .training import accuracy, batches, bits, scheduled, set_rate

RESIDUAL, POST_LN = "residual network without normalization", "Post-LN transformer"
BLOCKS, UNITS, IMAGES = 16, 64, 2048
LAYERS, WIDTH, LENGTH, VOCABULARY, SEQUENCES = 6, 32, 32, 40, 4096
EXTRA = "loss after GradInit's trial steps"
BATCH = {RESIDUAL: 64, POST_LN: 32}
EPOCHS = {RESIDUAL: 3, POST_LN: 1}


class Block(nn.Module):
    """Two layers beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(UNITS, UNITS)
        self.last = nn.Linear(UNITS, UNITS)

    def forward(self, x: Tensor) -> Tensor:
        """As many units."""
        return x + self.last(nn.functional.relu(self.first(nn.functional.relu(x))))


def residual(init: str, inputs: int, classes: int) -> nn.Module:
    """Sixteen blocks of 64 units."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, UNITS), *(Block() for _ in range(BLOCKS)), nn.ReLU(), nn.Linear(UNITS, classes)
    )
    for module in model.modules():
        if init == "He" and isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        if init == "zero" and isinstance(module, Block):
            nn.init.zeros_(module.last.weight)
            nn.init.zeros_(module.last.bias)
    return model


def build(kind: str, init: str, seed: int, data: Split, classes: int) -> nn.Module:
    """The network before GradInit: of the seed alone."""
    torch.manual_seed(seed)
    return residual(init, data.inputs[0].numel(), classes) if kind == RESIDUAL else Characters(classes)


class Characters(nn.Module):
    """A transformer of six layers of 32, four heads, that normalizes after each addition."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layers = [nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True) for _ in range(LAYERS)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next character, (batch, length, classes)."""
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        h = self.embedding(x) + self.position[:length]
        for layer in self.layers:
            h = layer(h, src_mask=mask, is_causal=True)
        return self.head(h)


def of_characters(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over all places."""
    return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())


def halves(data: Split, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Half batches for gradinit, in an order of their own."""
    for _, x, y in batches(data, size // 2, 100, seed + 10_000):
        yield x, y


class Again:
    """Batches that can be started again."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return self.make()


@lru_cache(maxsize=64)
def _learned(
    kind: str, init: str, iterations: int, seed: int, data: Split, classes: int
) -> tuple[nn.Module, float | None]:
    """A model whose scales are learned, and the mean of the last losses after a trial step; the same for all rates."""
    model = build(kind, init, seed, data, classes)
    if not iterations:
        return model, None
    source = Again(lambda: halves(data, BATCH[kind], seed))
    loss = nn.functional.cross_entropy if kind == RESIDUAL else of_characters
    algorithm = "sgd" if kind == RESIDUAL else "adam"
    found = fused_opt.gradinit(model, loss, source, algorithm=algorithm, iterations=iterations, progress=False)
    updated = [seen.updated_loss for seen in found.history if seen.updated_loss is not None]
    return model, mean(updated[-10:]) if updated else None


def train(
    options: Mapping[str, Any], lr: float, seed: int, data: Split, held_out: Split, classes: int
) -> dict[str, Any]:
    """SGD with momentum for images, AdamW for characters; linear decay. GradInit's own examples are counted beside."""
    kind, iterations = options["kind"], options["gradinit"]
    learned, updated = _learned(kind, options["init"], iterations, seed, data, classes)
    model = build(kind, options["init"], seed, data, classes)
    model.load_state_dict(learned.state_dict())
    if kind == RESIDUAL:
        optimizer, loss = fused_opt.SGD(model.parameters(), lr, momentum=0.9), nn.functional.cross_entropy
    else:
        optimizer, loss = fused_opt.AdamW(model.parameters(), lr), of_characters
    size, epochs = BATCH[kind], EPOCHS[kind]
    steps = len(data.targets) // size * epochs
    for update, x, y in batches(data, size, epochs, seed):
        set_rate(optimizer, lr * scheduled("linear", update / steps, options["warmup"]))
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    score = accuracy(model, held_out) if kind == RESIDUAL else -bits(model, held_out, classes)
    found = {"score": score, "examples": steps * size, "updates": steps}
    return {**found, EXTRA: "" if updated is None else updated}


def load(given: Path | None) -> Mapping[str, Data]:
    """2,048 images, and 4,096 sequences of 32 characters."""
    text = list(kjv(given).lower())
    return {
        RESIDUAL: fashion_mnist(given, IMAGES, 3000),
        POST_LN: language(text, VOCABULARY, LENGTH, SEQUENCES, 1000),
    }


def load_quick(given: Path | None) -> Mapping[str, Data]:
    """Digits and the standard library."""
    text = language(list(standard_library().lower()), VOCABULARY, LENGTH, 128, 64)
    return {RESIDUAL: digits(128, 100), POST_LN: text}


def study(quick: bool = False) -> Study:
    """The study, or the least of it that runs everything."""

    def arm(
        kind: str, name: str, init: str = "PyTorch", gradinit: int = 0, warmup: float = 0.0, against: str = ""
    ) -> Arm:
        grid = (-5, -4, -3) if kind == RESIDUAL else (-6, -5)
        options = {"kind": kind, "init": init, "gradinit": gradinit, "warmup": warmup}
        return Arm(kind, name, grid, options, (against,) if against else ())

    few, many = (3, 5) if quick else (120, 390)
    he, pytorch = "He", "PyTorch"
    arms = [
        arm(RESIDUAL, "He", he),
        arm(RESIDUAL, f"He, GradInit {few}", he, few, against="He"),
        arm(RESIDUAL, f"He, GradInit {many}", he, many, against="He"),
        arm(RESIDUAL, "PyTorch", pytorch, against="He"),
        arm(RESIDUAL, f"PyTorch, GradInit {few}", pytorch, few, against="PyTorch"),
        arm(RESIDUAL, "last layers zero", "zero", against="PyTorch"),
        arm(POST_LN, "PyTorch"),
        arm(POST_LN, "PyTorch, warmup", warmup=0.2, against="PyTorch"),
        arm(POST_LN, f"PyTorch, GradInit {few}", gradinit=few, against="PyTorch"),
    ]
    return Study(
        name="gradinit",
        title="GradInit",
        arms=[arms[0], arms[1], *arms[6:]] if quick else arms,
        metric="test accuracy, per cent; of characters minus the bits a character",
        higher=True,
        load=load_quick if quick else load,
        train=train,
        extras=(EXTRA,),
        seeds=tuple(range(1, 11)),
        digits=2,
    )
