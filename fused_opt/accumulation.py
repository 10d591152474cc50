"""Cyclical batch sizes by accumulation: micro-batches joined into steps, weighted by what their losses are means over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

from torch import Tensor

from .batch_size import CyclicalBatchSize


class MicroBatch(NamedTuple):
    """A part of a step: `weight` is its mean loss's factor, `step` says that the optimizer's step follows."""

    batch: Any
    weight: float
    step: bool


def leading_size(batch: Any) -> int:
    """Length of the first dimension of the first tensor in `batch`, through sequences and mappings."""
    if isinstance(batch, Tensor) and batch.ndim:
        return batch.shape[0]
    if isinstance(batch, Mapping | list | tuple) and batch:
        return leading_size(next(iter(batch.values() if isinstance(batch, Mapping) else batch)))
    raise TypeError(f"cannot tell the number of examples in a {type(batch).__name__}: pass examples=")


def accumulate(
    batches: Iterable[Any],
    schedule: CyclicalBatchSize,
    epoch: float = 0,
    *,
    length: int | None = None,
    count: Callable[[Any], float] | None = None,
    examples: Callable[[Any], int] = leading_size,
) -> Iterator[MicroBatch]:
    """Micro-batches, with the weight of each and whether a step follows it: larger batches by accumulation.

    The other form of cyclical batch sizes (arXiv 1812.01216). A step takes micro-batches until they hold the
    examples due at its beginning, or there are no more. Their weights are `count(batch)` over its sum, so the
    gradient is the mean over what is counted, not over micro-batches, however short the last one. Since the
    weights need that sum, the micro-batches of a step are read before the first is given.

    Args:
        batches: the micro-batches of an epoch, usually a `DataLoader`.
        schedule: the number of examples in a step.
        epoch: position of the first micro-batch, in epochs.
        length: micro-batches in a whole epoch; None for `len(batches)`.
        count: how many a micro-batch's loss is a mean over, such as tokens that are not padding; None for its
            examples. The size of a step is in examples whatever is counted.
        examples: how many examples a micro-batch has.

    Raises:
        TypeError: `batches` has no length and none is given, or `examples` cannot tell.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for batch, weight, step in accumulate(torch.ones(11, 3).split(4), CyclicalBatchSize(6)):
        ...     (weight * model(batch).square().mean()).backward()
        ...     if step:
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     print(len(batch), weight, step)
        4 0.5 False
        4 0.5 True
        3 1.0 True
    """
    if length is None:
        if not isinstance(batches, Sized):
            raise TypeError(f"a {type(batches).__name__} has no length: pass length=, that of an epoch")
        length = len(batches)
    stream, read = iter(batches), 0
    while True:
        due, held = schedule.at(epoch + read / length), 0
        parts: list[Any] = []
        for batch in stream:
            parts.append(batch)
            held += examples(batch)
            if held >= due:
                break
        if not parts:
            return
        read += len(parts)
        counts = [float((count or examples)(batch)) for batch in parts]
        for number, (batch, size) in enumerate(zip(parts, counts, strict=True), 1):
            yield MicroBatch(batch, size / (sum(counts) or 1), number == len(parts))
