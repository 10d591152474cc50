"""Real processes for tests: a module's checks run in all of them together, and each reports what it found."""

import importlib
import os
import socket
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch import multiprocessing


def run(module, world, folder):
    """Run the functions in ``module.CHECKS`` in ``world`` processes of one gloo group; {check's name: report}.

    A check is called with the process's rank and the number of processes. A report is empty, or the tracebacks.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(module, rank, world, port, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
    for process in processes:
        process.kill()
    reports = [torch.load(path) if (path := Path(folder) / f"{rank}").exists() else {} for rank in range(world)]
    names = [check.__name__ for check in importlib.import_module(module).CHECKS]
    return {name: "".join(report.get(name, "the process ended before") for report in reports) for name in names}


def _work(module, rank, world, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    sys.path.insert(0, str(Path(__file__).parent))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    reports = {}
    for check in importlib.import_module(module).CHECKS:
        try:
            torch.manual_seed(0)
            check(rank, world)
            reports[check.__name__] = ""
        except Exception:
            reports[check.__name__] = f"rank {rank} of {world}:\n{traceback.format_exc()}"
        torch.save(reports, Path(folder) / f"{rank}")
    torch.distributed.destroy_process_group()


def same_everywhere(tensors, rank, world):
    """Whether all processes hold the same bits."""
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    everyone = [torch.empty_like(flat) for _ in range(world)]
    torch.distributed.all_gather(everyone, flat)
    return all(torch.equal(flat, other) for other in everyone)
