"""Train a small convolutional network on real handwritten digits with torch.optim and with fused_opt, side by side.

``python examples/digits.py`` trains two copies of one network in lockstep, batch by batch: one with torch.optim's fused
step, one with ours, first SGD with momentum and then AdamW. It prints how they did and how long they spent in
``optimizer.step()``, and draws it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import fused_opt
from fused_opt import pictures

RECIPES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4},
    "AdamW": {"lr": 1e-3, "weight_decay": 1e-2},
}


@dataclass
class Run:
    """One network, its optimizer and what became of them."""

    label: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def train(self, images: Tensor, labels: Tensor) -> None:
        """One step on one batch; only ``optimizer.step()`` is timed."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> None:
        """The share of the images that the network reads right."""
        self.model.eval()
        self.accuracy = (self.model(images).argmax(1) == labels).float().mean().item()


def network() -> nn.Sequential:
    """Six convolutions with batch norm and a linear layer: 20 parameter tensors.

    SiLU because it is smooth. Most of an image is background, so at the kink of a ReLU hundreds of pixels switch at
    once, and two runs that differ by one rounding part ways within a few steps, torch.optim's own variants too.
    """
    layers: list[nn.Module] = []
    for inputs, outputs, stride in [(1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def digits() -> list[Tensor]:
    """1,797 images of 8x8: those to train on, those to test with (every fourth), and the labels of both.

    They are a file of scikit-learn, which is not imported: that needs scipy, and the demo needs neither.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        sys.exit("the images are a file of scikit-learn: pip install scikit-learn")
    table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1]).view(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(table[:, -1]).long()
    testing = torch.arange(len(labels)) % 4 == 0
    return [images[~testing], images[testing], labels[~testing], labels[testing]]


def batches(count: int, size: int, epochs: int) -> Iterator[Tensor]:
    """Indices in a new order every epoch, the same for the same arguments; full batches only, for the batch norm."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)


def compare(name: str, data: Sequence[Tensor], epochs: int, progress: Progress) -> tuple[Run, Run]:
    """Train with both; they start from the same weights and see the same batches."""
    train_images, test_images, train_labels, test_labels = data
    torch.manual_seed(0)
    model = network()
    theirs, ours = model, copy.deepcopy(model)
    runs = (
        Run(
            f"torch.optim.{name}(fused=True)",
            theirs,
            getattr(torch.optim, name)(theirs.parameters(), **RECIPES[name], fused=True),
        ),
        Run(f"fused_opt.{name}", ours, getattr(fused_opt, name)(ours.parameters(), **RECIPES[name])),
    )
    schedule = list(batches(len(train_labels), 64, epochs))
    task = progress.add_task(name, total=len(schedule), loss="")
    for rows in schedule:
        for run in runs:
            run.train(train_images[rows], train_labels[rows])
        progress.update(task, advance=1, loss=f"loss {runs[1].losses[-1]:.4f}")
    for run in runs:
        run.test(test_images, test_labels)
    return runs


def epoch_loss(run: Run, epochs: int) -> float:
    """Mean over the last epoch."""
    last = run.losses[-(len(run.losses) // epochs) :]
    return sum(last) / len(last)


def apart(runs: tuple[Run, Run]) -> float:
    """The largest difference of the two losses at any step."""
    return max(abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses))


def page(results: dict[str, tuple[Run, Run]], epochs: int) -> Table:
    """What is printed."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("optimizer", no_wrap=True)
    for heading in ("training loss\nlast epoch", "test\naccuracy", "in the step\nmedian", "\nratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for runs in results.values():
        baseline = median(runs[0].seconds)
        for run in runs:
            ratio = baseline / median(run.seconds)
            ours = run is runs[1]
            table.add_row(
                f"[bold]{run.label}[/bold]" if ours else run.label,
                f"{epoch_loss(run, epochs):.6f}",
                f"{run.accuracy:.1%}",
                f"{median(run.seconds) * 1e3:.3f} ms",
                f"[bold green]{ratio:.1f}x[/bold green]" if ours else "1x",
                end_section=ours,
            )
    return table


def draw(results: dict[str, tuple[Run, Run]], path: Path) -> None:
    """Loss curves on top of each other, and the time in the step."""
    theirs_colour, ours_colour = pictures.TORCH_FUSED, pictures.OURS
    figure, (axes,) = pictures.figure(1, 3, 12, 3.9, width_ratios=[1.25, 1.25, 1])
    for panel, (name, (theirs, ours)) in zip(axes, results.items()):
        panel.plot(
            theirs.losses, color=theirs_colour, alpha=0.5, linewidth=5, label=theirs.label, solid_capstyle="round"
        )
        panel.plot(ours.losses, color=ours_colour, linewidth=1.2, label=ours.label)
        panel.set(title=f"{name}: at most {apart((theirs, ours)):.0e} apart", xlabel="step", yscale="log")
        panel.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("training loss")
    bars = axes[-1]
    ticks = []
    for i, runs in enumerate(results.values()):
        ticks.append(2.6 * i + 0.5)
        for k, (run, colour) in enumerate(zip(runs, (theirs_colour, ours_colour))):
            value = median(run.seconds) * 1e3
            bars.barh(2.6 * i + k, value, height=0.92, color=colour)
            words = f"{value:.3f} ms" + (f", {median(runs[0].seconds) / median(run.seconds):.1f}x" if k else "")
            behind = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            bars.annotate(words, (value, 2.6 * i + k), **behind)
    bars.set_yticks(ticks, list(results))
    bars.invert_yaxis()
    bars.set_xlim(right=1.4 * max(median(run.seconds) * 1e3 for runs in results.values() for run in runs))
    bars.set(title="time in step(), median", xlabel="milliseconds")
    bars.tick_params(axis="y", length=0)
    pictures.finish(axes, legends=axes[:2])
    bars.grid(visible=False, axis="y")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[Run, Run]]:
    """Train, print, draw; returns the runs of torch.optim and of fused_opt by the name of the rule."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="the network is so small that a second one does not pay")
    parser.add_argument("--quick", action="store_true", help="one epoch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="where the picture goes")
    options = parser.parse_args(arguments)
    epochs = 1 if options.quick else options.epochs

    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 100)
    data = digits()
    console.print(
        f"{len(data[0])} handwritten digits to train on, {len(data[1])} to test with; {epochs} epochs, "
        f"{options.threads} {'thread' if options.threads == 1 else 'threads'}",
        highlight=False,
    )
    columns = (TextColumn("{task.description:5}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        results = {name: compare(name, data, epochs, progress) for name in RECIPES}
    console.print(page(results, epochs))
    for name, runs in results.items():
        steps = len(runs[0].losses)
        console.print(f"{name}: in {steps} steps the two losses were never further apart than {apart(runs):.0e}")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(results, options.out / "digits.png")
    console.print(f"picture: {options.out / 'digits.png'}", highlight=False, soft_wrap=True)
    if options.quick:
        console.print("--quick: this shows that the example runs; its figures mean nothing")
    return results


if __name__ == "__main__":
    main()
