"""The probe: norms of a few samples, once in a while; nothing else changes."""

import pytest
import torch
from support.parameters import clones
from support.sample_models import by_hand, example, losses
from torch import nn

import fused_opt
from fused_opt.parts.probe import Probe, probe_parts


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
