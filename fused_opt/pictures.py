"""One style for pictures of the package, the benchmarks and the examples: a colour has one meaning, a tick is a number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

OURS, TORCH_FUSED, TORCH_FOREACH, OTHERS, TRITON = "#d1495b", "#2f6690", "#9aa5b1", "#66a182", "#edae49"
TORCH_DEFAULT, TORCH_COMPILED = "#8fb8d8", "#13315c"
INK, ASIDE, GRID = "#333333", "#b9b9b9", "#dddddd"
#: Lines that stand for neither library: layers, schedules, settings.
SERIES = ("#5b4b8a", "#c98b2b", "#3f8f8f", "#8a5a44", "#7a8b3d", "#a05d9b")


def plain(x: float) -> str:
    """At least three digits, without an exponent unless the number is tiny."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def plain_ticks(left: float, right: float) -> list[float]:
    """1, 2, 5, 10 ... between two numbers; powers of ten alone where that would be too many, further digits where too few.

    Example:
        >>> plain_ticks(0.09, 11), plain_ticks(0.09, 0.33)
        ([0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0], [0.1, 0.15, 0.2, 0.3])
    """
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)):
        ticks = [float(f"{digit}e{power}") for power in range(-40, 40) for digit in digits]
        ticks = [x for x in ticks if left <= x <= right]
        if len(ticks) > 2:
            break
    if len(ticks) > 8:
        return [x for x in ticks if f"{x:e}".startswith("1.0")]
    return ticks or [left, right]


def figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A matplotlib figure that needs no display, and its panels as an array of ``rows`` x ``columns``.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False, **options)


def finish(panels: Iterable[Any], legends: Iterable[Any] = ()) -> None:
    """Give panels that were drawn their style, and those in ``legends`` a legend below, where nothing is drawn."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    from matplotlib.transforms import ScaledTranslation

    for panel in panels:
        title = panel.get_title()
        panel.set_title("")
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=GRID, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8)
        for axis, limits in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
            if axis.get_scale() == "log":
                axis.set_major_locator(FixedLocator(plain_ticks(*limits)))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(FuncFormatter(lambda x, _: plain(x)))
    for panel in legends:
        labels = panel.get_legend_handles_labels()[1]
        columns = min(len(labels), 3 if max(map(len, labels)) < 30 else 2)  # more would not be as wide as a panel
        behind = panel.transAxes + ScaledTranslation(0, -0.5, panel.figure.dpi_scale_trans)  # inches: ticks, name
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": behind, "ncols": columns}
        panel.legend(**below, frameon=False, fontsize=7, handlelength=3.5)
