"""Muon in programs: products that raise, GradScaler, closures, hooks, multipliers, gradients that are not there."""

import pytest
import torch
from support.compare import assert_same, unchanged
from support.models import plain
from support.parameters import parameters_of, set_gradients

import fused_opt
from fused_opt.balance import TempBalance

SHAPES = [(3,), (8, 8), (8, 8), (7, 13), (4, 3, 2, 2)]


def muon(backend, dtype=torch.float32, groups=lambda parameters: parameters, **options):
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    return fused_opt.Muon(groups(parameters), lr=0.02, backend=backend, **options)


def train(optimizer, *seeds):
    for seed in seeds:
        set_gradients(parameters_of(optimizer), seed)
        optimizer.step()


def raise_in_second_product(monkeypatch, error):
    """Where the matrices of the first shape are multiplied, and those of the second are not."""
    made, norm = [], torch.linalg.vector_norm

    def few(*args, **kwargs):
        made.append(args)
        if len(made) == 2:
            raise error
        return norm(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "vector_norm", few)


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_products_that_raise_change_nothing(steps_before, error, backend, monkeypatch):
    """AdamW's parameters come first, so that they would have been stepped; momenta of 16 bits are rounded at random."""
    options = {
        "groups": lambda found: [{"params": found[:1], "use_muon": False}, {"params": found[1:]}],
        "state_dtype": {"momentum_buffer": torch.bfloat16},
        "rounding": "stochastic",
        "averaging": fused_opt.EMA(0.5),
    }
    optimizer, undisturbed = (muon(backend, **options) for _ in range(2))
    train(optimizer, *range(steps_before))
    set_gradients(parameters_of(optimizer), steps_before)
    with monkeypatch.context() as patched:
        raise_in_second_product(patched, error)
        with unchanged(optimizer), pytest.raises(error):
            optimizer.step()
    optimizer.step()
    train(optimizer, steps_before + 1)
    train(undisturbed, *range(steps_before + 2))
    assert_same(optimizer, undisturbed, bound=0)


def test_a_grad_scaler(backend):
    """By a power of two: the bits of steps without it; an infinity is no step, whoever unscales."""
    optimizer, unscaled = muon(backend), muon(backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    scaler.scale(torch.ones(()))
    for seed, unscale, infinite in ((0, False, False), (1, True, False), (7, False, True), (2, True, False)):
        set_gradients(parameters_of(optimizer), seed)
        for p in parameters_of(optimizer):
            p.grad *= scaler.get_scale()
        if infinite:
            parameters_of(optimizer)[1].grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if not infinite:
            train(unscaled, seed)
        assert_same(optimizer, unscaled, bound=0)


def test_closures_and_hooks(backend):
    optimizer, plainly = muon(backend), muon(backend)
    log = []

    def closure():
        set_gradients(parameters_of(optimizer), len(log))
        assert torch.is_grad_enabled()
        return "loss"

    def closure_that_raises():
        raise KeyError("in a closure")

    with unchanged(optimizer), pytest.raises(KeyError):
        optimizer.step(closure_that_raises)
    assert optimizer.step(closure) == "loss"
    optimizer.register_step_pre_hook(lambda *_: log.append(parameters_of(optimizer)[0].detach().clone()))
    optimizer.register_step_post_hook(lambda *_: log.append(parameters_of(optimizer)[0].detach().clone()))
    train(plainly, 0)
    before = parameters_of(plainly)[0].detach().clone()
    assert optimizer.step(closure) == "loss"
    train(plainly, 1)  # the closure runs after the first hook
    assert torch.equal(log[0], before)
    assert torch.equal(log[1], parameters_of(plainly)[0])
    assert_same(optimizer, plainly, bound=0)

    def hook_that_raises(*_):
        raise KeyError("in a hook")

    handle = optimizer.register_step_pre_hook(hook_that_raises)
    with unchanged(optimizer), pytest.raises(KeyError):
        optimizer.step()
    handle.remove()
    train(optimizer, 5)
    train(plainly, 5)
    assert_same(optimizer, plainly, bound=0)


def test_multipliers_of_temp_balance(backend):
    """Of a matrix and of the bias beside it, which AdamW steps: what scale_layers makes of the same numbers."""
    found = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model = plain()
        optimizer = fused_opt.Muon(model.parameters(), lr=0.02, backend=backend)
        balance = TempBalance(model, fused_opt.SGD(model.parameters(), lr=1.0) if by_hand else optimizer)
        balance.step()
        multipliers = balance.multipliers
        assert len(set(multipliers.values())) > 2
        if by_hand:
            optimizer.scale_layers(lr={p: multipliers.get(name, 1.0) for name, p in model.named_parameters()})
        train(optimizer, 0, 1)
        found.append(optimizer)
    assert_same(*found, bound=0)


def test_gradients_that_are_not_there(backend):
    """A matrix without one stays, without a state; in its first step it is stepped as in any first step."""
    optimizer, complete = muon(backend), muon(backend)
    ours = parameters_of(optimizer)
    late = ours[1]
    start = late.detach().clone()
    optimizer.step()
    assert not optimizer.state
    for seed in range(2):
        set_gradients(ours, seed)
        late.grad = None
        optimizer.step()
    assert torch.equal(late, start)
    assert "momentum_buffer" not in optimizer.state.get(late, {})
    set_gradients(ours, 0)
    kept = {p: p.detach().clone() for p in ours}
    for p in ours:
        if p is not late:
            p.grad = None
    optimizer.step()
    train(complete, 0)
    assert torch.equal(late, parameters_of(complete)[1])
    assert all(torch.equal(p, value) for p, value in kept.items() if p is not late)
