"""What the loops of the libraries share: averages for evaluation, balance by epochs, all epochs in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler

from ..balance import TempBalance
from ..batch_size import TOLERANCE, CyclicalBatchSampler


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer beneath its wrappers, such as Accelerate's; each holds the next as ``optimizer``."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


@contextmanager
def averaged(optimizers: Iterable[Any]) -> Iterator[None]:
    """Within the block the weights of every optimizer that has ``averaging=`` are the averages, whatever wraps it.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = fused_opt.SGD([weight], lr=1.0, averaging=fused_opt.PSWA(period=3))
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([-1.0])
        ...     optimizer.step()
        >>> with averaged([optimizer]):
        ...     weight.item()
        1.5
    """
    with ExitStack() as stack:
        for optimizer in map(innermost, optimizers):
            if any(group.get("averaging") is not None for group in optimizer.param_groups):
                stack.enter_context(optimizer.averaged_weights())  # type: ignore[attr-defined]  # who has the key has this
        yield


def keep_averages(optimizers: Sequence[Any], model: nn.Module) -> None:
    """Give the model the averages for good."""
    with averaged(optimizers):
        averages = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
    with torch.no_grad():
        for tensor, average in zip((*model.parameters(), *model.buffers()), averages):
            tensor.copy_(average)


class EpochBalance:
    """A TempBalance that takes its step at the beginning of every epoch, and once, also where the epoch is resumed.

    Args:
        **settings: those of :class:`fused_opt.TempBalance` after ``model`` and ``optimizer``.
    """

    balance: TempBalance | None = None
    """Made when training begins; its ``alphas`` and ``multipliers`` are there to be logged."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self._loaded: dict[str, Any] = {}
        self._begun = 0  # epochs

    def begin(self, model: nn.Module, optimizer: Any) -> None:
        """Call where model and optimizer are those that train, with their checkpoint loaded."""
        self.balance = TempBalance(model, innermost(optimizer), **self.settings)
        self._begun = self._loaded.get("begun", 0)
        if self._loaded:
            self.balance.load_state_dict(self._loaded["balance"])
            self._loaded = {}

    def at(self, epoch: float) -> None:
        """Call before the first step of an epoch, or before every step, with the epochs that have passed."""
        assert self.balance is not None, "begin() comes first"
        if (begun := math.floor(epoch + TOLERANCE) + 1) > self._begun:
            self.balance.step()
            self._begun = begun

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain types that JSON can write."""
        return {"begun": self._begun, "balance": self.balance.state_dict()} if self.balance else self._loaded

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take effect in ``begin``."""
        self._loaded = dict(state_dict)


class AllEpochs(Sampler[list[Any]]):
    """The batches of several epochs one after the other, for a loop to which epochs must be of equal length."""

    def __init__(self, batches: CyclicalBatchSampler, epochs: int) -> None:
        self.batches, self.epochs = batches, epochs

    def __len__(self) -> int:
        """Updates in all epochs."""
        batches = self.batches
        return batches.schedule.updates(self.epochs, len(batches.sampler), batches.drop_last)

    def __iter__(self) -> Iterator[list[Any]]:
        for epoch in range(self.epochs):
            self.batches.set_epoch(epoch)
            yield from self.batches
