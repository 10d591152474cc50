"""Parameters that break kernels, their gradients, and optimizers of ours and of torch on the same values."""

import copy
import io

import torch
from rules import oracle as oracle_of

import fused_opt


def layouts(dtype=torch.float32, seed=0, chunk=16384):
    """Parameters of every shape and layout that breaks a kernel which assumes too much."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [randn(n) for n in (0, 1, 7, chunk - 1, chunk, chunk + 1)]
    tensors += [randn(()), randn(3, 0, 2), randn(5, 1, 3)]
    tensors.append(randn(6, 4).t())
    tensors.append(randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    tensors.append(randn(33)[1:])  # breaks the alignment of vector loads
    tensors.append(randn(8, 6)[::2, 1::2])  # not dense
    tensors.append(randn(3, 40, 50).permute(2, 0, 1))
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def set_gradients(parameters, seed, dtype=None):
    """The same gradients for the same seed, whatever dtype or layout they are wanted in."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = torch.empty_like(p).copy_(gradient.to(p.dtype))


def clones(parameters, dtype=None):
    """Parameters of the same values and strides."""
    result = []
    for p in parameters:
        data = torch.empty_strided(p.shape, p.stride(), dtype=dtype or p.dtype)
        result.append(torch.nn.Parameter(data.copy_(p.detach())))
    return result


def parameters_of(optimizer):
    """Its parameters, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def pair(name, options, backend, shapes=((3, 4), (5,), ()), arrange=list, dtype=torch.float64):
    """An optimizer of ours and its oracle on parameters of equal values; `arrange` makes groups or names of them."""
    generator = torch.Generator().manual_seed(7)
    if oracle_of(name).__module__.startswith("torch.optim"):
        options = {"foreach": False, **options}
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    theirs = clones(ours)
    optimizer = getattr(fused_opt, name)(arrange(ours), backend=backend, **copy.deepcopy(options))
    oracle = oracle_of(name)(arrange(theirs), **copy.deepcopy(options))
    return optimizer, oracle


def train_both(optimizer, oracle, steps=3, seed=0):
    """The same gradients for both, step for step."""
    for step in range(steps):
        set_gradients(parameters_of(optimizer), seed + step)
        set_gradients(parameters_of(oracle), seed + step)
        optimizer.step()
        oracle.step()


def checkpoint(optimizer):
    """Its state_dict, by way of a file that holds nothing but tensors and plain types."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)
