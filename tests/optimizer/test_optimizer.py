"""What users of torch.optim expect of an optimizer, compared with torch.optim itself wherever it has an answer."""

import copy
import io
import pickle

import pytest
import torch
from rules import OF_TORCH, both_kinds, every_rule, every_rule_of_torch
from support.compare import assert_close, assert_same, unchanged, without_extras
from support.kernels import as_on_a_gpu
from support.parameters import clones, pair, parameters_of, set_gradients, train_both
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fused_opt


def same_bits(ours, other):
    assert_same(ours, other, bound=0)


# ---------------------------------------------------------------------------------------------------- the step itself


@both_kinds
def test_closure(name, options, backend):
    optimizer, oracle = pair(name, options, backend)
    calls = []

    def closure_of(target):
        def closure():
            assert torch.is_grad_enabled()
            target.zero_grad()
            loss = sum(p.square().sum() for p in parameters_of(target))
            loss.backward()
            calls.append(target)
            return loss

        return closure

    for _ in range(3):  # at the first, no gradient exists before the closure has run
        with torch.no_grad():
            ours, theirs = optimizer.step(closure_of(optimizer)), oracle.step(closure=closure_of(oracle))
        assert_close(ours, theirs)
        assert_same(optimizer, oracle)
    assert calls == [optimizer, oracle] * 3
    assert optimizer.step() is None
    assert optimizer.step(closure=lambda: "whatever it returned") == "whatever it returned"


def test_a_closure_that_raises_leaves_everything_as_it_was(backend):
    optimizer, oracle = pair("AdamW", {}, backend)
    train_both(optimizer, oracle)
    with unchanged(optimizer), pytest.raises(KeyError, match="in the model"):
        optimizer.step(lambda: {}["in the model"])


GROUPS = {
    "SGD": [
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.03, "weight_decay": 0.2, "mine": "survives"},
        {"momentum": 0.5, "dampening": 0.5, "maximize": True},
    ],
    "AdamW": [
        {"lr": 0.1, "amsgrad": True},
        {"betas": (0.5, 0.6), "weight_decay": 0.2, "mine": "survives"},
        {"eps": 0.1, "maximize": True},
    ],
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_with_different_values(name, backend):
    def arrange(parameters):
        return [{"params": [p], **options} for p, options in zip(parameters, GROUPS[name])]

    optimizer, oracle = pair(name, {"lr": 0.02}, backend, arrange=arrange)
    train_both(optimizer, oracle)
    assert_same(optimizer, oracle)
    assert optimizer.param_groups[1]["mine"] == "survives"


@every_rule
def test_add_param_group_between_steps(name, options, backend):
    optimizer, oracle = pair(name, options, backend)
    train_both(optimizer, oracle)
    late = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3))
    optimizer.add_param_group({"params": late, "lr": 0.5})
    oracle.add_param_group({"params": clones([late]), "lr": 0.5})
    train_both(optimizer, oracle)
    assert_same(optimizer, oracle)


@pytest.mark.parametrize("name", OF_TORCH)
def test_named_parameters(name, backend):
    def arrange(parameters):
        return list(zip(("weight", "bias", "scale"), parameters))

    optimizer, oracle = pair(name, {"lr": 0.1}, backend, arrange=arrange)
    train_both(optimizer, oracle)
    assert_same(optimizer, oracle)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias", "scale"]


@every_rule
def test_gradients_that_are_none_now_and_then(name, options, backend):
    optimizer, oracle = pair(name, options, backend)
    for step, present in enumerate(["010", "111", "000", "101", "011", "010", "111"]):
        for each in (optimizer, oracle):
            set_gradients(parameters_of(each), step)
            for p, flag in zip(parameters_of(each), present):
                if flag == "0":
                    p.grad = None
            each.step()
        assert_same(optimizer, oracle)


@every_rule
def test_an_unfrozen_parameter_starts_its_own_count(name, options, backend):
    optimizer, oracle = pair(name, options, backend)
    for each in (optimizer, oracle):
        parameters = parameters_of(each)
        parameters[1].requires_grad_(False)
        for step in range(5):
            parameters[1].requires_grad_(step >= 3)
            each.zero_grad()
            sum((p * (step + 1) - 0.3).square().sum() for p in parameters).backward()
            each.step()
    assert_same(optimizer, oracle)
    if "step" in optimizer.state[parameters_of(optimizer)[0]]:
        assert [optimizer.state[p]["step"].item() for p in parameters_of(optimizer)] == [5, 2, 5]


TENSORS = [
    ("SGD", {"lr": torch.tensor(0.1), "momentum": 0.9}),
    ("SGD", {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.2)}),
    ("Adam", {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.8), torch.tensor(0.95))}),
    ("AdamW", {"lr": torch.tensor([0.01], dtype=torch.float64)}),
    ("AdamW", {"lr": 0.01, "betas": (torch.tensor(0.8), torch.tensor(0.95)), "amsgrad": True}),
]


@pytest.mark.parametrize(("name", "options"), TENSORS, ids=str)
def test_tensor_hyper_parameters(name, options, backend):
    """Read at every step: a write into the tensor counts, and the tensor stays the user's own."""
    optimizer, oracle = pair(name, options, backend)
    held = optimizer.param_groups[0]["lr"]
    for factor in (1, 3, 0):
        for each in (optimizer, oracle):
            group = each.param_groups[0]
            for tensor in (group["lr"], group["weight_decay"], *group.get("betas", ())):
                if isinstance(tensor, torch.Tensor):
                    tensor.mul_(factor if tensor is group["lr"] else 0.9)
        train_both(optimizer, oracle, 2)
        assert_close(parameters_of(optimizer), parameters_of(oracle), bound=1e-6)  # torch computes with float32 tensors
    assert optimizer.param_groups[0]["lr"] is held


@both_kinds
def test_hyper_parameters_are_read_at_every_step(name, options, backend):
    optimizer, oracle = pair(name, options, backend)
    changes = {
        "SGD": [{"lr": 1.0}, {"momentum": 0.0}, {"weight_decay": 0.5}, {"momentum": 0.5}, {"nesterov": True}],
        "AdamW": [{"lr": 0.5}, {"betas": (0.1, 0.2)}, {"eps": 0.5}, {"amsgrad": True}, {"weight_decay": 0.9}],
    }
    for change in [*changes[name], {"maximize": True}]:
        for each in (optimizer, oracle):
            each.param_groups[0].update(change)
            if change.get("amsgrad"):  # torch needs help with what is no use to it: a maximum that was not kept
                for of_p in each.state.values():
                    of_p["max_exp_avg_sq"] = torch.zeros_like(of_p["exp_avg_sq"])
        train_both(optimizer, oracle, 2)
        assert_same(optimizer, oracle)


def test_amsgrad_turned_on_between_steps(backend):
    """Where torch.optim raises KeyError, the maximum starts at this step."""
    optimizer, oracle = pair("Adam", {"lr": 0.1}, backend)
    train_both(optimizer, oracle)
    optimizer.param_groups[0]["amsgrad"] = True
    train_both(optimizer, oracle, 1)
    assert_close(parameters_of(optimizer), parameters_of(oracle))
    for of_p in optimizer.state.values():
        assert torch.equal(of_p["max_exp_avg_sq"], of_p["exp_avg_sq"])
        assert of_p["step"] == 4


@pytest.mark.parametrize("set_to_none", [True, False])
@both_kinds
def test_zero_grad(name, options, set_to_none, backend):
    optimizer, oracle = pair(name, options, backend)
    for each in (optimizer, oracle):
        for step in range(4):
            each.zero_grad(set_to_none=set_to_none)
            if step != 2:
                sum((p * step).sin().sum() for p in parameters_of(each)).backward()
            each.step()
    assert_same(optimizer, oracle)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in parameters_of(optimizer):
        assert p.grad is None if set_to_none else not p.grad.any()


@every_rule
def test_the_step_never_changes_a_gradient(name, options, backend):
    optimizer, _ = pair(name, options, backend)
    for step in range(2):
        set_gradients(parameters_of(optimizer), step)
        gradients = [p.grad for p in parameters_of(optimizer)]
        kept = [(gradient.clone(), gradient._version) for gradient in gradients]
        optimizer.step()
        for p, gradient, (values, version) in zip(parameters_of(optimizer), gradients, kept):
            assert p.grad is gradient
            assert torch.equal(gradient, values)
            assert gradient._version == version


# --------------------------------------------------------------------------------------------------------- schedulers

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),  # cycles the momentum or beta1 as well
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2, gamma=0.5)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


def test_every_scheduler_of_torch_is_here():
    assert SCHEDULERS.keys() == set(lr_scheduler.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler, tensor_lr, backend):
    for name, options in (("SGD", {"momentum": 0.9}), ("AdamW", {})):
        optimizer, oracle = pair(name, {**options, "lr": torch.tensor(0.1) if tensor_lr else 0.1}, backend)
        schedulers = [SCHEDULERS[scheduler](each) for each in (optimizer, oracle)]
        for step in range(7):
            train_both(optimizer, oracle, 1, seed=step)
            for each in schedulers:
                each.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            assert_close(optimizer.param_groups[0]["lr"], oracle.param_groups[0]["lr"])
        # torch computes with a lr that is a float32 tensor in float32
        assert_same(optimizer, oracle, bound=1e-6 if tensor_lr else 1e-12)


# -------------------------------------------------------------------------------------------------------------- hooks


def test_step_hooks(backend):
    optimizer, _ = pair("AdamW", {}, backend)
    other, _ = pair("SGD", {}, backend)
    log = []

    def record(name):
        def hook(target, args, kwargs):
            assert target in (optimizer, other)
            log.append(name if target is optimizer else f"{name} of another")

        return hook

    handles = [
        optimizer.register_step_pre_hook(record("pre")),
        optimizer.register_step_post_hook(record("post")),
        register_optimizer_step_pre_hook(record("global pre")),
        register_optimizer_step_post_hook(record("global post")),
    ]
    try:
        optimizer.step(lambda: log.append("step"))
        other.step()
    finally:
        for handle in handles:
            handle.remove()
    expected = ["global pre", "pre", "step", "post", "global post"]
    assert log == [*expected, "global pre of another", "global post of another"]
    optimizer.step(lambda: log.append("no hooks"))
    assert log[-1] == "no hooks"
    assert len(log) == 8


def test_hooks_fire_once_in_a_subclass(backend):
    class Mine(fused_opt.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Inherits(fused_opt.AdamW):
        pass

    for kind in (Inherits, Mine):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([p], lr=0.1, weight_decay=0.0, backend=backend)
        calls = []
        optimizer.register_step_post_hook(lambda *_: calls.append(p.detach().clone()))  # noqa: B023
        p.grad = torch.ones(3)
        optimizer.step()
        # torch wraps an overridden step a second time; what is inherited must fire once.
        assert len(calls) == (2 if kind is Mine else 1)
        torch.testing.assert_close(calls[0], torch.full((3,), 0.9))


def test_a_pre_hook_may_replace_the_arguments(backend):
    optimizer, oracle = pair("SGD", {"lr": 0.1}, backend)
    for each in (optimizer, oracle):
        each.register_step_pre_hook(lambda target, args, kwargs: ((target,), {"closure": lambda: "replaced"}))
        assert each.step(lambda: "given") == "replaced"
        each.register_step_pre_hook(lambda *_: "not a pair")
        with pytest.raises(RuntimeError, match="must return None or a tuple of"):
            each.step()


def test_the_profiler_sees_the_step(backend):
    optimizer, oracle = pair("AdamW", {}, backend)
    train_both(optimizer, oracle, 1)
    with torch.profiler.profile() as profiler:
        train_both(optimizer, oracle, 1)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["Optimizer.step#AdamW.step"] == 2  # ours and torch's
    assert_same(optimizer, oracle)


def test_state_dict_hooks(backend):
    optimizer, oracle = pair("SGD", {"momentum": 0.9}, backend)
    train_both(optimizer, oracle)
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "mine": 1})
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved.pop("mine") == 1

    fresh, _ = pair("SGD", {"momentum": 0.9}, backend)
    log = []
    fresh.register_load_state_dict_pre_hook(lambda *_: log.append("pre"))
    fresh.register_load_state_dict_post_hook(lambda target: log.append(len(target.state)))
    fresh.load_state_dict(saved)
    assert log == ["pre", 3]


@pytest.mark.parametrize("state_dtype", [None, torch.float64])
def test_a_load_hook_adapts_a_checkpoint_of_other_shapes(state_dtype, backend):
    """What torch documents these hooks for; the checks look at what the hook returns."""
    p = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = fused_opt.SGD([p], lr=0.1, momentum=0.5, state_dtype=state_dtype, backend=backend)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"momentum_buffer": torch.arange(6.0)}}

    def adapt(_, state_dict):
        buffer = state_dict["state"][0]["momentum_buffer"].reshape(2, 3)
        return {**state_dict, "state": {0: {"momentum_buffer": buffer}}}

    optimizer.register_load_state_dict_pre_hook(adapt)
    optimizer.load_state_dict(saved)
    found = optimizer.state[p]["momentum_buffer"]
    assert found.dtype == (state_dtype or torch.float32)
    assert torch.equal(found, torch.arange(6.0, dtype=found.dtype).reshape(2, 3))


# ------------------------------------------------------------------------------------- pickle, deepcopy, checkpoints


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


def checkpoint(optimizer):
    """Its state_dict, by way of a file that holds nothing but tensors and plain types."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
@pytest.mark.parametrize("name", OF_TORCH)
def test_state_dtype_survives_a_resume(name, dtype, backend):
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.1, "amsgrad": True}

    def fresh(values):
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        return getattr(fused_opt, name)(parameters, state_dtype=torch.float32, backend=backend, **options)

    optimizer = fresh([torch.linspace(-1, 1, 7).to(dtype), torch.ones(2, 3, dtype=dtype)])
    for step in range(3):
        set_gradients(parameters_of(optimizer), step)
        optimizer.step()
    resumed = fresh([p.detach() for p in parameters_of(optimizer)])
    resumed.load_state_dict(checkpoint(optimizer))
    for p in parameters_of(resumed):
        slots = {slot: value for slot, value in resumed.state[p].items() if slot != "step"}
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


# ------------------------------------------------------------------------------------------ switches of torch.optim


@pytest.mark.parametrize(
    "switches",
    [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}, {"capturable": True}],
    ids=str,
)
@pytest.mark.parametrize("name", OF_TORCH)
def test_switches_that_change_nothing_are_accepted(name, switches, backend):
    if name == "SGD" and "capturable" in switches:
        pytest.skip("torch.optim.SGD has no capturable")
    optimizer, _ = pair(name, {"lr": 0.1}, backend)
    given, _ = pair(name, {"lr": 0.1, **switches}, backend)
    assert {key: given.param_groups[0][key] for key in switches} == switches
    train_both(optimizer, given)
    assert_close(parameters_of(given), parameters_of(optimizer), bound=0)
    resumed, _ = pair(name, {"lr": 0.1}, backend)
    resumed.load_state_dict(checkpoint(given))  # torch casts and moves the count of steps by these switches
    for p, q in zip(parameters_of(resumed), parameters_of(given)):
        p.data.copy_(q.data)
    train_both(given, resumed)
    same_bits(resumed, given)


@pytest.mark.parametrize("name", OF_TORCH)
def test_switches_that_would_change_something_are_refused(name):
    make = getattr(fused_opt, name)
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="differentiable=True asks for a step that autograd can follow"):
        make([p], differentiable=True)
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        make([p], fused=True, foreach=True)
    optimizer = make([p])
    with unchanged(optimizer), pytest.raises(RuntimeError, match="differentiable"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "differentiable": True})


@pytest.mark.parametrize("name", OF_TORCH)
def test_arguments_come_in_the_order_of_torch(name):
    values = {"SGD": (0.1, 0.8, 0.0, 0.2, True), "Adam": (0.1, (0.5, 0.6), 1e-3, 0.2, True)}
    values["AdamW"] = values["Adam"]
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(fused_opt, name)([p], *values[name])
    oracle = getattr(torch.optim, name)([p], *values[name])
    plain, plain_oracle = getattr(fused_opt, name)([p]), getattr(torch.optim, name)([p])
    for ours, theirs in ((optimizer, oracle), (plain, plain_oracle)):
        assert theirs.defaults.items() <= ours.defaults.items()
        lines = repr(ours).splitlines()
        assert set(repr(theirs).splitlines()) <= set(lines)
        assert lines[:2] == [f"{name} (", "Parameter Group 0"]


# ----------------------------------------------------------------------------------------------- mixed precision


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
    if not isinstance(optimizer, torch.optim.SGD | torch.optim.Adam):
        for p, gradient in zip(parameters, kept):
            assert torch.equal(p.grad.nan_to_num(7), gradient.nan_to_num(7))
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled before"])
@pytest.mark.parametrize("bad", ["inf", "nan"])
@both_kinds
def test_grad_scaler(name, options, bad, unscale, backend):
    optimizer, oracle = pair(name, options, backend)
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


@both_kinds
def test_fused_is_false_has_the_scaler_unscale(name, options, backend):
    """Then gradients are what a program that clips between unscale_ and step takes them for, as in torch.optim."""
    optimizer, oracle = pair(name, {**options, "fused": False, "foreach": None}, backend)
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
    optimizer, _ = pair(name, options, backend)
    fresh, _ = pair(name, options, backend)
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
    optimizer, oracle = pair(name, options, backend)
    assert optimizer._step_supports_amp_scaling
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for step in range(3):
        for each, factor in ((optimizer, 8.0), (oracle, 1.0)):
            set_gradients(parameters_of(each), step)
            for p in parameters_of(each):
                p.grad.mul_(factor)
            each.step()
    assert_same(optimizer, oracle)


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


# ------------------------------------------------------------------------------------------------------ scale_layers


@every_rule
def test_scale_layers_equals_a_group_per_layer(name, options, backend):
    """The multiplier of the decay is of weight_decay, not of lr * weight_decay."""
    rates, decays = (0.5, 1.0, 3.0), (2.0, 0.0, 1.0)
    options = {"weight_decay": 0.2, **options}

    def arrange(parameters):
        lr, weight_decay = options["lr"], options["weight_decay"]
        return [
            {"params": [p], "lr": lr * rate, "weight_decay": weight_decay * decay}
            for p, rate, decay in zip(parameters, rates, decays)
        ]

    _, oracle = pair(name, options, backend, arrange=arrange)
    optimizer, _ = pair(name, options, backend)
    parameters = parameters_of(optimizer)
    optimizer.scale_layers(lr=dict(zip(parameters, rates)))
    optimizer.scale_layers(weight_decay=dict(zip(parameters, decays)))  # those of lr stay
    train_both(optimizer, oracle)
    assert_close(parameters, parameters_of(oracle))


def test_scale_layers_takes_effect_at_the_next_step_and_stays(backend):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = fused_opt.SGD([p], lr=1.0, backend=backend)
    for scale, expected in ((None, -1.0), (0.5, -1.5), (None, -2.0), (0.0, -2.0), (1.0, -3.0)):
        if scale is not None:
            optimizer.scale_layers(lr={p: scale})
        p.grad = torch.ones(2)
        optimizer.step()
        assert torch.equal(p, torch.full((2,), expected))
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
