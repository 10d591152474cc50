"""States in 8 bits: codes and, for every block of them, a scale; how they are kept, read and written in PyTorch.

A block is :data:`BLOCK` elements that follow each other in row-major order, its scale the largest magnitude in it, a float32.
A code is, roughly, the square root of a number's share of the scale where a state has signs, -127 to 127, and the fourth root
where it has none, 0 to 255. The root is that of the bits: a float32's bits, as an integer, are its logarithm with straight
lines between the powers of 2, and half or a quarter of them, with a constant added that makes 1 the largest code, are the
bits of the code before it is rounded to the nearest integer. Backwards they are shifted to the left. So within an octave of
codes every octave of numbers has as many codes, and half as many within the next one: our definition. A number that is not 0
never gets the code of 0 where there are no signs: what divides stays above 0. A block whose largest magnitude is below the
smallest normal float32 is zeros, and one with a number that is not finite is NaN.

But for one product each way, with the scale or its inverse, there is only arithmetic on integers and the addition that
rounds: every backend has the same bits. csrc/types.h and backends/triton/codes.py are the same, line for line.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: What ``state_dtype=`` calls it.
EIGHT_BITS = "8bit"
#: Elements of a block; as kCoded in csrc/types.h.
BLOCK = 128
#: Tensors of fewer elements keep states in full.
LEAST = 4096
#: The dtypes of codes: of states with signs, and of those that have none.
SIGNED, UNSIGNED = torch.int8, torch.uint8
CODES = (SIGNED, UNSIGNED)


def scale_of(slot: str) -> str:
    """The name of the state that has the scales of another."""
    return f"{slot}_scale"


def blocks_of(numel: int) -> int:
    """How many scales go with so many codes."""
    return -(-numel // BLOCK)


def _in_blocks(flat: Tensor) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _root(dtype: torch.dtype) -> tuple[int, int]:
    """By how many places bits are shifted, and what is then added: the bits of 1 become those of the largest code."""
    shift, most = (1, 0x42FE0000) if dtype == SIGNED else (2, 0x437F0000)
    return shift, most - (0x3F800000 >> shift)


@torch.no_grad()
def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes stand for: a new float32 tensor of their shape, contiguous."""
    shift, root = _root(codes.dtype)
    size = codes.float().abs().flatten()
    share = ((size.view(torch.int32) - root) << shift).view(torch.float32)
    share = torch.where(codes.flatten() < 0, -share, torch.where(size > 0, share, 0.0))
    return (_in_blocks(share) * scales.unsqueeze(1)).flatten()[: codes.numel()].view(codes.shape)


@torch.no_grad()
def encode(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Store numbers, of the shape of ``codes``, as the nearest codes and scales of their own."""
    shift, root = _root(codes.dtype)
    bits = _in_blocks(values.float().flatten()).view(torch.int32) & 0x7FFFFFFF
    largest = bits.amax(1)
    finite, zero = largest < 0x7F800000, largest < 0x00800000
    scale = torch.where(zero, 0, torch.where(finite, largest, 0x7FC00000)).view(torch.float32)
    usable = finite & ~zero
    bits = torch.where(usable.unsqueeze(1), bits, 0)
    share = bits.view(torch.float32) * torch.where(usable, 1.0 / scale, 0.0).unsqueeze(1)
    code = ((share.view(torch.int32) >> shift) + root).view(torch.float32)
    if codes.dtype == UNSIGNED:
        code = torch.where(bits == 0, 0.0, torch.where(code > 1, code, 1.0))
    code = code.round().flatten()[: codes.numel()].view(codes.shape)
    codes.copy_(torch.where(values < 0, -code, code) if codes.dtype == SIGNED else code)
    scales.copy_(scale)


def coded(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers as new codes of a dtype, contiguous, and their scales."""
    codes = torch.empty(values.shape, dtype=dtype, device=values.device)
    scales = torch.empty(blocks_of(values.numel()), dtype=torch.float32, device=values.device)
    encode(values, codes, scales)
    return codes, scales
