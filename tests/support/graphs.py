"""Training whose steps are captured and replayed, with something on the host in a GPU's place."""

import torch

import fused_opt

from .compare import assert_close


class Training:
    """An optimizer whose rate and gradients lie where they lay, with other values in every step.

    A subclass says ``backend``, ``shapes``, and ``recorder``: what has ``capture()``, a context manager, and ``replay()``.
    """

    def __init__(self, kind, groups=None, **options):
        generator = torch.Generator().manual_seed(0)
        self.parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in self.shapes]
        self.rate = torch.tensor(0.1)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        given = self.parameters if groups is None else groups(self.parameters)
        self.optimizer = getattr(fused_opt, kind)(given, **{**options, "lr": self.rate, "backend": self.backend})
        self.step = 0

    def renew(self):
        generator = torch.Generator().manual_seed(1000 + self.step)
        for p in self.parameters:
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        self.rate.fill_(0.05 / (1 + self.step % 7))
        self.step += 1

    def eager(self, steps):
        for _ in range(steps):
            self.renew()
            self.optimizer.step()
        return self

    def capture(self):
        self.graph = self.recorder()
        with self.graph.capture():
            self.optimizer.step()
        return self

    def replay(self, steps):
        for _ in range(steps):
            self.renew()
            self.graph.replay()
        return self


def assert_same_training(one, other):
    """Weights, groups and states, to the last bit."""
    assert_close(one.parameters, other.parameters, 0)
    assert one.optimizer.state_dict()["param_groups"] == other.optimizer.state_dict()["param_groups"]
    assert_close(one.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"], 0)
