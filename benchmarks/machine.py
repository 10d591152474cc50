"""What figures depend on besides the code. ``python -m benchmarks.machine`` says it for a GPU, in a process of its own."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .gpu import BACKENDS, DEVICE, ROOT
from .gpu.children import say


def describe() -> dict[str, Any]:
    """Processor, threads and torch; ``load``: how many processes wanted a core in the last minute."""
    import torch

    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.open() if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
        "torch": torch.__version__,
    }


def describe_gpu() -> dict[str, Any]:
    """The same, the GPU and the tools; ``gpu`` is None where torch finds none."""
    import torch

    here: dict[str, Any] = {
        **describe(),
        "gpu": None,
        "python": platform.python_version(),
        "cuda of torch": torch.version.cuda or torch.version.hip,
        "triton": version("triton"),
        "commit": answer("git", "rev-parse", "HEAD"),
        "nvcc": answer("nvcc", "--version"),
        "compute-sanitizer": shutil.which("compute-sanitizer"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,ecc.mode.current"
        here |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "L2": getattr(properties, "L2_cache_size", None),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "nvidia-smi": answer("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        }
    return here


def in_words(here: Mapping[str, Any]) -> str:
    """What was found, or a row of a CSV that has it, as one line."""
    where = here.get("gpu") or (
        f"{here['processor']}, {here['cores']} cores, {here['threads']} used, load {here['load']} before"
    )
    versions = [f"{name} {here[name]}" for name in ("torch", "fused_opt", "triton") if here.get(name)]
    return f"{where}; {', '.join(versions)}"


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def answer(*command: str) -> str:
    """The last line of what a program says, or why it says nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none ({error})"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and lines:
        return lines[-1].strip()
    return f"none ({(done.stderr or done.stdout).strip()[:200]})"


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
            reason = module.unavailable() or module.unsupported(None, [torch.ones(1, device=device)])
            reasons[f"{name}, {device}"] = reason
    return reasons


if __name__ == "__main__":
    say(machine=describe_gpu())
    say(backends=backends_here())
