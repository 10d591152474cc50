"""One protocol for every study: tune each arm's learning rate on validation data, then run other seeds on test data.

A study is arms, which are data, and one function that trains. Every finished run is a row of a CSV file; what is still to
be run follows from the rows that are there (:func:`pending`), so that a study which was killed goes on where it was.
"""

from __future__ import annotations

import csv
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .data import Data, Split

REACH = 3  # half-decades that a grid may grow by at either end
VALIDATION, TEST = "validation", "test"


def rate(k: int) -> float:
    """A point of the half-decade grid: 0.01, 0.032, 0.1, 0.32, 1."""
    return float(f"{10 ** (k / 2):.2g}")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        setting: what else is the same for the arms that are compared with each other.
        name: of the arm.
        grid: half-decades (see :func:`rate`) to begin with. While the best is the first or last, the grid grows.
        options: what the study's function reads.
        against: names of arms of the same setting that it is compared with, seed by seed.
        same_rate: whether it is run at the tuned rate of the first of ``against``, too.
    """

    setting: str
    name: str
    grid: Sequence[int]
    options: Mapping[str, Any] = field(default_factory=dict)
    against: tuple[str, ...] = ()
    same_rate: bool = False


class Run(NamedTuple):
    """What is still to be run: an arm at a rate with a seed, scored on validation or test data."""

    arm: Arm
    split: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Study:
    """Arms and how they are trained.

    Args:
        name: of the module and of the files of results.
        title: of the page.
        arms: what is compared.
        metric: what ``train`` returns under ``score``, in words with its unit.
        higher: whether more of it is better.
        load: makes the data from the folder that was given.
        train: ``train(options, lr, seed, train, held_out, classes)`` -> ``score``, ``examples``, ``updates`` and
            ``extras``. It sees the validation data in tuning and the test data afterwards, never both.
        extras: names of further numbers that ``train`` returns.
        tuning_seeds, seeds: they have none in common.
        digits: after the point, in tables.
    """

    name: str
    title: str
    arms: Sequence[Arm]
    metric: str
    higher: bool
    load: Callable[[Path | None], Data | Mapping[str, Data]]
    train: Callable[[Mapping[str, Any], float, int, Split, Split, int], dict[str, Any]]
    extras: Sequence[str] = ()
    tuning_seeds: Sequence[int] = (101, 102, 103)
    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    reach: int = REACH
    digits: int = 1

    @property
    def columns(self) -> list[str]:
        """Of the CSV file."""
        here = ["processor", "torch"]
        return ["setting", "arm", "split", "lr", "seed", "score", "examples", "updates", *self.extras, "seconds", *here]


Row = Mapping[str, Any]


def read(study: Study, path: Path) -> list[dict[str, Any]]:
    """The rows of finished runs; a last line that a kill cut off is removed from the file."""
    if not path.exists():
        return []
    content = path.read_text()
    if not content.endswith("\n"):
        content = content[: content.rfind("\n") + 1]
        path.write_text(content)
    rows = []
    for row in csv.DictReader(content.splitlines()):
        if list(row) != study.columns:
            raise ValueError(f"{path} has other columns than this study: remove it, or give another --out")
        numbers = {name: float(row[name]) for name in ("lr", "score", "seconds", *study.extras) if row[name]}
        rows.append({**row, **numbers, **{name: int(row[name]) for name in ("seed", "examples", "updates")}})
    return rows


def scores(rows: Iterable[Row], arm: Arm, split: str, lr: float | None = None) -> dict[Any, Any]:
    """Seed -> score at a rate; or without ``lr``, rate -> seed -> score."""
    found: dict[float, dict[int, float]] = {}
    for row in rows:
        if (row["setting"], row["arm"], row["split"]) == (arm.setting, arm.name, split):
            found.setdefault(row["lr"], {})[row["seed"]] = row["score"]
    return dict(sorted(found.items())) if lr is None else found.get(lr, {})


def grid(study: Study, arm: Arm, rows: Iterable[Row]) -> tuple[list[int], float | None]:
    """The half-decades that were or are to be tried, and the best rate if all of them were.

    Validation scores alone decide, by their mean over the tuning seeds. The grid grows while the best is at its end.
    """
    tried = scores(rows, arm, VALIDATION)
    points = list(arm.grid)
    while True:
        means = {}
        for k in points:
            of_rate = tried.get(rate(k), {})
            if not set(study.tuning_seeds) <= set(of_rate):
                return points, None
            means[k] = mean(of_rate[seed] for seed in study.tuning_seeds)
        best = max(points, key=lambda k: means[k] if study.higher else -means[k])
        if best == points[0] and arm.grid[0] - points[0] < study.reach:
            points = [points[0] - 1, *points]
        elif best == points[-1] and points[-1] - arm.grid[-1] < study.reach:
            points = [*points, points[-1] + 1]
        else:
            return points, rate(best)


def reference(study: Study, arm: Arm, name: str | None = None) -> Arm | None:
    """The arm that this one is compared with."""
    wanted = name or (arm.against[0] if arm.against else None)
    return next((other for other in study.arms if (other.setting, other.name) == (arm.setting, wanted)), None)


def pending(study: Study, rows: Sequence[Row]) -> list[Run]:
    """What can be run now: tuning, and for arms whose rate is chosen, the test; empty when the study is finished."""
    runs = []
    for arm in study.arms:
        points, lr = grid(study, arm, rows)
        if lr is None:
            runs += [Run(arm, VALIDATION, rate(k), seed) for k in points for seed in study.tuning_seeds]
            continue
        other = reference(study, arm) if arm.same_rate else None
        theirs = grid(study, other, rows)[1] if other else None
        runs += [Run(arm, TEST, at, seed) for at in dict.fromkeys((lr, theirs or lr)) for seed in study.seeds]
    done = {(row["setting"], row["arm"], row["split"], row["lr"], row["seed"]) for row in rows}
    return [run for run in runs if (run.arm.setting, run.arm.name, *run[1:]) not in done]


_worker: tuple[Study, Any] | None = None  # of a process: what all its runs share


def _begin(study: Study, data: Any) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = study, data


def _execute(run: Run) -> tuple[Run, dict[str, Any]]:
    """One training, in a worker."""
    assert _worker is not None
    study, everything = _worker
    data = everything[run.arm.setting] if isinstance(everything, Mapping) else everything
    held_out = data.validation if run.split == VALIDATION else data.test
    torch.manual_seed(run.seed)
    start = time.process_time()
    found = study.train(run.arm.options, run.lr, run.seed, data.train, held_out, data.classes)
    return run, {**found, "seconds": round(time.process_time() - start, 2)}


def processor() -> str:
    """Its name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def run_study(study: Study, path: Path, given: Path | None, jobs: int = 1) -> list[dict[str, Any]]:
    """Run what is missing in the CSV file at ``path``, and return all rows.

    Raises:
        MissingData: without the data.
        RuntimeError: where arms of a setting saw different numbers of examples.
    """
    rows = read(study, path)
    if todo := pending(study, rows):
        data = study.load(given)
        path.parent.mkdir(parents=True, exist_ok=True)
        here = {"processor": processor(), "torch": torch.__version__}
        with path.open("a", newline="") as file, tqdm(desc=study.name, initial=len(rows), unit="run") as bar:
            writer = csv.DictWriter(file, study.columns, lineterminator="\n")
            if not rows:
                file.truncate(0)
                writer.writeheader()
            while todo:
                bar.total = len(rows) + max(len(todo), expected(study, rows))
                for run, found in _results(study, data, todo, jobs):
                    keys = {"setting": run.arm.setting, "arm": run.arm.name, "split": run.split, "lr": run.lr}
                    row = {**keys, "seed": run.seed, **found, **here}
                    row = {name: plain(value) for name, value in row.items()}
                    writer.writerow(row)
                    file.flush()  # a kill loses what is being run
                    rows.append(row)
                    bar.update()
                todo = pending(study, rows)
    check_budgets(study, rows)
    return rows


def plain(value: Any) -> Any:
    """Six digits of a number, so that a file and what is read from it agree."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def expected(study: Study, rows: Sequence[Row]) -> int:
    """Runs that are left if no grid grows further."""
    left = 0
    for arm in study.arms:
        points, _ = grid(study, arm, rows)
        wanted = len(points) * len(study.tuning_seeds) + len(study.seeds) * (1 + arm.same_rate)
        left += max(0, wanted - sum((row["setting"], row["arm"]) == (arm.setting, arm.name) for row in rows))
    return left


def _results(study: Study, data: Any, todo: list[Run], jobs: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    if jobs == 1:
        _begin(study, data)
        yield from map(_execute, todo)
        return
    context = multiprocessing.get_context("fork")
    with context.Pool(jobs, _begin, (study, data)) as pool:
        yield from pool.imap_unordered(_execute, todo)


def check_budgets(study: Study, rows: Iterable[Row]) -> None:
    """Raise where arms of a setting were trained on different numbers of examples."""
    budgets: dict[str, dict[int, str]] = {}
    for row in rows:
        budgets.setdefault(row["setting"], {})[row["examples"]] = row["arm"]
    for setting, found in budgets.items():
        if len(found) > 1:
            raise RuntimeError(f"{study.name}, {setting}: arms saw different numbers of examples: {found}")
