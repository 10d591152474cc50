"""Pictures of saved results, without measuring: ``python -m benchmarks.pictures FILE ...`` draws each beside its file.

A file is the CSV of a table of ``python -m benchmarks``, or the gpu.json of ``python -m benchmarks.gpu``.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_opt import pictures as style
from fused_opt.pictures import plain, plain_ticks

from . import targets
from .machine import in_words
from .output import duration

# What a bar means: the first pattern that is found in the contender's name; else it is ours, on the CPU or by CUDA.
OURS = ("", "fused_opt", style.OURS)
MEANINGS = (
    ("^triton ", "fused_opt, Triton", style.TRITON),
    ("^torch fused", "torch fused", style.TORCH_FUSED),
    ("foreach", "torch foreach", style.TORCH_FOREACH),
    ("^torch( default)?$", "torch default", style.TORCH_DEFAULT),
    ("^torch compiled", "torch compiled", style.TORCH_COMPILED),
    (
        "^(add,|copy of memory|AveragedModel|clip_grad_norm_|apex|timm|torch_optimizer|bitsandbytes|optimi|deepspeed)",
        "others",
        style.OTHERS,
    ),
    OURS,
)


@dataclass(frozen=True)
class Bar:
    """A contender's value, the words behind it, and the target if there is one."""

    label: str
    value: float
    text: str
    target: float | None = None

    @property
    def meaning(self) -> tuple[str, str]:
        """Name and colour."""
        return next((name, colour) for pattern, name, colour in MEANINGS if re.search(pattern, self.label))


Panels = Mapping[str, Sequence[Sequence[Bar]]]  # by the row's title, the bars of each column


def draw(
    path: Path, title: str, axis: str, rows: Panels, columns: Sequence[str] = ("",), *, start: float | None
) -> None:
    """Horizontal bars that begin at ``start``, on a logarithmic axis unless it is 0; None: at the left edge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    heights = [max(map(len, row)) + 0.2 for row in rows.values()]
    shape, size = (len(rows), len(columns)), (4.5 + 3.4 * len(columns), 1.2 + sum(0.34 + 0.24 * h for h in heights))
    figure, grid = plt.subplots(
        *shape, figsize=size, height_ratios=heights, layout="constrained", squeeze=False, sharex=True, sharey="row"
    )
    bars = [bar for row in rows.values() for panel in row for bar in panel]
    values = [x for bar in bars for x in (bar.value, bar.target) if x is not None and x == x]
    if start == 0:
        left, right, scale = 0.0, 1.3 * max(values), "linear"
    else:
        left, right, scale = min([start or min(values), *values]) / 1.6, 2.5 * max([start or 0, *values]), "log"
    begin = left if start is None else start
    for (name, row), areas in zip(rows.items(), grid):
        for column, panel, area in zip(columns, row, areas):
            for y, bar in enumerate(panel):
                area.barh(y, bar.value - begin, left=begin, height=0.85, color=bar.meaning[1])
                if bar.target is not None:
                    area.plot([bar.target] * 2, [y - 0.45, y + 0.45], color="black", linewidth=2)
                end = max(begin, bar.value, bar.target or begin)  # of a value that is not a number: begin
                behind = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
                area.annotate(bar.text, (end, y), **behind, fontsize=8, color=style.INK)
            area.set_title(f"{name}: {column}" if column else name, loc="left", fontsize=9, color=style.INK)
            area.set_xscale(scale)
            area.set_xlim(left, right)
            area.set_yticks(range(len(panel)), [bar.label for bar in panel])
            area.set_ylim(max(map(len, row)) - 0.4, -0.6)
            area.tick_params(labelsize=8, length=0)
            area.grid(axis="x", color=style.GRID, linewidth=0.6)
            area.set_axisbelow(True)
            area.spines[:].set_visible(False)
            area.axvline(begin, color=style.INK, linewidth=1)
            if scale == "log":
                area.xaxis.set_major_locator(FixedLocator(plain_ticks(left, right)))
                area.xaxis.set_minor_locator(NullLocator())
            area.xaxis.set_major_formatter(FuncFormatter(lambda x, _: plain(x)))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=style.INK)
    drawn = {bar.meaning for bar in bars}
    meanings = {name: colour for _, name, colour in (OURS, *MEANINGS) if (name, colour) in drawn}
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in meanings.values()]
    if any(bar.target is not None for bar in bars):
        handles.append(plt.Line2D([], [], color="black", linewidth=2))
        meanings["target"] = "black"
    outside = {"loc": "outside lower center", "ncols": len(handles), "frameon": False}  # where no bar is
    figure.legend(handles, list(meanings), title=axis, title_fontsize=8, fontsize=8, **outside)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_table(table: Any, figures: Sequence[Mapping[str, Any]], path: Path) -> None:
    """How many times as fast as the baseline, from the rows of a table's CSV."""
    medians: dict[str, dict[str, float]] = {}
    parts: dict[tuple[str, str], str] = {}  # the optimizer's, of iterations
    for figure in figures:
        if part := figure.get("part_median_us"):
            parts[figure["case"], figure["contender"]] = f", of which the step {duration(1e-6 * float(part))}"
        medians.setdefault(figure["case"], {})[figure["contender"]] = 1e-6 * float(figure["median_us"])
    rows = {}
    for case in table.cases:
        if case.name not in medians:
            continue
        of_case = medians[case.name]
        baseline = of_case.pop(case.baseline)
        bounds = {
            target.contender: target.bound if target.quantity == "speed" else 1 / target.bound
            for target in case.targets
            if target.of == case.baseline and target.beyond is None and not target.of_part
        }
        rows[f"{case.name} ({case.baseline}: {duration(baseline)})"] = [
            [
                Bar(
                    label,
                    baseline / seconds,
                    f"{baseline / seconds:.3g}x   {duration(seconds)}{part}",
                    bounds.get(label),
                )
                for label, seconds in of_case.items()
                for part in [parts.get((case.name, label), "")]
            ]
        ]
    axis = f"times as fast as the contender in brackets, by medians\n{in_words(figures[0])}"
    draw(path, table.title, axis, rows, start=1)


def draw_gpu(data: Mapping[str, Any], folder: Path) -> None:
    """The share of a copy's bandwidth, and the host's time, of each contender: rows are cases, columns are models."""
    figures = {
        (f["case"], f["shape"], f["contender"]): f for f in data["figures"] if f["contender"] != "copy of memory"
    }
    cases, shapes = (list(dict.fromkeys(key[place] for key in figures)) for place in (0, 1))
    here = in_words(data["machine"])

    def panels(quantity: str, factor: float) -> Panels:
        bounds = {
            (case, shape, target.contender): factor * target.bound
            for case, of, target in targets.ON_GPU
            for shape in of
            if target.quantity == quantity
        }

        def bar(key: tuple[str, str, str]) -> Bar:
            if key not in figures:
                return Bar(key[2], float("nan"), "not measured")
            value = factor * (targets.quantity_of(figures[key], quantity) or 0.0)
            return Bar(key[2], value, plain(value), bounds.get(key))

        labels = {case: list(dict.fromkeys(label for of, _, label in figures if of == case)) for case in cases}
        return {case: [[bar((case, shape, label)) for label in labels[case]] for shape in shapes] for case in cases}

    words = "per cent: the least bytes that a step has to move, over its time, over the bandwidth of a copy"
    title = "Share of a copy's bandwidth"
    draw(folder / "gpu_bandwidth.png", title, f"{words}\n{here}", panels("share", 100.0), shapes, start=0)
    title = "What a step takes of the host's time, without waiting for the GPU"
    draw(folder / "gpu_host.png", title, f"microseconds\n{here}", panels("host", 1.0), shapes, start=None)


def main(files: Sequence[str]) -> None:
    """Draw them all."""
    for path in map(Path, files):
        if path.suffix == ".json":
            draw_gpu(json.loads(path.read_text()), path.parent)
            continue
        from .cases import TABLES

        tables = {table.name: table for table in TABLES}
        if path.stem not in tables:
            sys.exit(f"{path} is no table's; there are {', '.join(f'{name}.csv' for name in tables)}, and gpu.json")
        with path.open(newline="") as file:
            draw_table(tables[path.stem], list(csv.DictReader(file)), path.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
