"""The pictures of the pages, made by the package itself: ``python docs/pictures.py`` writes ``docs/images/*.png``."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch
from torch import nn

import fused_opt
from fused_opt import pictures

IMAGES = Path(__file__).parent / "images"
RESULTS = Path(__file__).parent.parent / "benchmarks/results"
PERIOD = 40


def trajectory(averaging: fused_opt.Averaging | None, steps: int = 3 * PERIOD) -> tuple[list[float], list[float]]:
    """The weight after every step, and what ``averaged_weights`` holds, on a noisy quadratic with a large rate."""
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(1)).tolist()
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = fused_opt.SGD([weight], lr=0.1, averaging=averaging)
    weights, averages = [], []
    for z in noise:
        weight.grad = weight.detach() + 2.5 * z
        optimizer.step()
        weights.append(weight.item())
        if averaging is not None:
            with optimizer.averaged_weights():
                averages.append(weight.item())
    return weights, averages


def averaging() -> None:
    """What a fold does over three periods, for all variants."""
    variants = {
        "EMA(0.95)": fused_opt.EMA(0.95),
        f"PSWA(period={PERIOD}, fraction=0.5)": fused_opt.PSWA(period=PERIOD, fraction=0.5),
        f"PWALKS(period={PERIOD}, samples=4, interval=4)": fused_opt.PWALKS(period=PERIOD, samples=4, interval=4),
        f"PSWM(period={PERIOD}, beta=0.5)": fused_opt.PSWM(period=PERIOD, beta=0.5),
        f"SWM(period={PERIOD}, beta=0.9)": fused_opt.SWM(period=PERIOD, beta=0.9),
    }
    plain, _ = trajectory(None)
    figure, panels = pictures.figure(len(variants), 1, 8, 10.5, sharex=True, sharey=True)
    for panel, (name, variant) in zip(panels.flat, variants.items()):
        weights, averages = trajectory(variant)
        steps = range(1, len(weights) + 1)
        taken = [t for t in steps if variant.sampled(t)]
        panel.axhline(0, color=pictures.INK, linewidth=0.8)
        panel.plot(steps, plain, color=pictures.ASIDE, linewidth=1, label="the weight without averaging")
        panel.plot(steps, weights, color=pictures.INK, linewidth=1.2, label="the weight")
        first = taken[0] - 1
        panel.plot(steps[first:], averages[first:], color=pictures.SERIES[1], linewidth=2, label="its average")
        at = [weights[t - 1] for t in taken]
        panel.plot(taken, at, ".", color=pictures.INK, markersize=4, label="sampled")
        if not isinstance(variant, fused_opt.EMA):
            for end in range(PERIOD, len(weights) + 1, PERIOD):
                panel.axvline(end, color=pictures.INK, linewidth=0.8, linestyle=":")
        panel.set(title=name, ylabel="weight")
    last = panels.flat[-1]
    last.set_xlabel("step; dotted: a period ends, and the weight becomes the average")
    pictures.finish(panels.flat)
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(IMAGES / "averaging.png", dpi=110)


def noise() -> None:
    """The standard deviation that every schedule has over the steps."""
    schedules = {
        "std=0.01": fused_opt.WeightNoise(std=0.01),
        'std=0.01, schedule="decay"': fused_opt.WeightNoise(std=0.01, schedule="decay"),
        'std=0.01, schedule="cycle", period=50': fused_opt.WeightNoise(std=0.01, schedule="cycle", period=50),
        "temperature=5e-4, a cosine learning rate": fused_opt.WeightNoise(temperature=5e-4),
    }
    figure, ((panel,),) = pictures.figure(1, 1, 8, 4)
    steps = range(200)
    for (name, made), color in zip(schedules.items(), pictures.SERIES):
        sigmas = [made.sigma(t, lr=0.05 * (1 + math.cos(math.pi * t / 200))) for t in steps]
        panel.plot(steps, sigmas, color=color, label=name, linewidth=1.8)
    panel.set(xlabel="step", ylabel="sigma of WeightNoise(...)", ylim=(0, None))
    pictures.finish((panel,))
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False, fontsize=8)
    figure.savefig(IMAGES / "noise.png", dpi=110)


def batch_sizes() -> None:
    """The three shapes of a cycle."""
    figure, ((panel,),) = pictures.figure(1, 1, 8, 3.6)
    epochs = [i / 50 for i in range(50 * 40)]
    for shape, color, style in zip(("sawtooth", "triangle", "cosine"), pictures.SERIES, ("-", "--", "-")):
        schedule = fused_opt.CyclicalBatchSize(32, levels=4, width=5, shape=shape)
        sizes = [schedule.at(epoch) for epoch in epochs]
        panel.plot(epochs, sizes, color=color, label=f'shape="{shape}"', linestyle=style, drawstyle="steps-post")
    panel.set(xlabel="epoch", ylabel="examples in a batch", yscale="log")
    pictures.finish((panel,), legends=(panel,))
    panel.set_yticks([32, 64, 128, 256])
    figure.savefig(IMAGES / "batch_sizes.png", dpi=110)


def spectrum() -> None:
    """What TempBalance sees of a small network that it watched over ten calls while it learned."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(100, 100), nn.Tanh())]
    model, teacher = nn.Sequential(*layers, nn.Linear(100, 10)), nn.Linear(100, 10)
    optimizer = fused_opt.AdamW(model.parameters(), lr=2e-3)
    balance = fused_opt.TempBalance(model, optimizer)
    for _ in range(10):
        balance.step()
        for _ in range(20):
            inputs = torch.randn(128, 100)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), teacher(inputs).argmax(1)).backward()
            optimizer.step()
    balance.plot().savefig(IMAGES / "spectrum.png", dpi=110)


def one_pass() -> None:
    """What a step of ResNet-50's shapes takes with what else it does, from the benchmarks' results."""
    median: dict[tuple[str, str, str], float] = {}
    for name in ("sgd", "one_pass"):
        with (RESULTS / f"{name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                median[name, row["case"], row["contender"]] = float(row["median_us"]) / 1000
    rows = {
        "SGD": (("sgd", "ResNet-50", "torch fused"), ("sgd", "ResNet-50", "fused_opt")),
        "and clipping": tuple(
            ("one_pass", "clipping", name) for name in ("clip_grad_norm_ and torch fused", "clipping in the step")
        ),
        "and EMA": tuple(("one_pass", "EMA", name) for name in ("torch fused and AveragedModel", "EMA in the step")),
        "LARS": tuple(("one_pass", "CLARS", name) for name in ("foreach LARS", "LARS")),
    }
    figure, ((panel,),) = pictures.figure(1, 1, 8, 3.6)
    drawn = set()
    for place, pair in enumerate(rows.values()):
        foreach = "foreach" in pair[0][2]
        fused = "torch fused, with torch's clipping or EMA", pictures.TORCH_FUSED
        theirs = ("torch foreach", pictures.TORCH_FOREACH) if foreach else fused
        for key, offset, (label, colour) in zip(pair, (-0.2, 0.2), (theirs, ("fused_opt", pictures.OURS))):
            panel.barh(place + offset, median[key], 0.36, color=colour, label=None if label in drawn else label)
            words = f"{median[key]:.1f} ms" + (f", {median[pair[0]] / median[key]:.2f}x" if offset > 0 else "")
            panel.annotate(
                words, (median[key], place + offset), (5, 0), textcoords="offset points", va="center", fontsize=8
            )
            drawn.add(label)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.invert_yaxis()
    panel.set_xlim(0, 1.12 * max(median[pair[0]] for pair in rows.values()))  # room for the words behind the longest
    panel.set(title="one step, ResNet-50's shapes, float32, two threads of an Intel Xeon", xlabel="milliseconds")
    pictures.finish((panel,), legends=(panel,))
    panel.grid(visible=False, axis="y")
    figure.savefig(IMAGES / "one_pass.png", dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)
    IMAGES.mkdir(exist_ok=True)
    for draw in (averaging, noise, batch_sizes, spectrum, one_pass):
        draw()
