"""Processes that divide layers between them: whose weights are sharded (DTensor), or copies of each other."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..shards import is_spread
from .layers import Layer


@dataclass(frozen=True)
class Team:
    """Processes and this one's place among them.

    Attributes:
        groups: process groups; a sum over one after the other is a sum over all.
        place: of this process, from 0.
        size: how many processes.
        device: on which sums are made.
        cut: whether each has a shard of a weight, and all must take part in gathering it.
    """

    groups: tuple[Any, ...]
    place: int
    size: int
    device: torch.device
    cut: bool

    def divide(self, costs: Sequence[float]) -> list[list[int]]:
        """Which items each process takes: the most expensive first, each to the process with the least work so far."""
        shares: list[list[int]] = [[] for _ in range(self.size)]
        loads = [0.0] * self.size
        for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
            least = loads.index(min(loads))
            shares[least].append(item)
            loads[least] += costs[item]
        return shares

    def exchange(self, numbers: Sequence[float]) -> list[float]:
        """The numbers of all processes, each of which all processes but one have as 0."""
        vector = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        for group in self.groups:
            torch.distributed.all_reduce(vector, group=group)
        return vector.tolist()


def team_of(layer: Layer, model: nn.Module) -> Team | None:
    """The processes that divide work on a layer with this one; None: it works alone."""
    source: Any
    for source in layer.sources():
        if is_spread(source):
            mesh = source.device_mesh
            place = 0
            for size, coordinate in zip(mesh.shape, mesh.get_coordinate()):
                place = place * size + coordinate
            team = Team(
                tuple(mesh.get_all_groups()), place, math.prod(mesh.shape), torch.device(mesh.device_type), True
            )
            return team if team.size > 1 else None
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and any(layer.module is part for part in module.modules()):
            group, device = module.process_group, layer.sources()[0].device
            size = torch.distributed.get_world_size(group)
            return Team((group,), torch.distributed.get_rank(group), size, device, False) if size > 1 else None
    return None


def is_partial(optimizer: Any) -> bool:
    """Whether it, or what made it, is a ZeroRedundancyOptimizer."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    made = getattr(optimizer, "_partial", False)
    return made or (zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer))


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put its parameters back in place: after an evaluation the outermost are whole copies of those trained."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()
