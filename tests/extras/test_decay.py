"""Kinds of weight decay, and masks of updates and of decay, against the formulas of fused_opt/extras/decay.py written out."""

import pytest
import torch
from rules import every_elementwise_rule
from rules import oracle as oracle_of
from support.parameters import layouts, set_gradients

import fused_opt
from fused_opt import Cautious

DECAY = 0.1
SETTINGS = [
    ("coupled", None),
    ("decoupled", None),
    ("independent", None),
    ("coupled", Cautious("update")),
    ("decoupled", Cautious("update", scaled=False)),
    ("decoupled", Cautious("decay")),
    ("independent", Cautious("both")),
]


class Formula:
    """The formulas in float64; the rule's own oracle gives the update of weights of 0, without a decay."""

    def __init__(self, name, options, parameters, decay, cautious):
        self.options, self.decay, self.cautious = {"lr": 1e-3, **options}, decay, cautious
        self.weights = [p.detach().double().clone() for p in parameters]
        self.shadow = [torch.nn.Parameter(torch.zeros_like(w)) for w in self.weights]
        own = {k: v for k, v in options.items() if k not in ("weight_decay", "decoupled_weight_decay", "maximize")}
        self.inner = oracle_of(name)(self.shadow, **{**own, "lr": 1.0, "weight_decay": 0.0}, foreach=False)

    def step(self, gradients, ratio=None):
        """One step; ``ratio(p, g, direction)``: a trust ratio."""
        given = []
        for q, w, g in zip(self.shadow, self.weights, gradients):
            q.data.zero_()
            q.grad = (-g if self.options.get("maximize") else g) + (DECAY * w if self.decay == "coupled" else 0.0)
            given.append(q.grad)
        self.inner.step()
        for i, (q, w, g) in enumerate(zip(self.shadow, self.weights, given)):
            u = -q.detach()
            m, c = self.masks(u, g, w)
            direction = m * u + (DECAY * c * w if self.decay == "decoupled" else 0.0)
            s = 1.0 if ratio is None else ratio(w, gradients[i], direction)
            new = w - self.options["lr"] * s * direction
            self.weights[i] = new - DECAY * c * w if self.decay == "independent" else new

    def masks(self, u, g, w):
        m = c = torch.ones_like(u)
        if self.cautious is not None and self.cautious.what != "decay":
            m = (u * g > 0).double()
            if self.cautious.scaled and m.numel():
                m = m / max(m.mean().item(), 1e-3)
        if self.cautious is not None and self.cautious.what != "update":
            c = (u * w >= 0).double()
        return m, c


def some(dtype=torch.float64):
    return layouts(dtype, chunk=300)


def settings(decay, cautious, **more):
    """Keywords of an optimizer of ours."""
    return {"weight_decay": DECAY, "decay": decay, "cautious": cautious, **more}


def without_a_kind(options):
    return {k: v for k, v in options.items() if k != "decoupled_weight_decay"}


@pytest.mark.parametrize(("decay", "cautious"), SETTINGS, ids=str)
@every_elementwise_rule
def test_every_rule_with_every_decay_and_mask(name, options, decay, cautious, every_kernel):
    parameters = some()
    formula = Formula(name, options, parameters, decay, cautious)
    ours = {**without_a_kind(options), **settings(decay, cautious)}
    optimizer = getattr(fused_opt, name)(parameters, **ours, backend=every_kernel)
    for step in range(4):
        set_gradients(parameters, step)
        formula.step([p.grad.double() for p in parameters])
        optimizer.step()
        for p, w in zip(parameters, formula.weights):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-11)
