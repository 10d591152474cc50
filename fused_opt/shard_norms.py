"""What processes agree on before a step: the norms of tensors of which each holds a shard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .parts.microbatches import Microbatches
from .plan import Plan, Row
from .shards import add_up

WEIGHT, GRADIENT, DIRECTION = range(3)
LARS, CLARS, LAMB = 1, 2, 3  # as in TrustRatio.row()


def _wanted(ratio: Any, noise: Any, ndim: int, split: bool) -> set[int]:
    """Which norms of a tensor a step needs; ``split``: those of the gradient's parts are known."""
    kind = ratio[0] if ratio is not None and ndim > ratio[-1] else None
    wanted = {WEIGHT} if kind is not None or (noise is not None and noise[1]) else set()
    if kind == LARS or (kind == CLARS and not split):
        wanted.add(GRADIENT)
    return wanted | ({DIRECTION} if kind == LAMB else set())


def agree(
    plan: Plan,
    rows: Sequence[Sequence[Row]],
    extras: Sequence[tuple[Any, Any, Any]],
    parts: Microbatches | None,
    *,
    gradients: bool,
    among: set[int],
) -> None:
    """Tell the backends the norms of whole tensors where they hold shards, after one all-reduce of what shards have.

    Args:
        plan: has gathered this step's gradients.
        rows: as :meth:`Plan.run` takes them.
        extras: every group's trust ratio, noise and average, as in the rows.
        parts: the parts of the gradients, where they are tracked.
        gradients: the norms of all gradients, not only those that trust ratios need.
        among: which norms: not DIRECTION before the gradients' scale is known, and no others after that.
    """
    norms = [
        [list(triple) for triple in bucket.norms(of_bucket, gradients, DIRECTION in among)]
        for bucket, of_bucket in zip(plan.buckets, rows)
    ]
    sums: list[list[tuple[float, float] | None]] = [[None] * len(bucket.members) for bucket in plan.buckets]
    asked = []
    for b, bucket in enumerate(plan.buckets):
        for k, member in enumerate(bucket.members):
            if member.shard is not None:
                ratio, noise, _ = extras[member.group]
                squares = parts.squares(member.parameter) if parts is not None and WEIGHT in among else []
                wanted = _wanted(ratio, noise, member.tensor.ndim, bool(squares)) | ({GRADIENT} if gradients else set())
                asked.append((member, b, k, sorted(wanted & among), squares))
    # What a process does not know, for want of a gradient or an element, it has nothing to add to.
    numbers = [[max(norms[b][k][i], 0.0) for i in which] + squares for _, b, k, which, squares in asked]
    for (member, b, k, which, squares), whole in zip(
        asked, add_up(numbers, [member.parameter for member, *_ in asked])
    ):
        if member.tensor.grad is None:  # it takes no part in the step, and keeps what it carries: a shard's norm
            continue
        for i, norm2 in zip(which, whole):
            norms[b][k][i] = norm2
        if squares:
            sums[b][k] = math.fsum(map(math.sqrt, whole[len(which) :])), norms[b][k][GRADIENT]
    for bucket, of_bucket, parts_of_bucket in zip(plan.buckets, norms, sums):
        bucket.know(parts_of_bucket)
        bucket.know_norms([tuple(triple) for triple in of_bucket])
