"""TempBalance where processes train together: layers divided between them, the same exponents everywhere."""

import pytest
import torch
from support.processes import in_processes, same_everywhere
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import fused_opt
from fused_opt.balance import sweep
from fused_opt.balance.team import Team


def model_of():
    torch.manual_seed(0)
    layers = [(20, 64), (64, 64), (64, 96), (96, 70), (70, 64), (64, 5)]
    return torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in layers))


def balanced(model, **options):
    optimizer = fused_opt.AdamW(model.parameters(), lr=0.01)
    return optimizer, fused_opt.TempBalance(model, optimizer, min_eigenvalues=50, **options)


class Computed:
    """Within the block, how many weights each call computes, and their shapes."""

    def __enter__(self):
        self.shapes, self.layer_alphas = [], sweep.layer_alphas

        def counting(weights, **options):
            self.shapes.append([tuple(weight.shape) for weight in weights])
            return self.layer_alphas(weights, **options)

        sweep.layer_alphas = counting
        return self

    def __exit__(self, *_):
        sweep.layer_alphas = self.layer_alphas


def train(model, optimizer, step):
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def exponents(balance):
    """In the order of the layers, without what a wrapper adds to their names."""
    return {name.removeprefix("module."): alpha for name, alpha in balance.alphas.items()}


def together(rank, world, wrap, largest, **options):
    """Every process has the same batches: the exponents are those of one that trains alone."""
    plain, model = model_of(), wrap(model_of())
    optimizer, balance = balanced(plain, **options)
    spread, divided = balanced(model, **options)
    for step in range(4):
        with Computed() as computed:
            divided.step()
        assert max(map(len, computed.shapes), default=0) <= largest
        balance.step()
        assert exponents(divided) == pytest.approx(exponents(balance), rel=1e-6)
        values = [torch.tensor(list(divided.multipliers.values())), torch.tensor(list(divided.alphas.values()))]
        assert same_everywhere(values, rank, world)
        train(plain, optimizer, step)
        train(model, spread, step)
        with torch.no_grad():
            model(torch.zeros(1, 20))  # an evaluation, after which FSDP2 leaves weights whole
    assert list(exponents(divided)) == ["1", "2", "3", "4"]
    given = {name.removeprefix("module."): value for name, value in divided.multipliers.items()}
    assert given == pytest.approx(balance.multipliers, rel=1e-6)
    assert set(given.values()) != {1.0}


def sharded(model, mesh=None):
    for layer in model[:-2]:  # the others belong to the outermost module
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_replicas_divide_the_layers(rank, world):
    together(rank, world, DistributedDataParallel, 4 // world)
    with Computed() as computed:
        model = DistributedDataParallel(model_of())
        _, balance = balanced(model)
        balance.step()
    total = torch.tensor(float(sum(map(len, computed.shapes))))
    torch.distributed.all_reduce(total)
    assert total == 4  # each layer once
    with Computed() as computed:
        balance.step()
    assert not sum(map(len, computed.shapes))  # nor again while its weights are the same


def check_shards_are_gathered_one_at_a_time(rank, world):
    together(rank, world, sharded, 1)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        together(rank, world, lambda model: sharded(model, mesh), 1)


def check_portions_of_a_budget(rank, world):
    together(rank, world, sharded, 1, budget=0.3, every=1)
    together(rank, world, DistributedDataParallel, 4, budget=0.6)


def check_a_layer_that_is_not_finite(rank, world):
    """Everybody learns of it."""
    model = sharded(model_of())
    with torch.no_grad():
        if rank == world - 1:
            model[2].weight.to_local()[0, 0] = float("nan")
    _, balance = balanced(model)
    balance.step()
    assert balance.alphas["2"] != balance.alphas["2"]
    assert balance.multipliers["2.weight"] == 1.0
    assert balance.multipliers["1.weight"] != 1.0


def check_parts_of_an_optimizer_are_refused(rank, world):
    model = DistributedDataParallel(model_of())
    zero = ZeroRedundancyOptimizer(model.parameters(), fused_opt.AdamW, lr=0.1)
    for optimizer in (zero, zero.optim):
        with pytest.raises(ValueError, match="multipliers compare all of them"):
            fused_opt.TempBalance(model, optimizer)


test_in_processes = in_processes(globals(), 2, 4)


def test_the_dearest_layers_are_divided_first():
    team = Team((), 0, 3, torch.device("cpu"), False)
    assert team.divide([1.0, 9.0, 4.0, 5.0, 4.0]) == [[1], [3, 0], [2, 4]]
    assert team.divide([]) == [[], [], []]
