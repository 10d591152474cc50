"""GradInit against evaluations that share nothing with it but the formulas."""

import copy
import importlib.util
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from support import ROOT
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_opt.gradinit import gradinit

cross_entropy = nn.functional.cross_entropy
EXAMPLE = ROOT / "examples" / "gradinit.py"


class Adam:
    """The published update of the scales on plain arrays."""

    def __init__(self, n, lr, floor, clip):
        self.lr, self.floor, self.clip = lr, floor, clip
        self.m, self.steps = np.ones(n), {"norm": 0, "objective": 0}
        self.first, self.second = {"norm": np.zeros(n), "objective": np.zeros(n)}, np.zeros(n)

    def step(self, h, branch):
        h = np.clip(h, -self.clip, self.clip)
        self.steps[branch] += 1
        self.first[branch] = 0.9 * self.first[branch] + 0.1 * h
        self.second = 0.999 * self.second + 0.001 * h**2
        mean = self.first[branch] / (1 - 0.9 ** self.steps[branch])
        root = np.sqrt(self.second / (1 - 0.999 ** sum(self.steps.values())))
        self.m = np.maximum(self.m - self.lr * mean / (root + 1e-8), self.floor)


def trial_step(gradient, algorithm, normalize=True):
    if algorithm == "adam":
        return [np.sign(g) for g in gradient]
    return [g / norm_of(gradient, "sgd") if normalize else g for g in gradient]


def norm_of(gradient, algorithm):
    if algorithm == "adam":
        return sum(np.abs(g).sum() for g in gradient)
    return math.sqrt(sum((g**2).sum() for g in gradient))


def backpropagate(theta, x, target):
    """Loss and gradient of a tanh network, [W1, b1, W2, b2, ...] in float64, by hand."""
    inputs, layers = [x], len(theta) // 2
    for k in range(layers):
        z = inputs[-1] @ theta[2 * k].T + theta[2 * k + 1]
        inputs.append(np.tanh(z) if k < layers - 1 else z)
    probability = np.exp(z - z.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    rows = np.arange(len(x))
    loss = -np.log(probability[rows, target]).mean()
    probability[rows, target] -= 1
    delta, gradient = probability / len(x), []
    for k in reversed(range(layers)):
        gradient = [delta.T @ inputs[k], delta.sum(0), *gradient]
        delta = delta @ theta[2 * k] * (1 - inputs[k] ** 2)
    return loss, gradient


def central_difference(function, m, width=1e-6):
    steps = np.eye(len(m)) * width
    return np.array([(function(m + step) - function(m - step)) / (2 * width) for step in steps])


def numpy_gradinit(initial, batches, algorithm, eta, gamma, lr, iterations, min_scale, clip, normalize):
    """The procedure with each derivative by the scales a difference quotient: no autograd at all."""
    adam = Adam(len(initial), lr, np.array([min_scale, 0.0] * (len(initial) // 2)), clip)
    drawn = 0

    def draw():
        nonlocal drawn
        drawn += 1
        return batches[(drawn - 1) % len(batches)]

    def scaled(m):
        return [factor * w for factor, w in zip(m, initial, strict=True)]

    def join(a, b):
        return np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])

    def gradient_norm(m, s):
        return norm_of(backpropagate(scaled(m), *s)[1], algorithm)

    def objective(m, s, steps):
        moved = [t - eta * step for t, step in zip(scaled(m), steps, strict=True)]
        return backpropagate(moved, *s)[0] / eta

    for _ in range(iterations):
        h0, h1 = draw(), draw()
        s = join(h0, h1)
        gradient = backpropagate(scaled(adam.m), *s)[1]
        if norm_of(gradient, algorithm) > gamma:
            adam.step(central_difference(partial(gradient_norm, s=s), adam.m), "norm")
        else:
            function = partial(objective, s=join(h0, draw()), steps=trial_step(gradient, algorithm, normalize))
            adam.step(central_difference(function, adam.m), "objective")
    return adam.m, adam.steps


@pytest.mark.parametrize(
    ("algorithm", "eta", "gamma", "clip", "normalize"),
    [
        ("sgd", 0.1, 0.5, 1.0, True),
        ("sgd", 0.1, 0.5, 0.05, True),
        ("sgd", 0.3, 0.5, math.inf, False),
        ("adam", 1e-3, 4.0, 1.0, True),
    ],
)
def test_scales_equal_a_numpy_evaluation(algorithm, eta, gamma, clip, normalize):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)  # so that some iterations begin above gamma and some below
    batches = [(torch.randn(12, 6), torch.randint(4, (12,))) for _ in range(7)]
    initial = [p.detach().double().numpy() for p in model.parameters()]
    expected, steps = numpy_gradinit(
        initial,
        [(x.double().numpy(), t.numpy()) for x, t in batches],
        algorithm, eta, gamma, 0.02, 60, 0.01, clip, normalize,
    )  # fmt: skip
    assert min(steps.values()) >= 8, steps
    result = gradinit(
        model, cross_entropy, batches, algorithm=algorithm, eta=eta, gamma=gamma, lr=0.02, iterations=60,
        scale_clip=clip, normalize=normalize, progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(list(result.scales.values()), expected, rtol=1e-4)
    for weight, w, m in zip(model.parameters(), initial, expected, strict=True):
        np.testing.assert_allclose(weight.detach().numpy(), m * w, rtol=1e-4)
    assert sum(seen.updated_loss is None for seen in result.history) == steps["norm"]


def substituting_gradinit(model, batches, lr, gamma, iterations, algorithm="sgd", eta=0.1):
    """The procedure in the manner of a training loop: write the parameters, backward(), read p.grad."""
    parameters = dict(model.named_parameters())
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    floor = np.array([0.0 if name.endswith("bias") else 0.01 for name in parameters])
    adam, endless = Adam(len(parameters), lr, floor, 1.0), (b for _ in range(9**9) for b in batches)

    def loss_at(values, a, b):
        for name, p in parameters.items():
            p.data, p.grad = values[name], None
        return cross_entropy(model(torch.cat([a[0], b[0]])), torch.cat([a[1], b[1]]))

    def slopes():
        return np.array([(p.grad * initial[name]).sum().item() for name, p in parameters.items()])

    for _ in range(iterations):
        h0, h1 = next(endless), next(endless)
        scaled = {name: w * m for (name, w), m in zip(initial.items(), adam.m, strict=True)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # backward(create_graph=True) warns of a reference cycle
            loss_at(scaled, h0, h1).backward(create_graph=True)
        gradient = {name: p.grad for name, p in parameters.items()}
        norm = sum((g**2).sum() if algorithm == "sgd" else g.abs().sum() for g in gradient.values())
        norm = norm.sqrt() if algorithm == "sgd" else norm
        if norm.item() > gamma:
            for p in parameters.values():
                p.grad = None
            norm.backward()
            adam.step(slopes(), "norm")
        else:
            direction = {n: (g / norm if algorithm == "sgd" else g.sign()) for n, g in gradient.items()}
            moved = {name: t - eta * direction[name].detach() for name, t in scaled.items()}
            loss_at(moved, h0, next(endless)).backward()
            adam.step(slopes() / eta, "objective")
    return dict(zip(parameters, adam.m, strict=True)), adam.steps


class Convolutional(nn.Module):
    """Batch norm, dropout, a weight under two names, a zero bias, a parameter that nothing uses."""

    def __init__(self, dropout):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.dropout, self.flat = nn.Dropout(dropout), nn.Flatten()
        self.first, self.again, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.again.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(3))
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        x = self.flat(self.dropout(self.norm(self.conv(x)).tanh()))
        return self.head(self.again(self.dropout(self.first(x).tanh())).tanh())


class Recurrent(nn.Module):
    """Parameters that the module also keeps in a list of its own."""

    def __init__(self, _):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(x.flatten(1, 2))[0][:, -1])


class Attention(nn.Module):
    """An encoder layer of torch's, whose attention torch computes with a fused kernel by default."""

    def __init__(self, dropout):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.layer(x.flatten(1, 2)).mean(1))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 1, 4, 4, generator=generator), torch.randint(4, (16,), generator=generator)) for _ in range(5)
    ]


@pytest.mark.parametrize(("kind", "gamma"), [(Convolutional, 0.27), (Recurrent, 0.15), (Attention, 0.23)])
def test_scales_of_other_architectures(kind, gamma, images):
    torch.manual_seed(0)
    model = kind(0.5).train()
    twin = kind(0.0).train()
    twin.load_state_dict(model.state_dict())
    if kind is Convolutional:
        del twin.unused
    with sdpa_kernel(SDPBackend.MATH):
        expected, steps = substituting_gradinit(twin, images, 0.02, gamma, 40)
    assert min(steps.values()) >= 8, steps
    if kind is Convolutional:
        expected["unused"] = 1.0
    result = gradinit(model, cross_entropy, images, lr=0.02, gamma=gamma, iterations=40, progress=False)
    assert result.scales == pytest.approx(expected, rel=1e-4)


class OneWeight(nn.Module):
    """f(x) = weight * x, and the loss 0.5 f^2: every derivative is one line of school mathematics."""

    def __init__(self, name="weight"):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.tensor([2.0])))

    def forward(self, x):
        return next(iter(self._parameters.values())) * x


def half_square(output, target):
    return 0.5 * output.square().mean()


def halves(*values):
    return [(torch.full((1,), float(value)), torch.zeros(1)) for value in values]


def test_one_weight_by_hand():
    # W = 2 and g = 2 m x^2 > 0, so d||g||/dm = 2 x^2, and with A = 1 d(L'/eta)/dm = x^2 (2 m - eta) 2 / eta.
    batches = halves(2, 2, 0.5, 0.5, 0.5)
    eta, lr = 0.5, 0.1
    options = {"eta": eta, "gamma": 1.0, "lr": lr, "iterations": 2, "progress": False}
    free = gradinit(OneWeight(), half_square, batches, scale_clip=math.inf, **options)
    h0 = 2 * 2**2  # above gamma: the norm
    m = 1 - lr * h0 / math.sqrt(h0**2)
    h1 = 0.5**2 * (2 * m - eta) * 2 / eta  # below: the objective, with its own first moment
    expected = m - lr * h1 / math.sqrt((0.999 * h0**2 + h1**2) / (0.999 + 1))  # and the second moment of both
    assert free.scales["weight"] == pytest.approx(expected, rel=1e-6)
    assert free.history[0] == (8.0, 8.0, None)
    assert free.history[1] == pytest.approx((0.5 * m**2, 0.5 * m, 0.5 * (0.5 * (2 * m - eta)) ** 2), rel=1e-6)
    assert min(h0, h1) > 1
    clipped = gradinit(OneWeight(), half_square, batches, scale_clip=1.0, **options)
    assert clipped.scales["weight"] == pytest.approx(1 - 2 * lr, rel=1e-6)


@pytest.mark.parametrize(("name", "smallest"), [("weight", 0.25), ("proj_bias", 0.0)])
def test_smallest_scales(name, smallest):
    model = OneWeight(name)
    result = gradinit(model, half_square, halves(3), gamma=0, lr=0.4, iterations=6, min_scale=0.25, progress=False)
    assert result.scales == {name: smallest}
    assert getattr(model, name).item() == 2 * smallest


def test_drawing_order_and_restart():
    seen = []

    def loss_fn(output, target):
        seen.append(target.tolist())
        return 0.01 * output.square().mean()

    batches = [(torch.ones(1), torch.full((1,), float(k))) for k in range(4)]
    gradinit(OneWeight(), loss_fn, batches, iterations=3, progress=False)
    assert seen == [[0, 1], [0, 2], [3, 0], [3, 1], [2, 3], [2, 0]]
    seen.clear()
    gradinit(OneWeight(), loss_fn, batches, gamma=0, iterations=3, progress=False)
    assert seen == [[0, 1], [2, 3], [0, 1]]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


def test_an_exploding_network_gets_a_gradient_of_norm_gamma_and_a_useful_first_step():
    torch.manual_seed(0)
    plain = nn.Sequential(*[Residual() for _ in range(10)], nn.Linear(16, 2))
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    x = torch.randn(256, 16)
    target = (x[:, 0] > 0).long()
    learned = copy.deepcopy(plain)
    batches = list(zip(x.split(32), target.split(32), strict=True))
    gradinit(learned, cross_entropy, batches, iterations=150, progress=False)
    norms, losses = [], []
    for model in (plain, learned):
        g = torch.autograd.grad(cross_entropy(model(x), target), list(model.parameters()))
        norms.append(torch.cat([part.flatten() for part in g]).norm().item())
        with torch.no_grad():
            for p, part in zip(model.parameters(), g, strict=True):
                p.sub_(0.1 * part / norms[-1])
            losses.append(cross_entropy(model(x), target).item())
    assert norms[0] > 100 > 1.5 > norms[1] > 0.5
    assert losses[0] > 10 > 0.65 > losses[1]


def test_example(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("gradinit_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "GradInit" in printed
    assert "its figures mean nothing" in printed
    assert (tmp_path / "gradinit.png").stat().st_size > 10_000
