"""Copies and checkpoints continue bit for bit, and are interchanged with torch.optim's; what dtype states have."""

import copy
import pickle

import pytest
import torch
from rules import every_rule, every_rule_of_torch
from support.compare import assert_close, assert_same, same_bits, without_extras
from support.kernels import as_on_a_gpu
from support.parameters import checkpoint, pair, parameters_of, set_gradients, train_both

import fused_opt


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@every_rule
def test_a_copy_continues_bit_for_bit(name, options, copied, backend):
    optimizer, oracle = pair(name, options, backend)
    first = parameters_of(optimizer)[0]
    optimizer.scale_layers(lr={first: 0.5}, weight_decay={first: 3.0})
    train_both(optimizer, oracle)
    optimizer.register_step_pre_hook(unchanged_arguments)
    other = copied(optimizer)
    assert type(other) is type(optimizer)
    assert other.backend == backend
    assert repr(other) == repr(optimizer)
    same_bits(other, optimizer)
    assert not {p.data_ptr() for p in parameters_of(other)} & {p.data_ptr() for p in parameters_of(optimizer)}
    train_both(optimizer, other)
    same_bits(other, optimizer)


def unchanged_arguments(*_):
    """A hook; at module level, so that it pickles."""


def test_a_copy_keeps_state_dtype(backend):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = fused_opt.AdamW([p], state_dtype=torch.float32, backend=backend)
    for copied in (copy.deepcopy, pickled):
        other = copied(optimizer)
        (q,) = parameters_of(other)
        q.grad = torch.ones_like(q)
        other.step()
        assert other.state[q]["exp_avg"].dtype == torch.float32


def test_a_copy_of_model_and_optimizer_stays_joined(backend):
    model = torch.nn.Linear(3, 2)
    optimizer = fused_opt.SGD(model.parameters(), lr=0.1, backend=backend)
    other_model, other = copy.deepcopy((model, optimizer))
    other_model(torch.ones(1, 3)).sum().backward()
    other.step()
    torch.testing.assert_close(other_model.weight, model.weight - 0.1)


@pytest.mark.parametrize(
    "directions", ["ours to ours", "theirs to ours", "ours to theirs", "theirs to ours to theirs to ours"]
)
@every_rule_of_torch
def test_checkpoints_interchange_with_torch(name, options, directions, backend):
    """In the middle of training, to a parameter with its own count and back; what continues matches torch throughout."""
    optimizer, oracle = pair(name, options, backend)
    for each in (optimizer, oracle):
        set_gradients(parameters_of(each)[:2], 9)  # the third starts a step later
        each.step()
    train_both(optimizer, oracle)
    assert_same(optimizer, oracle)

    sides = {"ours": optimizer, "theirs": oracle}
    current, *others = directions.split(" to ")
    running = sides[current]
    for seed, side in enumerate(others):
        values = [p.detach().clone() for p in parameters_of(running)]
        fresh, fresh_oracle = pair(name, {"lr": 123.0}, backend)
        resumed = fresh if side == "ours" else fresh_oracle
        for p, value in zip(parameters_of(resumed), values):
            p.data.copy_(value)
        resumed.load_state_dict(checkpoint(running))
        for of_p in resumed.state.values() if resumed is fresh_oracle else ():
            if "mu_product" in of_p:  # torch.optim casts it to the parameter's dtype, and then continues in another one
                of_p["mu_product"] = of_p["mu_product"].float()
        assert_close(without_extras(resumed.state_dict()), without_extras(running.state_dict()), bound=0)
        running = resumed
        for step in range(2):
            for each in (running, optimizer, oracle):
                set_gradients(parameters_of(each), 10 * seed + step)
                each.step()
        assert_same(running, oracle)
        if directions == "ours to ours":
            same_bits(running, optimizer)


@every_rule
def test_checkpoints_older_than_some_keys(name, options, backend):
    """Keys of later versions missing, step counts as plain numbers or of another dtype, a buffer that is None."""
    optimizer, oracle = pair(name, options, backend)
    train_both(optimizer, oracle)
    new = ["maximize", "foreach", "fused", "differentiable", "capturable", "amsgrad", "decoupled_weight_decay"]
    for write_step in (float, int, lambda t: t.to(torch.int64), lambda t: t.to(torch.bfloat16), lambda t: t.double()):
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            for key in new:
                group.pop(key, None)
            group.update({key: options[key] for key in new if key in options})
        for of_p in saved["state"].values():
            if "step" in of_p:
                of_p["step"] = write_step(of_p["step"])
        resumed, _ = pair(name, options, backend)
        for p, q in zip(parameters_of(resumed), parameters_of(optimizer)):
            p.data.copy_(q.data)
        resumed.load_state_dict(saved)
        assert resumed.param_groups[0].keys() == optimizer.param_groups[0].keys()
        straight = copy.deepcopy(optimizer)
        train_both(resumed, straight, 2)
        assert_close(parameters_of(resumed), parameters_of(straight), bound=0)
        assert all(of_p["step"] == 5 for of_p in resumed.state.values() if "step" in of_p)


@pytest.mark.parametrize("present", ["111", "100", "001"])
def test_a_momentum_buffer_of_none(present, backend):
    """What torch.optim.SGD wrote for a parameter that had not been stepped: as good as none, with or without gradient."""
    optimizer, oracle = pair("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, backend)
    saved = optimizer.state_dict()
    saved["state"] = {index: {"momentum_buffer": None} for index in range(3)}
    for each in (optimizer, oracle):
        each.load_state_dict(saved)
        for flags in (present, "111"):
            set_gradients(parameters_of(each), 0)
            for p, flag in zip(parameters_of(each), flags):
                if flag == "0":
                    p.grad = None
            each.step()
    assert_same(optimizer, oracle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_rule_of_torch
def test_state_dtype_survives_a_resume(name, options, dtype, backend):
    def fresh(values):
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        return getattr(fused_opt, name)(parameters, state_dtype=torch.float32, backend=backend, **options)

    optimizer = fresh([torch.linspace(-1, 1, 7).to(dtype), torch.ones(2, 3, dtype=dtype)])
    for step in range(3):
        set_gradients(parameters_of(optimizer), step)
        optimizer.step()
    if not optimizer.state:
        pytest.skip("no states")
    resumed = fresh([p.detach() for p in parameters_of(optimizer)])
    resumed.load_state_dict(checkpoint(optimizer))
    for p in parameters_of(resumed):
        slots = {slot: value for slot, value in resumed.state[p].items() if value.ndim}
        assert {value.dtype for value in slots.values()} == {torch.float32}
        # Were they rounded to the parameter's dtype on the way, this would hold.
        assert any(not torch.equal(value, value.to(dtype).float()) for value in slots.values())
    train_both(resumed, optimizer)
    same_bits(resumed, optimizer)


def test_state_dtype_is_none_keeps_the_dtype_of_the_parameter(backend):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = fused_opt.AdamW([p], backend=backend)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].dtype == dtype
        assert optimizer.state[p]["step"].dtype == torch.float32


def test_the_step_count_goes_beyond_what_a_half_can_count(backend):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = fused_opt.Adam([p], lr=0.0, backend=backend)
    p.grad = torch.ones_like(p)
    for _ in range(258):
        optimizer.step()
    assert optimizer.state[p]["step"] == 258


def test_the_step_count_in_the_default_dtype(backend):
    torch.set_default_dtype(torch.float64)
    try:
        optimizer, oracle = pair("Adam", {}, backend)
        train_both(optimizer, oracle)
        count = optimizer.state[parameters_of(optimizer)[0]]["step"]
        assert count.dtype == (torch.float32 if as_on_a_gpu() else torch.float64)  # there as torch's fused ones keep it
        if not as_on_a_gpu():
            assert_same(optimizer, oracle)
    finally:
        torch.set_default_dtype(torch.float32)


def test_states_are_laid_out_as_their_parameter(backend):
    p = torch.nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last))
    optimizer = fused_opt.AdamW([p], backend=backend)
    p.grad = torch.ones(2, 3, 4, 5)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].stride() == p.stride()


def test_an_adamw_stays_an_adamw(backend):
    """As torch.optim: a checkpoint of Adam loaded into AdamW does not couple the decay."""
    adam, adam_oracle = pair("Adam", {"lr": 0.1, "weight_decay": 0.5}, backend)
    train_both(adam, adam_oracle)
    optimizer, oracle = pair("AdamW", {"lr": 0.1, "weight_decay": 0.5}, backend)
    optimizer.load_state_dict(checkpoint(adam))
    oracle.load_state_dict(checkpoint(adam_oracle))
    train_both(optimizer, oracle)
    assert_same(optimizer, oracle)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
