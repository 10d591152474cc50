"""Trust ratios by their formulas."""

import math

import torch

from .parameters import set_gradients

BOUND = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def norm(tensor):
    return math.sqrt(math.fsum(x * x for x in tensor.detach().double().flatten().tolist()))


def lars(w, g, wd, coefficient=0.001, cap=math.inf, eps=0.0):
    if norm(w) == 0 or norm(g) == 0:
        return min(cap, 1.0)
    return min(cap, coefficient * norm(w) / (norm(g) + wd * norm(w) + eps))


def clars(w, parts, coefficient=0.01, cap=0.1, eps=1e-6):
    total = sum(norm(part) for part in parts)
    return min(cap, 1.0 if norm(w) == 0 or total == 0 else coefficient * norm(w) / (total + eps))


def gradients(parameters, seed):
    set_gradients(parameters, seed)
    return [p.grad.double() for p in parameters]


def close(ours, theirs, bound):
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1e-30, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.detach().double(), b, rtol=0, atol=bound * scale)


def ratios_of(optimizer):
    named = optimizer.trust_ratios()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [named[f"{i} of group 0"] for i in range(len(parameters))]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
