"""Under a GradScaler, as torch.optim's own."""

import copy

import pytest
import torch
from rules import both_kinds
from support.compare import assert_close, assert_same, same_bits, unchanged
from support.kernels import as_on_a_gpu
from support.parameters import pair, parameters_of, set_gradients, train_both

import fused_opt


def amp_step(optimizer, scaler, seed, bad=False, unscale=False):
    """Gradients as a scaled loss would leave them, and one step under the scaler."""
    parameters = parameters_of(optimizer)
    scale = scaler.scale(torch.ones(())).item()
    set_gradients(parameters, seed)
    for p in parameters:
        p.grad.mul_(scale)
    if bad:
        parameters[0].grad.view(-1)[-1] = float(bad)
    if unscale:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    kept = [p.grad.clone() for p in parameters]
    scaler.step(optimizer)
    if optimizer.defaults["fused"] and isinstance(optimizer, fused_opt.FusedOptimizer):
        for p, gradient in zip(parameters, kept):
            assert torch.equal(p.grad.nan_to_num(7), gradient.nan_to_num(7))
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled before"])
@pytest.mark.parametrize("bad", ["inf", "nan"])
@pytest.mark.parametrize("fused", [None, True])
@both_kinds
def test_grad_scaler(name, options, fused, bad, unscale, backend):
    optimizer, oracle = pair(name, options, backend)
    optimizer.defaults["fused"] = fused  # not torch's, which creates states in a step that overflows
    scales = []
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    for step, overflows in enumerate([True, False, False, True, False, False]):
        for each, scaler in zip((optimizer, oracle), scalers):
            amp_step(each, scaler, step, bad if overflows else False, unscale)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        scales.append(scalers[0].get_scale())
        if step == 0:  # an overflow on the very first step: no state, no count
            assert not optimizer.state
        assert_same(optimizer, oracle)
    assert scales == [512.0, 512.0, 1024.0, 512.0, 512.0, 1024.0]


@pytest.mark.parametrize("fused", [None, False])
@both_kinds
def test_without_fused_the_scaler_unscales(name, options, fused, backend):
    """Then gradients are what a program that clips between unscale_ and step takes them for, as in torch.optim."""
    optimizer, oracle = pair(name, {**options, "fused": fused, "foreach": None}, backend)
    for each in (optimizer, oracle):
        parameters, scaler = parameters_of(each), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        assert scaler.scale(torch.ones(())) == 1024
        set_gradients(parameters, 0)
        expected = [p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad.mul_(1024)
        scaler.step(each)
        assert_close([p.grad for p in parameters], expected, bound=0)
    assert not optimizer._step_supports_amp_scaling
    assert not copy.deepcopy(optimizer)._step_supports_amp_scaling
    assert_same(optimizer, oracle)


@both_kinds
def test_an_overflow_leaves_no_trace(name, options, backend):
    optimizer, _ = pair(name, {**options, "fused": True}, backend)
    fresh, _ = pair(name, {**options, "fused": True}, backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    amp_step(optimizer, scaler, 0, bad="inf")
    optimizer.zero_grad()
    same_bits(optimizer, fresh)
    train_both(optimizer, fresh)
    same_bits(optimizer, fresh)
    if as_on_a_gpu():
        return  # where one is left: see test_cuda.py
    with unchanged(optimizer):
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()


@both_kinds
def test_grad_scale_and_found_inf_as_the_scaler_sets_them(name, options, backend):
    optimizer, oracle = pair(name, {**options, "fused": True}, backend)
    assert optimizer._step_supports_amp_scaling
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for step in range(3):
        for each, factor in ((optimizer, 8.0), (oracle, 1.0)):
            set_gradients(parameters_of(each), step)
            for p in parameters_of(each):
                p.grad.mul_(factor)
            each.step()
    assert_same(optimizer, oracle)


def test_a_scaler_that_comes_after_steps_without_one(backend):
    p = torch.nn.Parameter(torch.full((3,), 4.0))
    optimizer = fused_opt.SGD([p], lr=0.5, backend=backend)
    for scale, found_inf in [(None, None)] * 4 + [(2.0, 0.0), (8.0, 0.0), (8.0, 1.0)]:
        if scale is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found_inf)
        p.grad = torch.full((3,), scale or 1.0)
        optimizer.step()
    assert p.tolist() == [1.0] * 3  # of 4, six steps of 0.5


def test_gradients_are_unscaled_in_float32(backend):
    """In float16 the unscaled gradient would be 0."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = fused_opt.SGD([p], lr=1.0, momentum=0.9, state_dtype=torch.float32, backend=backend)
    p.grad = torch.full((3,), 2.0**-10, dtype=torch.float16)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**16), torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full((3,), 2.0**-26))


def test_a_disabled_scaler(backend):
    optimizer, oracle = pair("AdamW", {}, backend)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(2):
        for each in (optimizer, oracle):
            set_gradients(parameters_of(each), step)
            scaler.step(each)
    assert_same(optimizer, oracle)
