"""What is asked of tensors of any kind: their norm, and whether their elements share memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .shards import local


def norm2(tensor: Tensor) -> float:
    """Sum of squares, in float64; of a sparse tensor, of its values; of a DTensor, of the local part."""
    tensor = local(tensor)
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    # complex64 goes to complex128: its squares overflow in float32, too.
    return float(torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float64)).item()) ** 2


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements of a strided tensor share memory; exact, and False for other layouts.

    Elements do not overlap where every stride exceeds the largest offset that the smaller ones reach together, as in every
    dense tensor and every slice of one. The few layouts that pass neither this test nor the opposite one (more elements than
    memory, a stride of 0) have their offsets counted.
    """
    if tensor.layout != torch.strided or tensor.numel() < 2:
        return False
    dimensions = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)
    reach, apart = 0, True
    for stride, size in dimensions:
        apart &= stride > reach
        reach += (size - 1) * stride
    if apart:
        return False
    if dimensions[0][0] == 0 or tensor.numel() > reach + 1:
        return True
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in dimensions:
        offsets = (offsets.unsqueeze(1) + stride * torch.arange(size, device="cpu")).flatten()
    return len(offsets.unique()) < len(offsets)
