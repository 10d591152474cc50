"""A step or a load that raises leaves everything as it was, and what it needs it makes where it belongs."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from support.compare import assert_same, unchanged

import fused_opt
from fused_opt.warn import FusedOptWarning


def pair_of(backend, **options):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return p, fused_opt.SGD([p], lr=0.1, backend=backend, **options)


def test_states_of_a_step_that_raises_are_not_there(backend, monkeypatch):
    p, optimizer = pair_of(backend, momentum=0.9, dampening=0.5, noise=fused_opt.WeightNoise(temperature=1.0))
    optimizer.param_groups[0]["lr"] = -1.0
    with unchanged(optimizer), pytest.raises(ValueError, match=r"Invalid learning rate: -1\.0"):
        optimizer.step()
    optimizer.param_groups[0].update(lr=0.1, noise=None)

    def no_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("fused_opt.plan.Plan.run", no_memory)
        with unchanged(optimizer), pytest.raises(MemoryError):
            optimizer.step()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))  # a first step is not dampened


def test_states_go_where_memory_ends_between_them(backend, monkeypatch):
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = fused_opt.AdamW(parameters, lr=0.1, backend=backend)
    for p in parameters:
        p.grad = torch.ones(3)
    made, full_like = [], torch.full_like

    def few(*args, **kwargs):
        made.append(args)
        if len(made) == 3:
            raise MemoryError
        return full_like(*args, **kwargs)

    monkeypatch.setattr(torch, "full_like", few)
    with unchanged(optimizer), pytest.raises(MemoryError):
        optimizer.step()
    monkeypatch.undo()
    assert not optimizer.state


@pytest.mark.parametrize("entry", [{}, {"momentum_buffer": None}, {"mine": 1}], ids=str)
def test_an_entry_that_was_there_stays(entry, backend):
    p, optimizer = pair_of(backend, momentum=0.9, nonfinite="raise")
    optimizer.state[p] = entry
    p.grad[0] = torch.nan
    with unchanged(optimizer), pytest.raises(RuntimeError, match="parameter 0 of group 0"):
        optimizer.step()
    assert optimizer.state[p] is entry


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_states_of_a_step_that_is_not_made_are_not_there(nonfinite, backend):
    p, optimizer = pair_of(backend, momentum=0.9, nonfinite=nonfinite)
    p.grad[0] = torch.nan
    with nullcontext() if nonfinite == "skip" else pytest.raises(RuntimeError, match="parameter 0 of group 0"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_default_device_is_not_the_parameters(name, backend):
    p = torch.nn.Parameter(torch.ones(3))
    options = {"momentum": 0.9} if name == "SGD" else {"averaging": fused_opt.PSWA(3, probability=0.5)}
    optimizer = getattr(fused_opt, name)([p], lr=0.1, backend=backend, max_grad_norm=1e9, **options)
    with torch.device("meta"):
        for _ in range(2):
            p.grad = torch.ones(3, device="cpu")
            optimizer.step()
    assert p[0].item() == pytest.approx(0.71 if name == "SGD" else 0.7980, abs=1e-3)
    assert {state.device.type for state in optimizer.state[p].values()} == {"cpu"}


def test_a_first_step_within_inference_mode(backend):
    p, optimizer = pair_of(backend, momentum=0.9)
    with torch.inference_mode():
        optimizer.step()
    p.grad = torch.ones(3)
    optimizer.step()
    assert p[0].item() == pytest.approx(0.71)


def test_a_load_that_raises_changes_nothing(backend):
    _, optimizer = pair_of(backend, momentum=0.9, averaging=fused_opt.EMA(0.5))
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    for key, value, words in (
        ("averaging", "WeightNoise {}", "Invalid averaging in the state_dict"),
        ("averaging", "EMA nonsense", "Invalid averaging in the state_dict"),
        ("nonfinite", "bogus", "Invalid nonfinite: 'bogus'"),
        ("max_grad_norm", -1, "Invalid max_grad_norm"),
        ("momentum", -1.0, "Invalid momentum"),
        ("steps", "many", "Invalid steps in the state_dict"),
        ("lr", -0.7, "Invalid learning rate"),
    ):
        bad = copy.deepcopy(good)
        bad["param_groups"][0] |= {"lr": 0.7, key: value}
        with unchanged(optimizer), pytest.raises((ValueError, TypeError), match=words):
            optimizer.load_state_dict(bad)
        optimizer.step()


def test_what_the_program_asked_for_stays_through_a_load(backend, monkeypatch):
    monkeypatch.setattr("fused_opt.warn._said", set())
    _, saved = pair_of(backend, averaging=fused_opt.EMA(0.9))
    saved.step()
    asked = {"averaging": fused_opt.EMA(0.999), "max_grad_norm": 2.0, "nonfinite": "skip"}
    _, optimizer = pair_of(backend, **asked)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(saved.state_dict())
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in asked} == asked
    assert (group["steps"], group["samples"]) == (1, 1)  # an EMA goes on as one
    (found,) = [one for one in caught if issubclass(one.category, FusedOptWarning)]
    for word in ("EMA(start=0", "beta=0.999", "beta=0.9,", "max_grad_norm=2.0 here and None there", "'skip'"):
        assert word in str(found.message)
    assert found.filename == __file__


def test_where_the_program_asked_for_nothing_settings_come_along(backend):
    _, clars = pair_of(backend, trust_ratio=fused_opt.TrustRatio("clars"))
    _, optimizer = pair_of(backend)
    optimizer.load_state_dict(clars.state_dict())
    assert optimizer.param_groups[0]["trust_ratio"] == fused_opt.TrustRatio("clars")


def test_averages_of_another_kind_begin_anew(backend):
    _, saved = pair_of(backend, averaging=fused_opt.EMA(0.9))
    saved.step()
    q, optimizer = pair_of(backend, averaging=fused_opt.PSWA(period=3))
    optimizer.load_state_dict(saved.state_dict())
    assert [optimizer.param_groups[0][count] for count in ("steps", "samples", "periods")] == [1, 0, 0]
    assert "average" not in optimizer.state.get(q, {})


def test_a_loaded_state_is_a_copy(backend):
    p, first = pair_of(backend, momentum=0.9)
    first.step()
    q, second = pair_of(backend, momentum=0.9)
    second.load_state_dict(first.state_dict())
    before = first.state[p]["momentum_buffer"].clone()
    q.grad = torch.full((3,), 5.0)
    second.step()
    assert torch.equal(first.state[p]["momentum_buffer"], before)


@pytest.mark.parametrize(("name", "made", "saved"), [("SGD", {}, {"momentum": 0.9}), ("AdamW", {}, {"amsgrad": True})])
def test_states_are_judged_by_the_settings_that_come_with_them(name, made, saved, backend):
    def optimizer_of(options):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 1000).bfloat16())
        return p, getattr(fused_opt, name)([p], lr=0.1, state_dtype=torch.float32, backend=backend, **options)

    def train(p, optimizer, steps):
        for step in steps:
            p.grad = torch.linspace(1, 2 + step, 1000).bfloat16()
            optimizer.step()

    (p, straight), (q, resumed) = optimizer_of(saved), optimizer_of(made)
    train(p, straight, range(3))
    q.data.copy_(p)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    train(p, straight, range(3, 6))
    train(q, resumed, range(3, 6))
    assert_same(resumed, straight, 0)
    bad = copy.deepcopy(straight.state_dict())
    slot = "momentum_buffer" if name == "SGD" else "max_exp_avg_sq"
    bad["state"][0][slot] = torch.zeros(7)
    with pytest.raises(ValueError, match=f"state '{slot}' of parameter 0 of group 0 has shape"):
        optimizer_of(made)[1].load_state_dict(bad)


def test_averages_that_cannot_be_taken_out_of_one_parameter_leave_the_others(backend, monkeypatch):
    parameters = [torch.nn.Parameter(torch.full((2,), float(i))) for i in range(3)]
    optimizer = fused_opt.SGD(parameters, lr=1.0, averaging=fused_opt.EMA(0.5), backend=backend)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones(2)
        optimizer.step()
    trained = [p.detach().clone() for p in parameters]
    copy_, left = torch.Tensor.copy_, [1]

    def interrupted(self, *args, **kwargs):
        if self is parameters[0] and left and within:
            left.pop()
            raise KeyboardInterrupt
        return copy_(self, *args, **kwargs)

    within = False
    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt), optimizer.averaged_weights():
        within = True
    assert not left
    assert all(torch.equal(p, value) for p, value in zip(parameters, trained))


def test_draws_are_cheap_and_counted_beyond_32_bits(backend):
    """A draw for step t is that for t modulo 2**32; noise likewise."""
    averaging = fused_opt.PSWA(period=10, probability=0.5)
    assert [averaging._drawn(t) for t in range(50)] == [averaging._drawn(2**32 + t) for t in range(50)]
    found = []
    for steps in (5, 2**32 + 5):
        p, optimizer = pair_of(backend, noise=fused_opt.WeightNoise(std=1.0))
        optimizer.param_groups[0]["steps"] = steps
        optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


def test_a_norm_of_complex_gradients_does_not_overflow(backend):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = fused_opt.SGD([p], lr=1e-25, nonfinite="skip", backend="auto" if "native" in backend else backend)
    p.grad = torch.full((3,), 1e25 + 0j)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert optimizer.grad_norm == pytest.approx(1e25 * 3**0.5, rel=1e-6)
