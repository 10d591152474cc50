"""TempBalance with our layer table against TempBalance with torch's groups split."""

import pytest
import torch
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
