"""The commands that show something, in small: they run, and what they say about results holds."""

import csv
import importlib.util
import math
import sys

import pytest
from support import ROOT
from support.threads import threads


@pytest.fixture(autouse=True)
def one_thread():
    """For speed; the example sets the number, too."""
    with threads(1):
        yield


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.__main__")


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_table_runs_and_is_saved(benchmarks, tmp_path, capsys):
    measured = benchmarks.main(["--quick", "--out", str(tmp_path)])
    assert [table for table, _ in measured] == benchmarks.TABLES
    shown = capsys.readouterr().out
    for table, results in measured:
        assert [result.case for result in results] == list(table.cases)
        saved = rows(tmp_path / f"{table.name}.csv")
        expected = [(case.name, label) for case in table.cases for label in case.contenders]
        assert [(row["case"], row["contender"]) for row in saved] == expected
        assert all(value for row in saved for value in row.values())
        assert all(float(row["minimum_us"]) > 0 for row in saved)
        assert (tmp_path / f"{table.name}.png").read_bytes().startswith(b"\x89PNG")
        assert table.title in shown


def test_every_case_names_contenders_that_it_has(benchmarks):
    for table in benchmarks.TABLES:
        assert len({case.name for case in table.cases}) == len(table.cases)
        for case in table.cases:
            assert case.baseline in case.contenders
            assert all({target.contender, target.of} <= set(case.contenders) for target in case.targets)


def test_a_part_of_the_tables_is_not_saved_over_the_whole(benchmarks, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path / "results")
    measured = benchmarks.main(["--quick", "--only", "adamw: 300 of 8x8"])
    assert [[result.case.name for result in results] for _, results in measured] == [
        ["300 of 8x8", "300 of 8x8, after a matmul"]
    ]
    assert not (tmp_path / "results").exists()
    with pytest.raises(SystemExit):
        benchmarks.main(["--quick", "--only", "nothing of the kind"])
    assert "'sgd: ResNet-50'" in capsys.readouterr().err


def test_targets_are_judged_by_medians(benchmarks):
    harness = sys.modules["benchmarks.harness"]
    faster, dearer = harness.Target("ours", 0.5, "theirs"), harness.Target("ours", 1.2, "plain")
    case = harness.Case("case", [], {"ours": None, "theirs": None, "plain": None}, "theirs", (faster, dearer))
    result = harness.Result(case, {"ours": [3.0, 9.0, 1.0], "theirs": [7.5, 1.0, 8.0], "plain": [2.4] * 3})
    assert result.speed("ours") == 2.5
    assert result.met(faster)
    assert not result.met(dearer)
    assert result.verdict(faster) == "[green]✓[/green] ≥ 2x theirs: 2.5x"
    assert result.verdict(dearer) == "[red]✗ ≤ 1.2x time of plain: 1.25x[/red]"


def test_contenders_take_turns(benchmarks):
    harness, turns = sys.modules["benchmarks.harness"], []
    contenders = {label: lambda shapes, label=label: lambda: turns.append(label) for label in "ABC"}
    case = harness.Case("case", [(3, 100)], contenders, "B", before=lambda: turns.append("before"))
    result = harness.measure(case, quick=True)
    warm_up = ["before", "A", "before", "B", "before", "C"]
    assert turns == [*warm_up, *(turn for label in "ABC" for turn in (label, label, label, "before", label))]
    assert {label: len(seconds) for label, seconds in result.seconds.items()} == {"A": 1, "B": 1, "C": 1}


@pytest.mark.parametrize(
    ("name", "tensors", "numbers"),
    [
        ("resnet50", 161, 25_557_032),
        ("gpt2_small", 148, 124_439_808),
        ("gpt2_medium", 292, 354_823_168),
        ("llama_1b", 146, 1_235_814_400),
    ],
)
def test_the_shapes_are_those_of_the_models(benchmarks, name, tensors, numbers):
    shapes = getattr(sys.modules["benchmarks.shapes"], name)()
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes)) == numbers


def test_digits_learns_the_same_with_both(tmp_path, capsys):
    specification = importlib.util.spec_from_file_location("digits", ROOT / "examples" / "digits.py")
    digits = importlib.util.module_from_spec(specification)
    sys.modules["digits"] = digits  # dataclasses look their module up
    specification.loader.exec_module(digits)
    try:
        results = digits.main(["--quick", "--out", str(tmp_path)])
    finally:
        del sys.modules["digits"]
    assert list(results) == ["SGD", "AdamW"]
    for theirs, ours in results.values():
        assert type(theirs.optimizer).__module__.startswith("torch.optim")
        assert type(ours.optimizer).__module__.startswith("fused_opt")
        assert len(ours.losses) == len(theirs.losses) == len(ours.seconds) == 21
        assert ours.losses == pytest.approx(theirs.losses, abs=1e-4)
        assert ours.losses[-1] < 0.7 * ours.losses[0]
        assert ours.accuracy == pytest.approx(theirs.accuracy, abs=0.01)
    picture = tmp_path / "digits.png"
    assert str(picture) in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
