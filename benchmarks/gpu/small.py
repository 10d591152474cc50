"""A small case for compute-sanitizer, each rule and extra once: ``python -m benchmarks.gpu.small BACKEND DONE``.

Every tensor is an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING), so that a step outside of one is seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import fused_opt

from ..machine import backends_here
from . import DEVICE, ON_CPU
from .children import say

SIZES = (7, 257) if ON_CPU else (1, 7, 255, 1024, 1025, 4099, 16385, 100_001)
CASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **b: fused_opt.SGD(p, lr=0.1, momentum=0.9, **b),
    "AdamW": lambda p, **b: fused_opt.AdamW(p, lr=0.1, amsgrad=True, **b),
    "LARS": lambda p, **b: fused_opt.LARS(p, lr=0.1, exempt=-1, **b),
    "LAMB": lambda p, **b: fused_opt.LAMB(p, lr=0.1, exempt=-1, **b),
    "everything": lambda p, **b: fused_opt.CLARS(
        p, lr=0.1, exempt=-1, max_grad_norm=1.0, averaging=fused_opt.EMA(0.9),
        noise=fused_opt.WeightNoise(std=0.01, relative=True), **b,
    ),
}  # fmt: skip


def step(make: Callable[..., Any], backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Three steps on tensors around the edges of blocks, the last of them without their alignment."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype).to(DEVICE)) for n in SIZES]
    unaligned = torch.randn(SIZES[-1] + 1, generator=generator).to(dtype).to(DEVICE)[1:]
    parameters.append(torch.nn.Parameter(unaligned))
    optimizer = make(parameters, backend=backend)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()
    return [p.detach().double().cpu() for p in parameters]


def main() -> int:
    """All cases that are not done; 1 where the values are not the reference's."""
    backend, done = sys.argv[1], json.loads(sys.argv[2])
    reason, failed = backends_here()[f"{backend}, {DEVICE}"], False
    for name, make in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            item = f"{backend}: {name}, {dtype}"
            if item in done:
                continue
            say(begin=item)
            if reason:
                say(id=item, outcome="skipped", text=reason)
                continue
            ours, theirs = step(make, backend, dtype), step(make, "reference", dtype)
            far = max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(ours, theirs))
            # Triton's interpreter truncates to bfloat16 where a GPU rounds to the nearest.
            allowed = (16 if ON_CPU else 4) * torch.finfo(dtype).eps
            failed |= not far <= allowed
            text = f"the largest error is {far:.3g} of the largest value, {allowed:.3g} is allowed"
            say(id=item, outcome="passed" if far <= allowed else "failed", text="" if far <= allowed else text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
