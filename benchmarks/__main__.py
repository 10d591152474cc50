"""``python -m benchmarks``: time every case of every table, print the tables, save CSV and picture."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from pathlib import Path

import fused_opt

from . import machine
from .cases import TABLES
from .harness import Case, Result, Table, figures, measure
from .output import RESULTS, console, page_of, save_csv
from .pictures import draw_table


def main(arguments: Sequence[str] | None = None) -> list[tuple[Table, list[Result]]]:
    """Measure and show; returns what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny tensors, one round: shows that it runs, no more")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cases whose 'table: case' matches: 'sgd*'")
    parser.add_argument("--out", metavar="DIR", type=Path, help=f"default: {RESULTS} for a whole run, else nowhere")
    options = parser.parse_args(arguments)

    def wanted(table: Table, case: Case) -> bool:
        return fnmatch.fnmatchcase(f"{table.name}: {case.name}".lower(), f"*{options.only.lower().strip('*')}*")

    terminal = console()
    out = options.out or (RESULTS if options.only == "*" and not options.quick else None)
    here = {**machine.describe(), "fused_opt": fused_opt.__version__}
    if here["load"] > 0.5:
        terminal.print(f"[yellow]this machine is busy (load {here['load']}): take the figures with care[/yellow]\n")
    measured = []
    for table in TABLES:
        results = []
        for case in table.cases:
            if wanted(table, case):
                with terminal.status(f"{table.name}: {case.name}"):
                    results.append(measure(case, quick=options.quick))
        if not results:
            continue
        measured.append((table, results))
        terminal.print(page_of(table, results, here, judge=not options.quick))
        if out:
            rows = figures(results, here)
            save_csv(out / f"{table.name}.csv", rows)
            draw_table(table, rows, out / f"{table.name}.png")
            terminal.print(f"saved {out / table.name}.csv and .png\n", highlight=False, soft_wrap=True)
    if not measured:
        names = ", ".join(f"'{table.name}: {case.name}'" for table in TABLES for case in table.cases)
        parser.error(f"no case matches {options.only!r}; there are {names}")
    if not options.quick:
        met = [result.met(target) for _, results in measured for result in results for target in result.case.targets]
        terminal.print(f"{sum(met)} of {len(met)} targets met")
    return measured


if __name__ == "__main__":
    main()
