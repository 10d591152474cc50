"""Inputs that break optimizers elsewhere: the right answer, or an error in words that leaves everything as it was."""

import copy

import pytest
import torch
from rules import both_kinds
from support.compare import assert_close, assert_same, unchanged
from support.kernels import as_on_a_gpu, run_with
from support.parameters import clones, pair, parameters_of, set_gradients, train_both
from support.refusals import refuses, whenever

import fused_opt
from fused_opt import backends, warn
from fused_opt.backends import native

SLOT = {"SGD": "momentum_buffer", "AdamW": "exp_avg_sq"}


# ------------------------------------------------------------------------------------------------- gradients and rates


@both_kinds
def test_fused_on_a_device_without_elements(name, options, backend):
    """As torch.optim refuses it, in the step."""
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    p.grad = torch.empty(3, device="meta")
    getattr(fused_opt, name)([p], **options).step()
    for make in (getattr(fused_opt, name), getattr(torch.optim, name)):
        with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
            make([p], **options, fused=True).step()


def test_sparse_gradients_that_are_not_finite_are_named():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = fused_opt.SGD([("table", embedding.weight)], lr=0.1, momentum=0.9, nonfinite="raise")
    embedding(torch.tensor([1, 2])).sum().backward()
    embedding.weight.grad = embedding.weight.grad * float("inf")
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="the gradient of parameter table is not finite"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    assert not optimizer.state


@pytest.mark.parametrize(
    "bad", [float("nan"), torch.tensor(float("nan")), -0.1, torch.tensor(-0.1), "0.1", None], ids=str
)
@whenever
@both_kinds
def test_a_learning_rate_that_becomes_none(name, options, steps_before, bad, backend):
    if as_on_a_gpu() and steps_before and isinstance(bad, torch.Tensor):
        pytest.skip("a rate that is on a GPU is not looked at by the host")
    optimizer, oracle = pair(name, options, backend)
    train_both(optimizer, oracle, steps_before)
    set_gradients(parameters_of(optimizer), 0)
    optimizer.param_groups[0]["lr"] = bad
    refuses(optimizer, f"Invalid learning rate: {bad}", ValueError)
    optimizer.param_groups[0]["lr"] = options["lr"]
    train_both(optimizer, oracle)
    assert_same(optimizer, oracle)


@whenever
def test_a_beta_that_becomes_one(steps_before, backend):
    optimizer, oracle = pair("Adam", {}, backend)
    train_both(optimizer, oracle, steps_before)
    set_gradients(parameters_of(optimizer), 0)
    optimizer.param_groups[0]["betas"] = (1.0, 0.999)
    refuses(optimizer, "division by zero|Invalid beta parameter", (ZeroDivisionError, ValueError))


def test_multipliers_out_of_range(backend):
    optimizer, oracle = pair("SGD", {"lr": 0.1, "weight_decay": 0.1}, backend)
    first, second, _ = parameters_of(optimizer)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"Invalid multiplier: .*; it must be finite and at least 0"):
            optimizer.scale_layers(lr={first: 0.0, second: bad})
        with pytest.raises(ValueError, match="Invalid multiplier"):
            optimizer.scale_layers(lr={first: 0.0}, weight_decay={second: bad})
    with pytest.raises(ValueError, match=r"a multiplier for a tensor of shape \(7,\) that is not optimized here"):
        optimizer.scale_layers(lr={first: 0.0, torch.nn.Parameter(torch.ones(7)): 1.0})
    train_both(optimizer, oracle)
    assert_same(optimizer, oracle)


# ------------------------------------------------------------------------------------------------------------ backends


def test_a_named_backend_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(native, "_reason", "its compiled core is not installed")
    monkeypatch.setattr(warn, "_said", set())
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"'native' cannot run here: its compiled core is not installed. .*'auto'"):
        fused_opt.SGD([p], backend="native")
    available = backends.available()
    assert (available["native"], available["reference"]) == ("its compiled core is not installed", None)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer = fused_opt.SGD([p], lr=0.25)
        if not warn._said:
            with pytest.warns(UserWarning, match="runs without its native backend: its compiled core is not installed"):
                optimizer.step()
        else:
            optimizer.step()  # it says so once; a second warning would be an error here
    assert torch.equal(p, torch.full((3,), 0.5))


class Subclass(torch.Tensor):
    """A tensor of somebody else's, as DTensor is."""


UNSTEPPABLE = {
    "complex": (torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.complex64), "torch.complex64 tensor"),
    "sparse": (torch.ones(3), torch.ones(3).to_sparse(), "torch.sparse_coo tensor"),
    "subclass": (torch.ones(3).as_subclass(Subclass), torch.ones(3), "Subclass is a tensor subclass"),
    "meta": (torch.ones(3, device="meta"), torch.ones(3, device="meta"), "a tensor on meta"),
}


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("what", UNSTEPPABLE)
def test_what_the_named_backend_cannot_step(what):
    data, gradient, reason = UNSTEPPABLE[what]
    good, p = torch.nn.Parameter(torch.ones(2)), data.clone().requires_grad_()
    optimizer = fused_opt.SGD([("good", good), ("odd", p)], lr=0.5, momentum=0.9, backend="native")
    good.grad, p.grad = torch.ones(2), gradient.clone()
    refuses(
        optimizer, f"backend 'native' cannot step parameter '?odd'?: a?.*{reason}.*backend='auto' takes one that can"
    )


@pytest.mark.parametrize("what", UNSTEPPABLE)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_auto_steps_what_one_backend_cannot_beside_what_it_can(name, what):
    data, gradient, _ = UNSTEPPABLE[what]
    if name == "AdamW" and what == "sparse":
        pytest.skip("Adam takes no sparse gradients")
    results = []
    for module, extra in ((fused_opt, {}), (torch.optim, {"foreach": False})):
        good, p = torch.nn.Parameter(torch.ones(2)), data.clone().requires_grad_()
        optimizer = getattr(module, name)([good, p], lr=0.5, **extra)
        for _ in range(3):
            good.grad, p.grad = torch.ones(2), gradient.clone()
            optimizer.step()
        results.append([good, p] if what != "meta" else [good])
        if name == "AdamW":
            assert [of_p["step"] for of_p in optimizer.state.values()] == [3, 3]
    assert_close(*results, bound=2e-6)


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@both_kinds
def test_an_instruction_set_that_the_processor_does_not_have(name, options, monkeypatch):
    optimizer, _ = pair(name, options, "native")
    set_gradients(parameters_of(optimizer), 0)
    run_with("sse9", monkeypatch)
    refuses(optimizer, "sse9", (ValueError, RuntimeError))


# ---------------------------------------------------------------------------------------------- parameters and states


@both_kinds
def test_a_parameter_whose_elements_share_memory(name, options, backend):
    """torch: "more than one element of the written-to tensor refers to a single memory location"."""
    good = torch.nn.Parameter(torch.ones(2))
    p = torch.nn.Parameter(torch.ones(1, 3).expand(4, 3))
    optimizer = getattr(fused_opt, name)([("good", good), ("odd", p)], backend=backend, **options)
    good.grad, p.grad = torch.ones(2), torch.ones(4, 3)
    refuses(optimizer, "odd.*memory|single memory location")


@both_kinds
def test_a_resized_parameter_says_what_to_do(name, options, backend):
    optimizer, oracle = pair(name, options, backend)
    train_both(optimizer, oracle, 2)
    p = parameters_of(optimizer)[1]
    p.grad = None
    p.data = torch.ones(2, 2, dtype=torch.float64)
    p.grad = torch.ones(2, 2, dtype=torch.float64)
    refuses(
        optimizer, r"parameter 1 of group 0 has shape \(2, 2\) and its state '\w+' \(5,\).*entry in optimizer.state"
    )
    del optimizer.state[p]
    optimizer.step()
    assert optimizer.state[p][SLOT[name]].shape == (2, 2)


BAD_STATES = {
    "shape": (lambda s: s[:-1], r"parameter '?bias'? has shape \(5,\) and its state '\w+' \(4,\); they must be equal"),
    "expandable": (lambda s: s[:1], r"parameter '?bias'? has shape \(5,\) and its state '\w+' \(1,\)"),
    "device": (lambda s: s.to("meta"), r"parameter '?bias'? is on cpu and its state '\w+' on meta"),
    "integer": (lambda s: s.to(torch.int64), r"parameter '?bias'? is torch.float64 and its state '\w+' torch.int64"),
    "bool": (lambda s: s > 0, r"parameter '?bias'? is torch.float64 and its state '\w+' torch.bool"),
    "complex": (lambda s: s.to(torch.complex128), r"parameter '?bias'? is torch.float64 .* '\w+' torch.complex128"),
}
# What a checkpoint holds is copied when it is loaded.
UNWRITABLE_STATES = {
    "expanded": (lambda s: s[:1].expand_as(s), r"parameter '?bias'? has a state '\w+' whose elements share memory"),
    "zeros": (
        lambda s: torch._efficientzerotensor(s.shape, dtype=s.dtype),
        r"whose elements share memory or have none",
    ),
    "list": (
        lambda s: s.tolist(),
        r"parameter '?bias'? has a list as its state '\w+'; it must be a tensor of shape \(5,\)",
    ),
    "array": (lambda s: s.numpy(), r"parameter '?bias'? has a ndarray as its state '\w+'; it must be a tensor"),
}


def named(parameters):
    return list(zip(("weight", "bias", "scale"), parameters))


@pytest.mark.parametrize("what", [*BAD_STATES, *UNWRITABLE_STATES])
@both_kinds
def test_a_bad_state_at_the_step(name, options, what, backend):
    spoil, message = {**BAD_STATES, **UNWRITABLE_STATES}[what]
    optimizer, oracle = pair(name, options, backend, arrange=named)
    train_both(optimizer, oracle, 2)
    bias = parameters_of(optimizer)[1]
    optimizer.state[bias][SLOT[name]] = spoil(optimizer.state[bias][SLOT[name]])
    refuses(optimizer, message)


BAD_COUNTS = {
    "integer": torch.tensor(3),
    "half": torch.tensor(3.0, dtype=torch.bfloat16),
    "shape": torch.ones(5),
    "device": torch.ones((), device="meta"),
    "number": 3.0,
}


@pytest.mark.parametrize(("name", "slot"), [("Adam", "step"), ("NAdam", "mu_product")])
@pytest.mark.parametrize("what", BAD_COUNTS)
def test_a_bad_step_count_at_the_step(what, name, slot, backend):
    optimizer, oracle = pair(name, {"lr": 0.1}, backend, arrange=named)
    train_both(optimizer, oracle, 3)
    optimizer.state[parameters_of(optimizer)[1]][slot] = copy.deepcopy(BAD_COUNTS[what])
    set_gradients(parameters_of(optimizer), 0)
    refuses(optimizer, f"parameter '?bias'?.* '{slot}'")


@pytest.mark.parametrize("what", [what for what in BAD_STATES if what != "device"])  # loading moves the states
@pytest.mark.parametrize("state_dtype", [None, torch.float64])
@both_kinds
def test_a_bad_state_in_a_checkpoint(name, options, state_dtype, what):
    spoil, _ = BAD_STATES[what]
    optimizer, oracle = pair(
        name,
        {
            **options,
        },
        "auto",
        arrange=named,
    )
    optimizer.state_dtype = state_dtype
    train_both(optimizer, oracle, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][SLOT[name]] = spoil(saved["state"][1][SLOT[name]])
    for group in saved["param_groups"]:
        group["lr"] = 123.0
    with unchanged(optimizer), pytest.raises(ValueError, match=f"state '{SLOT[name]}' of parameter '?bias'? (has|is) "):
        optimizer.load_state_dict(saved)
    train_both(optimizer, oracle)
    assert_same(optimizer, oracle)


@both_kinds
def test_a_checkpoint_of_another_model_in_the_words_of_torch(name, options):
    optimizer, oracle = pair(name, options, "auto")
    train_both(optimizer, oracle)
    fewer = clones(parameters_of(optimizer)[:2])
    for params in (fewer, [{"params": fewer}, {"params": clones(parameters_of(optimizer)[2:])}]):
        saved = getattr(fused_opt, name)(params, **options).state_dict()
        with pytest.raises(ValueError) as theirs:
            oracle.load_state_dict(saved)
        with unchanged(optimizer), pytest.raises(ValueError) as ours:
            optimizer.load_state_dict(saved)
        assert str(ours.value) == str(theirs.value)
