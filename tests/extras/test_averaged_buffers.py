"""average_buffers() averages what EMA's samples find in the model's buffers."""

import copy
import math

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_opt import EMA, PSWA, SGD
from fused_opt.integrations.loop import keep_averages


def normalized(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).to(dtype)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    return model


def train(model, optimizer, steps, first=0, after=lambda: None):
    for t in range(first, first + steps):
        batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(t), dtype=model[0].weight.dtype) + t
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        after()


def test_buffers_are_averaged_as_by_torchs_averaged_model():
    model, ours = normalized(torch.float64), normalized(torch.float64)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 6, after=lambda: ema.update_parameters(model))
    optimizer = SGD(ours.parameters(), lr=0.1, averaging=EMA(0.9))
    optimizer.average_buffers(ours)
    train(ours, optimizer, 6)
    trained = copy.deepcopy(ours.state_dict())
    with optimizer.averaged_weights():  # without the model, as callbacks ask for it
        found = dict(ours.state_dict())
        for name in ("1.weight", "1.running_mean", "1.running_var"):
            torch.testing.assert_close(found[name], ema.module.state_dict()[name], rtol=1e-12, atol=1e-12)
            assert not torch.equal(found[name], trained[name])
        assert found["1.num_batches_tracked"] == 6  # counts are the model's
        assert found["mask"].tolist() == [0.0, -math.inf]  # an infinity has no difference to itself
        ours(torch.ones(8, 3, dtype=torch.float64))  # in training mode, which moves the statistics
    assert all(torch.equal(value, trained[name]) for name, value in ours.state_dict().items())


def test_buffers_follow_the_samples_of_the_weights_in_float32():
    model = normalized(torch.bfloat16)
    groups = [{"params": model[0].parameters(), "averaging": None}, {"params": model[1:].parameters()}]
    optimizer = SGD(groups, lr=0.1, averaging=EMA(0.5, start=1, interval=2))
    buffers = optimizer.average_buffers(model)
    seen = []
    train(model, optimizer, 5, after=lambda: seen.append(model[1].running_mean.float()))
    assert buffers.averages["1.running_mean"].dtype == torch.float32
    torch.testing.assert_close(buffers.averages["1.running_mean"], (seen[2] + seen[4]) / 2, rtol=0, atol=0)


def test_a_training_resumes_with_the_averages_of_its_buffers():
    whole, halves = normalized(), normalized()
    optimizer = SGD(whole.parameters(), lr=0.1, averaging=EMA(0.9))
    expected = optimizer.average_buffers(whole)
    train(whole, optimizer, 6)
    first = SGD(halves.parameters(), lr=0.1, averaging=EMA(0.9))
    kept = first.average_buffers(halves)
    train(halves, first, 3)
    saved = copy.deepcopy((first.state_dict(), kept.state_dict()))
    second = SGD(halves.parameters(), lr=0.1, averaging=EMA(0.9))
    resumed = second.average_buffers(halves)
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(halves, second, 3, first=3)
    assert all(torch.equal(average, saved[1][name]) for name, average in kept.averages.items())  # not written to
    assert expected.averages.keys() == resumed.averages.keys() == {"mask", "1.running_mean", "1.running_var"}
    assert all(torch.equal(average, resumed.averages[name]) for name, average in expected.averages.items())
    with pytest.raises(ValueError, match=r"model lacks, or has with another shape: 1\.running_mean$"):
        resumed.load_state_dict({"1.running_mean": torch.ones(5), "1.running_var": torch.ones(4)})
    assert all(torch.equal(average, resumed.averages[name]) for name, average in expected.averages.items())


@pytest.mark.parametrize("averaging", [None, PSWA(4)])
def test_other_averages_of_buffers_are_refused(averaging):
    model = normalized()
    optimizer = SGD(model.parameters(), lr=0.1, averaging=averaging)
    with pytest.raises(ValueError, match=r"average_buffers needs one averaging=fused_opt.EMA\(beta\)"):
        optimizer.average_buffers(model)
    train(model, optimizer, 1)


def test_a_model_that_keeps_the_averages_keeps_those_of_its_buffers():
    model = normalized()
    optimizer = SGD(model.parameters(), lr=0.1, averaging=EMA(0.9))
    buffers = optimizer.average_buffers(model)
    train(model, optimizer, 3)
    keep_averages([optimizer], model)
    assert torch.equal(model[1].running_var, buffers.averages["1.running_var"])
