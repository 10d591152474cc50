"""A batch of 1,024 without warmup: SGD, LARS, LARS with warmup and CLARS on handwritten digits.

``python examples/large_batch.py`` trains a small convolutional network with batches of 1,024 images that are accumulated
from 16 micro-batches of 64. CLARS divides by the norms of the 16 parts (``track_parts("microbatch")``), LARS by the norm
of their sum. Every optimizer gets its learning rate from the same grid, by the loss on validation images with seeds of
their own; then five more seeds are trained and tested. Printed: mean and spread over these; drawn: their curves.

Momentum 0.9, decay 2e-4, coefficient 0.01 and a learning rate that falls as (1 - step / steps)**2 for all of them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fused_opt
from fused_opt import pictures

MICROBATCHES, MICROBATCH = 16, 64
GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
TUNING_SEEDS, SEEDS = (101, 102), (0, 1, 2, 3, 4)
COMMON = {"momentum": 0.9, "weight_decay": 2e-4}

Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """An optimizer and the share of the steps over which its learning rate rises first."""

    make: Callable[[nn.Module, float], fused_opt.FusedOptimizer]
    color: str
    warmup: float = 0.0


RECIPES = {
    "SGD": Recipe(lambda m, lr: fused_opt.SGD(m.named_parameters(), lr, **COMMON), pictures.SERIES[0]),
    "LARS": Recipe(
        lambda m, lr: fused_opt.LARS(m.named_parameters(), lr, **COMMON, coefficient=0.01), pictures.SERIES[1]
    ),
    "LARS, warmup": Recipe(
        lambda m, lr: fused_opt.LARS(m.named_parameters(), lr, **COMMON, coefficient=0.01),
        pictures.SERIES[2],
        warmup=0.2,
    ),
    "CLARS": Recipe(lambda m, lr: fused_opt.CLARS(m.named_parameters(), lr, **COMMON), pictures.SERIES[3]),
}


@dataclass
class Run:
    """What became of one training."""

    losses: list[float] = field(default_factory=list)  # of every batch, before its update
    accuracies: list[float] = field(default_factory=list)  # on the test images, after every update
    validation: float = math.inf  # loss at the end


@dataclass
class Result:
    """One optimizer: how it did on the grid, and the runs with the rate that did best there."""

    tuning: list[list[Run]]
    lr: float
    runs: list[Run]


def digits() -> Data:
    """1,797 images of 8x8: 1,100 to train on, 247 to choose the learning rate with, 450 to test with."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.tensor(data.target)[order]
    train, validation, test = zip(images.split([1100, 247, 450]), labels.split([1100, 247, 450]))
    return train, validation, test


def network() -> nn.Sequential:
    """Four convolutions with batch norm and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in [(1, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2)]:
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4, 10))


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss and accuracy."""
    model.eval()
    scores = model(images)
    model.train()
    accuracy = (scores.argmax(1) == labels).float().mean().item()
    return nn.functional.cross_entropy(scores, labels).item(), accuracy


def rate(lr: float, step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step, counted from 0."""
    rising = min(1.0, (step + 1) / (warmup * steps)) if warmup else 1.0
    return lr * rising * (1 - step / steps) ** 2


def train(recipe: Recipe, lr: float, seed: int, steps: int, data: Data) -> Run:
    """One training; the same seed gives every optimizer the same weights and batches."""
    (images, labels), validation, test = data
    torch.manual_seed(seed)
    model, run = network(), Run()
    optimizer = recipe.make(model, lr)
    if isinstance(optimizer, fused_opt.CLARS):
        optimizer.track_parts("microbatch")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(lr, step, steps, recipe.warmup)
        optimizer.zero_grad()
        loss = 0.0
        for rows in torch.randperm(len(labels))[: MICROBATCHES * MICROBATCH].split(MICROBATCH):
            part = nn.functional.cross_entropy(model(images[rows]), labels[rows]) / MICROBATCHES
            part.backward()
            loss += part.item()
        run.losses.append(loss)
        optimizer.step()
        run.accuracies.append(evaluate(model, *test)[1])
    loss = evaluate(model, *validation)[0]
    run.validation = loss if math.isfinite(loss) else math.inf
    return run


def compare(
    grid: Sequence[float], tuning: Sequence[int], seeds: Sequence[int], steps: int, out: Console
) -> dict[str, Result]:
    """Tune and train every optimizer."""
    data = digits()
    columns = (TextColumn("{task.description:13}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    results = {}
    with Progress(*columns, console=out) as progress:
        for name, recipe in RECIPES.items():
            task = progress.add_task(name, total=len(grid) * len(tuning) + len(seeds))

            def run(lr: float, seed: int, recipe: Recipe = recipe, task: object = task) -> Run:
                found = train(recipe, lr, seed, steps, data)
                progress.advance(task)  # type: ignore[arg-type]
                return found

            tried = [[run(lr, seed) for seed in tuning] for lr in grid]
            lr, _ = min(zip(grid, tried), key=lambda pair: mean(run.validation for run in pair[1]))
            results[name] = Result(tried, lr, [run(lr, seed) for seed in seeds])
    return results


def spread(values: Sequence[float], percent: bool = False) -> str:
    """Mean and standard deviation in words."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.1%} ± {deviation:.1%}" if percent else f"{mean(values):.4f} ± {deviation:.4f}"


def page(results: dict[str, Result], early: int) -> Table:
    """What is printed."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("optimizer", no_wrap=True)
    for heading in (
        "learning\nrate",
        f"test accuracy\nafter {early} steps",
        "test accuracy\nat the end",
        "training loss\nat the end",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.lr:g}",
            spread([run.accuracies[early - 1] for run in result.runs], percent=True),
            spread([run.accuracies[-1] for run in result.runs], percent=True),
            spread([run.losses[-1] for run in result.runs]),
        )
    return table


def draw(results: dict[str, Result], grid: Sequence[float], path: Path) -> None:
    """Loss and accuracy over the steps (mean line, all seeds within the band), and what the learning rate matters."""
    figure, ((loss, error, tuning),) = pictures.figure(1, 3, 13, 4.2)
    for name, result in results.items():
        color, label = RECIPES[name].color, f"{name} (lr {result.lr:g})"
        for panel, curves in (
            (loss, [run.losses for run in result.runs]),
            (error, [[100 * (1 - a) for a in run.accuracies] for run in result.runs]),
        ):
            steps = range(1, len(curves[0]) + 1)
            panel.plot(steps, [mean(values) for values in zip(*curves)], color=color, linewidth=2, label=label)
            panel.fill_between(
                steps, *zip(*[(min(v), max(v)) for v in zip(*curves)]), color=color, alpha=0.15, linewidth=0
            )
        values = [min(mean(run.validation for run in tried), 20.0) for tried in result.tuning]
        tuning.plot(grid, values, "o-", color=color, markersize=4, linewidth=1.5)
        best = grid.index(result.lr)
        tuning.plot(
            grid[best], values[best], "o", color=color, markersize=10, markerfacecolor="none", markeredgewidth=2
        )
    loss.set(title="training loss", xlabel="step", yscale="log")
    error.set(title="test error, per cent", xlabel="step", yscale="log")
    for panel in (loss, error):
        panel.xaxis.get_major_locator().set_params(integer=True)
    tuning.set(title="validation loss (ring: the rate taken)", xlabel="learning rate", xscale="log", yscale="log")
    pictures.finish((loss, error, tuning), legends=(loss,))
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    """Tune, train, print, draw; returns the results by the optimizer's name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--quick", action="store_true", help="two learning rates, one seed to tune and two to train, 4 steps"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="where the picture goes")
    parser.add_argument("--threads", type=int, default=1, help="the networks are so small that a second does not pay")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    grid, tuning, seeds, steps = (GRID, TUNING_SEEDS, SEEDS, options.steps)
    if options.quick:
        grid, tuning, seeds, steps = GRID[1:3], TUNING_SEEDS[:1], SEEDS[:2], 4

    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(
        f"batches of {MICROBATCHES * MICROBATCH} as {MICROBATCHES} micro-batches, {steps} steps, {len(seeds)} seeds; "
        f"learning rates {', '.join(f'{lr:g}' for lr in grid)} tried with {len(tuning)} other seeds",
        highlight=False,
    )
    results = compare(grid, tuning, seeds, steps, console)
    console.print(page(results, max(1, steps // 8)))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(results, grid, options.out / "large_batch.png")
    console.print(f"picture: {options.out / 'large_batch.png'}", highlight=False, soft_wrap=True)
    if options.quick:
        console.print("--quick: this shows that the example runs; its figures mean nothing")
    return results


if __name__ == "__main__":
    main()
