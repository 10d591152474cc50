"""averaging=ScheduleFree: the authors' equations, written out with all three sequences."""

import io

import pytest
import torch
from support.parameters import clones, layouts, set_gradients

import fused_opt

RATES = [0.01, 0.02, 0.04, 0.04, 0.0, 0.03]
RULES = [("SGD", {"weight_decay": 0.1}), ("AdamW", {"betas": (0.0, 0.9), "weight_decay": 0.1, "eps": 1e-3})]


class WrittenOut:
    """Algorithm 1 of arXiv 2405.15682, in float64; weights 0 where a parameter has no gradient would move z only."""

    def __init__(self, parameters, name, options, beta):
        self.y = [p.detach().double().clone() for p in parameters]
        self.z, self.x = [y.clone() for y in self.y], [y.clone() for y in self.y]
        self.v = [torch.zeros_like(y) for y in self.y]
        self.name, self.options, self.beta = name, options, beta
        self.squares, self.steps = 0.0, [0] * len(self.y)

    def direction(self, k, g):
        decay = self.options["weight_decay"]
        if self.name == "SGD":
            return g + decay * self.y[k]
        self.steps[k] += 1
        beta2 = self.options["betas"][1]
        self.v[k] = beta2 * self.v[k] + (1 - beta2) * g * g
        root = (self.v[k] / (1 - beta2 ** self.steps[k])).sqrt()
        return g / (root + self.options["eps"]) + decay * self.y[k]

    def step(self, gradients, lr):
        self.squares += lr**2
        c = lr**2 / self.squares
        for k, g in enumerate(gradients):
            if g is not None:
                self.z[k] = self.z[k] - lr * self.direction(k, g.double())
            self.x[k] = (1 - c) * self.x[k] + c * self.z[k]
            self.y[k] = (1 - self.beta) * self.z[k] + self.beta * self.x[k]


@pytest.mark.parametrize("beta", [0.9, 0.0])
@pytest.mark.parametrize(("name", "options"), RULES, ids=["SGD", "AdamW"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-5)], ids=str)
def test_the_authors_equations(name, options, dtype, bound, beta, every_kernel):
    """Parameters are y and averages x, with a warmup, a step at rate 0, and a parameter that once has no gradient."""
    ours = layouts(dtype, chunk=300)
    averaging = fused_opt.ScheduleFree(beta=beta)
    optimizer = getattr(fused_opt, name)(ours, lr=0.0, averaging=averaging, backend=every_kernel, **options)
    written_out = WrittenOut(ours, name, options, beta)
    for step, lr in enumerate(RATES):
        set_gradients(ours, step)
        if step == 2:
            ours[2].grad = None
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        written_out.step([p.grad for p in ours], lr)
        for p, y in zip(ours, written_out.y):
            torch.testing.assert_close(p.detach().double(), y, rtol=0, atol=bound)
        kept = clones(ours)
        with optimizer.averaged_weights():
            for p, x in zip(ours, written_out.x):
                torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=bound)
        assert all(map(torch.equal, ours, kept))
    assert optimizer.param_groups[0]["lr_squares"] == pytest.approx(written_out.squares)


def test_it_learns_without_a_schedule(backend):
    """A noisy quadratic at a constant rate: the average is nearer to the minimum than the last iterate of SGD."""
    weight, other = (torch.nn.Parameter(torch.ones(50)) for _ in range(2))
    optimizer = fused_opt.SGD([weight], lr=0.2, averaging=fused_opt.ScheduleFree(), backend=backend)
    plain = torch.optim.SGD([other], lr=0.2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        noise = torch.randn(50, generator=generator)
        weight.grad, other.grad = weight.detach() + noise, other.detach() + noise
        optimizer.step()
        plain.step()
    with optimizer.averaged_weights():
        assert weight.norm() < 0.7 * other.norm()


def test_resumed(backend):
    """From a checkpoint to the last bit; the squared rates are in the group."""
    ours = layouts(chunk=300)

    def make(parameters, **more):
        return fused_opt.SGD(parameters, lr=0.1, backend=backend, **more)

    optimizer = make(ours, averaging=fused_opt.ScheduleFree(beta=0.8))
    for step in range(2):
        set_gradients(ours, step)
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    others = clones(ours)
    resumed = make(others)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for each, parameters in ((optimizer, ours), (resumed, others)):
        set_gradients(parameters, 7)
        each.step()
    assert all(map(torch.equal, ours, others))
    assert resumed.param_groups[0]["lr_squares"] == optimizer.param_groups[0]["lr_squares"] == pytest.approx(0.03)


def test_refused():
    with pytest.raises(ValueError, match="has no interval; got 2"):
        fused_opt.ScheduleFree(interval=2)
    with pytest.raises(ValueError, match="Invalid beta: 1"):
        fused_opt.ScheduleFree(beta=1.0)
    p, averaging = torch.nn.Parameter(torch.ones(2)), fused_opt.ScheduleFree()
    with pytest.raises(ValueError, match="and noise: noise would be that of an iterate"):
        fused_opt.SGD([p], averaging=averaging, noise=fused_opt.WeightNoise(std=0.1))
    state_dict = fused_opt.SGD([p], averaging=averaging).state_dict()
    state_dict["param_groups"][0]["lr_squares"] = float("nan")
    with pytest.raises(ValueError, match="Invalid lr_squares in the state_dict: nan"):
        fused_opt.SGD([p]).load_state_dict(state_dict)
