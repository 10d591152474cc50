"""What figures depend on: ``python -m benchmarks.gpu.machine``, a process of its own, since it imports what is built."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

from . import BACKENDS, DEVICE, ROOT
from .children import say


def answer(*command: str) -> str:
    """The first line of what a program says, or why it says nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none ({error})"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return (
        lines[-1].strip() if done.returncode == 0 and lines else f"none ({(done.stderr or done.stdout).strip()[:200]})"
    )


def describe() -> dict[str, Any]:
    """Hardware and versions; ``gpu`` is None where torch finds none."""
    import torch

    here: dict[str, Any] = {
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda or torch.version.hip,
        "triton": version("triton"),
        "cores": os.cpu_count(),
        "commit": answer("git", "rev-parse", "HEAD"),
        "nvcc": answer("nvcc", "--version"),
        "compute-sanitizer": shutil.which("compute-sanitizer"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        here |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "L2": getattr(properties, "L2_cache_size", None),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "nvidia-smi": answer(
                "nvidia-smi",
                "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem,ecc.mode.current",
                "--format=csv,noheader",
            ),
        }
    return here


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as found

    try:
        return found(package)
    except PackageNotFoundError:
        return None


def backends_here() -> dict[str, str | None]:
    """Every backend and kind of device with None, or why it does not step tensors there."""
    import torch

    from fused_opt import backends

    reasons: dict[str, str | None] = {}
    for name in BACKENDS:
        for device in dict.fromkeys(("cpu", DEVICE)):
            if device != "cpu" and not torch.cuda.is_available():
                reasons[f"{name}, {device}"] = "torch finds no GPU"
                continue
            module = backends.get(name)
            reasons[f"{name}, {device}"] = module.unavailable() or module.unsupported(
                None, [torch.ones(1, device=device)]
            )
    return reasons


if __name__ == "__main__":
    say(machine=describe())
    say(backends=backends_here())
