"""Counts, sizes and runs beyond those of other tests: quick ones here, and long ones of the same kind with `make long`."""

import gc
import itertools
import os
import sys
import tracemalloc

import pytest
import torch
from rules import both_kinds
from support.compare import assert_close
from support.kernels import as_on_a_gpu
from support.parameters import set_gradients

import fused_opt
from fused_opt.rule import Rule


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize("before", [2**24 - 2, 2**31 - 2, 2**32 - 2])
def test_counts_of_steps_that_float32_does_not_have(before, backend):
    """Both counts stop at 2**24, where a bias correction has been 1 for long; in checkpoints from elsewhere they go on."""
    runs = []
    for module, extra in ((fused_opt, {"backend": backend}), (torch.optim, {"foreach": False})):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = module.AdamW([p], lr=0.1, **extra)
        for step in range(5):
            p.grad = torch.full((3,), 1.0 + step)
            optimizer.step()
            if step == 0:
                optimizer.state[p]["step"].fill_(before)
        runs.append((p, optimizer.state[p]))
    assert_close(*runs, bound=1e-6)
    assert runs[0][1]["step"] == (2**24 if before < 2**24 else before + 2)


def test_counts_in_the_groups_go_on(backend):
    counts, kinds = (2**24 - 1, 2**31 - 1, 2**32 - 1, 2**53, 2**63 - 2, 2**70), ("PSWA", "PSWM")
    for before, kind in itertools.product(counts, kinds):  # of both: draws one by one, and of a period
        p = torch.nn.Parameter(torch.ones(3))
        options = {"beta": 0.5} if kind == "PSWM" else {}
        averaging = getattr(fused_opt, kind)(period=4, probability=0.5, **options)
        optimizer = fused_opt.SGD([p], noise=fused_opt.WeightNoise(std=0.1), averaging=averaging, backend=backend)
        optimizer.param_groups[0]["steps"] = before
        for step in range(1, 4):
            p.grad = torch.ones(3)
            optimizer.step()
            assert optimizer.param_groups[0]["steps"] == before + step
        assert p.isfinite().all()


@pytest.mark.parametrize("count", [500, long(100_000)])
@both_kinds
def test_many_parameters(name, options, count, backend):
    runs = []
    for module, extra in ((fused_opt, {"backend": backend}), (torch.optim, {"foreach": False})):
        values = torch.linspace(-1, 1, 3 * count, dtype=torch.float64).view(count, 3)
        parameters = [torch.nn.Parameter(row.clone()) for row in values]
        optimizer = getattr(module, name)(parameters, **options, **extra)
        for step in range(2):
            set_gradients(parameters[step:], step)
            optimizer.step()
        runs.append(torch.stack(parameters))
    assert_close(*runs)


@pytest.mark.parametrize("count", [300, long(30_000)])
def test_many_counts_of_steps(count, backend, monkeypatch):
    """A third as many as parameters; the numbers of each are computed once in a step, at most."""
    runs, calls, numbers = [], [], Rule.at
    monkeypatch.setattr(Rule, "at", lambda *args: calls.append(args) or numbers(*args))
    for module, extra in ((fused_opt, {"backend": backend}), (torch.optim, {"foreach": False})):
        parameters = [torch.nn.Parameter(row) for row in torch.ones(count, 3, dtype=torch.float64)]
        optimizer = module.AdamW(parameters, lr=0.1, **extra)
        for step in range(3):
            if step == 1:
                for k, p in enumerate(parameters):
                    optimizer.state[p]["step"].fill_(1 + k % (count // 3))
                calls.clear()
            set_gradients(parameters, step)
            optimizer.step()
        runs.append((torch.stack(parameters), [optimizer.state[p]["step"].item() for p in parameters]))
        if module is fused_opt:
            needed = 1 if as_on_a_gpu() else 2 * (count // 3)  # a GPU counts by itself, and is told the same again
            assert 0 <= len(calls) - needed <= 2  # once more where a plan is made
    assert_close(*runs)


@pytest.mark.parametrize("count", [200, long(10_000)])
@both_kinds
def test_many_groups(name, options, count, backend):
    """Beside torch's, of 500 groups each: it compares each group with all parameters before it."""
    runs = []
    for module, extra, most in ((fused_opt, {"backend": backend}, count), (torch.optim, {"foreach": False}, 500)):
        parameters = [torch.nn.Parameter(torch.full((3,), 1.0, dtype=torch.float64)) for _ in range(count)]
        groups = [{"params": [p], "lr": 1 / (k + 1), "weight_decay": k / count} for k, p in enumerate(parameters)]
        make = getattr(module, name)
        optimizers = [make(groups[k : k + most], **{**options, **extra}) for k in range(0, count, most)]
        for step in range(3):
            set_gradients(parameters, step)
            for optimizer in optimizers:
                optimizer.step()
        runs.append(torch.stack(parameters))
    assert_close(*runs)


@pytest.mark.parametrize("name", ["SGD", "Muon"])
def test_groups_are_made_in_linear_time(name, monkeypatch):
    """Twice as many groups hash twice as many parameters; torch's constructor four times as many."""
    hashed, plainly = [], torch.Tensor.__hash__
    monkeypatch.setattr(torch.Tensor, "__hash__", lambda self: hashed.append(self) or plainly(self))
    counts = []
    for count in (40, 80):
        groups = [{"params": [torch.nn.Parameter(torch.ones(2, 2))]} for _ in range(count)]
        hashed.clear()
        optimizer = getattr(fused_opt, name)(groups, lr=0.1)
        counts.append(len(hashed))
        assert [group["params"] for group in optimizer.param_groups] == [group["params"] for group in groups]
    assert 0 < counts[1] < 3 * counts[0]


@pytest.mark.parametrize("count", [100_003, long(2**31 + 100_003)])
def test_more_elements_than_an_int_counts(count, backend):
    """9 GB in bfloat16."""
    if backend == "reference" and count > 2**31:
        pytest.skip("it computes in float32, and would take four times as much")
    places = [k for k in (0, 1, count // 2, 2**31 - 1, 2**31, 2**31 + 1, count - 2, count - 1) if k < count]
    p = torch.nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
    p.grad = torch.zeros(count, dtype=torch.bfloat16)
    p.grad[places] = torch.arange(1, len(places) + 1).bfloat16()
    expected = -p.grad[places]
    fused_opt.SGD([p], lr=1.0, backend=backend).step()
    assert torch.equal(p[places], expected)
    assert sum(piece.count_nonzero().item() for piece in p.detach().split(2**24)) == len(places)


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("steps", [500, long(1_000_000)])
@both_kinds
def test_memory_does_not_grow(name, options, steps, backend):
    """With all that a step can do, new gradients each time, and a plan made anew now and then."""
    if backend == "reference":
        pytest.skip("it keeps nothing, and takes its time")
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (3, 40)]
    extras = {
        "noise": fused_opt.WeightNoise(std=1e-4, schedule="decay"),
        "averaging": fused_opt.PSWM(period=7, beta=0.5),
        "trust_ratio": fused_opt.TrustRatio("lars", exempt=-1),
        "max_grad_norm": 1.0,
        "nonfinite": "skip",
    }
    optimizer = getattr(fused_opt, name)(parameters, backend=backend, **options, **extras)

    def train(count):
        for step in range(count):
            for p in parameters:
                p.grad = torch.full_like(p, (-1.0) ** step)  # weights that a ratio multiplies stay finite
            if step % 10 == 0:
                parameters[0].data = parameters[0].data.clone()
            if step % 11 == 0:
                parameters[1].grad[0] = torch.nan
            optimizer.step()
        gc.collect()
        sys._clear_type_cache()  # it keeps up to 4,096 of the names that C++ asked for

    train(100)
    before = resident()
    tracemalloc.start()
    train(100)
    python = tracemalloc.get_traced_memory()[0]
    train(min(steps, 10_000))
    assert tracemalloc.get_traced_memory()[0] - python < 25_000  # less than a small object a step
    tracemalloc.stop()  # it takes more time than a step
    train(steps)
    assert resident() - before < 2**23
