"""Float32 weights behind parameters of 16 bits: how they are kept, read and written in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .shards import is_spread, local

#: What is kept beside a parameter, by its dtype, as a state of this name and dtype.
KEPT = {torch.bfloat16: ("remainder", torch.int16), torch.float16: ("master", torch.float32)}
#: The dtypes in which a state_dict has the same bits: torch's collectives, which gather shards, know no int16.
SAVED = {"remainder": torch.bfloat16, "master": torch.float32}


def slot_of(p: Tensor) -> str | None:
    """The name of the state that makes a parameter's weights exact; None: they are."""
    return KEPT[p.dtype][0] if p.dtype in KEPT else None


def kept_for(p: Tensor) -> Tensor:
    """A new one, of a parameter of 16 bits whose weights are what it holds."""
    kept = torch.zeros_like(p, dtype=KEPT[p.dtype][1], memory_format=torch.preserve_format, requires_grad=False)
    return kept if p.dtype == torch.bfloat16 else kept.copy_(p.detach())


def viewed(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits as numbers of another dtype, without a copy; of a DTensor, a DTensor."""
    if is_spread(kept):
        return _spread_as(local(kept).view(dtype), kept)
    return kept.view(dtype)


def _spread_as(here: Tensor, other: Any) -> Any:
    return type(other).from_local(
        here, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
    )


@torch.no_grad()
def exact_weights(p: Tensor, kept: Tensor) -> Tensor:
    """The float32 weights of a parameter: a new tensor, and as it a DTensor.

    Of a bfloat16 its bits and the remainder's are added up; beside a float16 they are kept as they are, and count unless
    something else has written the float16 since.
    """
    if is_spread(p):
        return _spread_as(exact_weights(local(p), local(kept)), p)
    if p.dtype == torch.bfloat16:
        return ((p.detach().view(torch.int16).to(torch.int32) << 16) + kept).view(torch.float32)
    seen = p.detach().float()
    return torch.where(kept.to(p.dtype).float() == seen, kept, seen)


@torch.no_grad()
def set_exact_weights(p: Tensor, kept: Tensor, weights: Tensor) -> None:
    """Store float32 weights: the parameter becomes the nearest number of its dtype.

    Of bfloat16 ties go away from zero, not to even: what is left is then between -2**15 and 2**15 - 1, an int16.
    """
    if is_spread(p):
        return set_exact_weights(local(p), local(kept), local(weights))
    if p.dtype != torch.bfloat16:
        kept.copy_(weights)
        p.copy_(weights)
        return None
    bits = weights.float().contiguous().view(torch.int32)
    none = weights.isnan()
    high = torch.where(none, bits >> 16 | 0x40, (bits + 0x8000) >> 16)
    kept.copy_(torch.where(none, 0, bits))  # the lower half
    p.copy_(high.to(torch.int16).view(torch.bfloat16))
    return None
