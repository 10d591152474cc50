"""GradInit with what programs bring along: activation checkpoints, labels within the batch, another optimizer."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_opt.gradinit import gradinit

cross_entropy = nn.functional.cross_entropy


class Deep(nn.Module):
    """Blocks with a batch norm, each of which runs as ``run`` says."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(3))
        self.head, self.run = nn.Linear(8, 4), run

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x.to(block[0].weight.dtype))
        return self.head(x)


class Labelled(nn.Module):
    """Computes its own loss where it is given labels, as transformers' models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, input_ids, labels=None):
        output = type("Output", (), {})()
        output.logits = self.head(self.embedding(input_ids).mean(1).tanh())
        output.loss = None if labels is None else cross_entropy(output.logits, labels)
        return output


@pytest.fixture
def vectors():
    torch.manual_seed(1)
    return [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(5)]


@pytest.fixture
def sentences():
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(10, (16, 5)), "labels": torch.randint(4, (16,))} for _ in range(5)]


def kept(block, x):
    return block(x)


def recomputed(block, x):
    return checkpoint(block, x, use_reentrant=False)


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def reentrant_behind_a_gradient(block, x):
    return reentrant(block, x.requires_grad_() if x.is_leaf else x)


@pytest.mark.parametrize("gamma", [0.3, math.inf], ids=["both branches", "first order"])
def test_scales_are_those_without_activation_checkpoints(gamma, vectors):
    results = []
    for run in (kept, recomputed):
        model = Deep(run)
        results.append(gradinit(model, cross_entropy, vectors, lr=0.05, gamma=gamma, iterations=12, progress=False))
        assert model.blocks[0][1].running_mean.abs().max() == 0
    assert {seen.updated_loss is None for seen in results[0].history} == ({True, False} if gamma == 0.3 else {False})
    assert results[1] == results[0]
    assert max(abs(scale - 1) for scale in results[0].scales.values()) > 0.1


@pytest.mark.parametrize("run", [reentrant, reentrant_behind_a_gradient])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_are_refused_by_the_names_of_what_they_hide(run, vectors):
    model = Deep(run)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"blocks\.0\.0\.weight, .*blocks\.2\.1\.bias are used .*use_reentrant=False"
    ):
        gradinit(model, cross_entropy, vectors, iterations=2, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_the_loss_does_not_need_may_run_with_autograd_on_or_off(vectors):
    class One(torch.autograd.Function):  # autograd is off in its forward
        @staticmethod
        def forward(ctx, weight):
            return weight * 1

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1

    class Watched(Deep):
        def forward(self, x):
            self.aside(x)  # an output that the loss leaves out
            with torch.no_grad():
                self.aside(x)
            return super().forward(x) * One.apply(self.one)

    model = Watched(kept)
    model.aside, model.one = nn.Linear(8, 2), nn.Parameter(torch.ones(()))
    result = gradinit(model, cross_entropy, vectors, iterations=4, progress=False)
    assert result.scales["aside.weight"] == result.scales["aside.bias"] == 1
    assert abs(result.scales["one"] - 1) > 0.01


def test_a_loss_may_read_the_weights_from_the_model(vectors):
    def penalized(model):
        return lambda output, target: cross_entropy(output, target) + 0.3 * model.head.weight.square().sum()

    class Penalized(Deep):
        def forward(self, x):
            return super().forward(x), self.head.weight

    outside, inside = Deep(kept), Penalized(kept)
    options = {"gamma": 1.5, "lr": 0.05, "iterations": 8, "progress": False}
    expected = gradinit(
        inside, lambda out, target: cross_entropy(out[0], target) + 0.3 * out[1].square().sum(), vectors, **options
    )
    assert gradinit(outside, penalized(outside), vectors, **options) == expected


def test_batches_that_are_mappings_hold_the_labels(sentences):
    options = {"lr": 0.05, "iterations": 8, "progress": False}
    pairs = [({"input_ids": batch["input_ids"]}, batch["labels"]) for batch in sentences]
    expected = gradinit(Labelled(), lambda output, target: cross_entropy(output.logits, target), pairs, **options)
    assert gradinit(Labelled(), None, sentences, **options) == expected
    loss_of_batch = gradinit(
        Labelled(), lambda output, batch: cross_entropy(output.logits, batch["labels"]), sentences, **options
    )
    assert loss_of_batch == expected
    assert max(abs(scale - 1) for scale in expected.scales.values()) > 0.1


def test_a_transformers_model_with_its_own_loss():
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    tokens = [torch.randint(20, (4, 8)) for _ in range(5)]
    batches = [transformers.BatchEncoding({"input_ids": part, "labels": part}) for part in tokens]
    joined = torch.cat(tokens[:2])
    with torch.no_grad():
        loss = model.eval()(input_ids=joined, labels=joined).loss.item()
    result = gradinit(model, None, batches, algorithm="adam", lr=0.05, iterations=5, progress=False)
    assert result.history[0].loss == pytest.approx(loss, rel=1e-5)
    assert min(abs(result.scales[f"transformer.h.{i}.attn.c_attn.weight"] - 1) for i in range(2)) > 0.02


@pytest.mark.parametrize(
    ("batch", "found"), [("mapping", "found Output without one"), ("pair", "found Tensor without one")]
)
def test_an_output_without_a_loss_is_refused(batch, found, sentences, vectors):
    unlabelled = [{"input_ids": part["input_ids"]} for part in sentences]
    model, batches = (Labelled(), unlabelled) if batch == "mapping" else (Deep(kept), vectors)
    with pytest.raises(TypeError, match=f"loss_fn=None takes the loss .*{found}"):
        gradinit(model, None, batches, progress=False)


@pytest.mark.parametrize(("algorithm", "eta", "gamma"), [("sgd", 0.1, 1.0), ("adam", 1e-3, math.sqrt(3 * 88 + 36))])
def test_defaults_follow_the_algorithm(algorithm, eta, gamma, vectors):
    options = {"algorithm": algorithm, "lr": 0.05, "iterations": 8, "progress": False}
    models = [Deep(kept) for _ in range(2)]
    for model in models:
        model.head.weight.data *= 2.5  # begins above either bound
    left = gradinit(models[0], cross_entropy, vectors, **options)
    given = gradinit(models[1], cross_entropy, vectors, eta=eta, gamma=gamma, **options)
    assert left == given
    assert {seen.updated_loss is None for seen in left.history} == {True, False}
    for seen in left.history:
        assert (seen.updated_loss is None) == (seen.gradient_norm > gamma)


def test_a_norm_that_never_came_under_gamma_is_said(vectors):
    with pytest.warns(UserWarning, match=r"in 3 iterations it came down to .* never under gamma=0\.001; raise gamma"):
        gradinit(Deep(kept), cross_entropy, vectors, gamma=1e-3, iterations=3, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradinit(Deep(kept), cross_entropy, vectors, iterations=0, progress=False)


def test_a_norm_that_was_under_gamma_is_said(vectors):
    with pytest.warns(UserWarning, match=r"was \S+ before gradinit changed anything, under gamma=100"):
        gradinit(Deep(kept), cross_entropy, vectors, gamma=100, iterations=3, progress=False)
    model = Deep(kept)
    model.head.weight.data *= 2.5  # begins above the bound and comes under it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradinit(model, cross_entropy, vectors, lr=0.05, iterations=8, progress=False)
