"""CLARS steps by the norms of samples."""

import copy

import pytest
import torch
from support.sample_models import (
    by_hand,
    example,
    expected,
    losses,
)

import fused_opt


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
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-9)  # the gradient of a key's bias is rounding alone
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
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-9)  # the gradient of a key's bias is rounding alone
