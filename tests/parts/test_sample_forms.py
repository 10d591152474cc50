"""Norms by sample of modules that do not do what their class says: found out, and called again instead."""

import copy
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm

import fused_opt
from fused_opt.parts import per_sample_norms

B = 5


def losses(output):
    """One loss per sample, of very different sizes."""
    return (output + 0.3).square().flatten(1).sum(1) * 4.0 ** torch.arange(len(output), dtype=output.dtype)


def one_by_one(model, x, clone=copy.deepcopy):
    """The sum over the samples of the norms of their gradients, by parameter; the model keeps its buffers."""
    sums = {name: 0.0 for name, p in model.named_parameters() if p.requires_grad}
    for i in range(len(x)):
        alone = clone(model)
        (losses(alone(x[i : i + 1])).sum() * 4.0**i).backward()
        for name in sums:
            grad = alone.get_parameter(name).grad
            sums[name] += 0.0 if grad is None else grad.norm().item()
    return sums


def check(model, x):
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
    parts = optimizer.track_parts("sample", model=model)
    truth = one_by_one(model, x)
    for _ in range(2):
        losses(model(x)).sum().backward()
        found = {name: parts.norms(p)[0] for name, p in model.named_parameters() if p.requires_grad}
        assert found == pytest.approx(truth, rel=1e-9)
        assert set(parts.counts().values()) == {len(x)}
        parts.reset()
        model.zero_grad()
    return parts


class Standardized(nn.Conv2d):
    """Weight standardization, as it is often written."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Circular(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="circular"), weight, bias)


def patched():
    conv = nn.Conv2d(2, 3, 3)
    conv._conv_forward = types.MethodType(lambda self, x, weight, bias: F.conv2d(x, weight.tanh(), bias), conv)
    return conv


@pytest.mark.parametrize("make", [lambda: Standardized(2, 3, 3), lambda: Circular(2, 3, 3), patched])
def test_convolutions_with_a_forward_of_their_own(make):
    torch.manual_seed(0)
    parts = check(nn.Sequential(make().double()), torch.randn(B, 2, 6, 5, dtype=torch.float64))
    assert not parts._without_forms  # never tried


@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Linear(4, 3), (4,)), (lambda: nn.Conv1d(4, 3, 2), (4, 5)), (lambda: nn.LayerNorm(4), (2, 4))],
)
def test_a_form_that_does_not_add_up_to_the_gradient_is_given_up(make, shape, which, monkeypatch):
    torch.manual_seed(0)
    layer = make().double()
    ndim, forms = per_sample_norms.FORMS[type(layer).forward]
    form = forms[which]
    wrong = {**forms, which: lambda m, x, e: form(m, x, 1.5 * e)}
    monkeypatch.setitem(per_sample_norms.FORMS, type(layer).forward, (ndim, wrong))
    parts = check(nn.Sequential(layer), torch.randn(B, *shape, dtype=torch.float64))
    assert set(parts._without_forms) == {layer}


def test_a_table_whose_form_is_right_keeps_it_where_its_gradient_is_sparse():
    torch.manual_seed(0)
    table = nn.Embedding(9, 4, sparse=True).double()
    model, tokens = nn.Sequential(table, nn.Flatten()), torch.randint(9, (B, 6))
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
    parts = optimizer.track_parts("sample", model=model)
    losses(model(tokens)).sum().backward()
    assert table.weight.grad.is_sparse
    assert not parts._without_forms
    assert set(parts._checked) == {table.weight}


def test_a_gradient_from_elsewhere_is_refused_the_first_time():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
    optimizer.track_parts("sample", model=model)
    loss = losses(model(torch.randn(B, 4, dtype=torch.float64))).sum() + 1e4 * model[0].weight.square().sum()
    with pytest.raises(RuntimeError, match=r"(?s)by sample of 0\.weight.*do not add up to its gradient.*'microbatch'"):
        loss.backward()


def test_a_gradient_of_zero_proves_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    nn.init.zeros_(model[1].weight)
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
    parts = optimizer.track_parts("sample", model=model)
    losses(model(torch.randn(B, 4, dtype=torch.float64))).sum().backward()
    assert set(parts._checked) == {model[1].weight, model[1].bias}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**18])
def test_gradients_that_16_bits_round_underflow_or_overflow_pass(dtype, scale):
    torch.manual_seed(0)
    model = nn.Linear(64, 8).to(dtype)
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
    parts = optimizer.track_parts("sample", model=model)
    (model(torch.randn(64, 64, dtype=dtype)).float().square().sum() * scale).backward()
    assert parts.norms(model.weight)[0] > 0
    assert not parts._without_forms


class Parametrized(nn.Module):
    def forward(self, weight):
        return weight.tanh()


def parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Parametrized())
    return layer


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


MADE = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "spectral_norm in evaluation": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "parametrized": lambda: parametrized(nn.Linear(4, 3)),
    "weight_norm, old": lambda: weight_norm(nn.Linear(4, 3)),
    "pruned": lambda: pruned(nn.Linear(4, 3)),
    "pruned twice": lambda: pruned(pruned(nn.Linear(4, 3))),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*weight_norm.*:DeprecationWarning")
@pytest.mark.parametrize("name", MADE)
def test_weights_that_are_made_of_parameters(name):
    torch.manual_seed(0)

    def clone(model):  # those with hooks of the old kind cannot be copied
        other = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), MADE[name]()).double()
        other.load_state_dict(model.state_dict())
        return other

    model = clone(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), MADE[name]()).double())
    x = torch.randn(B, 4, dtype=torch.float64)
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
    parts = optimizer.track_parts("sample", model=model)
    for _ in range(2):
        before = clone(model)
        losses(model(x)).sum().backward()
        # spectral_norm iterates in every forward: each sample alone begins where this one began.
        found = {name: parts.norms(p)[0] for name, p in model.named_parameters()}
        assert found == pytest.approx(one_by_one(before, x, clone), rel=1e-9)
        before(x)
        for (name_, buffer), other in zip(model.named_buffers(), before.buffers(), strict=True):
            assert torch.equal(buffer, other), name_  # nothing but the forward has written it
        assert all(m.training == other.training for m, other in zip(model.modules(), before.modules()))
        assert not torch._C._functorch.is_functorch_wrapped_tensor(model[2].weight)
        optimizer.zero_grad()
        parts.reset()


def test_old_spectral_norm_is_refused_in_words():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(old_spectral_norm(nn.Linear(4, 3)))
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"0 \(Linear\) has torch\.nn\.utils\.spectral_norm.*parametrizations\.spectral_norm"
    ):
        optimizer.track_parts("sample", model=model)


class Recurrent(nn.Module):
    """Begins with a state and returns the last one, too; both are layers x samples x features."""

    def __init__(self, kind, layers):
        super().__init__()
        self.layers = layers
        self.cell = kind(3, 2, num_layers=layers, batch_first=True)

    def forward(self, x):
        x, state = x.split([12, 2 * self.layers], 1)
        state = state.unflatten(1, (self.layers, 2)).transpose(0, 1).contiguous()
        lstm = isinstance(self.cell, nn.LSTM)
        output, last = self.cell(x.unflatten(1, (4, 3)), (state, state) if lstm else state)
        return torch.cat([output.flatten(1), (last[1] if lstm else last).transpose(0, 1).flatten(1)], 1)


@pytest.mark.parametrize("layers", [1, B])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_modules_with_a_first_and_a_last_state(kind, layers):
    """As many layers as samples, too: the first dimension of a state counts layers."""
    torch.manual_seed(0)
    check(Recurrent(kind, layers).double(), torch.randn(B, 12 + 2 * layers, dtype=torch.float64))


@pytest.mark.parametrize("compiled", ["model", "whole", "in place"])
def test_a_model_that_was_compiled_and_called_before(compiled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(B, 4, dtype=torch.float64)
    truth = one_by_one(model, x)
    torch.compiler.reset()
    try:
        if compiled == "in place":
            model.compile(backend="aot_eager")
            run = model
        else:
            run = torch.compile(model, backend="aot_eager")
        run(x).sum().backward()
        model.zero_grad()
        optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
        parts = optimizer.track_parts("sample", model=run if compiled == "whole" else model)
        for _ in range(2):
            losses(run(x)).sum().backward()
            found = {name: parts.norms(p)[0] for name, p in model.named_parameters()}
            assert found == pytest.approx(truth, rel=1e-9)
            parts.reset()
            model.zero_grad()
        parts.remove()
        losses(run(x)).sum().backward()
        assert parts.counts() == {}
    finally:
        torch.compiler.reset()
