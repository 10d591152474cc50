"""Gradient release: a backward that steps leaves what an ordinary step leaves, bit for bit, and no gradients."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from rules import BY_NAME
from support.compare import assert_close, same_bits
from support.kernels import GPU, run_with
from support.parameters import checkpoint, parameters_of
from support.refusals import refuses
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import fused_opt
from fused_opt import EMA, PSWA, PSWM, ScheduleFree, WeightNoise
from fused_opt.backends import native

LRS = [0.1, 0.05, 0.2, 0.0, 0.1, 0.1, 0.02]


class Net(nn.Module):
    """An embedding tied to the head, a frozen layer, and one that every second batch does without."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden, self.frozen = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.sometimes, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)

    def forward(self, step):
        torch.manual_seed(step)
        y = self.frozen(self.hidden(self.embedding(torch.randint(11, (5,)))))
        return self.head(self.norm(self.sometimes(y) if step % 2 else y)).square().mean()


def groups_of(model):
    """Two groups, the second without decay; all parameters, frozen ones too, named."""
    named = dict(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named.items() if p.ndim > 1]},
        {"params": [(n, p) for n, p in named.items() if p.ndim < 2], "weight_decay": 0.0},
    ]


def train(model, optimizer, steps=range(7)):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = LRS[step]
        optimizer.zero_grad()
        model(step).backward()
        optimizer.step()


def twins(name, released=True, **options):
    """A model and its optimizer that steps, and copies of both whose backward steps."""
    model = Net()
    other = copy.deepcopy(model)
    optimizers = [getattr(fused_opt, name)(groups_of(m), lr=0.1, **options) for m in (model, other)]
    if released:
        optimizers[1].step_in_backward(other)
    return model, optimizers[0], other, optimizers[1]


OPTIONS = {
    "AdamW": {"amsgrad": True},
    "CLARS": {"coefficient": 0.1},
    "LARS": {"coefficient": 0.1},
    "SGD": {"momentum": 0.9},
}
EXTRAS = {
    "plain": {},
    "noise and PSWA": {"noise": WeightNoise(0.01, schedule="decay"), "averaging": PSWA(period=3, on_write_back="zero")},
    "relative noise and EMA": {"noise": WeightNoise(0.01, relative=True), "averaging": EMA(0.9, start=1)},
    "rounding at random": {"rounding": "stochastic", "state_dtype": torch.bfloat16},
    "ScheduleFree": {"averaging": ScheduleFree(0.9)},
    "PSWM": {"averaging": PSWM(period=3, beta=0.5, fraction=0.5), "decay": "independent"},
}


CASES = [(name, "plain") for name in [*BY_NAME, "Muon"]]
CASES += [(name, extras) for name in ("SGD", "AdamW", "CLARS", "LAMB") for extras in list(EXTRAS)[1:]]


@pytest.mark.parametrize(("name", "extras"), CASES)
@pytest.mark.filterwarnings("ignore:CLARS steps without track_parts")
def test_weights_states_and_counts_are_those_of_ordinary_steps(name, extras, backend):
    options = {**OPTIONS.get(name, {}), **EXTRAS[extras], "backend": backend}
    model, optimizer, other, releasing = twins(name, **options)
    train(model, optimizer)
    train(other, releasing)
    if name == "Muon":  # torch multiplies a stack of matrices in another order than one
        assert_close(parameters_of(releasing), parameters_of(optimizer), 1e-4)
    else:
        same_bits(releasing, optimizer)
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("kind", ["reference", "foreach", "native"])
def test_multipliers_and_groups_that_change_in_the_run(kind):
    model, optimizer, other, releasing = twins("AdamW", backend=kind)
    for m, o in ((model, optimizer), (other, releasing)):
        train(m, o, range(2))
        o.scale_layers(lr={m.hidden.weight: 0.5}, weight_decay={m.norm.weight: 2.0})
        train(m, o, range(2, 4))
        m.frozen.requires_grad_(True)
        o.param_groups[0]["betas"] = (0.5, 0.9)
        train(m, o, range(4, 5))
        m.added = nn.Parameter(torch.ones(6))
        o.add_param_group({"params": [("added", m.added)], "weight_decay": 0.3})
        o.state.pop(m.norm.weight)
        m.norm.weight, o.param_groups[1]["params"][3] = [nn.Parameter(torch.full((6,), 0.5))] * 2
        train(m, o, range(5, 6))
        o.zero_grad()
        (m(6) + m.added.square().sum()).backward()
        assert (m.added.grad is None) == (m.frozen.weight.grad is None) == (o is releasing)
        o.step()
    same_bits(releasing, optimizer)


@pytest.mark.filterwarnings("error")
def test_a_scheduler_a_closure_and_hooks_find_what_they_are_used_to():
    model, optimizer, other, releasing = twins("AdamW")
    for m, o in ((model, optimizer), (other, releasing)):
        calls = []
        o.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        scheduler = torch.optim.lr_scheduler.StepLR(o, 1, 0.5)
        for step in range(3):

            def closure(m=m, o=o, step=step):
                o.zero_grad()
                (loss := m(step)).backward()
                return loss

            assert o.step(closure).item() > 0
            scheduler.step()
        assert calls == [1] * 3
        assert o.param_groups[0]["lr"] == 0.1 / 8
    same_bits(releasing, optimizer)


@pytest.mark.parametrize("kind", ["reference", "foreach", "native"])
def test_one_gradient_lives_at_a_time(kind):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    optimizer = fused_opt.AdamW(model.parameters(), lr=0.1, backend=kind)
    seen, alive = [], []

    def look(p):
        seen.append(weakref.ref(p.grad))
        alive.append(sum(grad() is not None for grad in seen))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    handle = optimizer.step_in_backward(model)
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        assert not any(grad() for grad in seen)
        optimizer.step()
    assert alive == [1] * 30
    handle.remove()
    model(torch.ones(2, 8)).sum().backward()
    assert alive[30:] == list(range(1, 11))


def test_a_tied_weight_is_stepped_once_with_its_whole_gradient():
    weight = nn.Parameter(torch.ones(1))
    optimizer = fused_opt.SGD([weight], lr=1.0)
    module = nn.Module()
    module.a = module.b = weight
    optimizer.step_in_backward(module)
    (2 * weight + 3 * weight).sum().backward()
    assert weight.item() == -4


def test_a_gradient_from_elsewhere_is_stepped_with_by_step():
    weight = nn.Parameter(torch.ones(1))
    optimizer = fused_opt.SGD([weight], lr=1.0)
    optimizer.step_in_backward(nn.Linear(1, 1))
    weight.grad = torch.tensor([3.0])
    optimizer.step()
    assert weight.item() == -2
    assert weight.grad is None


def test_removed_it_steps_as_before():
    model, optimizer, other, releasing = twins("AdamW", released=False, averaging=EMA(0.5))
    for m, o in ((model, optimizer), (other, releasing)):
        train(m, o, range(2))
        handle = o.step_in_backward(m) if o is releasing else None
        train(m, o, range(2, 5))
        o.zero_grad()
        m(4).backward()
        if handle:
            handle.remove()  # the step that has begun counts
            assert repr(handle) == "<StepInBackward: removed>"
            assert not any(p._post_accumulate_grad_hooks for p in m.parameters())
            handle.remove()
        else:
            o.step()
        train(m, o, range(5, 7))
    same_bits(releasing, optimizer)
    assert releasing.param_groups[0]["steps"] == 7  # one of them with a rate of 0


def test_an_optimizer_that_goes_takes_its_hooks_and_copies_have_none():
    model = nn.Linear(2, 2)
    optimizer = fused_opt.SGD(model.parameters(), lr=1.0)
    optimizer.step_in_backward(model)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied._in_backward is None
    twin = copy.deepcopy(model)
    twin(torch.ones(2)).sum().backward()
    assert twin.weight.grad is not None
    alive = weakref.ref(optimizer)
    del optimizer, copied
    gc.collect()
    assert alive() is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_checkpoints_resume_while_it_is_on():
    extras = {"noise": WeightNoise(0.01), "averaging": PSWA(period=4)}
    model, optimizer, other, releasing = twins("CLARS", **extras)
    train(other, releasing)
    _, _, third, resumed = twins("CLARS", **extras)
    train(model, optimizer, range(4))
    third.load_state_dict(model.state_dict())
    train(third, resumed, range(1))
    third.load_state_dict(model.state_dict())
    resumed.load_state_dict(checkpoint(optimizer))
    train(third, resumed, range(4, 7))
    same_bits(resumed, releasing)


def test_ratios_and_averages_can_be_read():
    model, optimizer, other, releasing = twins("LARS", averaging=EMA(0.5))
    train(model, optimizer, range(2))
    train(other, releasing, range(2))
    assert releasing.trust_ratios() == optimizer.trust_ratios()
    assert len(releasing.trust_ratios()) == 7
    with optimizer.averaged_weights(model), releasing.averaged_weights(other):
        assert torch.equal(model(0), other(0))


def test_torchs_distributed_checkpoints_make_states_without_a_step():
    model, _, other, releasing = twins("AdamW")
    get_optimizer_state_dict(other, releasing)
    assert_close(list(other.parameters()), list(model.parameters()), 0)
    assert releasing.param_groups[0]["steps"] == 0
    assert {of_p["step"].item() for of_p in releasing.state.values()} == {0.0}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("SGD", {"max_grad_norm": 1.0}, "max_grad_norm and nonfinite= look at all gradients before"),
        ("SGD", {"nonfinite": "skip"}, "max_grad_norm and nonfinite= look at all gradients before"),
        ("SGD", {"differentiable": True}, "differentiable=True keeps the gradients for autograd"),
    ],
)
def test_settings_that_need_all_gradients(name, options, words):
    model = Net()
    optimizer = getattr(fused_opt, name)(model.parameters(), lr=0.1, **options)
    with pytest.raises(ValueError, match=words):
        optimizer.step_in_backward(model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert optimizer._in_backward is None


def test_a_setting_that_comes_later_is_refused_before_anything_moves():
    _, _, other, releasing = twins("SGD", momentum=0.9)
    train(other, releasing, range(1))
    releasing.param_groups[0]["max_grad_norm"] = releasing.param_groups[1]["max_grad_norm"] = 1.0
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="look at all gradients"):
        other(1).backward()
    assert_close(dict(other.state_dict()), dict(before), 0)
    for group in releasing.param_groups:
        group["max_grad_norm"] = None
    releasing.zero_grad()
    train(other, releasing, range(1, 2))
    assert releasing.param_groups[0]["steps"] == 2


def test_parts_are_refused_both_ways():
    model = nn.Linear(2, 2)
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
    parts = optimizer.track_parts()
    with pytest.raises(ValueError, match=r"track_parts\(\) compares the parts"):
        optimizer.step_in_backward(model)
    parts.remove()
    handle = optimizer.step_in_backward(model)
    with pytest.raises(ValueError, match="step_in_backward is on, which frees a gradient"):
        optimizer.track_parts("sample", model)
    with pytest.raises(ValueError, match="step_in_backward is on already"):
        optimizer.step_in_backward(model)
    handle.remove()
    optimizer.track_parts("sample", model)


def test_a_second_backward_before_the_step_is_refused_and_changes_nothing():
    _, _, other, releasing = twins("AdamW")
    other(0).backward()
    before = copy.deepcopy(list(other.parameters()))
    with pytest.raises(RuntimeError, match=r"parameter \S+ has got a second gradient since the last optimizer.step"):
        other(1).backward()
    assert_close(list(other.parameters()), before, 0)
    with pytest.raises(RuntimeError, match=r"the state was asked for within a step"):
        releasing.state_dict()
    releasing.zero_grad()
    releasing.step()
    train(other, releasing, range(1, 3))
    assert releasing.param_groups[0]["steps"] == 3


@pytest.mark.parametrize("way", ["step", "load"])
def test_after_a_backward_that_raised(way):
    """Some are stepped and others are not; the step is counted, or the last checkpoint taken."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError("of the user")

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = fused_opt.AdamW(model.parameters(), lr=0.1)
    optimizer.step_in_backward(model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(ArithmeticError, match="of the user"):
        model[1](Fails.apply(model[0](torch.ones(1, 3)))).sum().backward()
    assert [p in optimizer.state for p in model.parameters()] == [False, False, True, True]
    if way == "step":
        optimizer.step()
    else:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    steps = [optimizer.state[p]["step"].item() for p in model.parameters()]
    assert (steps, optimizer.param_groups[0]["steps"]) == (([1, 1, 2, 2], 2) if way == "step" else ([1] * 4, 1))


def test_a_gradient_that_does_not_fit_is_refused_before_its_parameter_moves(backend):
    model = nn.Linear(2, 2)
    optimizer = fused_opt.SGD(model.parameters(), lr=0.1, momentum=0.9, backend=backend)
    optimizer.step_in_backward(model)
    optimizer.state[model.bias]["momentum_buffer"] = torch.zeros(3)
    model.bias.grad = torch.ones(2)
    refuses(optimizer, "parameter 1 of group 0 has shape")
    optimizer.state.pop(model.bias)
    optimizer.param_groups[0]["lr"] = 1.0  # no step has begun
    before = model.bias.detach().clone()
    optimizer.step()
    assert torch.equal(model.bias, before - 1)


def test_a_grad_scaler_is_refused():
    model = nn.Linear(2, 2)
    optimizer = fused_opt.SGD(model.parameters(), lr=0.1)
    optimizer.step_in_backward(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(2)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler unscales gradients after the backward"):
        scaler.step(optimizer)


def test_a_capture_is_refused_before_anything_moves(monkeypatch):
    run_with(GPU, monkeypatch)
    model = nn.Linear(2, 2)
    optimizer = fused_opt.SGD(model.parameters(), lr=0.1, backend="native")
    optimizer.step_in_backward(model)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    graph, before = native._native.HostGraph(), copy.deepcopy(list(model.parameters()))
    graph.begin()
    try:
        with pytest.raises(RuntimeError, match="a backward that steps was captured in a CUDA graph"):
            model(torch.ones(2)).sum().backward()
    finally:
        graph.end()
    assert_close(list(model.parameters()), before, 0)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_is_there_twice():
    weight = nn.Parameter(torch.ones(1))
    optimizer = fused_opt.SGD([weight, weight], lr=1.0)
    with pytest.raises(ValueError, match="parameter 1 of group 0 is in the groups twice"):
        optimizer.step_in_backward(nn.Linear(1, 1))
