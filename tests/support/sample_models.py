"""Models of every kind of layer that samples are told apart in, and their gradients one by one."""

import copy

import pytest
import torch
from torch import nn

import fused_opt
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


KEPT = []  # trackers, and the optimizers that they would go with


def track(parameters, model, kind=Samples):
    """A tracker of an optimizer that lives as long as the test process."""
    optimizer = fused_opt.CLARS(parameters, lr=0.1)
    parts = kind(optimizer, model)
    KEPT.append((parts, optimizer))
    return parts
