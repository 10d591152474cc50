"""States in 8 bits: codes and, for every block of them, a scale; how they are kept, read and written in PyTorch.

A block is :data:`BLOCK` elements that follow each other in row-major order, its scale the largest magnitude in it, a float32.
Code c of a state with signs stands for :math:`s (c / 127) |c / 127|`, c from -127 to 127, and of one that has none for
:math:`s (c / 255)^4`, c from 0 to 255: our definition. A number becomes the nearest code, measured in codes, and one that is
not 0 never the code of 0 where there are no signs: what divides stays above 0. A block whose largest magnitude is below the
smallest normal float32 is zeros, and one with a number that is not finite is NaN.

Every operation of both directions is one that IEEE 754 rounds to the nearest, and no multiplication is followed by an
addition, which some processors would round once: every backend has the same bits. csrc/types.h and
backends/triton/codes.py are the same, line for line.
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


@torch.no_grad()
def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes stand for: a new float32 tensor of their shape, contiguous."""
    share = codes.float()
    if codes.dtype == SIGNED:
        share = share * (1 / 127)
        share = share * share.abs()
    else:
        share = share * (1 / 255)
        share = share * share
        share = share * share
    return (_in_blocks(share.flatten()) * scales.unsqueeze(1)).flatten()[: codes.numel()].view(codes.shape)


@torch.no_grad()
def encode(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Store numbers, of the shape of ``codes``, as the nearest codes and scales of their own."""
    bits = _in_blocks(values.float().flatten()).view(torch.int32) & 0x7FFFFFFF
    largest = bits.amax(1)
    finite, zero = largest < 0x7F800000, largest < 0x00800000
    size, scale = bits.view(torch.float32), largest.view(torch.float32)
    scale = torch.where(finite, torch.where(zero, 0.0, scale), torch.nan)
    share = size * torch.where(finite & ~zero, 1.0 / scale, 0.0).unsqueeze(1)
    if codes.dtype == SIGNED:
        code = (share * (127 * 127)).sqrt()
    else:
        code = (share.sqrt() * (255 * 255)).sqrt()
        code = torch.where(bits > 0, torch.where(code > 1, code, 1.0), 0.0)
    code = (torch.where(code > 0, code, 0.0) + 0.5).to(torch.int32).flatten()[: codes.numel()].view(codes.shape)
    codes.copy_(torch.where(values < 0, -code, code) if codes.dtype == SIGNED else code)
    scales.copy_(scale)


def coded(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers as new codes of a dtype, contiguous, and their scales."""
    codes = torch.empty(values.shape, dtype=dtype, device=values.device)
    scales = torch.empty(blocks_of(values.numel()), dtype=torch.float32, device=values.device)
    encode(values, codes, scales)
    return codes, scales
