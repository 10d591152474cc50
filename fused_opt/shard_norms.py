"""Norms of tensors of which every process holds a shard, before a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

from .backends.interface import Kind, NoiseArgs, Norm, Norms, ParamEntry, PartNorms, RatioArgs, ShardBucket, StepArgs
from .parts.tracker import PartTracker
from .plan import Plan
from .shards import add_up

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


def _shards(buckets: Sequence[ShardBucket]) -> Iterator[tuple[int, int, ParamEntry]]:
    """Every shard with the numbers of its bucket and of its place there."""
    for b, bucket in enumerate(buckets):
        for k, member in enumerate(bucket.members):
            if member.shard is not None:
                yield b, k, member


def all_reduce_norms(
    plan: Plan,
    args: Sequence[Sequence[StepArgs]],
    extras: Sequence[tuple[Any, ...]],
    parts: PartTracker | None,
    among: Norm,
    *,
    gradients: bool,
) -> None:
    """Give the backends the norms of whole tensors where they step shards, after one all-reduce of the shards' norms.

    ``among``: which norms: not DIRECTION before the gradients' scale is known, and no others after that. ``gradients``: the
    norms of all gradients, not only those that trust ratios need. ``extras``: of every group, as in the arguments.
    """
    buckets = cast("list[ShardBucket]", plan.buckets)
    norms = [
        [list(of_member) for of_member in bucket.norms(of_bucket, gradients, Norm.DIRECTION in among)]
        for bucket, of_bucket in zip(buckets, args)
    ]
    sums: list[list[PartNorms | None]] = [[None] * len(bucket.members) for bucket in buckets]
    asked = []
    for b, k, member in _shards(buckets):
        ratio, noise, *_ = extras[member.group]
        squares = parts.squares(member.parameter) if parts is not None and Norm.WEIGHT in among else []
        needed = _needed(ratio, noise, member.tensor.ndim, bool(squares)) | (Norm.GRADIENT if gradients else Norm(0))
        asked.append((member, b, k, [i for i, norm in enumerate(_FIELDS) if norm in needed & among], squares))
    # A norm that a process does not know, without a gradient or elements, contributes 0.
    numbers = [[max(norms[b][k][i], 0.0) for i in which] + squares for _, b, k, which, squares in asked]
    wholes = add_up(numbers, [member.parameter for member, *_ in asked])
    for (member, b, k, which, squares), whole in zip(asked, wholes):
        if member.tensor.grad is None:  # it is not stepped, and keeps its carried norm: that of the shard
            continue
        for i, norm2 in zip(which, whole):
            norms[b][k][i] = norm2
        if squares:
            sums[b][k] = PartNorms(math.fsum(map(math.sqrt, whole[len(which) :])), Norms(*norms[b][k]).grad2)
    for bucket, of_bucket, parts_of_bucket in zip(buckets, norms, sums):
        bucket.set_part_norms(parts_of_bucket)
        bucket.set_norms([Norms(*of_member) for of_member in of_bucket])
