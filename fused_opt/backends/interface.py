"""The interface between the optimizer and its backends: the numbers of a step, and the functions of a backend.

In a step the functions of a bucket are called in this order; where one raises, the step is over and nothing was stepped:

1. ``collect_gradients``: finds this step's gradients, or says that the bucket has to be made anew;
2. ``set_part_norms``: where the parts of the gradients are tracked;
3. ``norms`` and ``set_norms``, of a bucket with shards: the norms of the shards, and those of the whole tensors;
4. ``grad_norm2``, or of a device bucket ``sum_gradients``: where the norm of all gradients is wanted;
5. for shards of tensors with LAMB's ratio ``norms`` and ``set_norms`` once more, now that the gradients' scale is known;
6. ``run``: steps, and counts the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ..eight_bits import decoded
from ..rule import UNKNOWN, Rule
from ..shards import Shard, ShardLayout
from ..warn import warn_once

#: What parameters of one StepArgs have in common: their group, their step, counted from 1 (UNKNOWN where the device counts),
#: and their rule's scalar as the step before left it (1 where it has none, or the device has it), before how many steps:
#: that of a parameter which is there twice changes between its steps.
StepKey: TypeAlias = tuple[int, float, float, int]


def is_known(number: float) -> bool:
    """Whether a count or a (squared) norm, never negative, is one; a NaN is."""
    return number != UNKNOWN


class Kind(IntEnum):
    """What a trust ratio divides by; as ``Kind`` in csrc/table.h."""

    LARS = 1
    CLARS = 2
    LAMB = 3


class Norm(IntFlag):
    """Norms that a step may need before it writes; as ``Wanted`` in csrc/table.h."""

    WEIGHT = 1
    GRADIENT = 2
    DIRECTION = 4
    AGREEMENT = 8  # how many elements of the update go the gradient's way


class RatioArgs(NamedTuple):
    """A trust ratio, see :class:`fused_opt.TrustRatio`."""

    kind: Kind
    coefficient: float
    cap: float
    eps: float
    exempt: int  # tensors of at most this many dimensions keep ratio 1


class NoiseArgs(NamedTuple):
    """The noise of one step, see :class:`fused_opt.WeightNoise`."""

    sigma: float
    relative: bool
    seed: int
    step: int  # counted from 0; with the seed, the parameter's index and the element's place the key of a draw


class Fold(NamedTuple):
    """What a step does with the average v of the weights w: ``v <- (restart ? 0 : v) + add * (w - share * v)``.

    Then ``w <- w + follow * (new v - old v)``, where nothing is written back and v does not restart.
    """

    add: float
    share: float
    restart: bool
    write_back: bool  # and then w <- v
    follow: float = 0.0


class CautiousArgs(NamedTuple):
    """Masks, see :class:`fused_opt.Cautious`."""

    update: bool
    decay: bool
    scaled: bool  # the update by the share that its mask leaves


class RoundingArgs(NamedTuple):
    """What is stored in 16 bits is rounded at random, see :class:`fused_opt.StochasticRounding`."""

    seed: int
    step: int  # as that of NoiseArgs


class Average(IntEnum):
    """What a :class:`fused_opt.extras.averaging.Averaging` computes; as ``Average`` in csrc/schedule.h."""

    MEAN = 1  # of a period's samples
    EXPONENTIAL = 2
    MOMENTUM = 3  # of the periods' means


class Schedule(NamedTuple):
    """What :class:`NoiseArgs` and :class:`Fold` are computed from, beside the counts: ``at_counts`` in csrc/schedule.h."""

    sigma: float = 0.0  # standard deviation of the noise, before what follows
    temperature: bool = False  # it is one: the standard deviation is sqrt(2 * lr * sigma)
    decay: bool = False  # falls with the steps
    cycle: int = 0  # falls to zero in as many steps; 0: it does not
    relative: bool = False
    noise_seed: int = 0
    average: int = 0  # an Average; 0: none
    start: int = 0
    period: int = 0  # 0: it never ends
    interval: int = 1
    window: float = 0.0  # steps at the end of a period that can be sampled
    probability: float = 1.0
    beta: float = 0.0
    seed: int = 0
    warmup: bool = False  # of beta


class Counted(NamedTuple):
    """The noise and the average of a group where the device counts: its steps, the period's samples, past periods."""

    schedule: Schedule
    steps: int  # UNKNOWN: from wherever the device is
    samples: int
    periods: int


class StepArgs(NamedTuple):
    """What a step does to the parameters of one group that have taken equally many steps."""

    lr: float | Tensor  # a tensor only for a device bucket, and then on its device
    grad_scale: float  # multiplies every gradient: sign, unscaling and clipping in one factor
    # Times the weights; one of them is not 0, and may be a tensor where the rate may.
    coupled_decay: float | Tensor  # added to the gradient before the rule
    decoupled_decay: float | Tensor  # added to the rule's update
    independent_decay: float | Tensor  # beside the direction: not times the rate
    coefficients: Sequence[float]  # the rule's, for this step; before ``at_step`` where only the device has the count
    ratio: RatioArgs | None = None
    noise: NoiseArgs | None = None
    fold: Fold | None = None
    cautious: CautiousArgs | None = None
    rounding: RoundingArgs | None = None
    counted: Counted | None = None  # for a device bucket, in place of noise and fold


class Norms(NamedTuple):
    """Squared norms of one parameter's weights, gradient and direction; UNKNOWN where not known."""

    weight2: float = UNKNOWN
    grad2: float = UNKNOWN
    direction2: float = UNKNOWN


def norms_table(norms: Sequence[Sequence[float]]) -> Tensor:
    """The norms of members whose bucket is the host's: a tensor of shape (members, 3), float64."""
    return torch.tensor(norms, dtype=torch.float64, device="cpu").reshape(-1, 3)


class PartNorms(NamedTuple):
    """The sum of the norms of the parts that a gradient is a sum of, and the squared norm of the gradient."""

    sum_of_norms: float
    grad2: float = UNKNOWN


class DeviceScalars(NamedTuple):
    """The numbers of a step's scale that stay on the device, where the kernels read them."""

    found_inf: Tensor | None = None  # not 0: nothing is stepped, nothing counted
    grad_scale: Tensor | None = None  # what the gradients were multiplied with
    norm2: Tensor | None = None  # the sum of squares of all gradients, float64, to be clipped
    max_norm: float = 0.0  # to this norm

    def on(self, device: torch.device) -> DeviceScalars:
        """The same as the kernels of a device read them: to be kept until they have."""
        if self.found_inf is self.grad_scale is None:
            return self
        found_inf, grad_scale = (
            None if scalar is None else scalar.to(device, torch.float32, non_blocking=True)
            for scalar in (self.found_inf, self.grad_scale)
        )
        return self._replace(found_inf=found_inf, grad_scale=grad_scale)

    def addresses(self) -> tuple[int, int, int, float]:
        """Of those that there are, 0 for others, and the norm to clip to."""
        if self.found_inf is self.grad_scale is self.norm2 is None:
            return 0, 0, 0, 0.0
        found_inf, grad_scale, norm2 = (0 if scalar is None else scalar.data_ptr() for scalar in self[:3])
        return found_inf, grad_scale, norm2, self.max_norm


@dataclass
class ParamEntry:
    """One parameter of a bucket."""

    tensor: Tensor  # what is stepped: of a DTensor the local part
    group: int
    index: int  # in the optimizer: a key of its noise
    name: str
    states: list[Tensor] | None = None  # None until its first gradient
    step: Tensor | None = None
    average: Tensor | None = None
    states_are_new: bool = False  # made for the coming step
    lr_scale: float = 1.0
    decay_scale: float = 1.0
    shard: Shard | None = None  # of a DTensor
    noisy: bool = False  # noise counts its elements in row-major order
    earlier: int = 0  # how often its parameter is stepped before it in the same step
    differentiable: bool = False  # autograd follows its step
    exclusive: bool = True  # no other parameter shares its memory, so that a carried norm stays valid
    scalar: Tensor | None = None  # the rule's, a float32
    exact: Tensor | None = (
        None  # laid out as `tensor`, which is the rounding of weights that it makes exact: fused_opt/exact.py
    )

    scales: list[Tensor | None] = field(
        default_factory=list
    )  # by state; None: it has no codes (fused_opt/eight_bits.py)

    @property
    def coded(self) -> bool:
        """Whether it has states in 8 bits."""
        return any([scale is not None for scale in self.scales])  # noqa: C419  # of one or two

    def values(self) -> list[Tensor]:
        """What its states are, in 8 bits or not."""
        states = self.states or ()
        if not self.coded:
            return list(states)
        return [s if scale is None else decoded(s, scale) for s, scale in zip(states, self.scales)]

    @property
    def parameter(self) -> Tensor:
        """What the optimizer was given."""
        return self.tensor if self.shard is None else self.shard.parameter

    @property
    def layout(self) -> ShardLayout | None:
        """Where in the whole tensor a shard lies."""
        return None if self.shard is None else self.shard.layout

    def count(self) -> float:
        """How many steps it has taken before this one; 0 or 1 where torch.optim keeps no count."""
        return self.step.item() + self.earlier if self.step is not None else float(not self.states_are_new)

    def key(self) -> StepKey:
        """Of its coming step."""
        if self.scalar is None:
            return self.group, self.count() + 1, 1.0, 0
        return self.group, self.count() + 1, self.scalar.item(), self.earlier

    def advance(self, args: StepArgs) -> None:
        """Count one more step, which was made with these arguments."""
        self.states_are_new = False
        if self.step is not None:
            self.step.add_(1)
        if self.scalar is not None:
            self.scalar.fill_(args.coefficients[-1])

    def warn_not_finite(self) -> None:
        """Say, once per parameter, that its trust ratio could not be formed."""
        warn_once(f"the norms of parameter {self.name} are not finite: its trust ratio is 1 in such steps")


class Bucket(Protocol):
    """Parameters that one backend steps together with one rule, prepared for many steps."""

    @property
    def members(self) -> Sequence[ParamEntry]:
        """The parameters."""

    @property
    def device(self) -> torch.device | None:
        """Of a DeviceBucket."""

    def collect_gradients(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]
    ) -> list[StepKey] | None:
        """Find this step's gradients.

        Returns:
            the keys for which ``run`` wants arguments, in its order. None: something was moved, resized, cast or replaced,
            and the plan must be made anew.
        """

    def set_part_norms(self, norms: Sequence[PartNorms | None]) -> None:
        """Set the norms of every member's gradient parts, None where they are not known."""

    def grad_norm2(self) -> float:
        """Sum of squares of all gradients, as they lie in memory."""

    def run(self, args: Sequence[StepArgs]) -> None:
        """Step every parameter that has a gradient, with arguments for every pair that ``collect_gradients`` returned."""

    def written_states(self) -> list[Tensor]:
        """What ``run`` has written besides the parameters, and autograd has not seen."""

    def ratios(self) -> list[float]:
        """The trust ratio of every member in the last step; 1 where it has none, NaN where it was not stepped."""


class ShardBucket(Bucket, Protocol):
    """A bucket that steps shards of DTensors, too."""

    def norms(
        self, args: Sequence[StepArgs], gradients: bool, directions: bool, scalars: DeviceScalars | None = None
    ) -> Tensor:
        """The norms of every member that a step with these arguments needs.

        Args:
            args: as for ``run``.
            gradients: those of all gradients.
            directions: LAMB's, too.
            scalars: as for ``run``, of a device bucket.

        Returns:
            A new tensor where the bucket keeps them, of shape (members, 3) and dtype float64: a row is a member's Norms.
            Those that are not needed are UNKNOWN, 0, or what is known.
        """

    def set_norms(self, norms: Tensor) -> None:
        """Set the norms of every member's whole tensor, of which the member may be a shard; a tensor as ``norms`` returns."""


class DeviceBucket(Bucket, Protocol):
    """A bucket on one device that reads a step's numbers there, so that the host does not wait for them."""

    def sum_gradients(self, norm2: Tensor, add: bool) -> None:
        """Put the sum of squares of all gradients into ``norm2``, or add it to what is there."""

    def run(self, args: Sequence[StepArgs], scalars: DeviceScalars | None = ...) -> None:
        """Queue the step of every parameter that has a gradient."""

    def capturing(self) -> bool:
        """Whether a step would go into a CUDA graph now, to be made when the graph is replayed."""

    def counts(self) -> list[tuple[int, int, int, int]]:
        """Of every group in captured steps: its number, steps replayed since the last call, samples, periods; waits."""


class Standard(NamedTuple):
    """What a backend's results are compared with before it steps anything on a device: see self_check.py."""

    bucket: Callable[..., Bucket]  # on the CPU
    exact: bool  # whether results that no norm enters have the same bits
    compiles: bool  # every rule, dtype and extra at its first use: the check leaves out what is not needed


class Backend(Protocol):
    """What a module in this folder offers."""

    @property
    def DEVICES(self) -> tuple[str, ...]:
        """The device types that it supports."""

    @property
    def REUSABLE(self) -> bool:
        """Whether its buckets notice that any parameter or state was replaced, so that a plan can be kept."""

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, in words, or None."""

    def unsupported(
        self,
        rule: Rule | None,
        tensors: Sequence[Tensor],
        noisy: bool = False,
        sharded: bool = False,
        coded: bool = False,
    ) -> str | None:
        """Why it cannot step a parameter, or None.

        Args:
            rule: None: only ``accumulate`` will be called.
            tensors: the parameter, then its gradient and states where it has them.
            noisy: noise is added to it.
            sharded: it is a shard of a DTensor.
            coded: it has, or is to have, states in 8 bits.

        Raises:
            RuntimeError: where the rule has other states or coefficients than the backend's kernel takes.
        """

    def steps_on_device(self, p: Tensor) -> bool:
        """Whether it makes device buckets of parameters like this, and so keeps their count of steps there, in float32."""

    def standard(self, p: Tensor) -> Standard | None:
        """What its results on a tensor's device must agree with before they are used; None: they need no proof there."""

    def accumulate(self, total: Tensor | None, part: Tensor) -> tuple[float, float]:
        """``total += part`` in one pass with the sums of squares of both; None: there is only a part."""

    def bucket(
        self,
        rule: Rule,
        members: Sequence[ParamEntry],
        param_groups: list[dict[str, Any]],
        state: Mapping[Tensor, Any],
    ) -> Bucket:
        """The parameters, prepared."""
