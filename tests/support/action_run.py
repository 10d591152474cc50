"""The run that the actions of actions.py are done to, beside that of an oracle."""

import torch

import fused_opt

from . import plan_events
from .compare import unchanged
from .parameters import checkpoint


class Run(plan_events.Run):
    """A run of plan_events with what else a program has: a GradScaler, a part tracker; and a log of what was seen.

    Args:
        make: the class of the optimizer.
        extras: whether the run it is compared with has them as well.
        options: the optimizer's.
    """

    def __init__(self, make, extras, **options):
        super().__init__(make, **options)
        self.options = options
        self.fused = isinstance(self.optimizer, fused_opt.FusedOptimizer)
        self.extras = extras
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.tracker = None
        self.tied = False
        self.log = []
        self.bound = 1e-11

    def do(self, action, index):
        """An action, and what torch itself raises in it, as when an expanded gradient is clipped."""
        try:
            action(self, index)
        except RuntimeError as error:
            self.log.append(type(error))

    def attempt(self, call, made=False):
        """Log what a call raises; unless it was ``made`` all the same, nothing has changed then."""
        look = unchanged(self.optimizer)
        look.__enter__()
        try:
            call()
        except (MemoryError, RuntimeError, TypeError, ValueError) as error:
            if self.fused and not made:
                look.__exit__(None, None, None)
            self.log.append(type(error))
        else:
            self.log.append(None)

    def retire(self, tensor):
        """Unless another parameter may have the same memory."""
        if not self.tied:
            super().retire(tensor)

    def step(self, *args, made=False):
        before = [(p, p._version) for p in self.parameters()]
        self.attempt(lambda: self.optimizer.step(*args), made)
        for tensor, values in self.retired:
            assert torch.equal(tensor, values)
        self.log.append([p._version > version for p, version in before])  # what a step writes, autograd knows
        if self.extras and self.log[-2] is None:
            ratios, with_gradient = self.optimizer.trust_ratios(), [p for p in self.parameters() if p.grad is not None]
            self.log.append([ratios.get(name, 1.0) for name, p in self.names() if any(p is q for q in with_gradient)])
            self.log.append(self.optimizer.grad_norm)

    def names(self):
        groups = enumerate(self.optimizer.param_groups)
        return [(f"{i} of group {g}", p) for g, group in groups for i, p in enumerate(group["params"])]

    def another_optimizer(self, parameters):
        """Made as this one was, with groups of the same sizes, and with what has been loaded from its checkpoint."""
        rest, asked = iter(parameters), ("backend", "foreach", "coefficient")
        groups = [{"params": [next(rest) for _ in group["params"]]} for group in self.optimizer.param_groups]
        options = {key: value for key, value in self.options.items() if key in asked}
        other = type(self.optimizer)(groups, lr=9.0, **options)
        other.load_state_dict(checkpoint(self.optimizer))
        for group, of_other in zip(self.optimizer.param_groups, other.param_groups):  # what a class asks for stays
            of_other.update({key: value for key, value in group.items() if key != "params"})
        return other

    def group(self, index):
        return self.optimizer.param_groups[index % len(self.optimizer.param_groups)]

    def forget_strangers(self):
        """States of parameters that have left, of which no state_dict can be made."""
        for p in self.optimizer.state.keys() - set(self.parameters()):
            del self.optimizer.state[p]

    def untrack(self):
        if self.tracker is not None:
            self.tracker.remove()
            self.tracker = None

    def adopt(self, optimizer):
        """Go on with a copy; what it was copied from changes no more."""
        self.untrack()
        for p in self.parameters():
            self.retire(p)
            for value in self.state(p).values():
                self.retire(value)
        self.optimizer = optimizer
        self.module = torch.nn.ParameterList(self.parameters())
