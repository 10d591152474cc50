"""The weights' norms that are carried from step to step, and every write that makes them stale."""

import pytest
import torch
from support.parameters import clones, layouts, set_gradients
from support.ratios import BOUND, lars, randn, ratios_of
from support.threads import threads as threads_set_to

import fused_opt
from fused_opt import LARS, SGD, TrustRatio


def train_with(optimizer, parameters, steps, forget=False, first=0):
    """Every step's ratios; `forget` makes the optimizer plan anew, so that it cannot have carried anything."""
    found = []
    for step in range(first, first + steps):
        set_gradients(parameters, step)
        if forget:
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        found.append(ratios_of(optimizer))
    return found


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_carried_norms_are_the_recomputed_ones_bit_for_bit(threads, dtype, every_kernel):
    with threads_set_to(threads):
        results = []
        for forget in (False, True):
            parameters = layouts(dtype, chunk=30000 if threads > 1 and every_kernel == "native" else 300)
            optimizer = LARS(parameters, lr=0.3, coefficient=0.1, exempt=-1, momentum=0.9, backend=every_kernel)
            results.append((train_with(optimizer, parameters, 4, forget), parameters))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def load(p, optimizer):
    layer = torch.nn.Linear(4, 3, bias=False)
    layer.weight = p
    layer.load_state_dict({"weight": 2 * p.detach()})


def load_into_the_optimizer(p, optimizer):
    p.data.mul_(2)
    optimizer.load_state_dict(optimizer.state_dict())


@torch.no_grad()
def no_grad(write):
    write()


WRITES = {
    "add_": lambda p, o: no_grad(lambda: p.add_(p.clone())),
    "copy_": lambda p, o: no_grad(lambda: p.copy_(2 * p)),
    "one element": lambda p, o: no_grad(lambda: p[1].mul_(9.0)),
    "through a view": lambda p, o: no_grad(lambda: p.view(-1)[3:].mul_(2.0)),
    "inference_mode": lambda p, o: torch.inference_mode()(lambda: p.mul_(2))(),
    "detach": lambda p, o: p.detach().mul_(2),
    "vector_to_parameters": lambda p, o: torch.nn.utils.vector_to_parameters(2 * p.detach().flatten(), [p]),
    "nn.init": lambda p, o: torch.nn.init.constant_(p, 2.0),
    "module.load_state_dict": load,
    "optimizer.load_state_dict": load_into_the_optimizer,
    "p.data =": lambda p, o: setattr(p, "data", 2 * p.data),
    "foreach": lambda p, o: no_grad(lambda: torch._foreach_mul_([p], 2.0)),
    "another optimizer": lambda p, o: SGD([p], lr=5.0).step(),
    "averaged_weights": lambda p, o: None,
    "the ratio was off for a step": None,
    "no gradient for a step": None,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_visible_write_is_noticed_by_the_next_step(name, backend):
    p, other = (torch.nn.Parameter(randn(3, 4, seed=seed).float()) for seed in (0, 1))
    ratio = TrustRatio("lars", coefficient=0.1)
    optimizer = SGD([p, other], lr=0.7, momentum=0.9, trust_ratio=ratio, backend=backend)
    for step in range(3):
        set_gradients([p, other], step)
        optimizer.step()
    if name == "the ratio was off for a step":
        optimizer.param_groups[0]["trust_ratio"] = None
        optimizer.step()
        optimizer.param_groups[0]["trust_ratio"] = ratio
    elif name == "no gradient for a step":
        p.grad = None
        optimizer.step()
        with torch.no_grad():
            p.mul_(2)
    else:
        WRITES[name](p, optimizer)
    set_gradients([p, other], 3)
    expected = [lars(q, q.grad, 0.0, 0.1) for q in (p, other)]
    optimizer.step()
    assert ratios_of(optimizer) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_an_invisible_write_is_missed_for_one_step_at_most(every, backend):
    """The step after a write through p.data sums what it stores; also where a parameter has a gradient now and then."""
    p, other = (torch.nn.Parameter(randn(3, 4, seed=seed)) for seed in (0, 1))
    optimizer = LARS([("p", p), ("other", other)], lr=1e-12, coefficient=0.1, weight_decay=0.0, backend=backend)
    missed = []
    for step in range(24):
        set_gradients([p, other], 0)
        gradient = p.grad
        if step == 7:
            p.data.mul_(2)
        if step % every:
            p.grad = None
        optimizer.step()
        if step % every == 0 and optimizer.trust_ratios()["p"] != pytest.approx(lars(p, gradient, 0.0, 0.1), rel=1e-9):
            missed.append(step)
    assert missed in ([], [next(step for step in range(7, 24) if step % every == 0)])


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_invisible_writes_after_every_step_are_noticed(name, every_kernel):
    """The step that finds other weights than those whose norm it was given is the last that is given one."""
    p, q = (torch.nn.Parameter(randn(70, 300).float()) for _ in range(2))
    ours, theirs = (
        getattr(fused_opt, name)([("p", parameter)], lr=0.5, coefficient=0.1, backend=backend)
        for parameter, backend in ((p, every_kernel), (q, "reference"))
    )
    wrong = []
    for step in range(6):
        for parameter, optimizer in ((p, ours), (q, theirs)):
            set_gradients([parameter], step)
            optimizer.step()
            parameter.data.clamp_(-0.01, 0.01)
        if ours.trust_ratios()["p"] != pytest.approx(theirs.trust_ratios()["p"], rel=1e-4):
            wrong.append(step)
        q.data.copy_(p.data)
    assert wrong == ([] if every_kernel in ("reference", "foreach") else [1])


def test_noise_and_averages_leave_the_norm_of_what_was_stored(every_kernel):
    """bfloat16: what is summed is what was rounded."""
    results = []
    for forget in (False, True):
        parameters = layouts(torch.bfloat16, chunk=300)
        optimizer = LARS(
            parameters, lr=0.3, coefficient=0.1, noise=fused_opt.WeightNoise(std=0.1, relative=True),
            averaging=fused_opt.PSWA(period=2), backend=every_kernel,
        )  # fmt: skip
        results.append((train_with(optimizer, parameters, 5, forget), parameters))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_the_carried_norm_is_that_of_the_weights(every_kernel):
    """The ratio after ten steps that carried, against the weights themselves."""
    parameters = [torch.nn.Parameter(randn(70, 900).float())]
    optimizer = LARS(parameters, lr=0.3, coefficient=0.1, weight_decay=0.0, backend=every_kernel)
    train_with(optimizer, parameters, 10)
    w = clones(parameters)[0]
    set_gradients(parameters, 11)
    optimizer.step()
    assert ratios_of(optimizer)[0] == pytest.approx(lars(w, parameters[0].grad, 0.0, 0.1), rel=1e-12)
