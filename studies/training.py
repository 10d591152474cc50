"""What the studies' trainings have in common: batches, rates, scores."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .data import Split


def batches(split: Split, size: int, epochs: int, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(update, inputs, targets) for whole epochs, in an order that the seed alone decides; an epoch's rest is left out."""
    order = torch.Generator().manual_seed(seed)
    update = 0
    for _ in range(epochs):
        rows = torch.randperm(len(split.targets), generator=order)
        for chosen in rows[: len(rows) // size * size].split(size):
            yield update, split.inputs[chosen], split.targets[chosen]
            update += 1


def scheduled(kind: str, progress: float, warmup: float = 0.0) -> float:
    """The factor of the learning rate at ``progress``, 0 to 1 of the run: ``constant``, ``linear`` or ``cosine``.

    ``warmup`` is the share of the run over which the factor rises linearly first.
    """
    if progress < warmup:
        return (progress + 1e-3) / warmup
    left = (1 - progress) / (1 - warmup)
    return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[kind]


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """For all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of scores whose last dimension are the classes, of whatever there is one target for."""
    return nn.functional.cross_entropy(scores.movedim(-1, 1), targets)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, first: int | None = None) -> float:
    """Per cent of the targets of the (first) examples that are found."""
    model.eval()
    inputs, targets = split.inputs[:first], split.targets[:first]
    right = sum(
        (model(x).argmax(-1) == y).sum().item() for x, y in zip(inputs.split(1000), targets.split(1000), strict=True)
    )
    model.train()
    return 100 * right / targets.numel()


@torch.no_grad()
def bits(model: nn.Module, split: Split, classes: int) -> float:
    """Mean cross entropy of the next symbol, in bits; a model that is worse than guessing, or lost, counts as guessing."""
    model.eval()
    total = 0.0
    for x, y in zip(split.inputs.split(200), split.targets.split(200), strict=True):
        total += nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train()
    found = total / split.targets.numel() / math.log(2)
    return min(found, math.log2(classes)) if math.isfinite(found) else math.log2(classes)
