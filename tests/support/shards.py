"""Tensors cut over processes beside the same ones whole."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fused_opt

# Rows that 2 and 4 do not divide, fewer rows than processes (empty shards), one element, kernels of more dimensions.
SHAPES = [(33, 5), (3, 7), (1,), (70,), (6, 3, 2, 2), (16, 1030)]


EVERYTHING = {
    "noise": fused_opt.WeightNoise(std=0.01, seed=5),
    "averaging": fused_opt.PSWA(period=3),
}


BACKENDS = ["reference", "native"] if fused_opt.backends.available()["native"] is None else ["reference"]


def raises(kind, words, call):
    with pytest.raises(kind, match=words):
        call()


def layouts(world):
    """A mesh, and how a tensor of so many dimensions is cut on it."""
    line = init_device_mesh("cpu", (world,))
    found = [(line, lambda ndim: [Shard(0)])]
    if world == 2:
        found += [(line, lambda ndim: [Shard(ndim - 1)]), (line, lambda ndim: [Replicate()])]
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        found += [
            (square, lambda ndim: [Replicate(), Shard(0)]),
            (square, lambda ndim: [Shard(max(0, ndim - 2)), Shard(ndim - 1)]),
        ]
    return found


def whole(tensor):
    if isinstance(tensor, DTensor):
        wide = tensor.int() if tensor.dtype == torch.int16 else tensor  # collectives know no int16
        return wide.full_tensor().to(tensor.dtype)
    return tensor


def cut_as(tensor, mesh, placements):
    """Every process has the same tensor already, and takes its part."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def both(make, mesh, cut, dtype=torch.float32, shapes=SHAPES):
    """An optimizer of whole tensors, and one of the same tensors cut."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    plain = [torch.nn.Parameter(tensor.clone()) for tensor in tensors]
    spread = [torch.nn.Parameter(cut_as(tensor, mesh, cut(tensor.ndim))) for tensor in tensors]
    return make(plain), make(spread)


def parameters_of(optimizer):
    return optimizer.param_groups[0]["params"]


def set_gradients(plain, spread, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for i, (p, q) in enumerate(zip(parameters_of(plain), parameters_of(spread))):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        q.grad = cut_as(p.grad, q.device_mesh, q.placements)
        if i in without:
            p.grad = q.grad = None


def assert_alike(plain, spread, bound):
    """Weights and states; bound 0: to the last bit."""
    for i, (p, q) in enumerate(zip(parameters_of(plain), parameters_of(spread))):
        pairs = {"weight": (p, q)}
        assert plain.state.get(p, {}).keys() == spread.state.get(q, {}).keys()
        pairs |= {slot: (value, spread.state[q][slot]) for slot, value in plain.state.get(p, {}).items()}
        for name, (expected, found) in pairs.items():
            assert name == "step" or found.placements == q.placements
            found = whole(found.detach())
            if bound == 0:
                assert torch.equal(found, expected.detach()), f"{name} of {i}, {SHAPES[i]}"
            else:
                error = (found - expected).abs().max().item() if expected.numel() else 0.0
                assert error <= bound * max(1.0, expected.abs().max().item()), f"{name} of {i}: {error}"
