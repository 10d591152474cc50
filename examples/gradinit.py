"""GradInit on handwritten digits: deep networks without normalization, with and without learned scales.

Two networks (16 plain layers; 16 residual blocks) begin from two initializations (PyTorch's default; He's)
and train at several learning rates. Printed: the training loss after the first update and the test accuracy
at the end. GradInit runs with its defaults everywhere.

    python examples/gradinit.py [--quick] [--out FOLDER]
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fused_opt import pictures
from fused_opt.gradinit import gradinit

OPTIMIZER = partial(torch.optim.SGD, momentum=0.9)
WIDTH, CLASSES, BATCH, TEST = 64, 10, 64, 397
Runs = dict[tuple[str, str, bool, float], list[tuple[float, float]]]  # network, start, learned, lr -> loss, accuracy


class Block(nn.Module):
    """x + W2 relu(W1 relu(x)): the variance grows with every block, and nothing normalizes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.second(self.first(x.relu()).relu())


def build(network: str, initialization: str, depth: int) -> nn.Module:
    hidden: list[nn.Module] = []
    for _ in range(depth - 2 if network == "plain" else depth):
        hidden += [nn.ReLU(), nn.Linear(WIDTH, WIDTH)] if network == "plain" else [Block()]
    model = nn.Sequential(nn.Linear(64, WIDTH), *hidden, nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    for module in model.modules():
        if initialization == "He" and isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


def shuffled(x: Tensor, y: Tensor, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [(x[rows], y[rows]) for rows in order.split(size) if len(rows) == size]


def train(model: nn.Module, lr: float, epochs: int, x: Tensor, y: Tensor, seed: int) -> tuple[float, float]:
    """Loss on all training digits after the first update, and accuracy on the test digits at the end."""
    x_test, y_test, x, y = x[:TEST], y[:TEST], x[TEST:], y[TEST:]
    optimizer = OPTIMIZER(model.parameters(), lr=lr)
    first_loss = math.nan
    for epoch in range(epochs):
        for inputs, target in shuffled(x, y, BATCH, 1000 * seed + epoch):
            optimizer.zero_grad()
            cross_entropy(model(inputs), target).backward()
            optimizer.step()
            if math.isnan(first_loss):
                with torch.no_grad():
                    first_loss = cross_entropy(model(x), y).nan_to_num(torch.inf).item()
    with torch.no_grad():
        return first_loss, (model(x_test).argmax(1) == y_test).float().mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds: shallow networks, one seed, one epoch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the picture")
    parser.add_argument("--threads", type=int, default=1, help="the networks are so small that a second does not pay")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    depth, epochs, iterations, seeds = (4, 1, 20, 1) if options.quick else (16, 8, 390, 5)
    rates = (1e-2, 1e-1) if options.quick else (1e-3, 1e-2, 1e-1, 3e-1)
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order], torch.tensor(labels)[order]
    x = (x - x[TEST:].mean(0)) / x[TEST:].std()

    variants = [
        (network, initialization, learned)
        for network in ("plain", "residual")
        for initialization in ("PyTorch", "He")
        for learned in (False, True)
    ]
    runs: Runs = {}
    scales: dict[tuple[str, str], list[float]] = {}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    bar = tqdm(total=len(variants) * seeds * (len(rates) + 1), desc="runs")
    for network, initialization, learned in variants:
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = build(network, initialization, depth)
            began = time.perf_counter()
            if learned:
                halves = shuffled(x[TEST:], y[TEST:], BATCH // 2, seed)
                result = gradinit(model, cross_entropy, halves, iterations=iterations, progress=False)
                seconds[True].append(time.perf_counter() - began)
                if seed == 0:
                    scales[network, initialization] = [
                        scale for name, scale in result.scales.items() if "weight" in name
                    ]
            bar.update()
            for lr in rates:
                began = time.perf_counter()
                run = train(copy.deepcopy(model), lr, epochs, x, y, seed)
                seconds[False].append(time.perf_counter() - began)
                runs.setdefault((network, initialization, learned, lr), []).append(run)
                bar.update()
    bar.close()

    print(f"{depth} layers or blocks of width {WIDTH}, {epochs} epochs, {seeds} seed(s)")
    print("loss after the first update (median) | test accuracy at the end (median, lowest to highest)")
    print(f"{'network':9} {'starts from':20}" + "".join(f"{f'lr {lr:g}':>31}" for lr in rates))
    for network, initialization, learned in variants:
        cells = []
        for lr in rates:
            losses, accuracies = zip(*runs[network, initialization, learned, lr], strict=True)
            loss, accuracy = statistics.median(losses), statistics.median(accuracies)
            cells.append(f"{loss:.4g} | {accuracy:.2f}, {min(accuracies):.2f} to {max(accuracies):.2f}")
        start = initialization + (" + GradInit" if learned else "")
        print(f"{network:9} {start:20}" + "".join(f"{cell:>31}" for cell in cells))
    print(
        f"seconds on average: GradInit {statistics.mean(seconds[True]):.1f}, "
        f"a training of {epochs} epoch(s) {statistics.mean(seconds[False]):.1f}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    draw(runs, scales, rates, options.out / "gradinit.png")
    if options.quick:
        print("--quick: this shows that the example runs; its figures mean nothing")


def draw(runs: Runs, scales: dict[tuple[str, str], list[float]], rates: Sequence[float], path: Path) -> None:
    figure, axes = pictures.figure(2, 3, 13, 8)
    colors = dict(zip(("PyTorch", "He"), pictures.SERIES))
    for (loss_axis, accuracy_axis, scale_axis), network in zip(axes, ("plain", "residual"), strict=True):
        for initialization, color in colors.items():
            for learned, line in ((False, "--"), (True, "-")):
                cells = [runs[network, initialization, learned, lr] for lr in rates]
                losses = [min(statistics.median(loss for loss, _ in cell), 1e3) for cell in cells]
                accuracies = [statistics.median(accuracy for _, accuracy in cell) for cell in cells]
                label = initialization + (" + GradInit" if learned else "")
                loss_axis.plot(rates, losses, "o" + line, color=color, label=label)
                accuracy_axis.plot(rates, accuracies, "o" + line, color=color, label=label)
            scale_axis.plot(scales[network, initialization], ".-", color=color, label=initialization)
        loss_axis.set(title=f"{network}: loss after the first update (cut at 1e3)", xlabel="learning rate")
        loss_axis.set(xscale="log", yscale="log" if loss_axis.get_ylim()[1] > 10 else "linear")
        accuracy_axis.set(title=f"{network}: test accuracy at the end", xlabel="learning rate", xscale="log")
        scale_axis.set(title=f"{network}: learned scales, first seed", xlabel="weight, from input to output")
    pictures.finish(axes.flat, legends=axes[-1])
    figure.savefig(path, dpi=110)
    print(f"drawn: {path.name}")


if __name__ == "__main__":
    main()
