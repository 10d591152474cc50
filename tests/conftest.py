"""What every test shares: the backends of this machine, and tensors that hurt."""

import pytest
import torch

import fused_opt
from fused_opt import backends
from fused_opt.backends import native

INSTRUCTION_SETS = native._native.instruction_sets() if native.unavailable() is None else []


@pytest.fixture(params=["reference", *(f"native-{name}" for name in INSTRUCTION_SETS)])
def backend(request, monkeypatch):
    """Every backend that runs here, the native one with each instruction set."""
    name, _, instruction_set = request.param.partition("-")
    if instruction_set:
        monkeypatch.setenv("FUSED_OPT_CPU", instruction_set)
    return name


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


__all__ = ["backends", "clones", "fused_opt", "layouts", "set_gradients"]
