"""Backwards whose gradients are given, and the norms of parts that a step took."""

import math

import torch

from fused_opt import CLARS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def norm(tensor):
    return math.sqrt(math.fsum(x * x for x in tensor.detach().double().flatten().tolist()))


def parameters_of(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [
        randn(5, 7),
        randn(3),
        randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        randn(6, 4).t(),
        randn(70, 300),
    ]
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def coefficients(parameters, count, seed=1):
    """What each part's gradient is to be."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in parameters]
        for _ in range(count)
    ]


def backward(parameters, part, **options):
    """A loss whose gradient is the part."""
    sum((p * c).sum() for p, c in zip(parameters, part) if c is not None).backward(**options)


def clars(parameters, **options):
    options = {"lr": 0.5, "coefficient": 0.1, "cap": math.inf, "eps": 0.0, "exempt": -1, "weight_decay": 0.0, **options}
    return CLARS(parameters, **options)


def norms_of(optimizer, parameters):
    """A of every parameter, from the ratio that a step with the learning rate 0 beside an idle parameter leaves."""
    weights = [norm(p) for p in parameters]
    optimizer.step()
    ratios = optimizer.trust_ratios()
    return [0.1 * w / ratios[f"{i} of group 0"] for i, w in enumerate(weights)]


def sums(parts, factor=1.0):
    """Sum of the parts' norms, by parameter."""
    return [factor * sum(norm(c) for c in of_p if c is not None) for of_p in zip(*parts)]
