"""What the exponents of a model cost, beside the published per-layer svdvals, and beside WeightWatcher's.

    python benchmarks/spectra.py [--quick] [--models NAME ...] [--repeats N] [--out DIR]

Prints tables and writes spectra.csv. Ours and the published way take turns in the same run; figures are medians.
WeightWatcher is compared where it is installed: `make bench` installs it.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fused_opt.balance import TempBalance, layer_alphas
from fused_opt.balance.hill import hill
from fused_opt.balance.spectrum import spectrum

Shapes = list[tuple[int, ...]]

RESULTS = Path(__file__).parent / "results"


def resnet50() -> Shapes:
    """Convolutions and the classifier, in module order."""
    shapes: Shapes = [(64, 3, 7, 7)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, width_in, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, width_in, 1, 1))
            width_in = 4 * width
    return [*shapes, (1000, 2048)]


def vit_b() -> Shapes:
    """ViT-B/16: patches, and query-key-value, projection and MLP of twelve blocks, and the head."""
    return [(768, 3, 16, 16), *[(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12, (1000, 768)]


def gpt2() -> Shapes:
    """GPT-2 small without embedding and head, which are tied and 50257 x 768."""
    return [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12


MODELS: dict[str, Callable[[], Shapes]] = {
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b,
    "GPT-2 small": gpt2,
    "GPT-2 small + head": lambda: [*gpt2(), (50257, 768)],
}
QUICK: dict[str, Callable[[], Shapes]] = {"three layers": lambda: [(64, 64), (96, 64, 3, 3), (64, 128)]}


def random_weights(shapes: Shapes) -> list[Tensor]:
    """Initialized weights whose columns decay, as the spectra of trained layers do."""
    generator = torch.Generator().manual_seed(0)
    weights = []
    for shape in shapes:
        decay = torch.linspace(1, 8, shape[1]).pow(-0.5).reshape(-1, *[1] * (len(shape) - 2))
        weights.append(torch.randn(shape, generator=generator) * shape[1] ** -0.5 * decay)
    return weights


def published(weights: list[Tensor]) -> list[float]:
    """Layer after layer: singular values, squared, sorted, and the exponent of the upper half."""
    alphas = []
    for weight in weights:
        matrix = weight if weight.ndim == 2 else weight.flatten(2).permute(2, 0, 1) * 0.5**0.5
        lam = torch.linalg.svdvals(matrix).square().flatten().sort().values
        log = lam[len(lam) // 2 :].log()
        alphas.append((1 + len(log) / (log.sum() - len(log) * log[0])).item())
    return alphas


def seconds(call: Callable[..., object], *arguments: object) -> float:
    """Wall-clock time of one call."""
    return both_times(call, *arguments)[0]


def both_times(call: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Wall-clock time of one call, and the time of all cores, which a busy machine changes less."""
    wall, cores = time.perf_counter(), time.process_time()
    call(*arguments)
    return time.perf_counter() - wall, time.process_time() - cores


def as_model(shapes: Shapes) -> nn.Module:
    """A model with these weights, which is not meant to be run."""
    model = nn.Sequential()
    for weight in random_weights(shapes):
        layer = nn.Conv2d(1, 1, 1) if weight.ndim == 4 else nn.Linear(1, 1)
        layer.weight = nn.Parameter(weight)
        model.append(layer)
    return model


def speed(models: dict[str, Callable[[], Shapes]], repeats: int) -> list[dict[str, object]]:
    """All exponents of each model, ours and the published way in turns."""
    rows: list[dict[str, object]] = []
    for name, shapes in models.items():
        weights = random_weights(shapes())
        seconds(layer_alphas, weights)  # starts the threads
        turns = [[both_times(way, weights) for way in (published, layer_alphas)] for _ in range(repeats)]
        times = torch.tensor(turns, dtype=torch.float64)
        (theirs, _), (ours, _) = times.median(0).values.tolist()
        ratio, core_ratio = (times[:, 0] / times[:, 1]).median(0).values.tolist()
        exact = [hill(spectrum(weight)).alpha.item() for weight in weights]
        error = max(abs(a - b) for a, b in zip(layer_alphas(weights), exact, strict=True))
        rows.append(
            {
                "model": name,
                "layers": len(weights),
                "svdvals s": f"{theirs:.3f}",
                "ours s": f"{ours:.3f}",
                "ratio": f"{ratio:.2f}",
                "ratio of core time": f"{core_ratio:.2f}",
                "error of alpha": f"{error:.1e}",
            }
        )
    return rows


def additions(models: dict[str, Callable[[], Shapes]], budgets: tuple[float, ...]) -> list[dict[str, object]]:
    """What one call of step() adds at most."""
    rows: list[dict[str, object]] = []
    for name, shapes in models.items():
        for budget, background in [*((b, False) for b in budgets), (1.0, True), (budgets[-1], True)]:
            model = as_model(shapes())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            balance = TempBalance(model, optimizer, budget=budget, background=background, every=10**6)
            calls = []
            while not balance.alphas:
                calls.append(seconds(balance.step))
                if background:  # where training would go on
                    time.sleep(0.02)
            idle = statistics.median(seconds(balance.step) for _ in range(100))
            rows.append(
                {
                    "model": name,
                    "budget": budget,
                    "background": background,
                    "calls": len(calls),
                    "largest ms": f"{1e3 * max(calls):.1f}",
                    "sum ms": f"{1e3 * sum(calls):.1f}",
                    "idle call us": f"{1e6 * idle:.1f}",
                }
            )
    return rows


def beside_weightwatcher(shapes: Shapes) -> list[dict[str, object]]:
    """Its exponent, of the power law nearest to the spectrum by Kolmogorov-Smirnov, beside our fit="ks"."""
    try:
        import weightwatcher
    except ImportError:
        return []
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    model = as_model(shapes)
    weights = random_weights(shapes)
    begin = time.perf_counter()
    found = weightwatcher.WeightWatcher(model=model).analyze()
    theirs = time.perf_counter() - begin
    begin = time.perf_counter()
    ours = layer_alphas(weights, fit="ks")
    took = time.perf_counter() - begin
    print(f"weightwatcher {weightwatcher.__version__}: {theirs:.2f} s, ours with fit='ks': {took:.2f} s")
    return [
        {
            "layer": str(shape),
            "weightwatcher": f"{alpha:.6f}",
            "ours, ks": f"{mine:.6f}",
            "ours, median": f"{half:.6f}",
        }
        for shape, alpha, mine, half in zip(shapes, found["alpha"], ours, layer_alphas(weights), strict=True)
    ]


def show(title: str, rows: list[dict[str, object]], console: Console) -> None:
    """Print rows as a table."""
    table = Table(*(rows[0] if rows else ()), title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three small layers")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS} for a whole run, nowhere for others")
    options = parser.parse_args()
    models = QUICK if options.quick else {name: MODELS[name] for name in options.models}
    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    fast = speed(models, options.repeats)
    show("All exponents of a model", fast, console)
    body = {name: shapes for name, shapes in models.items() if "head" not in name}
    added = additions(body, (1.0, 0.1, 0.02))
    show("What a call of TempBalance.step() takes", added, console)
    beside = beside_weightwatcher([(64, 64, 3, 3), (256, 64), (384, 384), (512, 128)])
    if beside:
        show("Beside WeightWatcher", beside, console)
    else:
        console.print("weightwatcher is not installed: not compared")
    out = options.out or (RESULTS if models == MODELS else None)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / "spectra.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "row", "quantity", "value"])
        for table, rows in (("speed", fast), ("step", added), ("weightwatcher", beside)):
            for number, row in enumerate(rows):
                writer.writerows([table, number, quantity, value] for quantity, value in row.items())


if __name__ == "__main__":
    main()
