"""Parameters that are sharded over processes (DTensor): the local part, and sums over all parts."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ShardLayout(NamedTuple):
    """Where the elements of a shard are in the row-major order of the whole tensor, which keys the noise."""

    offset: int  # of the first
    run: int  # how many consecutive elements of the shard are consecutive in the whole
    elsewhere: int  # how many elements of the whole are not in the shard
    strides: tuple[int, ...]  # of the whole

    def elements(self, sizes: Sequence[int]) -> Tensor:
        """The place of every element, in row-major order, int64."""
        places = torch.full(tuple(sizes), self.offset)
        for d, (size, stride) in enumerate(zip(sizes, self.strides)):
            places += (torch.arange(size) * stride).reshape([-1 if d == k else 1 for k in range(len(sizes))])
        return places.flatten()


def is_spread(tensor: Any) -> bool:
    """Whether it is a DTensor; torch.distributed.tensor is not imported for the question."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The part of a tensor that is in this process: all of it, unless it is a DTensor."""
    # Not to_local(): of a parameter it makes a new view every time, and whether it moved is asked every step.
    return tensor._local_tensor if is_spread(tensor) else tensor


def like(tensor: Any, parameter: Any) -> Any:
    """A gradient, laid out as its parameter: autograd may give it as a partial sum, or sharded differently."""
    if not is_spread(tensor) or tensor.placements == parameter.placements:
        return tensor
    with torch.no_grad():
        return tensor.redistribute(placements=parameter.placements)


def within_zero() -> bool:
    """Whether ZeroRedundancyOptimizer is making an optimizer of this process's parameters; only the stack tells."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return False
    makes = module.ZeroRedundancyOptimizer._init_local_optimizer.__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not makes:  # f_locals would keep what it shows alive
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def spread_of(parameter: Any) -> tuple[Any, tuple[int, ...]]:
    """The mesh, and its dimensions over which the parameter is sharded: a norm is a sum over these."""
    cut = tuple(d for d, placement in enumerate(parameter.placements) if not placement.is_replicate())
    return parameter.device_mesh, cut


def add_up(vector: Tensor, mesh: Any, cut: Sequence[int]) -> Tensor:
    """Numbers that belong to parts of parameters, added up over the processes that hold the other parts.

    They stay on their device where that is the mesh's, and the host does not wait. A NaN is returned as an infinity, which no
    backend confuses with UNKNOWN.
    """
    device = vector.device
    if device.type != mesh.device_type:
        vector = vector.to(mesh.device_type)
    for dimension in cut:
        torch.distributed.all_reduce(vector, group=mesh.get_group(dimension))
    return vector.nan_to_num_(nan=math.inf, posinf=math.inf).to(device)


@lru_cache(maxsize=4096)
def layout_of(shape: torch.Size, mesh: Any, placements: tuple[Any, ...]) -> tuple[tuple[int, ...], ShardLayout | None]:
    """Sizes of the local part, and its place in the whole; None where it is not one box, as uneven strided shards are not."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    for m, placement in enumerate(placements):
        if (factor := getattr(placement, "split_factor", None)) is not None:
            cuts = {k: mesh.size(k) for k, p in enumerate(placements) if getattr(p, "dim", None) == placement.dim}
            inner = math.prod(size for k, size in cuts.items() if k > m)
            if factor != inner or shape[placement.dim] % math.prod(cuts.values()):
                return sizes, None
    strides = torch.empty(shape, device="meta").stride()
    cut = [d for d, size in enumerate(sizes) if size != shape[d]]
    return sizes, ShardLayout(
        sum(first * stride for first, stride in zip(offsets, strides)),
        max(1, math.prod(sizes[cut[-1] if cut else 0 :])),
        math.prod(shape) - math.prod(sizes),
        strides,
    )


def check_alike(name: str, parameter: Any, what: str, found: Any) -> None:
    """Raise where a gradient or a state is not spread over processes as its parameter is."""
    alike = not is_spread(parameter) and not is_spread(found)
    if is_spread(parameter) and is_spread(found):
        placed = what == "gradient" or found.placements == parameter.placements  # a gradient is redistributed
        alike = placed and found.device_mesh == parameter.device_mesh
    if alike:
        return
    first, second = (
        f"a DTensor on {tensor.device_mesh} with {tensor.placements}"
        if is_spread(tensor)
        else "a tensor of this process"
        for tensor in (parameter, found)
    )
    raise RuntimeError(
        f"parameter {name} is {first} and its {what} {second}; they must be laid out alike. "
        f"torch.distributed.tensor.distribute_tensor cuts a tensor, and torch.distributed.checkpoint.state_dict."
        f"set_optimizer_state_dict loads states that way"
    )


class Shard:
    """A DTensor parameter as a backend sees it: ``tensor``, plain, in the memory of the local part.

    Attributes:
        tensor: what a backend steps; it has a gradient only between ``bind`` and ``unbind``.
        layout: where in the whole tensor the part lies; None where only noise would need it and it is not one box.

    Raises:
        RuntimeError: for a parameter that is a pending sum, or of which noise cannot tell the elements.
    """

    def __init__(self, name: str, parameter: Any, noisy: bool) -> None:
        if any(placement.is_partial() for placement in parameter.placements):
            raise RuntimeError(
                f"parameter {name} has the placements {parameter.placements}, and a sum that is still to be made has no "
                f"elements to step; redistribute() it to Shard or Replicate before making it a parameter"
            )
        self.parameter = parameter
        self._here = local(parameter)
        self._version = parameter._version
        self._states: list[tuple[Any, Tensor]] = []
        self._bound: Any = None
        self.tensor = self._here.detach()
        sizes, layout = layout_of(parameter.shape, parameter.device_mesh, parameter.placements)
        self.layout = layout if tuple(sizes) == tuple(self._here.shape) else None
        if noisy and self.layout is None:
            raise RuntimeError(
                f"parameter {name} of shape {tuple(parameter.shape)} is cut by {parameter.placements} into parts that are "
                f"not one box each, and noise counts elements, as rounding at random does; cut dimensions into equal parts, "
                f"or leave both out"
            )

    def hold(self, state: Any) -> Tensor:
        """The local part of a state; ``bind`` checks from now on that it has not been replaced."""
        here = local(state)
        self._states.append((state, here))
        return here

    def bind(self) -> bool:
        """Give ``tensor`` its part of this step's gradient; False if a local part was replaced since."""
        if local(self.parameter) is not self._here or any(local(state) is not here for state, here in self._states):
            return False
        if self.parameter._version != self._version:  # a write that the local part's version does not count
            torch.autograd.graph.increment_version(self.tensor)
            self._version = self.parameter._version
        grad = self.parameter.grad
        if grad is None or grad is not self._bound:
            self.tensor.grad = None if grad is None else local(like(grad, self.parameter))
            self._bound = grad
        return True

    @property
    def states(self) -> list[Any]:
        """What ``hold`` was given."""
        return [state for state, _ in self._states]

    def unbind(self) -> None:
        """Remove the gradient from ``tensor``."""
        self.tensor.grad = self._bound = None

    def written(self) -> None:
        """Tell autograd that the step has written the parameter."""
        torch.autograd.graph.increment_version(self.parameter)
        self._version = self.parameter._version
