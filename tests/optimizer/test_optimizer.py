"""What users of torch.optim expect of an optimizer, compared with torch.optim itself wherever it has an answer."""

from inspect import Parameter, signature

import pytest
import torch
from rules import BY_NAME, OF_TORCH, both_kinds, every_rule
from support.compare import assert_close, assert_same, same_bits, unchanged
from support.parameters import checkpoint, clones, pair, parameters_of, set_gradients, train_both

import fused_opt

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
    copies = clones([late])
    oracle.add_param_group({"params": copies, "lr": 0.5})
    if name == "Adagrad":  # torch 2.10's has states of the constructor's parameters alone
        total = torch.full_like(copies[0], options.get("initial_accumulator_value", 0))
        oracle.state[copies[0]] = {"step": torch.tensor(0.0), "sum": total}
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


def test_products_of_nadam_differ_where_its_counts_do_not(backend):
    """After steps with other betas; torch.optim keeps them in the state, too."""
    optimizer, oracle = pair("NAdam", {"lr": 0.1}, backend)
    for step, (beta1, present) in enumerate([(0.9, "110"), (0.5, "001"), (0.9, "111"), (0.9, "111")]):
        for each in (optimizer, oracle):
            each.param_groups[0]["betas"] = (beta1, 0.999)
            set_gradients(parameters_of(each), step)
            for p, flag in zip(parameters_of(each), present):
                if flag == "0":
                    p.grad = None
            each.step()
        assert_same(optimizer, oracle)
    steps, products = ({of_p[slot].item() for of_p in optimizer.state.values()} for slot in ("step", "mu_product"))
    assert (len(steps), len(products)) == (1, 2)


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
        "SGD": [
            {"lr": 1.0},
            {"momentum": 0.0},
            {"weight_decay": 0.5},
            {"momentum": 0.5},
            {"nesterov": True, "dampening": 0.0},
        ],
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


# ------------------------------------------------------------------------------------------ switches of torch.optim


@pytest.mark.parametrize(
    "switches",
    [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}, {"capturable": True}],
    ids=str,
)
@pytest.mark.parametrize("name", OF_TORCH)
def test_switches_that_change_nothing_are_accepted(name, switches, backend):
    if not switches.keys() <= {*signature(getattr(torch.optim, name)).parameters, "fused"}:
        pytest.skip(f"torch.optim.{name} has no {min(switches)}")
    optimizer, _ = pair(name, {"lr": 0.1}, backend)
    given = getattr(fused_opt, name)(clones(parameters_of(optimizer)), lr=0.1, backend=backend, **switches)
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
def test_switches_that_contradict_each_other_are_refused(name):
    make = getattr(fused_opt, name)
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        make([p], fused=True, differentiable=True)
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        make([p], fused=True, foreach=True)
    optimizer = make([p])
    with unchanged(optimizer), pytest.raises(RuntimeError, match="cannot be `True` together"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "fused": True, "foreach": True})


@pytest.mark.parametrize("name", OF_TORCH)
def test_arguments_come_in_the_order_of_torch(name):
    p = torch.nn.Parameter(torch.ones(3))
    kinds = getattr(fused_opt, name), getattr(torch.optim, name)
    mine, other = (
        {kind: [(one.name, one.default) for one in signature(of).parameters.values() if one.kind is kind]
         for kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
        for of in kinds
    )  # fmt: skip
    assert mine[Parameter.POSITIONAL_OR_KEYWORD] == other[Parameter.POSITIONAL_OR_KEYWORD]
    assert set(other[Parameter.KEYWORD_ONLY]) <= set(mine[Parameter.KEYWORD_ONLY])
    for options in ({}, *BY_NAME[name].options):
        ours, theirs = (kind([p], **options) for kind in kinds)
        assert theirs.defaults.items() <= ours.defaults.items()
        lines = repr(ours).splitlines()
        assert set(repr(theirs).splitlines()) <= set(lines)
        assert lines[:2] == [f"{name} (", "Parameter Group 0"]


@pytest.mark.parametrize("shapes", [[(2, 0)], [(2,), (3,)]], ids=["without elements", "one of two"])
@both_kinds
def test_zeros_are_stepped_at_rate_zero(name, options, shapes, backend):
    """As torch.optim does; zeros for all, which torch.distributed.checkpoint makes states by, are not."""
    made = []
    for module, extra in ((fused_opt, {"backend": backend}), (torch.optim, {"foreach": False})):
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = getattr(module, name)(parameters, **{**options, "lr": 0.0}, **extra)
        parameters[0].grad = torch.zeros_like(parameters[0])
        optimizer.step()
        made.append((parameters[0], optimizer.state[parameters[0]]))
    (p, ours), (q, theirs) = made
    assert p._version > 0 < q._version
    assert ours.keys() == theirs.keys()
    if "step" in theirs:
        assert ours["step"] == theirs["step"] == 1
