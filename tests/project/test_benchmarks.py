"""The commands that show something, in small: they run, and what they say about results holds."""

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
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


def rows_of_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_table_runs_and_is_saved(benchmarks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step: step)  # takes minutes; below
    measured = benchmarks.main(["--quick", "--out", str(tmp_path)])
    assert [table for table, _ in measured] == benchmarks.TABLES
    shown = capsys.readouterr().out
    for table, results in measured:
        assert [result.case for result in results] == list(table.cases)
        saved = rows_of_csv(tmp_path / f"{table.name}.csv")
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
            for target in case.targets:
                assert {target.contender, target.of, target.beyond or target.of} <= set(case.contenders)


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
    faster, dearer = harness.Target("ours", "speed", 2, "theirs"), harness.Target("ours", "time", 1.2, "plain")
    case = harness.Case("case", [], {"ours": None, "theirs": None, "plain": None}, "theirs", (faster, dearer))
    result = harness.Result(case, {"ours": [3.0, 9.0, 1.0], "theirs": [7.5, 1.0, 8.0], "plain": [2.4] * 3})
    assert result.speed("ours") == 2.5
    assert result.met(faster)
    assert not result.met(dearer)
    verdict = sys.modules["benchmarks.output"].verdict
    assert verdict(result, faster) == "[green]✓[/green] ≥ 2x theirs: 2.5x"
    assert verdict(result, dearer) == "[red]✗ ≤ 1.2x time of plain: 1.25x[/red]"


def test_a_target_may_be_about_what_is_added(benchmarks):
    target = sys.modules["benchmarks.harness"].Target("ours", "time", 0.5, "theirs", beyond="plain")
    assert target.found({"ours": 5.0, "theirs": 8.0, "plain": 2.0}.__getitem__) == 0.375
    assert str(target) == "beyond plain ≤ 0.5x time of theirs"


def test_the_compiled_contender_is_compiled(benchmarks, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # or processes are started for the others
    step = sys.modules["benchmarks.cases"].compiled(parameters := [torch.nn.Parameter(torch.ones(2))], lr=0.5).step
    parameters[0].grad = torch.ones(2)
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    step()
    step()
    assert counted["unique_graphs"] == before + 1
    assert parameters[0].tolist() != [1.0, 1.0]


def test_iterations_are_timed_with_the_optimizers_part(benchmarks):
    harness, cases = sys.modules["benchmarks.harness"], sys.modules["benchmarks.cases"]
    now, weight = iter(range(100)), torch.nn.Parameter(torch.ones(2))
    model = torch.nn.ParameterList([weight])
    gradients, parts = [], []

    def make(parameters):
        assert parameters == [weight]
        return lambda: gradients.append(weight.grad.tolist())

    call = harness.iteration(model, lambda: 3 * weight.sum(), make, parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.time, "perf_counter", lambda: float(next(now)) ** 2)
        call()
        call()
    assert gradients == [[3.0, 3.0]] * 2  # nothing is left from the iteration before
    assert parts == [1.0, 5.0]
    quarter = cases.Target("ours", "speed", 4, "theirs", of_part=True)
    result = harness.Result(None, {"ours": [9.0], "theirs": [9.0]}, {"ours": [1.0], "theirs": [5.0]})
    assert (result.found(quarter), result.met(quarter)) == (5.0, True)
    assert str(quarter) == "its part ≥ 4x theirs"


def test_no_contender_of_torchs_has_our_colour(benchmarks):
    bar, tables = importlib.import_module("benchmarks.pictures").Bar, importlib.import_module("benchmarks.cases").TABLES
    meanings = {
        name: bar(name, 1.0, "").meaning[0] for table in tables for case in table.cases for name in case.contenders
    }
    assert meanings["torch compiled"] == "torch compiled"
    assert "fused_opt" not in {meaning for name, meaning in meanings.items() if "torch" in name.split()}


def test_pictures_are_drawn_from_saved_figures(benchmarks, tmp_path, monkeypatch):
    pictures, drawn = importlib.import_module("benchmarks.pictures"), []
    monkeypatch.setattr(pictures, "draw", lambda path, title, axis, rows, **_: drawn.append((path, rows)))
    pictures.main([str(ROOT / "benchmarks" / "results" / "sgd.csv")])
    ((path, rows),) = drawn
    assert path == ROOT / "benchmarks" / "results" / "sgd.png"
    saved = {(row["case"], row["contender"]): float(row["median_us"]) for row in rows_of_csv(path.with_suffix(".csv"))}
    assert len(rows) == len(saved) / 3
    ours, foreach = next(panel for title, (panel,) in rows.items() if title.startswith("300 of 64x64 (torch fused: "))
    assert (ours.label, ours.target, ours.meaning[0]) == ("fused_opt", 5, "fused_opt")
    assert (foreach.label, foreach.target, foreach.meaning[0]) == ("torch foreach", None, "torch foreach")
    assert ours.value == pytest.approx(saved["300 of 64x64", "torch fused"] / saved["300 of 64x64", "fused_opt"])
    with pytest.raises(SystemExit, match=r"there are sgd.csv, .*, decay.csv, .*, iterations.csv, and gpu.json"):
        pictures.main([str(tmp_path / "spectra.csv")])


def test_microbenchmarks_report_what_the_harness_measured(benchmarks, tmp_path):
    pytest.importorskip("pytest_benchmark")
    report = tmp_path / "report.json"
    program = (
        "import sys, pytest; from benchmarks import harness\n"
        "harness.measure = lambda case: harness.Result(case, {label: [3e-6, 1e-6, 2e-6] for label in case.contenders})\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-k", "one_pass and clipping", "--benchmark-enable"]
    options += [f"--benchmark-json={report}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-c", program, str(ROOT / "benchmarks" / "microbench.py"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())["benchmarks"]
    assert [one["params"]["label"] for one in found] == ["clipping in the step", "clip_grad_norm_ and torch fused"]
    for one in found:
        assert one["group"] == "one_pass: clipping"
        assert one["stats"]["data"] == pytest.approx([3e-6, 1e-6, 2e-6])


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
