"""Tables for the terminal and CSV files."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.box
import rich.table
from rich.console import Console
from rich.markup import escape

from .machine import in_words
from .targets import Target

if TYPE_CHECKING:  # it imports torch, which takes the pictures of a GPU's run longer than to draw them
    from .harness import Result, Table

RESULTS = Path(__file__).parent / "results"


def console() -> Console:
    """As wide as the terminal; 120 columns in a file."""
    return Console(width=None if sys.stdout.isatty() else 120)


def save_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def page(
    title: str, rows: Sequence[Mapping[str, Any]], left: Sequence[str] = (), caption: str = ""
) -> rich.table.Table:
    """Rows of the same columns, whose cells may have rich's markup; the ``left`` columns and the first are words.

    A row whose first cell is empty belongs to the row before it.
    """
    table = rich.table.Table(title=f"[bold]{escape(title)}[/bold]", caption=caption, box=rich.box.SIMPLE_HEAD)
    table.title_justify = table.caption_justify = "left"
    for i, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if i == 0 or heading in left else "right", no_wrap=heading != "target")
    cells = [[f"{x:,}" if type(x) is int else str(x) for x in row.values()] for row in rows]
    grouped = not all(row[0] for row in cells)
    for row, after in zip(cells, [*cells[1:], ["end"]]):
        table.add_row(*row, end_section=grouped and bool(after[0]))
    return table


def duration(seconds: float) -> str:
    """Three digits, in microseconds or milliseconds."""
    value, unit = (seconds * 1e6, "µs") if seconds < 0.9995e-3 else (seconds * 1e3, "ms")
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def verdict(result: Result, target: Target) -> str:
    """A mark, the target and what was found."""
    found = result.found(target)
    words = escape(f"{target}: {found:.3g}x")
    return f"[green]✓[/green] {words}" if target.met(found) else f"[red]✗ {words}[/red]"


def page_of(table: Table, results: Sequence[Result], here: Mapping[str, Any], *, judge: bool) -> rich.table.Table:
    """The page of a table; ``judge=False`` leaves the targets out."""
    rows = [
        {
            "case": "" if i else result.case.name,
            "contender": escape(label) if i else f"[bold]{escape(label)}[/bold]",
            "median": duration(result.median(label)),
            "fastest": f"[dim]{duration(min(seconds))}[/dim]",
            **({"optimizer's part": duration(result.part(label))} if result.parts else {}),
            **({"states, bytes": f"{result.states[label]:.2f}"} if result.states else {}),
            "speed": "[dim]1x[/dim]" if label == result.case.baseline else f"{result.speed(label):.3g}x",
            "target": "\n".join(verdict(result, t) for t in result.case.targets if t.contender == label and judge),
        }
        for result in results
        for i, (label, seconds) in enumerate(result.seconds.items())
    ]
    return page(table.title, rows, ("contender", "target"), in_words(here))
