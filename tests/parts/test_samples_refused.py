"""Models whose samples cannot be told apart are refused in words; and nothing is left behind or kept alive."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from support.sample_models import (
    Attention,
    B,
    close,
    example,
    expected,
    found,
    losses,
    track,
)
from torch import nn

import fused_opt


class BatchStandardized(nn.Module):
    """Mixes its samples without saying so."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.gain * (x - x.mean(0))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, x):
        return x + self.table(torch.arange(x.shape[1]))


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(
    ("make", "shape", "words"),
    [
        (BatchStandardized, (4,), r"gain.* do not add up to its gradient.*its samples mix"),
        (Functional, (4,), r"layer\.(weight|bias) has a gradient that comes from no call of the module that owns it"),
        (Positions, (3, 4), r"table \(Embedding\) was called with a tensor of shape \(3,\).*called with 5\. Expand"),
        (Rows, (3, 4), r"layer \(Linear\) was called with a tensor of shape \(15, 4\).*called with 5"),
        (
            lambda: Attention(dropout=0.5),
            (3, 4),
            r"attention \(MultiheadAttention\) draws random numbers.*dropout to 0",
        ),
    ],
)
def test_what_has_no_samples_is_refused_in_words(make, shape, words):
    model = make().double()
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
    optimizer.track_parts("sample", model=model)
    x = torch.randn(B, *shape, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"(?s){words}"):
        losses(model(x)).mean().backward()
    optimizer._parts.remove()
    losses(model(x)).mean().backward()  # nothing of it is left


def test_unbatched_input_is_refused_in_words():
    model = nn.Conv2d(2, 3, 1)
    track(model.parameters(), model)
    with pytest.raises(RuntimeError, match=r"the model \(Conv2d\).*shape \(2, 4, 4\).*dimension 0 of at least 4"):
        model(torch.randn(2, 4, 4))


def test_batch_norm_in_training_mode_is_refused_in_words():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
    words = r"1 \(BatchNorm2d\) normalizes with the statistics of the whole batch.*GroupNorm.*\.eval\(\).*'microbatch'"
    with pytest.raises(ValueError, match=words):
        optimizer.track_parts("sample", model=model)
    assert not model._forward_hooks
    assert not model[0]._forward_hooks

    model.eval()
    optimizer.track_parts("sample", model=model)
    model.train()
    with pytest.raises(RuntimeError, match=words):
        model(torch.randn(2, 1, 3, 3))
    assert model[1].num_batches_tracked == 0
    with torch.no_grad():
        model(torch.randn(2, 1, 3, 3))
    model.eval()
    losses(model(torch.randn(2, 1, 3, 3))).mean().backward()
    optimizer._parts.remove()
    losses(model.train()(torch.randn(2, 1, 3, 3))).mean().backward()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.BatchNorm1d(3, affine=False), r"BatchNorm1d\) normalizes with the statistics of the whole batch"),
        (lambda: nn.BatchNorm1d(3, track_running_stats=False).eval(), r"normalizes with the statistics"),
        (lambda: nn.MultiheadAttention(4, 2), r"samples in dimension 1; batch_first=True"),
        (lambda: nn.GRU(4, 2), r"samples in dimension 1; batch_first=True"),
        (lambda: nn.Embedding(4, 2, scale_grad_by_freq=True), r"scale_grad_by_freq=False does not"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), r"1\.weight, 1\.bias: complex .*'microbatch' takes them"),
    ],
)
def test_models_whose_samples_cannot_be_told_apart_are_refused(make, words):
    model = nn.Sequential(nn.Linear(3, 3), make())
    with pytest.raises(ValueError, match=words):
        track(model.parameters(), model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_arguments_are_refused_in_words():
    model, other = nn.Linear(2, 3), nn.Linear(5, 2)
    optimizer = fused_opt.CLARS([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"model= takes an nn\.Module, not None"):
        optimizer.track_parts("sample")
    with pytest.raises(ValueError, match=r"shapes \(2, 5\), \(2,\) are optimized and not in the model"):
        optimizer.track_parts("sample", model=model)
    with pytest.raises(ValueError, match=r"'rank'; there are 'microbatch', 'sample' and 'probe'"):
        optimizer.track_parts("rank")
    optimizer.track_parts("sample", model=nn.Sequential(model, other))
    with pytest.raises(ValueError, match=r"tracked already; remove\(\)"):
        optimizer.track_parts("microbatch")


def test_uses_with_different_numbers_of_samples_are_refused():
    layer = nn.Linear(2, 2)
    track(layer.parameters(), nn.Sequential(layer))  # the model itself is not called
    with pytest.raises(RuntimeError, match=r"is used by 0 with [34] and 0 with [34] samples in one call"):
        (layer(torch.randn(3, 2)).sum() + layer(torch.randn(4, 2)).sum()).backward()


def test_removed_it_leaves_nothing_behind():
    model, x = example("conv2d")
    parts = track(model.parameters(), model)
    loss = losses(model(x)).mean()
    assert len(parts._inputs) == 2
    assert parts.active
    parts.remove()
    assert not parts.active
    assert len(parts._inputs) == 0
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    loss.backward()
    assert all(p.grad is not None and parts.norms(p) is None for p in model.parameters())
    assert len(parts._inputs) == 0
    assert not parts._pending


@pytest.mark.parametrize("how", ["backward", "remove", "drop", "autograd.grad"])
@pytest.mark.parametrize("name", ["linear", "twice, conv", "keywords", "lstm", "own parameter"])
def test_nothing_is_kept_alive(name, how):
    model, x = example(name)
    parts = track(model.parameters(), model)
    loss = losses(model(x)).mean()
    kept = [
        weakref.ref(leaf) for leaves, *_ in parts._inputs.values() for leaf in leaves if isinstance(leaf, torch.Tensor)
    ]
    assert kept
    assert all(leaf() is not None for leaf in kept)
    if how == "backward":
        loss.backward()  # the loss, and with it the graph's nodes, are still there
    elif how == "remove":
        parts.remove()
    elif how == "drop":
        del loss
    else:
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        del loss
    assert all(leaf() is None for leaf in kept)
    assert not parts._pending


def test_the_tracker_dies_with_the_optimizer():
    model, x = example("conv2d")
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
    optimizer.track_parts("sample", model=model)
    losses(model(x)).mean().backward()
    optimizer.step()
    dead = [weakref.ref(model[0].weight), weakref.ref(model[0]), weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [r() is None for r in dead] == [True] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_the_model_are_not_tracked(copied):
    model, x = example("conv2d")
    truth = expected(model, x)
    parts = track(model.parameters(), model)
    losses(model(x)).mean().backward()
    other = copied(model)
    other.zero_grad()
    losses(other(x)).mean().backward()
    close(found(model, parts), truth)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert parts.norms(q) is None
    parts.reset()
    model.zero_grad()
    losses(model(x)).mean().backward()
    close(found(model, parts), truth)
