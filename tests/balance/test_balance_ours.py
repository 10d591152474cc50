"""TempBalance with our layer table against TempBalance with torch's groups split."""

import pytest
import torch
from support.models import plain
from torch import nn

import fused_opt


@pytest.mark.parametrize("target", ["lr", "weight_decay"])
def test_our_optimizer_equals_torch_with_split_groups(target, backend):
    results = []
    for package in (fused_opt, torch.optim):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)]).double()
        options = {"backend": backend} if package is fused_opt else {}
        optimizer = package.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        balance = fused_opt.TempBalance(model, optimizer, target=target)
        for step in range(6):
            if step % 2 == 0:
                balance.step()
            optimizer.zero_grad()
            model(torch.randn(8, 64, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            scheduler.step()
        assert len(optimizer.param_groups) == 1
        assert max(balance.multipliers.values()) / min(balance.multipliers.values()) > 2
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_multipliers_of_the_user_stay_under_those_of_the_balance():
    """Of a balanced layer, and of the first, which is skipped; a call of the balance sets its own alone."""
    model = plain()
    optimizer = fused_opt.SGD(model.parameters(), lr=1.0)
    optimizer.scale_layers(lr={model[0].weight: 0.5, model[1].weight: 0.0, model[2].weight: 0.5})
    balance = fused_opt.TempBalance(model, optimizer)
    for _ in range(2):
        balance.step(force=True)
        before = [layer.weight[0, 0].item() for layer in model]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved = [old - layer.weight[0, 0].item() for old, layer in zip(before, model, strict=True)]
        own = [balance.multipliers[f"{i}.weight"] for i in range(6)]
        assert own[0] == 1.0 != own[2]
        factors = [0.5, 0.0, 0.5, 1.0, 1.0, 1.0]
        assert moved == pytest.approx([factor * of_it for factor, of_it in zip(factors, own)], abs=1e-5)
