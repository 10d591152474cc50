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
    if "nesterov" in options:  # it moves twice
        assert distance(ours, theirs) < 4 * torch.finfo(dtype).eps
    else:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    set_gradients(theirs, 3)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs))  # torch's own adds to them


@pytest.fixture
def fused_in_32_bits(monkeypatch):
    """The dtypes in which torch's fused steps are right in every version of torch, in the place of 16 bits."""
    monkeypatch.setattr(foreach, "SIXTEEN_BITS", (torch.float32, torch.float64))
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


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam"])
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_decay_where_torchs_fused_steps_have_it_or_not(name, decay, fused_in_32_bits):
    runs = []
    for backend in ("foreach", "reference"):
        runs.append(layouts(chunk=300))
        options = {"lr": 0.1, "weight_decay": 0.5, "decay": decay}
        train(getattr(fused_opt, name)(runs[-1], backend=backend, **options), runs[-1])
    assert distance(*runs) < 1e-6


def rounds_often(name, options, dtype):
    """Whether it is stepped by 16-bit operations."""
    if name == "SGD":
        return torch.__version__ < "2.14" and len(options) > 1  # what one operation does is rounded once
    return dtype == torch.bfloat16 and (name == "Adamax" or not options.keys().isdisjoint({"centered", "momentum"}))


of_torch_in_16_bits = [
    (name, options, dtype) for name, options in CASES for dtype in (torch.bfloat16, torch.float16) if name in OF_TORCH
]
often = [case for case in of_torch_in_16_bits if rounds_often(*case)]
once = [case for case in of_torch_in_16_bits if not rounds_often(*case)]
# By operations torch.optim would round a decay away that it does not add to the gradient, and what a limit leaves of one.
once += [
    (name, {"lr": 0.1, "weight_decay": 0.1, **more}, dtype)
    for name in ("SGD", "Adamax", "RMSprop", "NAdam", "RAdam")
    for more in ({"decay": "decoupled"}, {"decay": "decoupled", "max_grad_norm": 1.0})
    for dtype in (torch.bfloat16, torch.float16)
]


def steps_from_the_same_place(optimizer, *others, steps=4):
    """Four steps, each from the weights and states that the first optimizer has, some of which have gaps."""
    for step in range(steps):
        parameters = optimizer.param_groups[0]["params"]
        set_gradients(parameters, step)
        for other in others:
            for p, q in zip(parameters, other.param_groups[0]["params"]):
                q.grad = p.grad.to(q.dtype, copy=True)
                with torch.no_grad():
                    q.copy_(p)
                    for slot, state in optimizer.state.get(p, {}).items():
                        other.state[q][slot].copy_(state)
            other.step()
        optimizer.step()
        yield step


def tensors_of(optimizer):
    """Its parameters and its states of as many elements."""
    parameters = optimizer.param_groups[0]["params"]
    states = [state for p in parameters for state in optimizer.state[p].values() if state.shape == p.shape and p.ndim]
    return parameters + states


@pytest.mark.parametrize(("name", "options", "dtype"), once, ids=str)
def test_16_bits_are_float32_rounded_once(name, options, dtype):
    ours = layouts(dtype, chunk=3000)
    optimizer, oracle = (
        getattr(fused_opt, name)(parameters, backend="foreach", **options)
        for parameters in (ours, clones(ours, torch.float32))
    )
    for _ in steps_from_the_same_place(optimizer, oracle):
        for a, b in zip(tensors_of(optimizer), tensors_of(oracle)):
            rounded = b.to(dtype).float()  # apart by the rounding of float32, which at 0 is that of what was subtracted
            assert ((a.float() - rounded).abs() <= torch.finfo(dtype).eps * rounded.abs() + 1e-6).all()
            assert (a.float() != rounded).sum() <= 2 + a.numel() // 500


@pytest.mark.parametrize(("name", "options", "dtype"), often, ids=str)
def test_16_bit_operations_are_as_near_to_float32_as_torchs(name, options, dtype):
    ours = layouts(dtype, chunk=3000)
    optimizer = getattr(fused_opt, name)(ours, backend="foreach", **options)
    exact = getattr(fused_opt, name)(clones(ours, torch.float32), backend="reference", **options)
    theirs = getattr(torch.optim, name)(clones(ours), foreach=True, **options)
    for _ in steps_from_the_same_place(optimizer, exact, theirs):
        off = [0.0, 0.0]
        for of_each in zip(*map(tensors_of, (optimizer, theirs, exact))):
            for place in (0, 1):
                off[place] += (of_each[place].double() - of_each[2].double()).abs().sum().item()
        assert 0 < off[0] <= 1.01 * off[1]


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [(name, options, torch.float32) for name, options, dtype in of_torch_in_16_bits if dtype == torch.float16] + often,
    ids=str,
)
def test_how_long_the_lists_are_changes_no_bit(name, options, dtype, monkeypatch):
    runs = []
    for most, longest in ((1 << 18, 1 << 22), (1000, 5000), (7, 10_000)):
        monkeypatch.setattr(foreach, "_MOST_ON_CPU", most)
        monkeypatch.setattr(foreach, "_LONGEST_ON_CPU", longest)
        runs.append(layouts(dtype, chunk=3000))
        train(getattr(fused_opt, name)(runs[-1], backend="foreach", **options), runs[-1])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*runs))
