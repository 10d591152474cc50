"""Starting a program of the tests as torchrun does: one process for every rank, which finds its place in the environment."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path


def run_ranks(program, world, folder, *arguments):
    """Start ``world`` processes and wait for them; fails with what the first of them said that failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    places = [str(Path(__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    shared = {
        **os.environ,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(places),
    }
    command = [sys.executable, "-W", "ignore", program, str(folder), *arguments]
    with ExitStack() as stack:
        logs = [stack.enter_context((folder / f"rank-{rank}-of-{world}.txt").open("w")) for rank in range(world)]
        ranks = [
            subprocess.Popen(command, env={**shared, "RANK": str(n), "LOCAL_RANK": str(n)}, stdout=log, stderr=log)
            for n, log in enumerate(logs)
        ]
        for rank in ranks:
            stack.callback(rank.wait)
            stack.callback(rank.kill)
        deadline = time.monotonic() + 150
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            assert time.monotonic() < deadline, "the ranks wait for each other"
            time.sleep(0.05)
        failed = [log for rank, log in zip(ranks, logs) if rank.poll()]
        assert not failed, Path(failed[0].name).read_text()
