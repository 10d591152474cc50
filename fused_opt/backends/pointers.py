"""Which tensors a kernel can read through their data pointer: the check for all backends that do so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..eight_bits import CODES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The data pointer of a subclass may not be that of its elements (DTensor, FakeTensor, a collective not yet finished).
_PLAIN = (Tensor, torch.nn.Parameter)
_MOST_DIMENSIONS = 64  # of a strided walk


def unreachable(tensor: Tensor, devices: Sequence[str], coded: bool = False) -> str | None:
    """Why kernels for devices of these types cannot read and write a tensor through its pointer, or None."""
    if type(tensor) not in _PLAIN:
        return f"{type(tensor).__name__} is a tensor subclass; it steps torch.Tensor and torch.nn.Parameter"
    if tensor.layout != torch.strided:
        return f"a {tensor.layout} tensor; it steps strided ones"
    if tensor.device.type not in devices:
        return f"a tensor on {tensor.device}; it steps those on {' and '.join(devices)}"
    if tensor.dtype not in DTYPES and not (coded and tensor.dtype in CODES):
        return f"a {tensor.dtype} tensor; it steps {', '.join(str(dtype) for dtype in DTYPES)}"
    if tensor.is_neg():
        return "a tensor with a lazy negation"
    if tensor._is_zerotensor():
        return "a tensor of zeros without memory"
    if tensor.ndim > _MOST_DIMENSIONS:
        return f"a tensor of {tensor.ndim} dimensions; it steps those of at most {_MOST_DIMENSIONS}"
    return None
