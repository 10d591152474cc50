"""``python -m benchmarks.host``: the host's time of a step on a GPU, for ResNet-50's 161 tensors, with launches left out.

No GPU is needed: the tables of a step are made, compared and sent as for one, to host memory in its place, and where a kernel
would be launched nothing is. What CUDA's own calls take (a launch, a copy of what is new) is not in the figures. Tensors are
those of ResNet-50 with every dimension cut to at most 8. Torch's fused step has no such stub: it does step them, on the CPU.

Figures are the least of many turns, of the processor's time of one thread: on a busy machine others are of something else.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import torch

import fused_opt
from fused_opt.backends import native

from .contenders import ADAMW, SGD
from .harness import graph_of, parameters_of, take_turns
from .output import console, page
from .shapes import resnet50, tiny
from .targets import Target

CALLS = 20  # in a turn
MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **options: fused_opt.SGD(p, **SGD, **options),
    "AdamW": lambda p, **options: fused_opt.AdamW(p, **ADAMW, **options),
    "CLARS": lambda p, **options: fused_opt.CLARS(p, **SGD, **options),
}
TARGETS = {"native": 40.0, "triton": 60.0}  # microseconds


def least(steps: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The least microseconds of a call, of contenders that alternate."""
    found = dict.fromkeys(steps, float("inf"))

    def turn(label: str, step: Callable[[], object]) -> None:
        step()  # which finds the caches as the contender before has left them
        began = time.process_time()
        for _ in range(CALLS):
            step()
        found[label] = min(found[label], (time.process_time() - began) / CALLS * 1e6)

    take_turns([lambda label=label, step=step: turn(label, step) for label, step in steps.items()], 5, seconds)  # type: ignore[misc]
    return found


def stub() -> str:
    """Leave launches out; returns the backend that takes tensors of the CPU for those of a GPU."""
    if os.environ.get("TRITON_INTERPRET"):
        from fused_opt.backends.triton import device

        device.launch = lambda *_: None
        return "triton"
    native.EMULATE_GPU = True
    native._native.set_host_blocks(0)
    return "native"


def measure(backend: str, seconds: float) -> dict[str, float]:
    """Every contender in microseconds."""
    shapes = tiny(resnet50())
    contenders = {f"{backend} {name}": partial(make, backend=backend) for name, make in MAKERS.items()}
    contenders["torch fused SGD"] = partial(torch.optim.SGD, **SGD, fused=True)
    contenders["torch fused AdamW"] = partial(torch.optim.AdamW, **ADAMW, fused=True)
    parameters = {label: parameters_of(shapes) for label in contenders}
    graph = graph_of(chain(*parameters.values()))
    steps = {label: make(parameters[label]).step for label, make in contenders.items()}
    gc.collect()
    found = least(steps, seconds)
    del graph
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in a process of each backend, since Triton decides at its import whether it runs on the CPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each backend")
    parser.add_argument("--only", choices=TARGETS, help="in this process: what is left is printed as numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.only:
        for label, found in measure(stub(), options.seconds).items():
            print(label, found, sep="\t")
        return
    for backend, bound in TARGETS.items():
        more = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            __spec__.name,
            "--only",
            backend,
            "--seconds",
            str(options.seconds),
        ]
        lines = subprocess.run(
            command, env={**os.environ, "FUSED_OPT_SELF_CHECK": "0", "OMP_NUM_THREADS": "1", **more},
            check=True, stdout=subprocess.PIPE, text=True,
        ).stdout.splitlines()  # fmt: skip
        rows = []
        for label, found in (line.split("\t") for line in lines):
            target = Target(label, "host", bound) if label.startswith(backend) else None
            verdict = "" if target is None else f"{target}: {'met' if target.met(float(found)) else 'not met'}"
            rows.append({"step": label, "host's time": f"{float(found):.1f} µs", "target": verdict})
        console().print(page(f"Host's time of {backend}, ResNet-50's 161 tensors, launches left out", rows))


if __name__ == "__main__":
    main()
