"""``python -m benchmarks.gpu``: build, test, check with compute-sanitizer and time on this machine's GPU, in eight minutes.

Everything found goes into one JSON, written as it comes, and pictures of it. No network, no environment but this one. A
stage that fails stops no other; the exit status is then 1. Without a GPU it goes as far as it can, says what was not run,
and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import BACKENDS, REHEARSAL, ROOT, children
from .children import Line
from .report import Report

RESULTS = ROOT / "benchmarks" / "results"
PYTHON = sys.executable
TOOLS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")  # where CUDA's are that are not on the PATH
REHEARSING = {REHEARSAL: "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FUSED_OPT_SELF_CHECK": "0"}
# For the tests, whose lines the native backend runs, too: the kernels' source, by the host.
NOT_INTERPRETED = {REHEARSAL: "1", "OMP_NUM_THREADS": "1", "FUSED_OPT_EMULATE_GPU": "1"}
NOT_BUILT = "the native backend was not built"  # setup.py's words, after which an older one may still be there


@dataclass
class Run:
    """What the stages of one run share."""

    report: Report
    out: Path | None = None
    rehearse: bool = False

    @property
    def gpu(self) -> str | None:
        """Its name."""
        return self.report.data["machine"].get("gpu")

    @property
    def nothing_to_step(self) -> str | None:
        """Why no tensor can be stepped, where none can."""
        return None if self.gpu or self.rehearse else "torch finds no GPU here"

    @property
    def environment(self) -> dict[str, str]:
        """What is different in the environment of a child that steps tensors."""
        return dict(REHEARSING) if self.rehearse else {}


def module(name: str, *arguments: str) -> list[str]:
    """The command of a child."""
    return [PYTHON, "-m", f"benchmarks.{name}", *arguments]


def together(function: Callable[[Any], str | None], arguments: Sequence[Any]) -> list[str]:
    """Call it for all arguments at once; what it returned, where it is not None."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        return [why for why in pool.map(function, arguments) if why]


# The stages. Each returns why there was nothing to do, or None.


def machine(run: Run, deadline: float, stage: str = "machine") -> None:
    """What there is, before anything is built; with a GPU, or in a rehearsal, there will be results."""
    status, last = children.run(
        module("machine"), deadline, partial(run.report.hear, stage), environment=run.environment
    )
    if status != 0:
        run.report.fail(stage, "python -m benchmarks.machine", last)
    if run.out is not None and run.nothing_to_step is None:
        run.report.path = run.out / "gpu.json"


def build(run: Run, deadline: float) -> str | None:
    """In place, for the GPU of this machine alone where CMake is asked for no other."""
    if run.rehearse:
        return "a rehearsal builds nothing"
    architecture = run.report.data["machine"].get("capability", "").replace(".", "")
    environment = {"CUDAARCHS": architecture, "PIP_NO_INDEX": "1"} if architecture else {"PIP_NO_INDEX": "1"}
    pip = ["-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-deps", "--editable", "."]
    in_place = ["setup.py", "build_ext", "--inplace"]
    for arguments in (pip, in_place):
        command = [PYTHON, *arguments]
        status, last = children.run(command, deadline, environment=environment, quiet=float("inf"), echo=False)
        if status == 0 and NOT_BUILT not in last:
            break
        run.report.fail("build", " ".join(arguments), last)
    machine(run, deadline, "build")
    wanted = {"native, cpu": True, "native, cuda": bool(shutil.which("nvcc")), "triton, cuda": False}
    for name, built in wanted.items():
        reason = run.report.data["backends"].get(name, "nothing is known of it")
        if reason and run.gpu is None and "cuda" in name:
            continue
        if reason and built:
            run.report.fail("build", name, f"{reason}\nThe end of what the build said:\n{last}")
        elif reason:
            run.report.not_run(f"{name}: {reason}")
    if run.gpu is None:
        run.report.not_run("anything on a GPU, since torch finds none here; no results are written")
    return None


def tests(run: Run, deadline: float) -> None:
    """Those marked ``gpu``, in several processes: most of their time is Triton's compiler."""
    shards = max(1, min(8, (os.cpu_count() or 1) // 2)) if run.gpu else 1
    environment = NOT_INTERPRETED if run.rehearse else {"OMP_NUM_THREADS": "2"}
    # Whatever plugins this machine has, the tests need none.
    environment = {**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    hear = partial(run.report.hear, "tests")

    def shard(i: int) -> str | None:
        command = lambda done: module("gpu.verdicts", str(i), str(shards), json.dumps(done))  # noqa: E731
        return children.run_items(command, deadline, hear, environment=environment, echo=False)

    for why in together(shard, range(shards)):
        run.report.fail("tests", "the whole of them", why)


def sanitizer(run: Run, deadline: float) -> str | None:
    """Accesses out of bounds, and races in shared memory, on a small case of each backend."""
    tool = shutil.which("compute-sanitizer")
    if run.nothing_to_step:
        return run.nothing_to_step
    if tool is None and not run.rehearse:
        return "compute-sanitizer is not on this machine"

    def check(kind: tuple[str, str]) -> str | None:
        check, backend = kind
        options = ["--tool", check, "--error-exitcode", "9", "--report-api-errors", "no"]
        prefix = [] if run.rehearse else [str(tool), *options]
        command = [*prefix, *module("gpu.small", backend, "[]")]
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **run.environment}
        heard: list[Line] = []

        def hear(line: Line) -> None:
            if "id" in line:
                heard.append(line)
                run.report.hear("sanitizer", {**line, "id": f"{check}: {line['id']}"})

        status, last = children.run(command, deadline, hear, environment=own, quiet=float("inf"))
        if status == 0 or (status == 1 and any(line["outcome"] == "failed" for line in heard)):
            return None
        return f"{check} of {backend}, status {status}:\n{last}"

    kinds = ("memcheck",) if run.rehearse else ("memcheck", "racecheck")
    for why in together(check, [(kind, b) for kind in kinds for b in BACKENDS]):
        run.report.fail("sanitizer", why.splitlines()[0], why)
    return None


def benchmark(run: Run, deadline: float) -> str | None:
    """The figures."""
    if run.nothing_to_step:
        return run.nothing_to_step
    command = lambda done: module("gpu.bench", json.dumps(done))  # noqa: E731
    hear = partial(run.report.hear, "benchmark")
    why = children.run_items(command, deadline, hear, environment=run.environment, echo=False)
    if why and time.monotonic() >= deadline:
        run.report.not_run(f"part of the benchmark, whose time was over: {why.splitlines()[0]}")
    elif why:
        run.report.fail("benchmark", "the whole of it", why)
    return None


def pictures(run: Run, deadline: float) -> str | None:
    """Of the figures."""
    if not run.report.data["figures"]:
        return "there are no figures"
    if run.report.path is None:
        return "no results are written"
    status, last = children.run(module("pictures", str(run.report.path)), deadline, environment=run.environment)
    if status != 0:
        run.report.fail("pictures", "python -m benchmarks.pictures", last)
    return None


Stage = Callable[[Run, float], "str | None"]
# With what a stage may take in seconds; one that ends early leaves its rest to those behind it. Eight minutes together,
# with what starting and ending takes.
STAGES: list[tuple[Stage, float]] = [
    (machine, 45.0), (build, 100.0), (tests, 100.0), (sanitizer, 75.0), (benchmark, 135.0), (pictures, 15.0)
]  # fmt: skip


def run_stages(run: Run, stages: Sequence[tuple[Stage, float]]) -> None:
    """One after the other, whatever became of the one before."""
    end = time.monotonic()
    for stage, seconds in stages:
        name = stage.__name__
        end += seconds * (4 if run.rehearse else 1)  # a rehearsal's machine may be busy
        began = time.monotonic()
        print(f"== {name}, {end - began:.0f} s at most", flush=True)
        fields = run.report.stage(name)
        try:
            nothing = stage(run, end)
        except Exception as error:
            nothing = None
            run.report.fail(name, "the command itself", f"{type(error).__name__}: {error}")
        if fields["skipped"] and not fields["passed"] + fields["failed"]:
            nothing = nothing or f"all {fields['skipped']} were skipped, with the reasons at the end"
        if nothing and fields["outcome"] == "passed":
            fields |= {"outcome": "nothing to do", "reason": nothing}
        run.report.stage(name, seconds=round(time.monotonic() - began, 1))
        counts = ", ".join(f"{n} {kind}" for kind in ("passed", "failed", "skipped") if (n := fields[kind]))
        words = [fields["outcome"], *filter(None, [fields.get("reason"), counts]), f"{fields['seconds']} s"]
        print(f"== {name}: {': '.join(words[:2])}{''.join(f', {word}' for word in words[2:])}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", metavar="DIR", type=Path, help=f"where the results go; default: {RESULTS}")
    rehearse = "run the tests' and the benchmark's code on the CPU, tiny, with Triton interpreted: shows that it runs"
    parser.add_argument("--rehearse", action="store_true", help=f"{rehearse}. Builds nothing, writes only to --out")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: children.end_all(128 + number))
    out = options.out.absolute() if options.out else None if options.rehearse else RESULTS
    report = Report("this was a rehearsal on the CPU" if options.rehearse else "")
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *filter(os.path.isdir, TOOLS)])
    began = time.monotonic()
    run_stages(Run(report, out, options.rehearse), STAGES)
    report.data |= {"finished": True, "seconds": round(time.monotonic() - began, 1)}
    report.save()
    return conclude(report)


def conclude(report: Report) -> int:
    """Say what was found, in a page."""
    data = report.data
    print("\nTargets, for an H200:")
    for verdict in data["targets"]:
        if verdict["verdict"] != "not measured":
            print(f"  {verdict['verdict']:8} {verdict['shape']:13} {verdict['target']}: {verdict['found']}")
    unmeasured = sum(verdict["verdict"] == "not measured" for verdict in data["targets"])
    print(f"  {unmeasured} of {len(data['targets'])} not measured")
    for skipped in data["skipped"]:
        print(f"skipped {skipped['items']}: {skipped['reason']}")
    for sentence in data["not_run"]:
        print(f"not run: {sentence}")
    print(f"{len(data['failures'])} failures" + "".join(f"\n  {f['stage']}: {f['item']}" for f in data["failures"]))
    if report.path is not None:
        print(f"saved {report.path}")
    return 1 if data["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
