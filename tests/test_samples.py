"""The norms of the gradient's parts by sample against gradients computed one by one, and the probe."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import clones
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_opt
from fused_opt.parts import per_sample_norms as forms
from fused_opt.parts import samples
from fused_opt.parts.microbatches import Microbatches
from fused_opt.parts.probe import Probe, probe_parts
from fused_opt.parts.samples import Samples


class Layered(nn.Sequential):
    """A model whose layers' outputs are written in place afterwards."""

    def __init__(self, *layers):
        super().__init__(*[layer for of_one in layers for layer in (of_one, nn.LeakyReLU(0.3, inplace=True))])


class Twice(nn.Module):
    """One module used twice in a forward."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    """A table that is also the weight of the last layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.table(tokens)))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.attention(x, x, x, attn_mask=mask)[0]


class Keyed(nn.Module):
    """Called by keyword, with an output that is not a tensor, and with another tensor that all samples share."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.linspace(0.5, 2, 4))
            self.shift = nn.Parameter(torch.linspace(-1, 1, 4))

        def forward(self, x, weights, *, flip=False):
            y = x @ weights
            return {"a": y * self.gain, "rest": [x.sin() + self.shift if flip else x]}

    def __init__(self):
        super().__init__()
        self.mixer = self.Mixer()

    def forward(self, x):
        weights = torch.arange(16.0, dtype=x.dtype).reshape(4, 4) / 16
        outputs = self.mixer(x, weights=weights, flip=True)
        return outputs["a"] + 2 * outputs["rest"][0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0]


class Undecided(nn.Module):
    """A forward that torch.func.vmap cannot follow."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, x):
        return x * self.weight if x.sum().item() > -1e9 else x


class WithToken(nn.Module):
    """A model that owns a parameter beside its modules."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.linspace(-1, 1, 4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.cat([self.token.expand(len(x), 1, -1), x], 1))


def eval_batch_norm(channels, kind=nn.BatchNorm2d):
    norm = kind(channels)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return norm.eval()


B = 5
RANDN = {
    "linear": (lambda: Layered(nn.Linear(6, 4), nn.Linear(4, 3, bias=False)), (6,)),
    "linear, long": (lambda: Layered(nn.Linear(3, 2), nn.Linear(2, 2)), (40, 3)),
    "linear, wide": (lambda: Layered(nn.Linear(30, 40)), (2, 30)),
    "linear, 4-d": (lambda: Layered(nn.Linear(6, 5)), (2, 3, 6)),
    "linear, frozen weight": (lambda: freeze(Layered(nn.Linear(6, 4)), "0.weight"), (3, 6)),
    "linear, frozen bias": (lambda: freeze(Layered(nn.Linear(6, 4)), "0.bias"), (3, 6)),
    "conv1d": (lambda: Layered(nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)), (4, 11)),
    "conv2d": (lambda: Layered(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, (2, 3), stride=(2, 1), bias=False)), (3, 8, 9)),
    "conv2d, wide": (lambda: Layered(nn.Conv2d(20, 30, 3)), (20, 4, 4)),
    "conv2d, grouped": (
        lambda: Layered(nn.Conv2d(4, 8, 3, stride=(2, 3), padding=(1, 2), dilation=(2, 1), groups=4)),
        (4, 9, 8),
    ),
    "conv2d, same": (lambda: Layered(nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2))), (2, 7, 6)),
    "conv2d, reflect": (lambda: Layered(nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect")), (2, 5, 6)),
    "conv2d, circular": (lambda: Layered(nn.Conv2d(2, 3, 3, padding=2, padding_mode="circular")), (2, 5, 6)),
    "conv3d": (lambda: Layered(nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1))), (2, 3, 4, 5)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 2), nn.LayerNorm(2, bias=False)), (3, 4)),
    "layer norm, 2-d": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), (4,)),
    "group norm": (lambda: Layered(nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6)), (2, 4, 3)),
    "group norm, 2-d": (lambda: nn.Sequential(nn.Linear(3, 6), nn.GroupNorm(2, 6)), (3,)),
    "instance norm": (lambda: Layered(nn.InstanceNorm2d(3, affine=True)), (3, 4, 5)),
    "instance norm, tracked": (
        lambda: Layered(nn.InstanceNorm1d(3, affine=True, track_running_stats=True).eval()),
        (3, 4),
    ),
    "batch norm in evaluation": (lambda: Layered(nn.Conv2d(2, 4, 2), eval_batch_norm(4)), (2, 4, 3)),
    "batch norm in evaluation, 2-d": (lambda: nn.Sequential(nn.Linear(3, 4), eval_batch_norm(4, nn.BatchNorm1d)), (3,)),
    "rms norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4)), (2, 3)),
    "prelu": (lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.PReLU(3)), (2, 4)),
    "conv transpose": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2)), (2, 3, 4)),
    "attention": (Attention, (B, 4)),  # as many tokens as samples: the mask has their shape
    "attention, own keys": (lambda: Attention(kdim=4, vdim=4, add_bias_kv=True, bias=False), (3, 4)),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), (3, 4)),
    "lstm": (Recurrent, (4, 3)),
    "keywords": (Keyed, (3, 4)),
    "no vmap": (lambda: nn.Sequential(nn.Linear(3, 4), Undecided()), (3,)),
    "own parameter": (WithToken, (2, 4)),
    "twice, linear": (lambda: Twice(nn.Linear(4, 4)), (4,)),
    "twice, 3-d": (lambda: Twice(nn.Linear(4, 4)), (3, 4)),
    "twice, conv": (lambda: Twice(nn.Conv2d(2, 2, 3, padding=1, groups=2)), (2, 4, 5)),
    "twice, layer norm": (lambda: Twice(nn.LayerNorm(4)), (3, 4)),
    "twice, prelu": (lambda: Twice(nn.PReLU()), (3,)),
}
TOKENS = {
    "embedding": (lambda: nn.Embedding(4, 3), (6,)),
    "embedding, one token": (lambda: nn.Embedding(4, 3), ()),
    "embedding, padded": (lambda: nn.Embedding(4, 3, padding_idx=2), (2, 6)),
    "embedding, sparse": (lambda: nn.Embedding(4, 3, sparse=True), (6,)),
    "tied": (Tied, (6,)),
}


KEPT = []  # trackers, and the optimizers that they would go with


def track(parameters, model, kind=Samples):
    optimizer = fused_opt.CLARS(parameters, lr=0.1)
    parts = kind(optimizer, model)
    KEPT.append((parts, optimizer))
    return parts


def freeze(model, name):
    model.get_parameter(name).requires_grad_(False)
    return model


def example(name, seed=0):
    """A model, and five samples of what it takes."""
    torch.manual_seed(seed)
    if name in TOKENS:
        make, shape = TOKENS[name]
        return make().double(), torch.randint(4, (B, *shape))
    make, shape = RANDN[name]
    return make().double(), torch.randn(B, *shape, dtype=torch.float64)


def losses(output):
    """One loss per sample, of very different sizes."""
    weights = 2.0 ** torch.arange(len(output), dtype=output.dtype)
    return (output + 0.3).square().flatten(1).sum(1) * weights


def one_by_one(model, x, reduce=torch.mean):
    """For every parameter the norms of what each sample adds to its gradient."""
    model = copy.deepcopy(model)
    n = len(x)
    share = 1.0 if reduce is torch.sum else 1 / n
    norms = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    for i in range(n):
        model.zero_grad()
        (losses(model(x[i : i + 1])).sum() * 2.0**i * share).backward()
        for name, of_p in norms.items():
            gradient = model.get_parameter(name).grad
            of_p.append(0.0 if gradient is None else gradient.to_dense().norm().item())
    return norms


def expected(model, x, reduce=torch.mean):
    return {name: sum(norms) for name, norms in one_by_one(model, x, reduce).items()}


def found(model, parts):
    return {name: parts.norms(p)[0] for name, p in model.named_parameters() if p.requires_grad}


def close(a, b, rel=1e-10):
    assert a == pytest.approx(b, rel=rel, abs=1e-14)


@pytest.mark.filterwarnings("error", "ignore:Using padding=.same.")
@pytest.mark.parametrize("limit", [1, 300, 2**24], ids="at most {} elements".format)
@pytest.mark.parametrize("name", [*RANDN, *TOKENS])
def test_norms_equal_those_of_gradients_computed_one_by_one(name, limit, monkeypatch):
    monkeypatch.setattr(samples, "LARGEST", limit)
    model, x = example(name)
    truth = expected(model, x)
    plain = copy.deepcopy(model)
    losses(plain(x)).mean().backward()
    parts = track(model.parameters(), model)
    losses(model(x)).mean().backward()
    close(found(model, parts), truth)
    assert all(norm > 0 for norm in truth.values())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if p.requires_grad:
            assert torch.equal(p.grad.to_dense(), q.grad.to_dense())
            assert parts.norms(p)[1] == pytest.approx(p.grad.to_dense().square().sum().item(), rel=1e-12)
            assert set(parts.counts().values()) == {B}


def test_both_forms_of_a_product_are_taken_where_they_are_cheaper():
    p = torch.empty(6, 7)
    for t, through_gram in ((1, True), (3, True), (4, False), (50, False)):
        part = forms.Factors(torch.randn(2, 1, t, 7).double(), torch.randn(2, 1, t, 6).double())
        assert forms._through_gram(part) == through_gram
        truth = (part.e.mT @ part.a).square().sum((1, 2, 3))
        assert torch.allclose(forms.norm2(p, part), truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_the_reduction_of_the_loss_does_not_matter(reduce):
    model, x = example("conv2d")
    truth = expected(model, x, reduce)
    parts = track(model.parameters(), model)
    reduce(losses(model(x))).backward()
    close(found(model, parts), truth)


def test_one_sample_has_exactly_the_norm_of_the_gradient():
    model, x = example("linear, wide")
    model = model.float()
    parts = track(model.parameters(), model)
    losses(model(x[:1].float())).mean().backward()
    for p in model.parameters():
        norms, norm2 = parts.norms(p)
        assert norms >= norm2**0.5
        assert norms == pytest.approx(norm2**0.5, rel=1e-6)


def test_an_empty_batch_has_no_norm():
    model, x = example("linear")
    parts = track(model.parameters(), model)
    losses(model(x[:0])).sum().backward()
    assert parts.norms(model[0].weight) == (0.0, 0.0)
    assert set(parts.counts().values()) == {0}


def test_samples_of_several_backwards_add_up_until_the_step():
    model, x = example("conv2d")
    truth = [expected(model, part) for part in (x[:2], x[2:])]
    parts = track(model.parameters(), model)
    for part in (x[:2], x[2:]):
        losses(model(part)).mean().backward()
    close(found(model, parts), {name: truth[0][name] + truth[1][name] for name in truth[0]})
    assert set(parts.counts().values()) == {B}
    parts.reset()
    assert parts.counts() == {}
    model.zero_grad()
    losses(model(x[:2])).mean().backward()
    close(found(model, parts), truth[0])


@pytest.mark.parametrize("name", ["linear", "twice, linear", "keywords", "embedding"])
def test_a_retained_graph_counts_every_time(name):
    model, x = example(name)
    truth = expected(model, x)
    parts = track(model.parameters(), model)
    loss = losses(model(x)).mean()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    close(found(model, parts), {name: 3 * norm for name, norm in truth.items()})


def test_calls_of_the_model_have_samples_of_their_own():
    model, x = example("twice, linear")
    truth = [expected(model, part) for part in (x[:2], x[2:])]
    parts = track(model.parameters(), model)
    (losses(model(x[:2])).mean() + losses(model(x[2:])).mean()).backward()
    close(found(model, parts), {name: truth[0][name] + truth[1][name] for name in truth[0]})
    assert set(parts.counts().values()) == {B}


def test_scaling_and_clipping_after_the_backward_scale_the_norms():
    model, x = example("conv2d")
    truth = expected(model, x)
    parts = track(model.parameters(), model)
    (losses(model(x)).mean() * 1024).backward()
    close(found(model, parts), {name: 1024 * norm for name, norm in truth.items()})
    for p in model.parameters():
        p.grad.div_(1024)
    close(found(model, parts), truth)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    close(found(model, parts), {name: of_p * 0.1 / (norm.item() + 1e-6) for name, of_p in truth.items()})


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_with_activation_checkpointing(use_reentrant):
    model, x = example("conv2d")
    truth = expected(model, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    outer = Checkpointed()
    parts = track(outer.parameters(), outer)
    losses(outer(x.requires_grad_())).mean().backward()
    close(found(model, parts), truth)


def test_under_autocast():
    model, x = example("conv2d")
    model, x = model.float(), x.float()
    truth = expected(model, x)
    parts = track(model.parameters(), model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    losses(output.float()).mean().backward()
    close(found(model, parts), truth, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    layer = nn.Linear(300, 2, bias=False).to(dtype)
    parts = track(layer.parameters(), layer)
    layer(torch.full((4, 300), 40.0, dtype=dtype)).sum().backward()  # squares of the gradient overflow in float16
    assert parts.norms(layer.weight)[0] == pytest.approx(4 * 40 * 600**0.5, rel=1e-5)


def test_a_backward_under_autocast_does_not_round_the_norms():
    model = nn.Linear(6, 4)
    x = torch.randn(B, 3, 6)
    truth = expected(model, x)
    parts = track(model.parameters(), model)
    loss = losses(model(x)).mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    close(found(model, parts), truth, rel=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv2d", "prelu"])
def test_samples_are_taken_in_turns(name, monkeypatch):
    model, x = example(name)
    turns = []
    monkeypatch.setattr(samples, "LARGEST", 1)
    monkeypatch.setattr(samples, "norm2", lambda p, part: turns.append(len(part[0])) or forms.norm2(p, part))
    parts = track([model[0].weight], model)
    losses(model(x)).mean().backward()
    assert turns == [1] * B
    assert parts.counts() == {"0 of group 0": B}


def test_a_module_called_again_is_not_tracked_meanwhile(monkeypatch):
    model, x = example("own parameter")
    calls = []
    call = samples._Call
    monkeypatch.setattr(samples, "_Call", lambda *args: calls.append(args[0]) or call(*args))
    track(model.parameters(), model)
    losses(model(x)).mean().backward()
    assert calls == ["layer", "the model"]


def test_a_backward_that_fails_can_be_made_again():
    model, x = example("twice, linear")
    truth = expected(model, x)
    parts = track(model.parameters(), model)
    outputs = []
    model.layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    loss = losses(model(x)).mean()

    def fail(gradient):
        raise KeyError("once")

    handle = outputs[0].register_hook(fail)
    with pytest.raises(KeyError):
        loss.backward(retain_graph=True)
    handle.remove()
    loss.backward()
    close(found(model, parts), truth)


def test_a_hook_that_changes_the_output_stays_outside():
    model, x = example("linear")
    for layer in (model[0], model[2]):
        layer.register_forward_hook(lambda module, args, output: 3 * output)
    truth = expected(model, x)
    parts = track(model.parameters(), model)
    losses(model(x)).mean().backward()
    close(found(model, parts), truth)


def test_a_module_may_be_called_by_itself_with_other_samples():
    model, x = example("linear")
    parts = track(model.parameters(), model)
    model(x)
    truth = expected(model[0], x[:2])
    losses(model[0](x[:2])).mean().backward()
    close(found(model[0], parts), truth)


def test_parameters_beside_the_optimized_ones_cost_nothing():
    model, x = example("linear")
    truth = expected(model, x)
    parts = track([model[2].weight], model)
    assert not model[0]._forward_hooks
    losses(model(x)).mean().backward()
    assert parts.norms(model[0].weight) is None
    assert parts.norms(model[2].weight)[0] == pytest.approx(truth["2.weight"], rel=1e-10)


@pytest.mark.parametrize("kind", [Microbatches, Samples])
def test_gradients_asked_of_autograd_leave_everything_as_it_was(kind):
    model, x = example("linear")
    truth = expected(model, x)
    parts = track(model.parameters(), model, kind)
    losses(model(x)).mean().backward()
    before = [p.grad.clone() for p in model.parameters()]
    norms = found(model, parts)
    torch.autograd.grad(losses(model(x)).sum(), list(model.parameters()))
    inputs = x.clone().requires_grad_()
    torch.autograd.grad(losses(model(inputs)).sum(), inputs)
    assert all(torch.equal(p.grad, q) for p, q in zip(model.parameters(), before, strict=True))
    assert found(model, parts) == norms
    if kind is Samples:
        close(norms, truth)
        assert not parts._pending


@pytest.mark.parametrize("kind", [Microbatches, Samples])
def test_a_model_may_move_to_another_dtype(kind):
    model, x = example("linear")
    model.float()
    parts = track(model.parameters(), model, kind)
    losses(model(x.float())).mean().backward()
    parts.reset()
    model.zero_grad()
    model.double()
    truth = expected(model, x)
    for _ in range(2):
        losses(model(x)).mean().backward()
    if kind is Samples:
        close(found(model, parts), {name: 2 * norm for name, norm in truth.items()})
    else:
        close(found(model, parts), {name: p.grad.norm().item() for name, p in model.named_parameters()})


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


def by_hand(model, x, parts, lr=0.5, steps=3):
    """CLARS in plain PyTorch, from the parts' norms: coefficient 0.01, cap 0.1, eps 1e-6, momentum 0.9, decay 2e-4."""
    model, buffers = copy.deepcopy(model), {}
    for step in range(steps):
        sums = parts(model, x, step)
        model.zero_grad()
        losses(model(x)).mean().backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                direction = p.grad + 2e-4 * p
                ratio = min(0.1, 0.01 * p.norm().item() / (sums[name] + 1e-6)) if p.ndim > 1 else 1.0
                buffers[name] = 0.9 * buffers[name] + direction if name in buffers else direction
                p -= lr * ratio * buffers[name]
    return model


@pytest.mark.parametrize("name", ["conv2d", "tied", "attention", "twice, 3-d", "group norm"])
def test_clars_steps_by_the_samples(name, backend):
    model, x = example(name)
    truth = by_hand(model, x, lambda model, x, _: expected(model, x))
    optimizer = fused_opt.CLARS(model.named_parameters(), lr=0.5, backend=backend)
    optimizer.track_parts("sample", model=model)
    for _ in range(3):
        optimizer.zero_grad()
        losses(model(x)).mean().backward()
        optimizer.step()
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-14)
    assert any(0 < ratio < 0.1 for ratio in optimizer.trust_ratios().values())


def test_clars_steps_alike_with_scaled_losses(backend):
    model, x = example("conv2d")
    other = copy.deepcopy(model)
    for of_model, scale in ((model, 1.0), (other, 256.0)):
        optimizer = fused_opt.CLARS(of_model.parameters(), lr=0.5, backend=backend, max_grad_norm=0.1)
        optimizer.track_parts("sample", model=of_model)
        for _ in range(2):
            optimizer.zero_grad()
            (losses(of_model(x)).mean() * scale).backward()
            for p in of_model.parameters():
                p.grad.div_(scale)
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-14)


def halves(x, count=2):
    return [(x[i::count], None) for i in range(count)]


def mean_loss(output, target):
    assert target is None
    return output.square().mean()


def test_the_probe_is_the_mean_of_the_norms_and_changes_nothing():
    model, x = example("linear")
    model.insert(1, nn.Dropout(0.5))
    model.append(nn.BatchNorm1d(3).double())
    losses(model(x)).mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    rng = torch.get_rng_state()
    norms = probe_parts(model, mean_loss, halves(x) + halves(x), count=2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(b, before) for b, before in zip(model.buffers(), buffers, strict=True))
    truth = dict.fromkeys(model.parameters(), 0.0)
    for half, _ in halves(x):
        torch.set_rng_state(rng)
        model.zero_grad()
        model(half).square().mean().backward()
        for p in truth:
            truth[p] += p.grad.norm().item() / 2
    assert norms == pytest.approx(truth, rel=1e-12)


def test_the_probe_draws_other_batches_each_time():
    model = nn.Linear(2, 1)
    data = torch.utils.data.TensorDataset(torch.randn(64, 2), torch.randn(64, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    first, second = (probe_parts(model, nn.functional.mse_loss, loader, count=2) for _ in range(2))
    assert first != second


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
def test_the_probe_calls_models_of_several_inputs(kind):
    model = nn.Bilinear(2, 3, 1).double()
    a, b = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    given = (a, b) if kind == "tuple" else {"input1": a, "input2": b}
    norms = probe_parts(model, mean_loss, [(given, None)], parameters=[model.bias], count=1)
    assert norms == {model.bias: pytest.approx(2 * model(a, b).mean().abs().item(), rel=1e-12)}


def test_a_probe_that_fails_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    batches = [(torch.randn(4, 2), None), (torch.randn(4, 5), None)]
    for count, given, error, words in (
        (0, batches, ValueError, "Invalid count of batches: 0"),
        (2, batches[:1], ValueError, "takes 2 batches and was given 1"),
        (2, batches, RuntimeError, "shapes cannot be multiplied"),
    ):
        with pytest.raises(error, match=words):
            probe_parts(model, mean_loss, given, count=count)
        assert model[1].num_batches_tracked == 0
        assert model[0].weight.grad is None


def test_clars_steps_by_the_probe(backend):
    model, x = example("conv2d")
    others = [(torch.randn_like(x), None) for _ in range(6)]

    def probed(model, x, step):
        norms = probe_parts(model, mean_loss, others[2 * step :], count=2)
        return {name: norms[p] for name, p in model.named_parameters()}

    truth = by_hand(model, x, probed)
    optimizer = fused_opt.CLARS(model.parameters(), lr=0.5, backend=backend)
    parts = optimizer.track_parts("probe")
    for step in range(3):
        parts.set(probe_parts(model, mean_loss, others[2 * step :], count=2))
        optimizer.zero_grad()
        losses(model(x)).mean().backward()
        optimizer.step()
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["lars", "clars", "lamb"])
def test_a_probe_is_for_clars_alone(kind, backend):
    p = nn.Parameter(torch.full((2, 2), 3.0))
    (q,) = clones([p])
    ratios = []
    for parameter, probing in ((p, True), (q, False)):
        ratio = fused_opt.TrustRatio(kind, coefficient=0.01)
        optimizer = fused_opt.SGD([("p", parameter)], lr=0.1, trust_ratio=ratio, backend=backend)
        if probing and kind == "clars":
            optimizer.track_parts("probe").set({p: 100.0})
        elif probing:
            with pytest.raises(ValueError, match="no group of this optimizer has CLARS's trust ratio"):
                optimizer.track_parts("probe")
        parameter.square().sum().backward()
        optimizer.step()
        ratios.append(optimizer.trust_ratios()["p"])
    assert (ratios[0] == ratios[1]) == (kind != "clars")
    assert kind != "clars" or ratios[0] == pytest.approx(0.01 * 6 / 100, rel=1e-6)


def test_what_was_probed_stays_until_set_again_and_goes_with_remove():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = fused_opt.CLARS([p, q], lr=0.1)
    parts = optimizer.track_parts("probe")
    assert isinstance(parts, Probe)
    parts.set({p: 2.0})
    (p.sum() + q.sum()).backward()
    optimizer.step()
    assert parts.norms(p) == (2.0, -1.0)
    assert parts.norms(q) is None
    assert parts.counts() == {"0 of group 0": 1}
    with pytest.raises(ValueError, match=r"\[-1\.0\]; they are at least 0"):
        parts.set({p: -1.0})
    assert parts.norms(p) == (2.0, -1.0)
    assert parts.active
    parts.remove()
    assert not parts.active
    assert parts.norms(p) is None
    optimizer.track_parts("microbatch")
