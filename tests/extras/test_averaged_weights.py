"""averaged_weights() shows the average within its block, and nothing of it afterwards."""

import warnings

import pytest
import torch
from support.averages import small
from support.parameters import set_gradients

from fused_opt import EMA, PSWA, SGD


def test_swap_is_undone_by_an_exception(backend):
    parameters = small()
    optimizer = SGD(parameters, lr=0.3, averaging=EMA(beta=0.5), backend=backend)
    for t in range(3):
        set_gradients(parameters, 100 + t)
        optimizer.step()
    kept = [p.detach().clone() for p in parameters]
    gradients = [p.grad for p in parameters]
    with pytest.raises(KeyError, match="from within"), optimizer.averaged_weights():  # noqa: PT012
        assert not torch.equal(parameters[0], kept[0])
        raise KeyError("from within")
    assert all(torch.equal(p, k) for p, k in zip(parameters, kept))
    assert all(p.grad is g for p, g in zip(parameters, gradients))


def test_swap_is_seen_by_autograd_and_keeps_the_memory(backend):
    """A graph made outside the block cannot be walked within it, and the parameters stay where they are."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.3, averaging=EMA(beta=0.5), backend=backend)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    where, loss = p.data_ptr(), p.square().sum()
    with optimizer.averaged_weights():
        assert p.data_ptr() == where
        assert p.requires_grad
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_before_the_first_sample_the_weights_are_their_own_average(backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.5, averaging=PSWA(period=4, start=2), backend=backend)
    for _ in range(2):
        with optimizer.averaged_weights():
            kept = p.detach().clone()
        assert torch.equal(p, kept)
        p.grad = torch.ones(3)
        optimizer.step()
    with optimizer.averaged_weights():
        assert torch.equal(p.detach(), torch.zeros(3))


def test_without_averaging_there_is_nothing_to_swap():
    optimizer = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(RuntimeError, match=r"no group of this optimizer has averaging="), optimizer.averaged_weights():
        pass


@pytest.mark.parametrize("given", [True, False], ids=["model given", "not given"])
def test_running_statistics_go_back_with_the_weights(given):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = SGD(model.parameters(), lr=0.3, averaging=EMA(beta=0.5))
    batch = torch.linspace(-1, 1, 12).view(4, 3)
    model(batch).square().sum().backward()
    optimizer.step()
    kept = [buffer.clone() for buffer in model.buffers()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with optimizer.averaged_weights(model if given else None):
            torch.optim.swa_utils.update_bn([5 * batch], model)
            assert not torch.equal(model[1].running_var, kept[1])
    assert all(torch.equal(b, k) for b, k in zip(model.buffers(), kept)) == given
    assert ["averaged_weights(model) swaps them back" in str(w.message) for w in caught] == [True] * (not given)
    model(batch)  # nothing is watched any more
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_weights_that_share_memory_are_back_after_the_block(backend):
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    q.data = p.data
    optimizer = SGD([p, q], lr=0.5, averaging=EMA(beta=0.5), backend=backend)
    for _ in range(2):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
    with optimizer.averaged_weights():
        assert not torch.equal(p, torch.full((3,), -1.0))
    assert p.tolist() == q.tolist() == [-1.0] * 3
