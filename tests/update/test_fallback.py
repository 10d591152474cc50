"""What steps where no compiled backend can, against torch.optim and against float32."""

import pytest
import torch
from rules import CASES, OF_TORCH
from support.compare import distance
from support.parameters import clones, layouts, set_gradients

import fused_opt
from fused_opt.backends import foreach

wide = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def cases_of(*names):
    return pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] in names], ids=str)


def train(optimizer, parameters, steps=4):
    for step in range(steps):
        set_gradients(parameters, step)
        optimizer.step()


@wide
@cases_of("SGD", "Adam", "AdamW", "RMSprop")
def test_the_bits_are_torchs(name, options, dtype):
    large = torch.nn.Parameter(torch.randn(3, 100_007, dtype=dtype))  # more than is stepped at once
    ours = [*layouts(dtype, chunk=20_000), large]
    theirs = clones(ours)
    optimizer = getattr(fused_opt, name)(ours, backend="foreach", **options)
    train(optimizer, ours)
    train(getattr(torch.optim, name)(theirs, foreach=True, **options), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    set_gradients(theirs, 3)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs))  # torch's own adds to them


@pytest.fixture
def fused_in_32_bits(monkeypatch):
    """The dtypes in which torch's fused steps are right in every version of torch, in the place of 16 bits."""
    monkeypatch.setattr(foreach, "_SIXTEEN_BITS", (torch.float32, torch.float64))
    monkeypatch.setattr(foreach, "fused_in_16_bits", lambda rule, device: True)


@wide
@cases_of("SGD", "Adam", "AdamW", "Adagrad")
def test_torchs_fused_steps_are_given_what_torch_gives_them(name, options, dtype, fused_in_32_bits, monkeypatch):
    monkeypatch.setattr(foreach, "step", None)  # operation by operation
    ours = [p for p in layouts(dtype, chunk=300) if p.is_contiguous() or p.ndim == 4]
    theirs = clones(ours)
    train(getattr(fused_opt, name)(ours, backend="foreach", **options), ours)
    train(getattr(torch.optim, name)(theirs, fused=True, **options), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_what_lies_between_the_elements_stays(fused_in_32_bits):
    memory = torch.ones(6)
    p = torch.nn.Parameter(memory[::2])
    p.grad = torch.ones(6)[::2]
    fused_opt.SGD([p], lr=0.5, backend="foreach").step()
    assert memory.tolist() == [0.5, 1.0] * 3


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_decay_where_torchs_fused_steps_have_it_or_not(name, decay, fused_in_32_bits):
    runs = []
    for backend in ("foreach", "reference"):
        runs.append(layouts(chunk=300))
        options = {"lr": 0.1, "weight_decay": 0.5, "decay": decay}
        train(getattr(fused_opt, name)(runs[-1], backend=backend, **options), runs[-1])
    assert distance(*runs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@cases_of(*OF_TORCH)
def test_16_bits_are_float32_rounded_once(name, options, dtype):
    """A step from the same weights and states, some of which have gaps, in float32."""
    ours = layouts(dtype, chunk=3000)
    theirs = clones(ours, torch.float32)
    optimizer = getattr(fused_opt, name)(ours, backend="foreach", **options)
    oracle = getattr(fused_opt, name)(theirs, backend="foreach", **options)
    for step in range(4):
        with torch.no_grad():
            for p, q in zip(ours, theirs):
                q.copy_(p)
                for slot, state in optimizer.state.get(p, {}).items():
                    oracle.state[q][slot].copy_(state)
        set_gradients(ours, step)
        for p, q in zip(ours, theirs):
            q.grad = p.grad.float()
        optimizer.step()
        oracle.step()
        pairs = list(zip(ours, theirs))
        pairs += [(optimizer.state[p][slot], oracle.state[q][slot]) for p, q in pairs for slot in optimizer.state[p]]
        for a, b in pairs:
            if a.dtype == dtype:  # apart by the rounding of float32, which where b is 0 is that of what was subtracted
                once = b.to(dtype).float()
                assert ((a.float() - once).abs() <= torch.finfo(dtype).eps * once.abs() + 1e-6).all()
                assert (a.float() != once).sum() <= 2 + a.numel() // 500
