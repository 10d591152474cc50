"""Models and an optimizer for the tests of TempBalance."""

import torch
from torch import nn

from fused_opt.balance import TempBalance


class Block(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.layer1, self.layer2 = Block(8, 8), Block(8, 12)
        self.hidden, self.norm, self.head = nn.Linear(12, 60), nn.LayerNorm(60), nn.Linear(60, 4)
        self.embed = nn.Linear(60, 60)

    def forward(self, x):
        y = self.layer2(self.layer1(torch.relu(self.stem(x)))).mean((2, 3))
        return self.head(self.embed(self.norm(torch.relu(self.hidden(y)))))


def plain(width=60, count=6, seed=0):
    """Linear layers of different tails."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))
    for i, layer in enumerate(model):
        layer.weight.data *= torch.linspace(1, 5, width) ** (0.4 * (i % 3))
    return model


def train_step(model, optimizer, step):
    torch.manual_seed(step)
    x = torch.randn(8, *((1, 6, 6) if isinstance(model, ResidualNetwork) else (60,)))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


class Fused(torch.optim.SGD):
    """An optimizer with a layer table."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr, weight_decay=0.1)
        self.table = {"lr": {}, "weight_decay": {}}
        self.calls = 0

    def scale_layers(self, *, lr=None, weight_decay=None, source="user"):
        self.calls += 1
        self.table["lr"].update(lr or {})
        self.table["weight_decay"].update(weight_decay or {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                lr = group["lr"] * self.table["lr"].get(p, 1.0)
                p -= lr * (p.grad + group["weight_decay"] * self.table["weight_decay"].get(p, 1.0) * p)


def multiplied(model, **settings):
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    balance.step()
    return balance
