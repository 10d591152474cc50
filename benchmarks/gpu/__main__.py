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
from pathlib import Path
from typing import Any

from . import BACKENDS, REHEARSAL, ROOT
from .children import Line, end_all, run, run_items
from .report import Report

RESULTS = ROOT / "benchmarks" / "results"
PYTHON = sys.executable
TOOLS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")  # where CUDA's are that are not on the PATH
REHEARSING = {REHEARSAL: "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
# For the tests, whose lines the native backend runs, too: the kernels' source, by the host.
NOT_INTERPRETED = {REHEARSAL: "1", "OMP_NUM_THREADS": "1", "FUSED_OPT_CPU": "gpu"}
NOT_BUILT = "the native backend was not built"  # setup.py's words, after which an older one may still be there
# What a stage may take in seconds; one that ends early leaves its rest to those behind it. Eight minutes together, with
# what starting and ending takes.
BUDGETS = {"machine": 45.0, "build": 100.0, "tests": 100.0, "sanitizer": 75.0, "benchmark": 135.0, "pictures": 15.0}


class Run:
    """One run of the command."""

    def __init__(self, report: Report, out: Path | None, rehearse: bool) -> None:
        self.report, self.out, self.rehearse = report, out, rehearse
        self.environment = dict(REHEARSING) if rehearse else {}
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *filter(os.path.isdir, TOOLS)])

    @property
    def gpu(self) -> str | None:
        """Its name."""
        return self.report.data["machine"].get("gpu")

    def module(self, name: str, *arguments: str) -> list[str]:
        """The command of a child."""
        return [PYTHON, "-m", f"benchmarks.gpu.{name}", *arguments]

    def machine(self, deadline: float) -> None:
        """What there is, before anything is built."""
        self._look("machine", deadline)

    def _look(self, stage: str, deadline: float) -> None:
        """Ask what there is; with a GPU, or in a rehearsal, there will be results."""
        status, last = run(
            self.module("machine"), deadline, lambda line: self.report.hear(stage, line), environment=self.environment
        )
        if status != 0:
            self.report.fail(stage, "python -m benchmarks.gpu.machine", last)
        if self.out is not None and (self.gpu is not None or self.rehearse):
            self.report.path = self.out / "gpu.json"

    def build(self, deadline: float) -> None:
        """In place, for the GPU of this machine alone where CMake is asked for no other."""
        if self.rehearse:
            return
        architecture = self.report.data["machine"].get("capability", "").replace(".", "")
        environment = {"CUDAARCHS": architecture, "PIP_NO_INDEX": "1"} if architecture else {"PIP_NO_INDEX": "1"}
        pip = ["-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-deps", "--editable", "."]
        in_place = ["setup.py", "build_ext", "--inplace"]
        for arguments in (pip, in_place):
            status, last = run([PYTHON, *arguments], deadline, environment=environment, quiet=float("inf"), echo=False)
            if status == 0 and NOT_BUILT not in last:
                break
            self.report.fail("build", " ".join(arguments), last)
        self._look("build", deadline)
        wanted = {"native, cpu": True, "native, cuda": bool(shutil.which("nvcc")), "triton, cuda": False}
        for name, built in wanted.items():
            reason = self.report.data["backends"].get(name, "nothing is known of it")
            if reason and self.gpu is None and "cuda" in name:
                continue
            if reason and built:
                self.report.fail("build", name, f"{reason}\nThe end of what the build said:\n{last}")
            elif reason:
                self.report.not_run(f"{name}: {reason}")
        if self.gpu is None:
            self.report.not_run("anything on a GPU, since torch finds none here; no results are written")

    def tests(self, deadline: float) -> None:
        """Those marked ``gpu``, in several processes: most of their time is Triton's compiler."""
        shards = max(1, min(8, (os.cpu_count() or 1) // 2)) if self.gpu else 1

        def shard(i: int) -> str | None:
            command = lambda done: self.module("verdicts", str(i), str(shards), json.dumps(done))  # noqa: E731
            own = NOT_INTERPRETED if self.rehearse else {"OMP_NUM_THREADS": "2"}
            # Whatever plugins this machine has, the tests need none.
            return self._items("tests", deadline, command, {**own, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})

        for why in self._together(shard, range(shards)):
            self.report.fail("tests", "the whole of them", why)

    def sanitizer(self, deadline: float) -> None:
        """Accesses out of bounds, and races in shared memory, on a small case of each backend."""
        tool = shutil.which("compute-sanitizer")
        if self.gpu is None and not self.rehearse:
            return
        if tool is None and not self.rehearse:
            self.report.not_run("compute-sanitizer, which is not on this machine")
            return

        def check(kind: tuple[str, str]) -> str | None:
            check, backend = kind
            options = ["--tool", check, "--error-exitcode", "9", "--report-api-errors", "no"]
            prefix = [] if self.rehearse else [str(tool), *options]
            command = [*prefix, *self.module("small", backend, "[]")]
            own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **self.environment}
            heard: list[Line] = []

            def hear(line: Line) -> None:
                if "id" in line:
                    heard.append(line)
                    self.report.hear("sanitizer", {**line, "id": f"{check}: {line['id']}"})

            status, last = run(command, deadline, hear, environment=own, quiet=float("inf"))
            if status == 0 or (status == 1 and any(line["outcome"] == "failed" for line in heard)):
                return None
            return f"{check} of {backend}, status {status}:\n{last}"

        kinds = ("memcheck",) if self.rehearse else ("memcheck", "racecheck")
        for why in self._together(check, [(kind, b) for kind in kinds for b in BACKENDS]):
            self.report.fail("sanitizer", why.splitlines()[0], why)

    def benchmark(self, deadline: float) -> None:
        """The figures."""
        if self.gpu is None and not self.rehearse:
            return
        command = lambda done: self.module("bench", json.dumps(done))  # noqa: E731
        why = self._items("benchmark", deadline, command, self.environment)
        if why and time.monotonic() >= deadline:
            self.report.not_run(f"part of the benchmark, whose time was over: {why.splitlines()[0]}")
        elif why:
            self.report.fail("benchmark", "the whole of it", why)

    def pictures(self, deadline: float) -> None:
        """Of the figures."""
        if self.report.path is None or not self.report.data["figures"]:
            return
        status, last = run(self.module("pictures", str(self.report.path), str(self.out)), deadline)
        if status != 0:
            self.report.fail("pictures", "python -m benchmarks.gpu.pictures", last)

    def _items(
        self, stage: str, deadline: float, command: Callable[[list[str]], Sequence[str]], environment: dict[str, str]
    ) -> str | None:
        hear = lambda line: self.report.hear(stage, line)  # noqa: E731
        return run_items(command, deadline, hear, environment=environment, echo=False)

    @staticmethod
    def _together(function: Callable[[Any], str | None], arguments: Sequence[Any]) -> list[str]:
        with ThreadPoolExecutor(len(arguments)) as pool:
            return [why for why in pool.map(function, arguments) if why]


def stages(run_: Run, budgets: dict[str, float]) -> None:
    """One after the other, whatever became of the one before."""
    end = time.monotonic()
    for name, seconds in budgets.items():
        end += seconds
        began = time.monotonic()
        print(f"== {name}, {end - began:.0f} s at most", flush=True)
        run_.report.stage(name)
        try:
            getattr(run_, name)(end)
        except Exception as error:
            run_.report.fail(name, "the command itself", f"{type(error).__name__}: {error}")
        stage = run_.report.stage(name, seconds=round(time.monotonic() - began, 1))
        print(f"== {name}: {', '.join(f'{key} {value}' for key, value in stage.items())}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", metavar="DIR", type=Path, help=f"where the results go; default: {RESULTS}")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run the tests' and the benchmark's code on the CPU, tiny, with Triton interpreted: shows that it runs. Builds "
        "nothing, and writes only to --out",
    )
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: end_all(128 + number))
    out = options.out.absolute() if options.out else None if options.rehearse else RESULTS
    report = Report("this was a rehearsal on the CPU" if options.rehearse else "")
    began = time.monotonic()
    stages(Run(report, out, options.rehearse), BUDGETS)
    report.data |= {"finished": True, "seconds": round(time.monotonic() - began, 1)}
    report.save()
    return conclude(report)


def conclude(report: Report) -> int:
    """Say what was found, in a page."""
    data = report.data
    print("\nTargets, for an H200:")
    for verdict in data["targets"]:
        if verdict["verdict"] != "not measured":
            print(
                f"  {verdict['verdict']:8} {verdict['shape']:13} {verdict['target']}: {verdict['found']} ({verdict['bound']})"
            )
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
