"""Pictures of a run's JSON: ``python -m benchmarks.gpu.pictures JSON DIR``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    """Horizontal bars, a panel for each case, a group for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, title, axis, value, target, logarithmic = picture
    cases = list(dict.fromkeys(figure["case"] for figure in figures))
    of_case = {case: [f for f in figures if f["case"] == case and f["contender"] != "copy of memory"] for case in cases}
    heights = [len(found) + 1.5 for found in of_case.values()]
    panels, axes = plt.subplots(
        len(cases), figsize=(10, 1 + 0.24 * sum(heights)), layout="constrained", squeeze=False, height_ratios=heights
    )
    colours: dict[str, str] = {}
    for (case, found), area in zip(of_case.items(), axes[:, 0]):
        labels = [f"{f['shape']}: {f['contender']}" for f in found]
        values = [value(f) for f in found]
        for label in (f["contender"] for f in found):
            backend = next((i for i, name in enumerate(("native", "triton")) if label.startswith(name)), None)
            colour = PEERS[len(colours) % len(PEERS)] if backend is None else OURS[backend]
            colours.setdefault(label, colour)
        bars = area.barh(labels, values, color=[colours[f["contender"]] for f in found])
        area.bar_label(bars, fmt="%.3g", fontsize=7, padding=3)
        area.axvline(target, color="black", linewidth=1)
        area.set_title(case, loc="left", fontsize=9, fontweight="bold")
        area.tick_params(axis="y", labelsize=7, length=0)
        area.invert_yaxis()
        area.spines[["top", "right", "left"]].set_visible(False)
        if logarithmic:
            area.set_xscale("log")
    axes[-1, 0].set_xlabel(f"{axis}; black: the target. Red: CUDA, yellow: Triton\n{words}", fontsize=8)
    panels.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    panels.savefig(path, dpi=110)
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
