"""Whose gradients a tracker looks at, for how long, and what it says of itself."""

import copy
import gc
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import fused_opt
from fused_opt import warn
from fused_opt.parts.microbatches import Microbatches
from fused_opt.parts.probe import Probe
from fused_opt.parts.samples import Samples
from fused_opt.parts.tracker import PartTracker, warn_without_parts

PARTS = [1.0, -0.5, 2.0]  # factors of a gradient: its norms add up to 3.5, and it adds up to 2.5


def clars(parameters, **options):
    options = {"lr": 1e-3, "coefficient": 0.1, "cap": math.inf, "eps": 0.0, "exempt": -1, **options}
    return fused_opt.CLARS(parameters, **options)


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()


X = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)


def train(model, optimizer, parts=PARTS):
    """A step of several parts; by parameter, the sum of the parts' norms that it had, in norms of a part of factor 1."""
    optimizer.zero_grad()
    for factor in parts:
        (factor * model(X).square().sum()).backward()
    one = {p: p.grad.norm().item() / abs(sum(parts)) for p in model.parameters() if p.grad is not None}
    expected = {
        f"{i} of group {g}": 0.1 * p.norm().item() / one[p]
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p in one
    }
    optimizer.step()
    return {name: of_one / optimizer.trust_ratios()[name] for name, of_one in expected.items()}


def tracked(kind, model, optimizer):
    return optimizer.track_parts(kind, model=model if kind == "sample" else None)


EVERYTHING = pytest.approx([3.5] * 4, rel=1e-9)


@pytest.mark.parametrize("kind", ["microbatch", "sample"])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_layer_that_is_unfrozen_is_tracked_from_then_on(kind, stepped):
    model = make()
    model[0].requires_grad_(False)
    optimizer = clars(model.parameters())
    tracked(kind, model, optimizer)
    if stepped:
        assert list(train(model, optimizer).values()) == pytest.approx([3.5] * 2, rel=1e-9)
    model[0].requires_grad_(True)
    for _ in range(2):
        assert list(train(model, optimizer).values()) == EVERYTHING


@pytest.mark.parametrize("kind", ["microbatch", "sample"])
@pytest.mark.parametrize("where", [0, 1])
def test_a_group_that_is_added_is_tracked_from_then_on(kind, where):
    model = make()
    optimizer = clars(model[1 - where].parameters())
    tracked(kind, model, optimizer)
    train(model, optimizer)
    optimizer.add_param_group({"params": list(model[where].parameters())})
    assert list(train(model, optimizer).values()) == EVERYTHING


@pytest.mark.parametrize("kind", ["microbatch", "sample"])
def test_a_parameter_that_is_replaced_is_let_go_of_and_its_successor_tracked(kind):
    model = make()
    optimizer = clars(model.parameters())
    parts = tracked(kind, model, optimizer)
    train(model, optimizer)
    old = model[0].weight
    model[0].weight = optimizer.param_groups[0]["params"][0] = nn.Parameter(2 * old.detach())
    assert list(train(model, optimizer).values()) == EVERYTHING
    assert not old._post_accumulate_grad_hooks
    kept = [
        p for held in vars(parts).values() if isinstance(held, dict | set) for p in held if isinstance(p, torch.Tensor)
    ]
    assert all(any(p is q for q in model.parameters()) for p in kept)
    assert len(kept) >= 8


def test_a_layer_that_is_replaced_is_hooked_by_samples():
    model = make()
    optimizer = clars(model.parameters())
    optimizer.track_parts("sample", model=model)
    train(model, optimizer)
    model[1] = nn.Linear(4, 2).double()
    optimizer.param_groups[0]["params"][2:] = model[1].parameters()
    assert list(train(model, optimizer).values()) == EVERYTHING


def test_a_parameter_outside_of_the_model_is_refused_when_it_comes():
    model, other = make(), nn.Linear(2, 2)
    optimizer = clars(model.parameters())
    optimizer.track_parts("sample", model=model)
    optimizer.add_param_group({"params": list(other.parameters())})
    with pytest.raises(ValueError, match=r"shapes \(2, 2\), \(2,\) are optimized and not in the model"):
        model(X)


def test_parts_from_before_a_parameter_was_seen_are_one():
    """Nothing that is tracked takes part in these backwards, so that nothing tells of the new group before the step."""
    model, other = make(), make(1)
    optimizer = clars(model.parameters())
    optimizer.track_parts("microbatch")
    optimizer.add_param_group({"params": list(other.parameters())})
    assert list(train(other, optimizer).values()) == pytest.approx([2.5] * 4, rel=1e-9)
    assert list(train(other, optimizer).values()) == EVERYTHING


def hooks_of(model):
    of_modules = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    of_tensors = [h for p in model.parameters() for h in (p._post_accumulate_grad_hooks or {}).values()]
    return of_modules + of_tensors


@pytest.mark.parametrize("kind", ["microbatch", "sample"])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("cyclic", [False, True])
def test_hooks_go_with_their_optimizer(kind, held, cyclic):
    model = make()
    kept = []
    for _ in range(5):
        optimizer = clars(model.parameters())
        parts = tracked(kind, model, optimizer)
        train(model, optimizer)
        kept.append(parts if held else None)
        optimizer.within = optimizer if cyclic else None
        assert hooks_of(model)
        del optimizer, parts
        gc.collect()
        assert not hooks_of(model)
    if held:
        assert not any(parts.active for parts in kept)
    calls = []
    measure = Samples._measure
    Samples._measure = lambda *args: calls.append(args) or measure(*args)
    try:
        model(X).sum().backward()
    finally:
        Samples._measure = measure
    assert not calls


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_hooks_do_nothing(copied):
    model = make()
    optimizer = clars(model.parameters())
    parts = optimizer.track_parts("sample", model=model)
    other = copied(model)
    other(X).sum().backward()
    assert parts.counts() == {}
    assert not parts._inputs


def test_a_probe_has_no_hooks():
    model = make()
    parts = clars(model.parameters()).track_parts("probe")
    assert isinstance(parts, Probe)
    assert isinstance(parts, PartTracker)
    assert not isinstance(parts, Microbatches)
    assert not hooks_of(model)


def test_counts_and_representations():
    model = make()
    optimizer = clars(model.named_parameters())
    parts = optimizer.track_parts("microbatch")
    assert repr(parts) == "<Microbatches: 0 parts of the gradients of 4 parameters since the last step>"
    for _ in range(2):
        model(X).sum().backward()
    assert parts.counts() == {"0.weight": 2, "0.bias": 2, "1.weight": 2, "1.bias": 2}
    assert repr(parts) == "<Microbatches: 8 parts of the gradients of 4 parameters since the last step>"
    parts.remove()
    assert repr(parts) == "<Microbatches: removed>"
    assert parts.counts() == {}
    parts = optimizer.track_parts("sample", model=model)
    assert repr(parts) == "<Samples: 0 parts of the gradients of 4 parameters since the last step>"
    parts.remove()
    parts = optimizer.track_parts("probe")
    assert repr(parts) == "<Probe: norms were set for 0 parameters>"
    parts.set({model[1].bias: 1.0})
    assert repr(parts) == "<Probe: norms were set for 1 parameters>"
    assert parts.counts() == {"1.bias": 1}


def test_an_optimizer_without_clars_refuses():
    model = make()
    for optimizer in (
        fused_opt.SGD(model.parameters(), lr=0.1),
        fused_opt.AdamW(model.parameters()),
        fused_opt.LARS(model.parameters(), lr=0.1),
        fused_opt.LAMB(model.parameters()),
    ):
        for kind in ("microbatch", "sample", "probe"):
            with pytest.raises(ValueError, match="no group of this optimizer has CLARS's trust ratio"):
                optimizer.track_parts(kind, model=model)
    assert not hooks_of(model)
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias], "trust_ratio": fused_opt.TrustRatio("clars")}]
    assert fused_opt.SGD(groups, lr=0.1).track_parts().active


@pytest.fixture
def said(monkeypatch):
    """Warnings, as if none had been given yet."""
    monkeypatch.setattr(warn, "_said", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def test_a_probe_that_was_not_set_is_said_once(said):
    model = make()
    optimizer = clars(model.parameters())
    parts = optimizer.track_parts("probe")
    for _ in range(3):
        model(X).sum().backward()
        optimizer.step()
    (warning,) = said
    assert "track_parts('probe') without .set()" in str(warning.message)
    parts.set({model[0].weight: 1.0})
    optimizer.step()
    assert len(said) == 1


def test_clars_without_parts_is_said_once(said):
    p = nn.Parameter(torch.ones(2, 2))
    warn_without_parts(fused_opt.LARS([p], lr=0.1).param_groups)
    assert not said
    for _ in range(3):
        warn_without_parts(clars([p]).param_groups)
    (warning,) = said
    assert "CLARS steps without track_parts" in str(warning.message)


@pytest.mark.parametrize("rechecked", [False, True])
def test_writes_that_the_version_does_not_count_are_rechecked_when_asked(rechecked):
    """As documented: they are not noticed, for looking costs as much as the step."""
    model = make()
    optimizer = clars(model.parameters())
    parts = optimizer.track_parts("microbatch")
    for factor in PARTS:
        (factor * model(X).square().sum()).backward()
    p = model[0].weight
    before, grad2 = parts.norms(p)
    p.grad.data.mul_(0.25)
    if rechecked:
        parts.recheck()
    scale = 0.25 if rechecked else 1.0
    assert parts.norms(p) == pytest.approx((scale * before, scale**2 * grad2), rel=1e-12)


class Reassigns(nn.Module):
    """A buffer replaced in forward, another one written, a third registered there, a fourth dropped."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        for name in ("replaced", "written", "both", "dropped"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, x):
        self.replaced = self.replaced + 0.41
        self.written.add_(0.41)
        self.both.add_(0.41)
        self.both = self.both + 1
        if self.dropped is not None:
            self.register_buffer("late", x.sum())
        self.dropped = None
        return self.layer(x)


def test_a_probe_restores_buffers_by_name():
    model = Reassigns()
    before = dict(model.named_buffers())
    fused_opt.probe_parts(model, lambda output, _: output.sum(), [(torch.ones(2, 3), None)] * 2, count=2)
    after = dict(model.named_buffers())
    assert list(after) == ["replaced", "written", "both", "dropped"]
    assert all(after[name] is before[name] for name in after)
    assert [buffer.item() for buffer in after.values()] == [0.0] * 4
