"""The norms of the gradient's parts by sample against gradients computed one by one, and the probe."""

import copy

import pytest
import torch
from support.sample_models import (
    RANDN,
    TOKENS,
    B,
    close,
    example,
    expected,
    found,
    losses,
    track,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_opt.parts import per_sample_norms as forms
from fused_opt.parts import samples
from fused_opt.parts.microbatches import Microbatches
from fused_opt.parts.samples import Samples


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
