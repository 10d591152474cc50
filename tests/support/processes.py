"""Processes that train together, as torchrun starts them: whole programs, and checks of which each reports what it found."""

import functools
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from . import ROOT


def run_ranks(module, world, folder, *arguments, seconds=150):
    """Start ``python -m module folder *arguments`` ``world`` times; fails with what the first of them said that failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # whatever could be imported here
    }
    command = [sys.executable, "-W", "ignore", "-m", module, str(folder), *arguments]
    with ExitStack() as stack:
        logs = [stack.enter_context((folder / f"rank-{rank}-of-{world}.txt").open("w")) for rank in range(world)]
        ranks = [
            subprocess.Popen(
                command, cwd=ROOT, env={**shared, "RANK": str(n), "LOCAL_RANK": str(n)}, stdout=log, stderr=log
            )
            for n, log in enumerate(logs)
        ]
        for rank in ranks:
            stack.callback(rank.wait)
            stack.callback(rank.kill)
        deadline = time.monotonic() + seconds
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            assert time.monotonic() < deadline, "the ranks wait for each other"
            time.sleep(0.05)
        failed = [log for rank, log in zip(ranks, logs) if rank.poll()]
        assert not failed, Path(failed[0].name).read_text()


def in_processes(module, *worlds):
    """A test that runs all functions ``check_...(rank, world)`` of a module's globals in so many processes.

    All checks of all modules that this session's tests ask for run in one gloo group for each number of processes, in the
    first test that asks: starting processes takes longer than most checks.
    """

    @pytest.mark.parametrize("world", worlds)
    @pytest.mark.parametrize(
        "check",
        [check for name, check in sorted(module.items()) if name.startswith("check_")],
        ids=lambda check: check.__name__,
    )
    def test_in_processes(check, world, request):
        assert not (report := report_of(check, world, request)), report

    return test_in_processes


def report_of(check, world, request):
    """What a check found in ``world`` processes: nothing, or the tracebacks."""
    items = [item for item in request.session.items if "check" in getattr(item, "fixturenames", ())]
    asked = [item.callspec.params for item in items]
    checks = [(p["check"].__module__, p["check"].__name__) for p in asked if p["world"] == world]
    return _reports(tuple(checks), world)[check.__module__, check.__name__]


@functools.cache
def _reports(checks, world):
    ended = "a process ended before"
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_ranks(__name__, world, Path(folder), json.dumps(checks), seconds=280)
        except AssertionError as error:
            ended = f"a process ended before:\n{error}"
        found = [torch.load(path) if (path := Path(folder) / f"{rank}").exists() else {} for rank in range(world)]
    return {check: "".join(reports.get(check, ended) for reports in found) for check in checks}


def main(folder, checks):
    """As one of the ranks: every check, and its report into a file at once, should the next one end the process."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    reports = {}
    for module, name in checks:
        try:
            torch.manual_seed(0)
            getattr(importlib.import_module(module), name)(rank, world)
            reports[module, name] = ""
        except Exception:
            reports[module, name] = f"rank {rank} of {world}:\n{traceback.format_exc()}"
        torch.save(reports, folder / f"{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def same_everywhere(tensors, rank, world):
    """Whether all processes hold the same bits."""
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    everyone = [torch.empty_like(flat) for _ in range(world)]
    torch.distributed.all_gather(everyone, flat)
    return all(torch.equal(flat, other) for other in everyone)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    os._exit(0)  # gloo's threads may outlive the interpreter
