"""What is asked of tensors of any kind: their norm, whether their elements share memory, and to be as they were before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two strided tensors share a byte; exact, and so to be asked only where they lie close; False for others."""
    if any(t.layout != torch.strided or t.device.type == "meta" or not t.numel() for t in (a, b)):
        return False
    start = min(a.data_ptr(), b.data_ptr())
    taken = []
    for tensor in (a, b):
        size = tensor.element_size()
        last = sum(stride * (n - 1) for stride, n in zip(tensor.stride(), tensor.shape))
        before = tensor.data_ptr() - start
        bytes_of = torch.zeros(before + (last + 1) * size, dtype=torch.bool, device="cpu")
        strides = [*(stride * size for stride in tensor.stride()), 1]
        bytes_of.as_strided([*tensor.shape, size], strides, before).fill_(True)
        taken.append(bytes_of)
    common = min(map(len, taken))
    return bool((taken[0][:common] & taken[1][:common]).any())


@torch.no_grad()
def restore(before: list[tuple[Tensor, Tensor]]) -> None:
    """Copy values back: all of them, also where one copy fails or is interrupted, and is then tried once more."""
    failed: BaseException | None = None
    for tensor, value in reversed(before):  # of two in the same memory the first was looked at before both were written
        for _ in range(2):
            try:
                tensor.copy_(value)
                break
            except BaseException as error:
                failed = error
    if failed is not None:
        raise failed


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """After the block the model's buffers are those that it had, and hold what they held."""
    # By name, for a forward may put another tensor in a buffer's place, or write into it, or both.
    registered = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for of_module, before in registered:
            of_module.clear()
            of_module.update(before)
        restore(values)
