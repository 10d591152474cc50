"""Noise and averages as what does not change from step to step, for devices that keep the counts of steps and samples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ..backends.interface import Average, Counted, Schedule
from ..rule import UNKNOWN
from .averaging import EMA, PSWA, PSWM, PWALKS, SWM, Averaging
from .noise import WeightNoise

_AVERAGES = {
    PSWA: Average.MEAN,
    PWALKS: Average.MEAN,
    SWM: Average.EXPONENTIAL,
    EMA: Average.EXPONENTIAL,
    PSWM: Average.MOMENTUM,
}
_MOST = 2**60  # steps that 64 bits still add and multiply; nobody takes as many
_NOTHING = Schedule()


@lru_cache(maxsize=256)
def _schedule(noise: WeightNoise | None, averaging: Averaging | None) -> Schedule | None:
    """None: a class that is not this package's decides in Python."""
    schedule = _NOTHING
    if noise is not None:
        if type(noise) is not WeightNoise:
            return None
        schedule = schedule._replace(
            sigma=noise.std if noise.std is not None else noise.temperature or 0.0,
            temperature=noise.std is None,
            decay=noise.schedule == "decay",
            cycle=min(noise.period or 0, _MOST),
            relative=noise.relative,
            noise_seed=noise.seed,
        )
    if averaging is not None:
        if type(averaging) not in _AVERAGES:
            return None
        period = getattr(averaging, "period", 0)
        schedule = schedule._replace(
            average=_AVERAGES[type(averaging)],
            start=min(averaging.start, _MOST),
            period=min(period, _MOST),
            interval=min(averaging.interval, _MOST),
            window=averaging._window() if period else 0.0,
            probability=averaging.probability,
            beta=getattr(averaging, "beta", 0.0),
            seed=averaging.seed % 2**64,
            warmup=getattr(averaging, "warmup", False),
        )
    return schedule


def counted(group: Mapping[str, Any]) -> Counted | None:
    """What a device that counts needs to know of a group's noise and averages; None: the host must compute them."""
    schedule = _schedule(group["noise"], group["averaging"])
    if schedule is None or group["steps"] >= _MOST:
        return None
    return Counted(schedule, group["steps"], group["samples"], group["periods"])


#: Of a group that has neither: its steps are counted, from wherever the device is.
UNCOUNTED = Counted(_NOTHING, int(UNKNOWN), 0, 0)
