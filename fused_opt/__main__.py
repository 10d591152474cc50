"""``python -m fused_opt``: which backends run on this machine, what their self-checks say, and why others do not run.

``python -m fused_opt native`` fails if that backend does not.
"""

import pkgutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module

import torch

from . import __version__, backends, rules
from .backends import native, self_check
from .rule import Rule


def main() -> None:
    """Print one line for every backend and device."""
    print(f"fused_opt {__version__}, torch {torch.__version__}")
    for name, reason in backends.available().items():
        print(f"{name:10} {'ready' if reason is None else 'not here: ' + reason}")
        if name == "native" and reason is None:
            threads = torch.get_num_threads()
            print(f"{'':10}   cpu: ready, instruction set {native.instruction_set()}, {threads} threads")
            if gpu := native.gpu_unavailable():
                print(f"{'':10}   cuda: not here: {gpu}")
        if reason is None:
            for device in _devices():
                _check(name, device)


def _devices() -> list[torch.device]:
    """The GPUs, and the CPU where it emulates one."""
    found = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return [*found, torch.device("cpu")] if native.EMULATE_GPU else found


def _rules() -> Iterator[Rule]:
    """Every one of the package."""
    for module in pkgutil.iter_modules(rules.__path__, f"{rules.__name__}."):
        for value in vars(import_module(module.name)).values():
            yield from (
                one for one in (value.values() if isinstance(value, dict) else [value]) if isinstance(one, Rule)
            )


def _check(name: str, device: torch.device) -> None:
    """Print what the self-checks of a backend on a device say."""
    module, p = backends.get(name), torch.empty(0, device=device)
    if (standard := module.standard(p)) is None:
        return
    what = "emulated GPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    if (found := module.unsupported(None, [p])) is None:
        # Triton compiles every variant, for a second or so: one of each rule.
        dtypes = [torch.float32] if standard.compiles else [torch.float32, torch.float64, torch.bfloat16, torch.float16]
        checked, start = 0, time.perf_counter()
        for rule in dict.fromkeys(_rules()):
            for dtype in dtypes:
                variant = partial(self_check.Variant, rule, (dtype,) * (2 + len(rule.states)))
                found = found or self_check.failure(name, module, p, variant)
                checked += 1
        took = 1e3 * (time.perf_counter() - start)
        found = found or f"passed its self-check, {checked} variants in {took:.0f} ms"
    print(f"{'':10}   {device} ({what}): {found}")


if __name__ == "__main__":
    main()
    for name in sys.argv[1:]:
        if reason := backends.get(name).unavailable():
            sys.exit(f"fused_opt: {name} is not ready: {reason}")
