"""Parameters that are spread over processes: a sharded step is the whole tensor's step, cut; in real processes."""

import copy
import math
from functools import partial
from itertools import product

import pytest
import torch
from support.processes import in_processes, same_everywhere
from support.shards import (
    BACKENDS,
    EVERYTHING,
    assert_alike,
    both,
    layouts,
    parameters_of,
    raises,
    set_gradients,
    whole,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fused_opt


def check_elementwise_steps_are_the_same_to_the_last_bit(rank, world):
    """With noise and averages: what an element draws does not depend on where it is."""
    makers = {
        (fused_opt.SGD, torch.float32): {"momentum": 0.9, "weight_decay": 0.1},
        (fused_opt.AdamW, torch.float32): {"amsgrad": True},
        (fused_opt.Adam, torch.bfloat16): {"state_dtype": torch.float32},
        (fused_opt.SGD, torch.float64): {},
        (fused_opt.SGD, torch.bfloat16): {"momentum": 0.9, "rounding": "stochastic"},
        (fused_opt.AdamW, torch.bfloat16): {"master_weights": True, "rounding": "stochastic"},
        (fused_opt.AdamW, torch.float16): {"rounding": "stochastic", "state_dtype": {"exp_avg_sq": torch.bfloat16}},
        (fused_opt.Lion, torch.float32): {"decay": "independent", "cautious": fused_opt.Cautious("both", scaled=False)},
    }
    first, *others = layouts(world)  # where an element is, is no matter of its rule: half of them with the other cuts
    cases = [*product(makers.items(), [first]), *product(list(makers.items())[::2], others)]
    for backend, (((cls, dtype), options), (mesh, cut)) in product(BACKENDS, cases):
        plain, spread = both(partial(cls, lr=0.1, backend=backend, **options, **EVERYTHING), mesh, cut, dtype)
        for step in range(4):
            set_gradients(plain, spread, step, without=[2] if step == 0 else [])
            gradients = [q.grad for q in parameters_of(spread)]
            plain.step()
            spread.step()
            assert all(q.grad is g for q, g in zip(parameters_of(spread), gradients))
        assert_alike(plain, spread, 0)


def check_norms_are_those_of_the_whole_tensors(rank, world):
    ratio = {"coefficient": 0.5, "exempt": 0, "lr": 0.1}
    makers = {
        "lars": partial(fused_opt.LARS, **ratio),
        "clars": partial(fused_opt.CLARS, **ratio),
        "lamb": partial(fused_opt.LAMB, **ratio),
        "clipped lars": partial(fused_opt.LARS, **ratio, max_grad_norm=3.0),
        "clipped lamb": partial(fused_opt.LAMB, **ratio, max_grad_norm=3.0),
        "clipped": partial(fused_opt.AdamW, lr=0.1, max_grad_norm=3.0),
        "relative": partial(fused_opt.SGD, lr=0.1, noise=fused_opt.WeightNoise(std=0.1, relative=True)),
    }
    for backend, (name, make), (mesh, cut) in product(BACKENDS, makers.items(), layouts(world)):
        plain, spread = both(partial(make, backend=backend), mesh, cut, torch.float64)
        for step in range(4):  # a parameter sits out the first step, and one of which a norm is carried already
            set_gradients(plain, spread, step, without={0: [1], 2: [0]}.get(step, []))
            plain.step()
            spread.step()
            assert (plain.grad_norm is None) == (not name.startswith("clipped"))
            assert (spread.grad_norm or 0.0) == pytest.approx(plain.grad_norm or 0.0, rel=1e-12), name
            ratios = spread.trust_ratios()
            assert ratios == pytest.approx(plain.trust_ratios(), rel=1e-12), name
        assert same_everywhere([torch.tensor(list(ratios.values()), dtype=torch.float64)], rank, world)
        assert_alike(plain, spread, 1e-12)


def check_a_write_between_steps_is_seen(rank, world):
    """The carried norm of the weights is of weights that were doubled since."""
    for write in (lambda q: q.mul_(2), lambda q: q.to_local().mul_(2)):
        plain, spread = both(lambda p: fused_opt.LARS(p, lr=0.1), *layouts(world)[0], torch.float64)
        for step in range(3):
            set_gradients(plain, spread, step)
            plain.step()
            spread.step()
            with torch.no_grad():
                for p, q in zip(parameters_of(plain), parameters_of(spread)):
                    p.mul_(2)
                    write(q)
        assert_alike(plain, spread, 1e-12)


def check_autograd_sees_the_step(rank, world):
    _, spread = both(lambda p: fused_opt.SGD(p, lr=0.1, momentum=0.9), *layouts(world)[0])
    for read in (lambda q: q * q, lambda q: q * spread.state[q]["momentum_buffer"]):
        loss = sum(read(q).sum() for q in parameters_of(spread))
        loss.backward(retain_graph=True)
        spread.step()
        raises(RuntimeError, "modified by an inplace operation", loss.backward)


def check_a_shard_that_is_not_finite_stops_every_process(rank, world):
    for features in ({}, {"max_grad_norm": 1.0}):
        plain, spread = both(
            lambda p: fused_opt.LARS(p, lr=0.1, nonfinite="skip", **features),  # noqa: B023
            *layouts(world)[0],
            torch.float64,
        )
        for step in range(4):
            set_gradients(plain, spread, step)
            if step in (0, 2):
                parameters_of(plain)[0].grad[-1, 0] = math.nan
                if rank == world - 1:
                    parameters_of(spread)[0].grad.to_local()[-1, 0] = math.nan
            plain.step()
            spread.step()
            assert spread.skipped_steps == plain.skipped_steps == step // 2 + 1
        assert_alike(plain, spread, 1e-12)
    _, spread = both(lambda p: fused_opt.AdamW(p, lr=0.1, nonfinite="raise"), *layouts(world)[0])
    set_gradients(spread, spread, 0)
    if rank == 0:
        parameters_of(spread)[3].grad.to_local()[0] = math.inf
    before = copy.deepcopy(parameters_of(spread))
    raises(RuntimeError, "parameter 3 of group 0 is not finite", spread.step)
    assert not spread.state
    assert all(torch.equal(q.to_local(), b.to_local()) for q, b in zip(parameters_of(spread), before))


def check_weights_that_are_not_finite_in_one_process(rank, world):
    """Their ratio is that of a tensor whose norm is not finite, in the processes that see none of it, too."""
    for backend, cls in product(BACKENDS, (fused_opt.LARS, fused_opt.LAMB)):
        plain, spread = both(partial(cls, lr=0.1, backend=backend), *layouts(world)[0], torch.float64)
        with torch.no_grad():
            parameters_of(plain)[0][-1, 0] = math.nan
            if rank == world - 1:
                parameters_of(spread)[0].to_local()[-1, 0] = math.nan
        for step in range(2):
            set_gradients(plain, spread, step)
            plain.step()
            spread.step()
            assert spread.trust_ratios() == pytest.approx(plain.trust_ratios(), rel=1e-12)
            assert spread.trust_ratios()["0 of group 0"] == 1.0


def model_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 13), torch.nn.LayerNorm(13), torch.nn.Tanh(), torch.nn.Linear(13, 3), torch.nn.Tanh()
    ).double()


def sharded(model, mesh=None):
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch(step, size=8):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def assert_models_alike(model, plain, bound):
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        error = (whole(p.detach()) - q.detach()).abs().max().item()
        assert error <= bound, f"{name}: {error}"


MAKERS = {
    "AdamW": lambda p: fused_opt.AdamW(p, lr=0.01, noise=fused_opt.WeightNoise(std=0.01), averaging=fused_opt.EMA(0.9)),
    "LAMB": lambda p: fused_opt.LAMB(p, lr=0.01),
    "CLARS": lambda p: fused_opt.CLARS(p, lr=0.1, max_grad_norm=0.1),
}


def check_fsdp_trains_as_one_process_does(rank, world):
    """Every process has the same batch, so that even the gradients are the same bits."""
    for name, make in MAKERS.items():
        meshes = (
            [None] if world == 2 else [None, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))]
        )
        for mesh in meshes:
            plain, model = model_of(), sharded(model_of(), mesh)
            optimizer, spread = make(plain.parameters()), make(model.parameters())
            for step in range(5):
                for net, of in ((plain, optimizer), (model, spread)):
                    net(batch(step)).square().mean().backward()
                    of.step()
                    of.zero_grad()
            assert_models_alike(model, plain, 0 if name == "AdamW" else 1e-13)
            if name == "AdamW":
                with spread.averaged_weights(), optimizer.averaged_weights():
                    assert_models_alike(model, plain, 0)
                assert_models_alike(model, plain, 0)


def check_clipping_is_that_of_torch(rank, world):
    model, other = sharded(model_of()), sharded(model_of())
    ours = fused_opt.SGD(model.parameters(), lr=0.1, momentum=0.9, max_grad_norm=0.01)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        for net in (model, other):
            net(batch(world * step + rank)).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.01).full_tensor().item()
        ours.step()
        theirs.step()
        assert ours.grad_norm == pytest.approx(norm, rel=1e-12)
        assert norm > 0.02
        ours.zero_grad()
        theirs.zero_grad()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p.to_local(), q.to_local(), rtol=1e-12, atol=1e-14)


def check_micro_batches_under_fsdp(rank, world):
    """A part is a micro-batch of all processes together; between the backwards p.grad is what it is without tracking."""
    make = lambda p: fused_opt.CLARS(p, lr=0.1, cap=math.inf)  # noqa: E731
    plain, model, untracked = model_of(), sharded(model_of()), sharded(model_of())
    optimizer, spread = make(plain.parameters()), make(model.parameters())
    parts, of_spread = optimizer.track_parts("microbatch", model=plain), spread.track_parts("microbatch", model=model)
    for step in range(3):
        for micro in range(3):
            pieces = [batch(100 * step + 10 * micro + r) for r in range(world)]
            plain(torch.cat(pieces)).square().mean().backward()
            for net in (model, untracked):
                net(pieces[rank]).square().mean().backward()
            for p, q in zip(model.parameters(), untracked.parameters()):
                assert torch.equal(p.grad.to_local(), q.grad.to_local())
        assert list(of_spread.counts().values()) == [3] * 6
        if step == 1:  # clipping scales the parts
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        spread.step()
        assert spread.trust_ratios() == pytest.approx(optimizer.trust_ratios(), rel=1e-9)
        optimizer.zero_grad()
        spread.zero_grad()
        with torch.no_grad():
            for p, q in zip(untracked.parameters(), model.parameters()):
                p.copy_(q)
                p.grad = None
    assert_models_alike(model, plain, 1e-10)
    parts.remove()
    # one part where gradients are not synchronized in between
    model.set_requires_gradient_sync(False)
    model(batch(0)).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    model.set_requires_gradient_sync(True)
    model(batch(1)).square().mean().backward()
    assert set(of_spread.counts().values()) == {1}
    # and such a backward leaves a gradient that is there already
    before = [(p.grad, p.grad.to_local().clone()) for p in model.parameters()]
    model.set_requires_gradient_sync(False)
    model(batch(2)).square().mean().backward()
    for p, (grad, values) in zip(model.parameters(), before):
        assert p.grad is grad
        assert torch.equal(grad.to_local(), values)
    model.set_requires_gradient_sync(True)
    of_spread.remove()
    model(batch(2)).square().mean().backward()
    assert not of_spread.counts()


def check_tensor_parallel_layers(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    for name, make in MAKERS.items():
        plain, model = model_of(), model_of()
        parallelize_module(model[0], mesh, ColwiseParallel(output_layouts=Replicate()))
        parallelize_module(model[3], mesh, RowwiseParallel(input_layouts=Replicate()))
        assert model[0].weight.placements == (Shard(0),)
        assert model[3].weight.placements == (Shard(1),)
        optimizer, spread = make(plain.parameters()), make(model.parameters())
        if name == "CLARS":
            optimizer.track_parts("microbatch", model=plain)
            spread.track_parts("microbatch", model=model)
        for step in range(3):
            for net, of in ((plain, optimizer), (model, spread)):
                for micro in range(2):
                    net(batch(2 * step + micro)).square().mean().backward()
                of.step()
                of.zero_grad()
        assert (spread.grad_norm or 0.0) == pytest.approx(optimizer.grad_norm or 0.0, rel=1e-10)
        assert spread.trust_ratios() == pytest.approx(optimizer.trust_ratios(), rel=1e-10)
        assert_models_alike(model, plain, 1e-12)


def check_fsdp_on_tensor_parallel_layers(rank, world):
    """Two cuts of one dimension: strided shards."""
    if world != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        plain = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4)).double()
        model = copy.deepcopy(plain)
        parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        optimizer, spread = make(plain.parameters()), make(model.parameters())
        for step in range(3):
            for net, of in ((plain, optimizer), (model, spread)):
                net(batch(step)).square().mean().backward()
                of.step()
                of.zero_grad()
        assert_models_alike(model, plain, 1e-12), name


def check_gradients_laid_out_otherwise(rank, world):
    """What autograd hands over for a replicated parameter may be a pending sum."""
    mesh = init_device_mesh("cpu", (world,))
    q = torch.nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]))
    q.grad = DTensor.from_local(torch.full((5, 3), 1.0 / world), mesh, [Partial()], run_check=False)
    given = q.grad
    optimizer = fused_opt.SGD([q], lr=0.5)
    optimizer.step()
    assert q.grad is given
    assert torch.equal(whole(q.detach()), torch.full((5, 3), 0.5))


def check_noise_of_shards_that_lie_otherwise_in_memory(rank, world):
    """A shard whose dimensions have another order in memory is walked in that order, and draws for its place in the whole."""
    mesh = init_device_mesh("cpu", (world,))
    for backend in BACKENDS:
        p = torch.nn.Parameter(torch.ones(4 * world, 6, 600))
        local = torch.ones(6, 4, 600).transpose(0, 1)
        q = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
        for of in (p, q):
            fused_opt.SGD([of], lr=0.5, noise=fused_opt.WeightNoise(std=0.1), backend=backend).step()
        assert q.to_local().stride() == local.stride()
        assert torch.equal(whole(q.detach()), p)


def check_refusals_change_nothing(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    plain = torch.ones(4, 3)
    q = torch.nn.Parameter(distribute_tensor(plain, mesh, [Shard(0)]))
    q.grad = distribute_tensor(plain, mesh, [Shard(0)])
    optimizer = fused_opt.SGD([q], lr=0.5, momentum=0.9)
    optimizer.state[q]["momentum_buffer"] = plain.clone()
    raises(
        RuntimeError,
        "its state 'momentum_buffer' a tensor of this process; they must be laid out alike",
        optimizer.step,
    )
    optimizer.state[q]["momentum_buffer"] = distribute_tensor(plain, mesh, [Shard(1)])
    raises(RuntimeError, r"Shard\(dim=0\).*and its state 'momentum_buffer' a DTensor.*Shard\(dim=1\)", optimizer.step)
    assert torch.equal(whole(q.detach()), plain)

    counts = fused_opt.SGD([q], lr=0.5, cautious=fused_opt.Cautious("update"))
    raises(
        RuntimeError, r"a scaled mask counts the elements of whole tensors. Cautious\(..., scaled=False\)", counts.step
    )
    assert torch.equal(whole(q.detach()), plain)

    pending = torch.nn.Parameter(DTensor.from_local(plain, mesh, [Partial()], run_check=False))
    pending.grad = DTensor.from_local(plain, mesh, [Partial()], run_check=False)
    raises(RuntimeError, "a sum that is still to be made", fused_opt.SGD([pending], lr=0.1).step)

    p = torch.nn.Parameter(plain.clone())
    p.grad = plain.clone()
    optimizer = fused_opt.SGD([p], lr=0.5, momentum=0.9)
    optimizer.state[p]["momentum_buffer"] = distribute_tensor(plain, mesh, [Shard(0)])
    raises(RuntimeError, "parameter 0 of group 0 is a tensor of this process and its state", optimizer.step)
    assert torch.equal(p.detach(), plain)

    clars = fused_opt.CLARS([q], lr=0.1)
    raises(ValueError, "give track_parts the model=", lambda: clars.track_parts("microbatch"))
    model = sharded(model_of())
    clars = fused_opt.CLARS(model.parameters(), lr=0.1)
    raises(
        ValueError, "of a sample's gradient every process has a part", lambda: clars.track_parts("sample", model=model)
    )


def check_zero_redundancy_optimizer(rank, world):
    """Every process steps the parameters that it owns."""
    for name in ("SGD", "AdamW"):
        options = {"lr": 0.1, "weight_decay": 0.1}
        plain, model = model_of(), model_of()
        optimizer = getattr(fused_opt, name)(plain.parameters(), **options)
        zero = ZeroRedundancyOptimizer(model.parameters(), getattr(fused_opt, name), **options)
        for step in range(3):
            for net, of in ((plain, optimizer), (model, zero)):
                net(batch(step)).square().mean().backward()
                of.step()
                of.zero_grad()
        assert_models_alike(model, plain, 0)
        zero.consolidate_state_dict(to=0)
        if rank == 0:
            optimizer.load_state_dict(zero.state_dict())
    for name, refused in {"max_grad_norm": 1.0, "nonfinite": "skip", "noise": fused_opt.WeightNoise(std=0.1)}.items():
        make = partial(ZeroRedundancyOptimizer, model.parameters(), fused_opt.AdamW, lr=0.1, **{name: refused})
        raises(ValueError, f"{name}: ZeroRedundancyOptimizer makes an optimizer of some of the parameters", make)
    zero = ZeroRedundancyOptimizer(model.parameters(), fused_opt.CLARS, lr=0.1)
    raises(ValueError, "ZeroRedundancyOptimizer made", lambda: zero.optim.track_parts("microbatch", model=model))


test_in_processes = in_processes(globals(), 2, 4)
