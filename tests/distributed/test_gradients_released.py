"""Backwards that step in several processes: with FSDP2 as ordinary steps do, and not where gradients are averaged later."""

import copy

import pytest
import torch
from support.compare import assert_close
from support.processes import in_processes, same_everywhere
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_opt


def make(world, sharded=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    if sharded:
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(model, optimizer, rank):
    for step in range(4):
        torch.manual_seed(10 * step + rank)
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def check_shards_are_stepped_as_by_ordinary_steps(rank, world):
    makers = {
        "AdamW": {"noise": fused_opt.WeightNoise(0.01), "averaging": fused_opt.EMA(0.9)},
        "LARS": {"coefficient": 0.1},
        "LAMB": {"averaging": fused_opt.PSWA(period=3)},
    }
    for name, options in makers.items():
        models = [make(world), make(world)]
        optimizers = [getattr(fused_opt, name)(model.parameters(), lr=0.1, **options) for model in models]
        optimizers[1].step_in_backward(models[1])
        for model, optimizer in zip(models, optimizers):
            train(model, optimizer, rank)
        plain, released = ([p.full_tensor() for p in model.parameters()] for model in models)
        assert_close(released, plain, 0)
        assert all(p.grad is None for p in models[1].parameters())
        assert same_everywhere(released, rank, world)
        assert len(optimizers[1].state) == 6


def check_replicas_are_refused_before_anything_moves(rank, world):
    model = make(world, sharded=False)
    optimizer = fused_opt.SGD(model.parameters(), lr=0.1)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="the model is under DistributedDataParallel, which averages them"):
        optimizer.step_in_backward(wrapped)
    handle = optimizer.step_in_backward(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the model is under DistributedDataParallel"):
        wrapped(torch.ones(1, 6))
    assert_close(dict(model.state_dict()), dict(before), 0)
    model(torch.ones(1, 6)).sum().backward()  # alone, it is this process's own
    handle.remove()
    assert not model._forward_pre_hooks


test_in_processes = in_processes(globals(), 2)
