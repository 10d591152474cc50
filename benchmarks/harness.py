"""Contenders timed against each other in one run, interleaved: medians, targets, a table, a CSV, a picture.

A table is data: its cases name the shapes, the contenders, the one that the others are compared with, and the targets.
"""

from __future__ import annotations

import csv
import datetime
import gc
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
import torch
from rich.markup import escape

import fused_opt

from .shapes import Shape

Call = Callable[[], object]
WARM_UP, ROUNDS, SECONDS, TURN = 5, 15, 3.0, 4
COLOURS = ("#d1495b", "#9aa5b1", "#2f6690", "#edae49", "#66a182")  # ours, which comes first, in red


@dataclass(frozen=True)
class Target:
    """``contender``, or what it takes beyond another one, is to take at most ``factor`` times as long as ``of``."""

    contender: str
    factor: float
    of: str
    beyond: str | None = None


@dataclass(frozen=True)
class Case:
    """What is timed.

    Args:
        name: unique within its table.
        shapes: what ``contenders`` get.
        contenders: label -> a function that makes parameters, gradients and optimizer, and returns the call to time.
            The first one is ours.
        baseline: the label that the picture and the column of speeds compare with.
        targets: judged by medians.
        before: called before every timed call, untimed.
    """

    name: str
    shapes: Sequence[Shape]
    contenders: Mapping[str, Callable[[Sequence[Shape]], Call]]
    baseline: str
    targets: tuple[Target, ...] = ()
    before: Call = lambda: None


@dataclass(frozen=True)
class Table:
    """Cases that belong on one page; ``name`` names the files."""

    name: str
    title: str
    cases: Sequence[Case]


@dataclass(frozen=True)
class Result:
    """The seconds that every contender's calls took."""

    case: Case
    seconds: dict[str, list[float]]

    def median(self, label: str) -> float:
        """Seconds."""
        return float(np.median(self.seconds[label]))

    def speed(self, label: str) -> float:
        """How many times as fast as the baseline."""
        return self.median(self.case.baseline) / self.median(label)

    def met(self, target: Target) -> bool:
        """Whether the medians keep to it."""
        return self.cost(target) <= target.factor

    def cost(self, target: Target) -> float:
        """What the target limits: a ratio of medians."""
        spared = self.median(target.beyond) if target.beyond else 0.0
        return (self.median(target.contender) - spared) / self.median(target.of)

    def verdict(self, target: Target) -> str:
        """A mark, the target and what was found: as a speed where ours is to be faster, as a time where it may cost."""
        found = self.cost(target)
        if target.beyond:
            words = f"beyond {target.beyond} ≤ {target.factor:.3g}x time of {target.of}: {found:.3g}x"
        elif target.factor < 1:
            words = f"≥ {1 / target.factor:.3g}x {target.of}: {1 / found:.3g}x"
        else:
            words = f"≤ {target.factor:.3g}x time of {target.of}: {found:.3g}x"
        return f"[green]✓[/green] {escape(words)}" if self.met(target) else f"[red]✗ {escape(words)}[/red]"


def measure(case: Case, *, quick: bool = False) -> Result:
    """Time a case: A B C A B C ... for 15 rounds or 3 seconds, whichever is more.

    A turn is four calls, of which the last is timed: the first ones pay for the caches that the contender before it left
    cold, which would otherwise be a matter of the order. What ``case.before`` leaves cold is in the figures.

    Args:
        case: the case.
        quick: one round, every dimension cut to at most 8; the figures mean nothing then.
    """
    if not quick:
        gc.collect()  # what the last case held
    warm_up, rounds, at_least = (1, 1, 0.0) if quick else (WARM_UP, ROUNDS, SECONDS)
    shapes = [tuple(min(n, 8) for n in shape) for shape in case.shapes] if quick else case.shapes
    calls = {label: make(shapes) for label, make in case.contenders.items()}
    for _ in range(warm_up):
        for call in calls.values():
            case.before()
            call()
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    gc.disable()  # a collection would land in whichever call comes next
    try:
        began, done = time.perf_counter(), 0
        while done < rounds or time.perf_counter() - began < at_least:
            for label, call in calls.items():
                for _ in range(TURN - 1):
                    call()
                case.before()
                start = time.perf_counter()
                call()
                seconds[label].append(time.perf_counter() - start)
            done += 1
    finally:
        gc.enable()
    return Result(case, seconds)


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code; ``load``: how many processes wanted a core in the last minute."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.open() if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
        "torch": torch.__version__,
        "fused_opt": fused_opt.__version__,
    }


def in_words(here: Mapping[str, Any]) -> str:
    """What :func:`machine` found, as one line."""
    words = "{processor}, {cores} cores, {threads} used, load {load} before; torch {torch}, fused_opt {fused_opt}"
    return words.format(**here)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    value, unit = (seconds * 1e6, "µs") if seconds < 0.9995e-3 else (seconds * 1e3, "ms")
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def page(table: Table, results: Sequence[Result], here: Mapping[str, Any], *, judge: bool) -> rich.table.Table:
    """The table for the terminal; ``judge=False`` leaves the targets out."""
    result = rich.table.Table(
        title=f"[bold]{escape(table.title)}[/bold]",
        title_justify="left",
        caption=in_words(here),
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    result.add_column("case", no_wrap=True)
    result.add_column("contender", no_wrap=True)
    for heading in ("median", "fastest", "speed"):
        result.add_column(heading, no_wrap=True, justify="right")
    result.add_column("target")
    for of_case in results:
        case = of_case.case
        for i, (label, seconds) in enumerate(of_case.seconds.items()):
            targets = [target for target in case.targets if target.contender == label and judge]
            result.add_row(
                "" if i else case.name,
                escape(label) if i else f"[bold]{escape(label)}[/bold]",
                duration(of_case.median(label)),
                f"[dim]{duration(min(seconds))}[/dim]",
                "[dim]1x[/dim]" if label == case.baseline else f"{of_case.speed(label):.3g}x",
                "\n".join(map(of_case.verdict, targets)),
                end_section=i == len(of_case.seconds) - 1,
            )
    return result


def save_csv(results: Sequence[Result], here: Mapping[str, Any], path: Path) -> None:
    """One row per case and contender, in microseconds, with the machine and the versions in every row."""
    columns = ("minimum_us", "lower_quartile_us", "median_us", "upper_quartile_us")
    rows = []
    for result in results:
        for label, seconds in result.seconds.items():
            figures = [f"{x * 1e6:.2f}" for x in np.quantile(seconds, [0, 0.25, 0.5, 0.75])]
            names = {"case": result.case.name, "contender": label, "calls": len(seconds)}
            rows.append({**here, **names, **dict(zip(columns, figures))})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save_picture(table: Table, results: Sequence[Result], here: Mapping[str, Any], path: Path) -> None:
    """Horizontal bars: how many times as fast as the baseline, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    bars = [[label for label in result.seconds if label != result.case.baseline] for result in results]
    speeds = [result.speed(label) for result, labels in zip(results, bars) for label in labels]
    left, right = min(1.0, *speeds) / 2, max(1.0, *speeds) * 2.5
    height = 1.4 + 0.26 * sum(len(labels) + 0.8 for labels in bars)
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    colours: dict[str, str] = {}
    y, ticks = 0.0, []
    for result, labels in zip(results, bars):
        ticks.append(y + (len(labels) - 1) / 2)
        for label in labels:
            known = label in colours
            colour = colours.setdefault(label, COLOURS[len(colours) % len(COLOURS)])
            speed = result.speed(label)
            end = max(speed, 1.0)
            axes.barh(y, speed - 1, left=1, height=0.9, color=colour, label="_" if known else label)
            for target in result.case.targets:
                if target.contender == label and target.of == result.case.baseline:
                    axes.plot([1 / target.factor] * 2, [y - 0.45, y + 0.45], color="black", linewidth=2)
                    end = max(end, 1 / target.factor)
            axes.annotate(
                f"{speed:.3g}x   {duration(result.median(label))}",
                (end, y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="#333333",
            )
            y += 1
        y += 0.8
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_xticks([x for x in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if left <= x <= right])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", length=0)
    names = [
        f"{result.case.name}\n{result.case.baseline} {duration(result.median(result.case.baseline))}"
        for result in results
    ]
    axes.set_yticks(ticks, names, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(table.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(f"times as fast as the baseline (by medians; black: the target)\n{in_words(here)}", fontsize=8)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
