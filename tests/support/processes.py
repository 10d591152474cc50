"""Real processes for tests: checks run in all of them together, and each reports what it found."""

import importlib
import os
import socket
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
from torch import multiprocessing


def report_of(check, world, request):
    """What a check of a test module found in ``world`` processes of one gloo group: nothing, or the tracebacks.

    A check is a function of the process's rank and the number of processes. All that this session's tests ask for run in
    one group, in the first test that asks: starting processes takes longer than most checks.
    """
    items = [item for item in request.session.items if "check" in getattr(item, "fixturenames", ())]
    asked = [item.callspec.params for item in items]
    checks = [(p["check"].__module__, p["check"].__name__) for p in asked if p["world"] == world]
    return _run(tuple(checks), world)[check.__module__, check.__name__]


@cache
def _run(checks, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_work, args=(checks, rank, world, port, folder)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(280)
        for process in processes:
            process.kill()
        found = [torch.load(path) if (path := Path(folder) / f"{rank}").exists() else {} for rank in range(world)]
    ended = "a process ended before"
    return {check: "".join(reports.get(check, ended) for reports in found) for check in checks}


def _work(checks, rank, world, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    sys.path.insert(0, str(Path(__file__).parent))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    reports = {}
    for module, name in checks:
        try:
            torch.manual_seed(0)
            getattr(importlib.import_module(module), name)(rank, world)
            reports[module, name] = ""
        except Exception:
            reports[module, name] = f"rank {rank} of {world}:\n{traceback.format_exc()}"
        torch.save(reports, Path(folder) / f"{rank}")
    torch.distributed.destroy_process_group()


def same_everywhere(tensors, rank, world):
    """Whether all processes hold the same bits."""
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    everyone = [torch.empty_like(flat) for _ in range(world)]
    torch.distributed.all_gather(everyone, flat)
    return all(torch.equal(flat, other) for other in everyone)
