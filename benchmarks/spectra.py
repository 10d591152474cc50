"""What the exponents of a model cost, beside the published per-layer svdvals, and beside WeightWatcher's.

    python -m benchmarks.spectra [--quick] [--models NAME ...] [--repeats N] [--out DIR]

Prints tables and writes spectra.csv. Ours and the published way take turns in the same run; figures are medians.
WeightWatcher is compared where it is installed: `make bench` installs it.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fused_opt.balance import TempBalance, layer_alphas
from fused_opt.balance.hill import hill
from fused_opt.balance.spectrum import spectrum

from . import shapes
from .harness import take_turns
from .machine import describe, in_words
from .output import RESULTS, console, page, save_csv
from .shapes import Shape

Models = Mapping[str, Sequence[Shape]]
Rows = list[dict[str, object]]
# GPT-2's linear layers as torch keeps them; embedding and head are tied.
GPT2 = [shape[::-1] for shape in shapes.gpt2_small()[2:] if len(shape) > 1]
MODELS: Models = {
    "ResNet-50": [shape for shape in shapes.resnet50() if len(shape) > 1],
    "ViT-B/16": shapes.vit_b(),
    "GPT-2 small": GPT2,
    "GPT-2 small + head": [*GPT2, (50257, 768)],
}
FOUR_LAYERS: list[Shape] = [(64, 64, 3, 3), (256, 64), (384, 384), (512, 128)]
QUICK: Models = {"three layers": [(64, 64), (96, 64, 3, 3), (64, 128)]}


def random_weights(shapes: Sequence[Shape]) -> list[Tensor]:
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
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def time_of(way: Callable[..., object], weights: list[Tensor], into: list[tuple[float, float]]) -> None:
    """Wall-clock time of one call, and the time of all cores, which a busy machine changes less."""
    cores = time.process_time()
    wall = seconds(way, weights)
    into.append((wall, time.process_time() - cores))


def as_model(shapes: Sequence[Shape]) -> nn.Module:
    """A model with these weights, which is not meant to be run."""
    model = nn.Sequential()
    for weight in random_weights(shapes):
        layer = nn.Conv2d(1, 1, 1) if weight.ndim == 4 else nn.Linear(1, 1)
        layer.weight = nn.Parameter(weight)
        model.append(layer)
    return model


def speed(models: Models, repeats: int) -> Rows:
    """All exponents of each model, ours and the published way in turns."""
    rows: Rows = []
    for name, of_model in models.items():
        weights = random_weights(of_model)
        seconds(layer_alphas, weights)  # starts the threads
        turns: list[list[tuple[float, float]]] = [[], []]
        ways = [partial(time_of, way, weights, into) for way, into in zip((published, layer_alphas), turns)]
        take_turns(ways, repeats, 0.0)
        times = torch.tensor(turns, dtype=torch.float64).transpose(0, 1)
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


def additions(models: Models, budgets: tuple[float, ...]) -> Rows:
    """What one call of step() adds at most."""
    rows: Rows = []
    for name, of_model in models.items():
        for budget, background in [*((b, False) for b in budgets), (1.0, True), (budgets[-1], True)]:
            model = as_model(of_model)
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


def beside_weightwatcher(shapes: Sequence[Shape]) -> Rows:
    """Its exponent, of the power law nearest to the spectrum by Kolmogorov-Smirnov, beside our fit="ks"."""
    try:
        import weightwatcher
    except ImportError:
        return []
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    watcher, weights = weightwatcher.WeightWatcher(model=as_model(shapes)), random_weights(shapes)
    begin = time.perf_counter()
    found = watcher.analyze()
    middle = time.perf_counter()
    ours = layer_alphas(weights, fit="ks")
    theirs, took = middle - begin, time.perf_counter() - middle
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three small layers")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS} for a whole run, nowhere for others")
    options = parser.parse_args(arguments)
    models = QUICK if options.quick else {name: MODELS[name] for name in options.models}
    terminal = console()
    terminal.print(in_words(describe()))
    body = {name: of for name, of in models.items() if "head" not in name}
    tables = {
        "speed": ("All exponents of a model", speed(models, options.repeats)),
        "step": ("What a call of TempBalance.step() takes", additions(body, (1.0, 0.1, 0.02))),
        "weightwatcher": ("Beside WeightWatcher", beside_weightwatcher(FOUR_LAYERS)),
    }
    for title, rows in tables.values():
        terminal.print(page(title, rows) if rows else "weightwatcher is not installed: not compared")
    if out := options.out or (RESULTS if models == MODELS else None):
        save_csv(
            out / "spectra.csv",
            [
                {"table": table, "row": number, "quantity": quantity, "value": value}
                for table, (_, rows) in tables.items()
                for number, row in enumerate(rows)
                for quantity, value in row.items()
            ],
        )


if __name__ == "__main__":
    main()
