"""``python -m studies [NAME ...] [--quick] [--data DIR]``: run what is missing of the studies, and write their results."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .data import ENVIRONMENT, MissingData
from .harness import Study, run_study
from .report import page, save

STUDIES = ("averaging", "large_batch", "cyclical", "gradinit", "temp_balance", "precision", "language")
RESULTS, TRIAL = Path(__file__).parent / "results", Path("build/studies")
QUICK = "**This is --quick: it shows that the study runs. Its figures mean nothing.**"


def study_of(name: str, quick: bool = False) -> Study:
    """The study of that name."""
    return importlib.import_module(f".{name}", __package__).study(quick)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(STUDIES)}; all of them without one")
    parser.add_argument("--quick", action="store_true", help="prove that it runs, on data that is always there")
    given = os.environ.get(ENVIRONMENT)
    parser.add_argument("--data", type=Path, default=given, help=f"folder of the data sets; or {ENVIRONMENT} says it")
    parser.add_argument("--out", type=Path, help="folder of the results; those that are there are gone on from")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, one thread each")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(STUDIES):
        parser.error(f"there is no study {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    folder = options.out or (TRIAL if options.quick else RESULTS)
    for name in options.names or STUDIES:
        study = study_of(name, options.quick)
        if options.quick:
            study = replace(study, tuning_seeds=study.tuning_seeds[:1], seeds=study.seeds[:2], reach=0)
        try:
            rows = run_study(study, folder / f"{name}.csv", options.data, options.jobs)
        except MissingData as error:
            print(error, file=sys.stderr)
            return 1
        note = QUICK if options.quick else ""
        save(study, rows, folder, note)
        print(page(study, rows, note))
        print(f"{folder / name}.csv, .md, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
