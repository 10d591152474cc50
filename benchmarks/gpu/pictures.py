"""Pictures of a run's JSON: ``python -m benchmarks.gpu.pictures JSON DIR``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import BACKENDS

OURS = ("#d1495b", "#edae49")
PEERS = ("#2f6690", "#9aa5b1", "#66a182", "#8a6d9e", "#c9a66b")
Figure = dict[str, Any]


def share(figure: Figure) -> float:
    """Per cent of the bandwidth of a copy."""
    return 100 * figure["share_of_copy"]


def host(figure: Figure) -> float:
    """Microseconds."""
    return figure["host_us"]["median"]


# File, title, axis, what is drawn, the target, whether the axis is logarithmic.
PICTURES: list[tuple[str, str, str, Callable[[Figure], float], float, bool]] = [
    ("gpu_bandwidth.png", "Least traffic over time, as a share of a copy's bandwidth", "per cent", share, 90.0, False),
    ("gpu_host.png", "What a step keeps the host, without waiting for the GPU", "microseconds", host, 60.0, True),
]


def draw(figures: list[Figure], words: str, picture: tuple[Any, ...], path: Path) -> None:
    """Horizontal bars: a row of panels for each case, a column for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, title, axis, value, target, logarithmic = picture
    found = {(f["case"], f["shape"], f["contender"]): value(f) for f in figures if f["contender"] != "copy of memory"}
    cases, shapes = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    labels = {case: list(dict.fromkeys(label for of, _, label in found if of == case)) for case in cases}
    heights = [len(labels[case]) + 1.5 for case in cases]
    size = (3.5 + 3 * len(shapes), 1 + 0.24 * sum(heights))
    panels, axes = plt.subplots(
        len(cases), len(shapes), figsize=size, layout="constrained", squeeze=False, height_ratios=heights, sharey="row"
    )
    colours: dict[str, str] = {}
    for label in (label for of_case in labels.values() for label in of_case):
        ours = [colour for name, colour in zip(BACKENDS, OURS) if label.startswith(name)]
        colours.setdefault(label, *ours or [PEERS[len(colours) % len(PEERS)]])
    for case, row in zip(cases, axes):
        for shape, area in zip(shapes, row):
            values = [found.get((case, shape, label), float("nan")) for label in labels[case]]
            bars = area.barh(labels[case], values, color=[colours[label] for label in labels[case]])
            area.bar_label(bars, [f"{x:.3g}" for x in values], fontsize=7, padding=3)
            area.axvline(target, color="black", linewidth=1)
            area.set_title(f"{case}: {shape}", loc="left", fontsize=9)
            area.tick_params(labelsize=7)
            area.spines[["top", "right", "left"]].set_visible(False)
            if logarithmic:
                area.set_xscale("log")
            else:
                area.set_xlim(0, 1.15 * max(target, *(x for x in values if x == x)))
        row[0].invert_yaxis()
    panels.supxlabel(f"{axis}; black: the target. Red: CUDA, yellow: Triton; no bar: not measured\n{words}", fontsize=8)
    panels.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    panels.savefig(path, dpi=100)
    plt.close(panels)


def main() -> None:
    """Draw them all."""
    source, folder = map(Path, sys.argv[1:])
    data = json.loads(source.read_text())
    here = data["machine"]
    words = f"{here.get('gpu') or 'a rehearsal on the CPU'}, torch {here.get('torch')}, Triton {here.get('triton')}"
    for picture in PICTURES:
        draw(data["figures"], words, picture, folder / picture[0])


if __name__ == "__main__":
    main()
