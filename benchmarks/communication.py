"""What each feature adds to a step's communication, counted in real processes: ``python -m benchmarks.communication``.

Every collective that torch dispatches is counted in one process, with the bytes that the process brings to it; what the
same model sends with torch.optim's optimizer is subtracted. Two processes by default; neither number of calls nor bytes
depend on how many there are. Prints a table and writes communication.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_opt

from .output import RESULTS, console, page, save_csv

WIDTH, LAYERS, MICRO_BATCHES = 64, 6, 4
INTO_FIRST = ("_allgather_base_", "_reduce_scatter_base_", "allgather_into_tensor_coalesced_")  # their second brings

FUNCTIONAL = ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "all_to_all_single", "broadcast")


class Count(TorchDispatchMode):
    """Collectives within the block: calls, and bytes that this process brings."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" or (space == "_c10d_functional" and name in FUNCTIONAL):
            brought = args[1] if name in INTO_FIRST else args[0]
            self.calls += 1
            self.bytes += sum(t.nbytes for t in tree_leaves(brought) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def model_of() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh()) for _ in range(LAYERS)]
    return nn.Sequential(*blocks)


def sharded(model: nn.Module) -> nn.Module:
    for block in model.children():
        fully_shard(block)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"DDP": DistributedDataParallel, "FSDP2": sharded}
AdamW, SGD = partial(fused_opt.AdamW, lr=1e-3), partial(fused_opt.SGD, lr=1e-3)
CLARS, LARS, LAMB = (partial(of, lr=1e-3) for of in (fused_opt.CLARS, fused_opt.LARS, fused_opt.LAMB))
# The optimizer, micro-batches in a step, and the kind of parts that are tracked.
FEATURES: dict[str, tuple[Callable[..., torch.optim.Optimizer], int, str | None]] = {
    "AdamW": (AdamW, 1, None),
    "noise": (partial(AdamW, noise=fused_opt.WeightNoise(std=1e-3)), 1, None),
    "averaging: EMA": (partial(AdamW, averaging=fused_opt.EMA(0.9)), 1, None),
    "averaging: PSWA": (partial(AdamW, averaging=fused_opt.PSWA(2)), 1, None),
    "relative noise": (partial(AdamW, noise=fused_opt.WeightNoise(std=1e-3, relative=True)), 1, None),
    "max_grad_norm": (partial(AdamW, max_grad_norm=1.0), 1, None),
    'nonfinite="skip"': (partial(AdamW, nonfinite="skip"), 1, None),
    "LARS": (LARS, 1, None),
    "LAMB": (LAMB, 1, None),
    "LAMB, max_grad_norm": (partial(LAMB, max_grad_norm=1.0), 1, None),
    "CLARS": (CLARS, 1, None),
    "CLARS, parts": (CLARS, 1, "microbatch"),
    f"CLARS, parts of {MICRO_BATCHES} micro-batches": (CLARS, MICRO_BATCHES, "microbatch"),
    f"CLARS, {MICRO_BATCHES} micro-batches, max_grad_norm": (
        partial(CLARS, max_grad_norm=1.0),
        MICRO_BATCHES,
        "microbatch",
    ),
}


def sent(wrap: Callable[[nn.Module], nn.Module], make: Any, micro_batches: int, kind: str | None) -> tuple[int, int]:
    """Calls and bytes of the third step: by then everything is as it will stay."""
    model = wrap(model_of())
    optimizer = make(model.parameters())
    if kind is not None:
        optimizer.track_parts(kind, model=model)
    for _ in range(3):
        with Count() as count:
            for micro in range(micro_batches):
                last = micro == micro_batches - 1
                lonely = not last and isinstance(model, DistributedDataParallel)
                with model.no_sync() if lonely else contextlib.nullcontext():
                    model(torch.ones(4, WIDTH)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return count.calls, count.bytes


def balanced(wrap: Callable[[nn.Module], nn.Module]) -> tuple[int, int]:
    """One call of ``TempBalance.step``."""
    model = wrap(model_of())
    balance = fused_opt.TempBalance(model, AdamW(model.parameters()))
    with Count() as count:
        balance.step()
    return count.calls, count.bytes


def measure() -> list[dict[str, Any]]:
    """Within a process group: a row for every feature and wrapper."""
    rows = []
    for wrapper, wrap in WRAPPERS.items():
        without = {n: sent(wrap, partial(torch.optim.AdamW, lr=1e-3), n, None) for n in (1, MICRO_BATCHES)}
        rows.append(row("gradients and weights, torch.optim", wrapper, without[1], (0, 0)))
        rows += [
            row(name, wrapper, sent(wrap, make, n, kind), without[n]) for name, (make, n, kind) in FEATURES.items()
        ]
        rows.append(row("TempBalance.step", wrapper, balanced(wrap), (0, 0)))
    return rows


def row(name: str, wrapper: str, found: tuple[int, int], without: tuple[int, int]) -> dict[str, Any]:
    tensors = sum(1 for _ in model_of().parameters())
    calls, brought = found[0] - without[0], found[1] - without[1]
    return {"feature": name, "model": wrapper, "tensors": tensors, "calls": calls, "bytes": brought}


def _work(rank: int, world: int, port: int, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rows = measure()
    if rank == 0:
        torch.save(rows, path)
    torch.distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Count and show; returns what was counted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.communication", description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows")
        multiprocessing.spawn(_work, (options.processes, port, path), options.processes)
        rows = torch.load(path)
    features: dict[str, dict[str, Any]] = {}
    for of in rows:
        figures = {f"{of['model']}, {what}": of[what] for what in ("calls", "bytes")}
        features.setdefault(of["feature"], {"feature": of["feature"]}).update(figures)
    title = f"Communication of a step beyond torch.optim's, {rows[0]['tensors']} tensors, {options.processes} processes"
    console().print(page(title, list(features.values())))
    save_csv(options.out / "communication.csv", rows)
    return rows


if __name__ == "__main__":
    main()
