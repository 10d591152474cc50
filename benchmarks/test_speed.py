"""The same cases for pytest-benchmark: ``python -m pytest benchmarks --benchmark-enable``."""

from typing import Any

import pytest

from .harness import WARM_UP, Case, Table
from .tables import TABLES

CASES = [
    pytest.param(table, case, label, id=f"{table.name}: {case.name}: {label}")
    for table in TABLES
    for case in table.cases
    for label in case.contenders
]


@pytest.mark.parametrize(("table", "case", "label"), CASES)
def test_speed(benchmark: Any, table: Table, case: Case, label: str) -> None:
    benchmark.group = f"{table.name}: {case.name}"
    call = case.contenders[label](case.shapes)
    benchmark.pedantic(call, setup=case.before, rounds=50, warmup_rounds=WARM_UP)
