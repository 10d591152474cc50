"""Norms of tensors of which every process holds a shard, before a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .backends.interface import (
    DeviceScalars,
    Kind,
    NoiseArgs,
    Norm,
    ParamEntry,
    PartNorms,
    RatioArgs,
    ShardBucket,
    StepArgs,
)
from .parts.tracker import PartTracker
from .plan import Plan
from .shards import add_up, spread_of

_FIELDS = (Norm.WEIGHT, Norm.GRADIENT, Norm.DIRECTION)  # of Norms, in their order


def _needed(ratio: RatioArgs | None, noise: NoiseArgs | None, ndim: int, has_parts: bool) -> Norm:
    """Which norms of a tensor a step needs; ``has_parts``: those of the gradient's parts are known."""
    needed = Norm(0)
    if noise is not None and noise.relative:
        needed |= Norm.WEIGHT
    if ratio is not None and ndim > ratio.exempt:
        needed |= Norm.WEIGHT
        if ratio.kind == Kind.LAMB:
            needed |= Norm.DIRECTION
        elif ratio.kind == Kind.LARS or not has_parts:
            needed |= Norm.GRADIENT
    return needed


class _Sum(NamedTuple):
    """What is added up in one all-reduce: norms of shards that are cut alike, and squares of their gradients' parts."""

    mesh: Any
    cut: tuple[int, ...]
    places: Tensor  # in the table of all norms, read row by row
    kept: Tensor | None  # which of the sums are put back there; None: all of them
    members: list[int]  # of those with parts


def _numbers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """On a device; it is not waited for."""
    found = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def _sums(
    members: Sequence[ParamEntry], needed: Sequence[Norm], squares: Sequence[Any], device: torch.device
) -> list[_Sum]:
    """The all-reduces of a step, the same in every process, and in the same order."""
    together: dict[Any, list[int]] = {}
    for k, member in enumerate(members):
        if member.shard is not None:
            together.setdefault(spread_of(member.parameter), []).append(k)
    sums = []
    for (mesh, cut), of_mesh in together.items():
        places = [(k, 3 * k + i) for k in of_mesh for i, norm in enumerate(_FIELDS) if norm in needed[k]]
        # One without a gradient is not stepped, and keeps its carried norm: that of the shard.
        kept = [n for n, (k, _) in enumerate(places) if members[k].tensor.grad is not None]
        with_parts = [k for k in of_mesh if squares[k]]
        if (cut and places) or with_parts:
            all_kept = len(kept) == len(places)
            sums.append(
                _Sum(
                    mesh,
                    cut,
                    _numbers([place for _, place in places], device),
                    None if all_kept else _numbers(kept, device),
                    with_parts,
                )
            )
    return sums


def all_reduce_norms(
    plan: Plan,
    args: Sequence[Sequence[StepArgs]],
    extras: Sequence[tuple[Any, ...]],
    parts: PartTracker | None,
    among: Norm,
    *,
    gradients: bool,
    scalars: DeviceScalars | None = None,
) -> None:
    """Give the backends the norms of whole tensors where they step shards, after one all-reduce of the shards' norms.

    Where the plan is on one device the numbers stay there, and the host waits for nothing but the norms of parts.

    Args:
        plan: of this step.
        args: for every bucket.
        extras: of every group, as in the arguments.
        parts: the tracker of the gradients' parts.
        among: which norms: not DIRECTION before the gradients' scale is known, and no others after that.
        gradients: the norms of all gradients, not only those that trust ratios need.
        scalars: of a step whose numbers are on the device.
    """
    buckets = cast("list[ShardBucket]", plan.buckets)
    members = [member for bucket in buckets for member in bucket.members]
    squares: list[list[float]] = [[]] * len(members)
    if parts is not None and Norm.WEIGHT in among:
        squares = [[] if m.shard is None else parts.squares(m.parameter) for m in members]
    device = plan.device or torch.device("cpu")
    wants = tuple((ratio, noise is not None and noise.relative) for ratio, noise, *_ in extras)
    idle = tuple([k for k, member in enumerate(members) if member.tensor.grad is None])
    key = (gradients, wants, idle, tuple(map(len, squares)) if parts is not None else None)
    if among not in plan.sums or plan.sums[among][0] != key:
        needed = [
            (
                _needed(extras[m.group][0], extras[m.group][1], m.tensor.ndim, bool(of_m))
                | (Norm.GRADIENT if gradients else Norm(0))
            )
            & among
            for m, of_m in zip(members, squares)
        ]
        # Directions come second, and every member's norms are then looked for where those of whole tensors are.
        always = among == Norm.DIRECTION and any(needed)
        plan.sums[among] = key, _sums(members, needed, squares, device), always
    _, sums, always = plan.sums[among]
    if not sums and not always:
        return
    tables = [
        bucket.norms(of_bucket, gradients, Norm.DIRECTION in among, scalars).to(device)
        for bucket, of_bucket in zip(buckets, args)
    ]
    norms = tables[0] if len(tables) == 1 else torch.cat(tables)
    part_norms = _add_up(norms.view(-1), sums, squares)
    for bucket in buckets:
        of_bucket, norms = norms[: len(bucket.members)], norms[len(bucket.members) :]
        if part_norms:
            first = sum(len(other.members) for other in buckets[: buckets.index(bucket)])
            bucket.set_part_norms([part_norms.get(first + k) for k in range(len(bucket.members))])
        bucket.set_norms(of_bucket)


def _add_up(norms: Tensor, sums: Sequence[_Sum], squares: Sequence[Sequence[float]]) -> dict[int, PartNorms]:
    """Put sums over processes into the norms; returns the norms of parts, which are waited for."""
    part_norms = {}
    for mesh, cut, places, kept, with_parts in sums:
        # A norm that a process does not know, without a gradient or elements, contributes 0.
        vector = norms.index_select(0, places).clamp_(min=0)
        if with_parts:
            flat = [square for k in with_parts for square in squares[k]]
            vector = torch.cat([vector, torch.tensor(flat, dtype=torch.float64, device=norms.device)])
        vector = add_up(vector, mesh, cut)
        if with_parts:
            whole = iter(vector[len(places) :].tolist())
            for k in with_parts:
                part_norms[k] = PartNorms(math.fsum(math.sqrt(next(whole)) for _ in squares[k]))
        vector = vector[: len(places)]
        if kept is not None:
            places, vector = places.index_select(0, kept), vector.index_select(0, kept)
        norms.index_copy_(0, places, vector)
    return part_norms
