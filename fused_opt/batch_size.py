"""Cyclical batch sizes: noise that is annealed by growing batches and injected again by small ones.

*Parameter Re-Initialization through Cyclical Batch Size Schedules* (arXiv 1812.01216). There are two ways to
raise the batch: `CyclicalBatchSampler` draws larger batches, which BatchNorm sees, and `accumulate` joins
more micro-batches before a step, which it does not. Their results differ where examples mix. The learning
rate stays as scheduled in both: scaling it with the batch would cancel the annealing.
"""

from __future__ import annotations

import itertools
import math
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from . import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The exponent of 2 after `phase` widths, from 0 up to `top`.
SHAPES: dict[str, Callable[[float, int], float]] = {
    "sawtooth": lambda phase, top: math.floor(phase) % (top + 1),
    "triangle": lambda phase, top: top - abs(top - math.floor(phase) % max(1, 2 * top)),
    "cosine": lambda phase, top: top * (1 - math.cos(math.pi * (phase / (top + 1) % 1))) / 2,
}
# Positions in epochs are sums and quotients of floats: one this near to the beginning of a level is on it.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class CyclicalBatchSize:
    r"""Batch size as a function of the epoch: it grows level by level and then starts again.

    *Parameter Re-Initialization through Cyclical Batch Size Schedules* (arXiv 1812.01216), an author's code:

    $$multiplier(epoch) = 2^{\lfloor epoch / width \rfloor \bmod levels}$$

    The other shapes and `maximum` are our definition: `"triangle"` comes back down by the same levels;
    `"cosine"` rises smoothly over the sawtooth's cycle, as $2^{(levels - 1)(1 - \cos \pi t) / 2}$, $t < 1$.

    Args:
        base: examples in a batch of the first level, at least 1; with a distributed sampler, on each rank.
        levels: batch sizes in a cycle, each twice the one before it, at least 1 (1 is a fixed batch).
        width: epochs at each level, above 0; below 1 the batch size changes within an epoch.
        shape: `"sawtooth"`, `"triangle"` or `"cosine"`.
        maximum: examples in the largest batch allowed, at least `base`; None for no limit.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> schedule = CyclicalBatchSize(32, levels=4, width=5)
        >>> [schedule.at(epoch) for epoch in (0, 4.9, 5, 10, 15, 19.9, 20)]
        [32, 32, 64, 128, 256, 256, 32]
    """

    base: int
    levels: int = 4
    width: float = 5
    shape: Literal["sawtooth", "triangle", "cosine"] = "sawtooth"
    maximum: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("base", self.base), ("levels", self.levels)):
            if value < 1 or value != int(value):
                raise ValueError(f"{name} must be a whole number of at least 1, found {value}")
        if not 0 < self.width < math.inf:
            raise ValueError(f"width must be a number of epochs above 0, found {self.width}")
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, found {self.shape!r}")
        if self.maximum is not None and self.maximum < self.base:
            raise ValueError(f"maximum must be at least base, {self.base}, found {self.maximum}")

    @property
    def period(self) -> float:
        """Epochs in a cycle."""
        return self.width * (max(1, 2 * self.levels - 2) if self.shape == "triangle" else self.levels)

    @property
    def largest(self) -> int:
        """Examples in the largest batch of the cycle."""
        size = self.base * int(2 ** (self.levels - 1))
        return size if self.maximum is None else min(size, self.maximum)

    def multiplier(self, epoch: float) -> float:
        """Batch size over `base` at `epoch`, of which fractions are allowed."""
        if not 0 <= epoch < math.inf:
            raise ValueError(f"epoch must be a number of at least 0, found {epoch}")
        phase = epoch / self.width
        if abs(phase - round(phase)) <= TOLERANCE * max(1, phase):
            phase = round(phase)
        return min(math.pow(2, SHAPES[self.shape](phase, self.levels - 1)), self.largest / self.base)

    def at(self, epoch: float) -> int:
        """Examples in a batch at `epoch`."""
        return round(self.base * self.multiplier(epoch))

    def noise_scale(self, epoch: float, *, lr: float, dataset_size: int, momentum: float = 0.0) -> float:
        """Gradient noise that learning rate and batch size set together (Smith and Le, arXiv 1710.06451).

        `lr * (dataset_size / batch - 1)`, or with momentum `lr * dataset_size / (batch * (1 - momentum))`,
        which neglects the 1. A batch counts for no more than the data set.
        """
        batches = max(1.0, dataset_size / self.at(epoch))
        return lr * batches / (1 - momentum) if momentum else lr * (batches - 1)

    def cycles(self, epoch: float) -> int:
        """How often a largest batch, the time of least noise, has come to its end by `epoch`."""
        return max(0, math.floor((epoch - self.levels * self.width) / self.period + TOLERANCE) + 1)

    def spans(
        self, epoch: int, dataset_size: int, drop_last: bool = False, start: int = 0
    ) -> Iterator[tuple[int, int]]:
        """Begin and end, in examples, of the batches of an epoch from its example `start` on.

        A batch has the size due at its first example. The last one is shorter, or left out with `drop_last`.

        Raises:
            ValueError: no examples, or with `drop_last` fewer than in the largest batch.
        """
        if dataset_size < (least := self.largest if drop_last else 1):
            raise ValueError(
                f"batches of up to {self.largest} with {drop_last=} need {least} examples or more, found "
                f"{dataset_size}: with fewer an epoch would be empty; lower maximum= or use drop_last=False"
            )
        while start < dataset_size:
            end = start + self.at(epoch + start / dataset_size)
            if drop_last and end > dataset_size:
                return
            yield start, min(end, dataset_size)
            start = end

    def begins(self, dataset_size: int, drop_last: bool = False) -> Iterator[float]:
        """Where each update of an endless training begins, in epochs."""
        for epoch in itertools.count():
            for begin, _ in self.spans(epoch, dataset_size, drop_last):
                yield epoch + begin / dataset_size

    def updates(self, epochs: float, dataset_size: int, drop_last: bool = False) -> int:
        """Updates that begin within the first `epochs`: turns milestones and lengths in epochs into updates.

        Example:
            >>> schedule = CyclicalBatchSize(32, levels=4, width=5)
            >>> [schedule.updates(milestone, dataset_size=3200) for milestone in (5, 10, 20, 30)]
            [500, 750, 940, 1690]
        """
        begins = self.begins(dataset_size, drop_last)
        return sum(1 for _ in itertools.takewhile(lambda begin: begin < epochs - TOLERANCE, begins))

    def plot(
        self, epochs: float, *, lr: float | Callable[[float], float], dataset_size: int, momentum: float = 0.0
    ) -> Figure:
        """Draw batch size and noise scale over `epochs`, 100 points to a width; needs matplotlib.

        `lr` is a number or a function of the epoch.
        """
        points = [i * self.width / 100 for i in range(math.ceil(100 * epochs / self.width))]
        rate = lr if callable(lr) else lambda epoch: lr
        noise = [
            self.noise_scale(epoch, lr=rate(epoch), dataset_size=dataset_size, momentum=momentum) for epoch in points
        ]
        figure, panels = pictures.figure(2, 1, 6.4, 4.8, sharex=True)
        above, below = panels.flat
        line = {"drawstyle": "steps-post", "color": pictures.SERIES[0]}
        above.plot(points, [self.at(epoch) for epoch in points], **line)
        above.set(ylabel="batch size", ylim=(0, None))
        below.plot(points, noise, **line)
        below.set(ylabel="noise scale", yscale="log", xlabel="epoch")
        pictures.finish((above, below))
        return figure


def by_update(
    by_epoch: Callable[[float], float],
    schedule: CyclicalBatchSize,
    dataset_size: int,
    drop_last: bool = False,
) -> Callable[[int], float]:
    """Turn a function of the epoch, fractions included, into one of the update.

    The number of updates in an epoch changes with the batch size. The result suits a
    `torch.optim.lr_scheduler.LambdaLR` stepped after every update.

    Example:
        >>> schedule = CyclicalBatchSize(50, levels=2, width=1)  # four updates in an epoch, then two
        >>> decay = by_update(lambda epoch: 0.1 ** (epoch // 2), schedule, dataset_size=200)
        >>> [decay(update) for update in range(8)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1]
    """
    begins = schedule.begins(dataset_size, drop_last)
    known = array("d")

    def at_update(update: int) -> float:
        known.extend(itertools.islice(begins, max(0, update + 1 - len(known))))
        return by_epoch(known[update])

    return at_update


class CyclicalBatchSampler(Sampler[list[Any]]):
    """Batches whose size follows a `CyclicalBatchSize`, for `DataLoader(batch_sampler=...)`.

    *Parameter Re-Initialization through Cyclical Batch Size Schedules* (arXiv 1812.01216). The batch after
    `done` examples of an epoch has `schedule.at(epoch + done / len(sampler))`.

    Call `set_epoch` before each epoch; it is passed on to `sampler`. With a distributed sampler the sizes and
    the number of batches are the same on all ranks, and an update's batch is the sum over them.

    To resume within an epoch, tell `state_dict` how many batches of this pass the training loop has finished:
    workers read ahead, so the sampler cannot know. The state is the epoch, the position in examples, and the
    epoch's order unless that follows from the epoch (a sequence of indices, a sampler with `set_epoch`). The
    random generator of the sampler is not part of it: restore it as the program's others if later epochs are
    to repeat as well.

    Args:
        sampler: a sampler or a sequence of indices, of known length.
        schedule: the batch sizes.
        drop_last: leave out an epoch's last batch if it is short.

    Raises:
        TypeError: `sampler` has no length, or gives examples or batches in the place of indices; `schedule` is
            not a `CyclicalBatchSize`.
        ValueError: `sampler` is empty, or with `drop_last` shorter than the largest batch.

    Warns:
        UserWarning: a second pass begins and `set_epoch` was never called, once a sampler.

    Example:
        >>> sampler = CyclicalBatchSampler(range(8), CyclicalBatchSize(2, levels=2, width=0.5))
        >>> list(sampler)
        [[0, 1], [2, 3], [4, 5, 6, 7]]
        >>> sampler.load_state_dict(sampler.state_dict(batches=1))
        >>> list(sampler)
        [[2, 3], [4, 5, 6, 7]]
    """

    def __init__(
        self, sampler: Sampler[Any] | Sequence[Any], schedule: CyclicalBatchSize, drop_last: bool = False
    ) -> None:
        if isinstance(sampler, Dataset | DataLoader | BatchSampler):
            raise TypeError(
                f"sampler must give indices of examples, found {type(sampler).__name__}: "
                "pass RandomSampler(dataset), or range(len(dataset)) for the order they are in"
            )
        if not isinstance(sampler, Sized):
            raise TypeError(f"sampler must have a length, found {type(sampler).__name__}: pass a list")
        if not isinstance(schedule, CyclicalBatchSize):
            raise TypeError(f"schedule must be a CyclicalBatchSize, found {schedule!r}: CyclicalBatchSize(32) is one")
        self.sampler = sampler
        self.schedule = schedule
        self.drop_last = drop_last
        self.epoch = 0
        self._passes: int | None = 0  # begun before the first set_epoch; None once it was called, or missed
        self._rewind()
        len(self)  # raises what the schedule finds wrong with the length

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.schedule!r}: epoch {self.epoch}, {self._handed_out} of {len(self.sampler)} "
            f"examples given, batches of {self.schedule.at(self.epoch + self._handed_out / len(self.sampler))} next)"
        )

    def _rewind(self) -> None:
        self._order: list[Any] | None = None
        self._start = self._handed_out = 0
        self._resuming = False

    def _spans(self) -> Iterator[tuple[int, int]]:
        return self.schedule.spans(self.epoch, len(self.sampler), self.drop_last, self._start)

    def _order_follows_from_epoch(self) -> bool:
        return isinstance(self.sampler, Sequence) or hasattr(self.sampler, "set_epoch")

    def __len__(self) -> int:
        """Batches in the epoch; after `load_state_dict`, those left of it."""
        return sum(1 for _ in self._spans())

    def __iter__(self) -> Iterator[list[Any]]:
        # A generator, so that all of this happens at the first batch: a DataLoader with workers calls iter()
        # twice for one pass, and the first call must not use up the position to resume from.
        if self._passes is not None:
            self._passes += 1
            if self._passes == 2:
                self._passes = None
                warnings.warn(
                    f"a second pass begins and set_epoch was never called: it has the batch sizes of epoch {self.epoch} "
                    f"again, and the order, if {type(self.sampler).__name__} draws it by epoch; "
                    "call set_epoch(epoch) before each",
                    stacklevel=2,
                )
        if not self._resuming:
            self._rewind()
        self._resuming = False
        order = self._order = self._order or list(self.sampler)
        for begin, end in self._spans():
            self._handed_out = end
            yield order[begin:end]

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; one that is being resumed keeps its position."""
        self._passes = None
        if epoch != self.epoch:
            self._rewind()
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """The position after `batches` batches of the present pass, in plain numbers and lists.

        None is all that were handed out: right without workers and inside torchdata's `StatefulDataLoader`,
        too far with the workers of a `DataLoader`.

        Raises:
            ValueError: the pass has fewer batches.
        """
        examples = self._handed_out
        if batches is not None:
            ends = [self._start, *(end for _, end in itertools.islice(self._spans(), batches))]
            if len(ends) <= batches:
                raise ValueError(f"asked for {batches=}, but this pass over epoch {self.epoch} has {len(self)}")
            examples = ends[-1]
        order = None if self._order_follows_from_epoch() else self._order
        return {"epoch": self.epoch, "examples": examples, "total": len(self.sampler), "order": order}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved position; the training loop goes on with `range(sampler.epoch, epochs)`.

        Raises:
            ValueError: not a state of this class, or one of another number of examples (other data or ranks),
                or lacks an order that cannot be drawn again. The sampler stays as it was.
        """
        if missing := {"epoch", "examples", "total", "order"} - state_dict.keys():
            raise ValueError(f"not a state of CyclicalBatchSampler: {', '.join(sorted(missing))} missing")
        epoch, examples, order = state_dict["epoch"], state_dict["examples"], state_dict["order"]
        if state_dict["total"] != len(self.sampler):
            raise ValueError(
                f"the state is of {state_dict['total']} examples, the sampler has {len(self.sampler)}: "
                f"resume with the same data and ranks, or begin the epoch again with set_epoch({epoch})"
            )
        if order is None and examples and not self._order_follows_from_epoch():
            raise ValueError(
                f"the state holds no order for epoch {epoch}, and {type(self.sampler).__name__} would draw "
                f"another: resume with the sampler of the run, or begin again with set_epoch({epoch})"
            )
        self.set_epoch(epoch)
        self._order, self._start, self._handed_out, self._resuming = order, examples, examples, True
