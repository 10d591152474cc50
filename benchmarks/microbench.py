"""The tables' cases under pytest-benchmark, which saves and compares runs: ``make microbench`` (CONTRIBUTING.md).

The harness times a case as for the tables, all contenders in turns, once; pytest-benchmark is then given each
contender's seconds. So torch's rows of a case say how much of a difference between two runs is the machine's.
"""

from functools import cache
from itertools import cycle
from typing import Any

import pytest

from .cases import TABLES
from .harness import measure

CASES = {f"{table.name}: {case.name}": case for table in TABLES for case in table.cases}
now = 0.0  # on the timer of pytest-benchmark, which stands still but for the seconds that were measured before


@cache
def seconds_of(case: str) -> dict[str, list[float]]:
    return measure(CASES[case]).seconds


@pytest.mark.benchmark(timer=lambda: now)
@pytest.mark.parametrize(
    ("case", "label"), [(name, label) for name, case in CASES.items() for label in case.contenders]
)
def test_speed(benchmark: Any, case: str, label: str) -> None:
    seconds = seconds_of(case)[label]
    again = cycle(seconds)

    def call() -> None:
        global now
        now += next(again)

    benchmark.group = case
    benchmark.pedantic(call, rounds=len(seconds))
