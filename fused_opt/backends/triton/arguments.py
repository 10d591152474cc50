"""A row of arguments, as the kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..interface import CautiousArgs, Counted, Fold, NoiseArgs, RatioArgs, RoundingArgs, Schedule, StepArgs
from . import columns, schedule

NO_RATIO, NO_NOISE, NO_FOLD = (0, 1.0, 0.0, 0.0, 0), NoiseArgs(0.0, False, 0, 0), Fold(0.0, 0.0, False, False)
NO_MASKS, NO_ROUNDING = CautiousArgs(False, False, False), RoundingArgs(0, 0)
_NO_COUNTS = Counted(Schedule(), 0, 0, 0)


class Row(NamedTuple):
    """What a step does to the parameters of one key; equal rows are equal words."""

    args: StepArgs  # without tensors
    slot: int = 0  # of the group's counts
    advances: bool = False  # whether it is the one of its group's rows that counts the step
    lr_at: int = 0  # the address of a rate on the device, in float64, or 0
    decay_at: int = 0  # and of what the decays are multiplied with
    by_device: bool = False  # the counts are those that the device has

    @property
    def noise(self) -> NoiseArgs | None:
        """The step's, or what a device makes it of."""
        counted = self.args.counted
        if counted is None:
            return self.args.noise
        return NoiseArgs(counted.schedule.sigma, counted.schedule.relative, counted.schedule.noise_seed, 0)

    @property
    def averages(self) -> bool:
        """Whether it may touch averages."""
        counted = self.args.counted
        return self.args.fold is not None if counted is None else counted.schedule.average != 0

    @property
    def carries(self) -> bool:
        """Whether its noise needs the norm of the weights."""
        noise = self.noise
        return noise is not None and noise.relative and noise.sigma > 0

    @property
    def masked(self) -> bool:
        """Whether there are masks, or decay that is not times the rate."""
        return self.args.cautious is not None or bool(self.args.independent_decay)

    @property
    def sums(self) -> bool:
        """Whether it may have to sum something first."""
        scaled = self.args.cautious is not None and self.args.cautious.scaled
        return self.args.ratio is not None or self.carries or scaled


def without_tensors(args: StepArgs) -> tuple[StepArgs, Tensor | None, Tensor | None]:
    """The arguments, and the rate and the decay where they are on the device."""
    lr = args.lr if isinstance(args.lr, Tensor) else None
    decay = next((one for one in args[2:5] if isinstance(one, Tensor)), None)
    if lr is not None:
        args = args._replace(lr=0.0)
    if decay is not None:
        factors = [float(isinstance(one, Tensor)) for one in args[2:5]]
        args = args._replace(coupled_decay=factors[0], decoupled_decay=factors[1], independent_decay=factors[2])
    return args, lr, decay


def pack(row: Row) -> bytes:
    """Its words."""
    args, counted = row.args, row.args.counted or _NO_COUNTS
    coefficients = [*args.coefficients, *[0.0] * (columns.MOST_COEFFICIENTS - len(args.coefficients))]
    ratio: RatioArgs | Sequence[float] = args.ratio or NO_RATIO
    by = schedule.BY_DEVICE.value if row.by_device else schedule.BY_HOST.value
    of_group = (counted.steps, counted.samples, counted.periods)
    due = 0 if row.by_device or args.counted is None else schedule.due(counted.schedule, counted.steps)
    _, temperature, decay, cycle, _, _, *average, warmup = counted.schedule
    kind, start, period, interval, *numbers, seed = average
    return columns.ROW_FORMAT.pack(
        *args[:4], *coefficients, *ratio, *(row.noise or NO_NOISE), *(args.fold or NO_FOLD), args.independent_decay,
        *(args.cautious or NO_MASKS), args.rounding is not None, *(args.rounding or NO_ROUNDING), row.lr_at, row.decay_at,
        0 if args.counted is None else by, row.slot, row.advances, *of_group, due,
        temperature, decay, cycle, kind, start, period, interval, *numbers, seed, warmup,
    )  # fmt: skip
