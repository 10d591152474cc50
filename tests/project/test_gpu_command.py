"""The command for a machine with a GPU, rehearsed on the CPU: it runs, ends in time, and loses nothing that it found."""

import importlib
import json
import subprocess
import sys
import time

import pytest
from support import ROOT


@pytest.fixture
def gpu(monkeypatch):
    """The modules of benchmarks.gpu that need no GPU."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("gpu.__main__", "gpu.children", "gpu.report", "targets")
    return {name.removeprefix("gpu."): importlib.import_module(f"benchmarks.{name}") for name in names}


def python(program, *arguments):
    return [sys.executable, "-c", program, *arguments]


SAYS = "import json, sys\nsay = lambda **line: print(json.dumps(line), flush=True)\ndone = json.loads(sys.argv[1])\n"


def items(gpu, program, seconds=30.0, **options):
    """What run_items hears of a program, and what it makes of its end."""
    heard = []
    command = lambda done: python(SAYS + program, json.dumps(done))  # noqa: E731
    why = gpu["children"].run_items(command, time.monotonic() + seconds, heard.append, **options)
    return [(line["id"], line["outcome"]) for line in heard], heard, why


def test_a_rehearsal_runs_every_stage(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["finished"]
    assert found["failures"] == []
    stages = found["stages"]
    assert list(stages) == ["machine", "build", "tests", "sanitizer", "benchmark", "pictures"]
    outcomes = {name: stage["outcome"] for name, stage in stages.items()}
    assert outcomes == {**dict.fromkeys(stages, "passed"), "build": "nothing to do"}
    assert stages["build"]["reason"] == "a rehearsal builds nothing"
    assert stages["tests"]["passed"] > 50
    assert stages["sanitizer"] | {"seconds": 0} == {
        "outcome": "passed", "passed": 20, "failed": 0, "skipped": 0, "seconds": 0
    }  # fmt: skip
    contenders = {figure["contender"] for figure in found["figures"]}
    assert {
        "native SGD",
        "triton SGD",
        "torch fused AdamW",
        "foreach LARS",
        "native CLARS",
        "copy of memory",
    } <= contenders
    assert {"triton SGD, noise", "native SGD, clipping", "native LAMB", "triton AdamW, EMA"} <= contenders
    for figure in found["figures"]:
        assert figure["elements"] == 8 * 3 * 7 * 7 + 8
        quartiles = [figure["gpu_us"][name] for name in ("minimum", "lower_quartile", "median", "upper_quartile")]
        assert 0 < quartiles[0] <= quartiles[1] <= quartiles[2] <= quartiles[3]
        assert figure["turns"] >= 1
        moved = figure["budget_bytes"] / figure["gpu_us"]["median"]
        assert figure["gigabytes_per_second"] == pytest.approx(moved / 1e3, rel=0.01, abs=0.01)
    assert {verdict["verdict"] for verdict in found["targets"]} == {"not measured"}
    assert {verdict["why"] for verdict in found["targets"]} == {"this was a rehearsal on the CPU"}
    for name in ("gpu_bandwidth.png", "gpu_host.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu_bandwidth.png", "gpu_host.png"]


def test_after_a_crash_the_other_items_are_run(gpu):
    program = (
        "import os\n"
        "for item in 'abcd':\n"
        "    if item in done: continue\n"
        "    say(begin=item)\n"
        "    if item == 'b': print('the reason', flush=True); os.abort()\n"
        "    say(id=item, outcome='failed' if item == 'c' else 'passed', text='')\n"
        "sys.exit(1)\n"
    )
    outcomes, heard, why = items(gpu, program)
    assert outcomes == [("a", "passed"), ("b", "failed"), ("c", "failed"), ("d", "passed")]
    assert heard[1]["text"] == "the process ended with status -6\nthe reason"
    assert why is None


def test_who_hangs_is_ended_and_the_other_items_are_run(gpu):
    program = (
        "import time\n"
        "for item in 'ab':\n"
        "    if item in done: continue\n"
        "    say(begin=item)\n"
        "    if item == 'a': time.sleep(60)\n"
        "    say(id=item, outcome='passed', text='')\n"
    )
    outcomes, heard, why = items(gpu, program, quiet=1.0)
    assert outcomes == [("a", "failed"), ("b", "passed")]
    assert heard[0]["text"] == "the process did not answer\n(ended: silent for 1 seconds)"
    assert why is None


def test_a_process_that_lost_the_gpu_is_begun_again_without_blame(gpu):
    program = (
        "for item in 'abc':\n"
        "    if item in done: continue\n"
        "    say(begin=item)\n"
        "    say(id=item, outcome='failed' if item == 'a' else 'passed', text='')\n"
        "    if item == 'a': sys.exit(75)\n"
    )
    assert items(gpu, program)[0] == [("a", "failed"), ("b", "passed"), ("c", "passed")]
    _, _, why = items(gpu, "sys.exit(75)")
    assert why.startswith("the GPU answers no more")


def test_time_that_is_over_ends_a_stage_with_what_it_has(gpu):
    program = "import time\nsay(begin='a'); say(id='a', outcome='passed', text=''); say(begin='b'); time.sleep(60)\n"
    outcomes, _, why = items(gpu, program, seconds=1.5)
    assert outcomes == [("a", "passed")]
    assert why == "not everything was reached: the last to begin was 'b'"


def test_a_command_that_does_not_exist_is_an_answer(gpu):
    status, last = gpu["children"].run(["/nonexistent/program"], time.monotonic() + 5)
    assert status is None
    assert "No such file" in last


def test_no_stage_stops_another_and_the_file_is_whole_after_each(gpu, tmp_path, capsys):
    report = gpu["report"].Report()
    report.path = tmp_path / "results" / "gpu.json"
    seen = []

    def first(run, deadline):
        raise ValueError("broken")

    def second(run, deadline):
        run.report.hear("second", {"id": "x", "outcome": "failed", "text": "an assertion"})
        seen.append(json.loads(report.path.read_text()))
        return "a stage that failed had something to do"

    def third(run, deadline):
        run.report.hear("third", {"id": "y", "outcome": "skipped", "text": "no such GPU"})

    def fourth(run, deadline):
        run.report.hear("fourth", {"id": "z", "outcome": "passed", "text": ""})

    stages = [(stage, 1.0) for stage in (first, second, third, fourth, gpu["__main__"].sanitizer)]
    gpu["__main__"].run_stages(gpu["__main__"].Run(report), stages)
    assert gpu["__main__"].conclude(report) == 1
    assert [failure["text"] for failure in seen[0]["failures"]] == ["ValueError: broken", "an assertion"]
    found = json.loads(report.path.read_text())
    assert {name: stage["outcome"] for name, stage in found["stages"].items()} == {
        "first": "failed", "second": "failed", "third": "nothing to do", "fourth": "passed", "sanitizer": "nothing to do"
    }  # fmt: skip
    assert found["stages"]["sanitizer"]["reason"] == "torch finds no GPU here"
    assert found["skipped"] == [{"reason": "no such GPU", "items": 1}]
    assert not found["finished"]
    shown = capsys.readouterr().out
    assert "== third: nothing to do: all 1 were skipped, with the reasons at the end, 1 skipped, 0." in shown
    assert "2 failures\n  first: the command itself\n  second: x" in shown


def test_a_figure_is_judged_as_soon_as_it_is_there(gpu, tmp_path, capsys):
    report = gpu["report"].Report()
    report.path = tmp_path / "gpu.json"
    missing = {"id": "ResNet-50: AdamW: native AdamW", "outcome": "failed", "text": "an illegal access\nand where"}
    for line in (
        missing,
        {**figure("native SGD", host=59.0), "id": "ResNet-50: SGD: native SGD", "outcome": "measured"},
    ):
        report.hear("benchmark", line)
    targets = json.loads(report.path.read_text())["targets"]
    found = {v["target"]: (v["verdict"], v.get("why")) for v in targets if v["shape"] == "ResNet-50"}
    assert found["native SGD: ≤ 60 µs of the host's time"] == ("met", None)
    assert found["native AdamW: ≤ 60 µs of the host's time"] == ("not measured", "an illegal access")
    assert "FAILED benchmark: ResNet-50: AdamW: native AdamW" in capsys.readouterr().out


def figure(contender, case="SGD", shape="ResNet-50", gpu=100.0, host=50.0, share=0.95, kernels=1):
    launches = {"kernels": kernels} if kernels is not None else {}
    return {
        "shape": shape, "case": case, "contender": contender, "gpu_us": {"median": gpu}, "host_us": {"median": host},
        "share_of_copy": share, "launches": launches,
    }  # fmt: skip


def test_targets_are_met_or_not_or_not_measured(gpu):
    figures = [
        figure("native SGD", gpu=101.0, host=61.0),
        figure("torch fused SGD", gpu=100.0),
        figure("native SGD", shape="Llama-1B", share=0.9, kernels=None),
        figure("native SGD", case="LARS"),
        figure("native CLARS", case="LARS", gpu=105.0),
        figure("foreach LARS", case="LARS", gpu=420.0),
    ]
    reasons = {"ResNet-50: SGD: triton SGD": "torch finds no such thing\nand more"}
    judge = gpu["targets"].judge
    found = {(v["target"], v["shape"]): v for v in judge(figures, reasons)}

    def verdict(target, shape="ResNet-50"):
        of = found[target, shape]
        return of["verdict"], of.get("found", of.get("why"))

    assert verdict("native SGD: ≥ 0.9 of a copy's bandwidth", "Llama-1B") == ("met", 0.9)
    assert verdict("native SGD: ≥ 0.9 of a copy's bandwidth", "1 G flat") == ("not measured", "no figure")
    assert verdict("native SGD: ≤ 1x time of torch fused SGD") == ("not met", 1.01)
    assert verdict("native SGD: ≤ 60 µs of the host's time") == ("not met", 61.0)
    assert verdict("native SGD: ≤ 1 launches") == ("met", 1)
    assert verdict("native SGD: ≤ 1 launches", "Llama-1B") == ("not measured", "launches were not counted")
    assert verdict("native CLARS: ≤ 1.05x time of native SGD") == ("met", 1.05)
    assert verdict("native CLARS: ≥ 3x foreach LARS") == ("met", 4.0)
    assert verdict("triton SGD: ≤ 1 launches") == ("not measured", "torch finds no such thing")
    assert {v["verdict"] for v in judge(figures, reasons, "a rehearsal")} == {"not measured"}


def test_every_target_names_cases_that_there_are(gpu, monkeypatch):
    cases, shapes = (importlib.import_module(f"benchmarks.{name}") for name in ("gpu.cases", "shapes"))
    there = {(case.name, label) for case in cases.on_gpu() for label in case.contenders}
    for case, models, target in gpu["targets"].ON_GPU:
        assert {(case, target.contender), (case, target.of or target.contender)} <= there
        assert set(models) <= set(shapes.ON_GPU)
