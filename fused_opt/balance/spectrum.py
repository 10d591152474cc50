"""Spectra of weights: the squared singular values of the matrices that a weight is made of.

The eigenvalues of the Gram matrix on the smaller side are the squared singular values, at less than half the
price of a singular value decomposition, and the exponents read from them need no vectors.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Windows = tuple[int, int, int]

CONV_SCALE = 0.5  # the published code multiplies the slices of a convolution by sqrt(0.5)
TASK_ELEMENTS = 2**16  # matrices are handed to the CPU threads in parcels of about this size
BATCH_ELEMENTS = 2**28  # and to a GPU in batches of at most this size


def matrices(weight: Tensor, windows: Windows | None = None) -> Tensor:
    """The matrices whose spectra describe a weight.

    Without ``windows`` a Linear weight is one matrix and a convolution its kernel positions, each (out, in).
    With ``windows`` (FARMS, arXiv 2506.06280) every matrix has one aspect ratio, so that tall layers are not
    mistaken for heavy-tailed ones: a Linear weight is cut into overlapping windows, a convolution into square
    blocks. A weight smaller than the window gets the largest window of the same aspect ratio that fits (our
    definition).

    Args:
        weight: at least two dimensions, (out, in, *kernel).
        windows: height and width of a window in elements, and the positions it takes along each dimension.

    Returns:
        (fits, pooled, rows, columns): the eigenvalues of ``pooled`` matrices are fitted together, and the
        layer's exponent is the mean over ``fits``.

    Raises:
        ValueError: if ``weight`` has fewer than two dimensions.

    Example:
        >>> matrices(torch.zeros(16, 8, 3, 3)).shape
        torch.Size([1, 9, 16, 8])
        >>> matrices(torch.zeros(16, 8, 3, 3), windows=(4, 4, 2)).shape
        torch.Size([2, 9, 8, 8])
        >>> matrices(torch.zeros(16, 8), windows=(4, 4, 3)).shape
        torch.Size([1, 9, 4, 4])
    """
    if weight.ndim < 2:
        raise ValueError(f"a spectrum needs a weight of two or more dimensions, found shape {tuple(weight.shape)}")
    weight = weight.detach()
    slices = weight.flatten(2).movedim(-1, 0) if weight.ndim > 2 else weight[None]
    if windows is None:
        return slices[None]
    if weight.ndim > 2:
        tall = slices if slices.shape[1] >= slices.shape[2] else slices.mT
        side = tall.shape[2]
        return tall[:, : tall.shape[1] // side * side].unflatten(1, (-1, side)).movedim(1, 0)
    (rows, columns), (height, width, count) = weight.shape, windows
    high = min(height, rows, columns * height // width)
    wide = min(width, columns, rows * width // height)
    positions = [(r, c) for r in _starts(rows, high, count) for c in _starts(columns, wide, count)]
    return torch.stack([weight[r : r + high, c : c + wide] for r, c in positions])[None]


def spectrum(weight: Tensor, windows: Windows | None = None) -> Tensor:
    """Squared singular values of a weight, pooled and ascending, computed in float64.

    Args:
        weight: at least two dimensions, (out, in, *kernel), any floating dtype.
        windows: see :func:`matrices`.

    Returns:
        (fits, eigenvalues) in float64; eigenvalues below the rounding of the computation are exactly zero.

    Example:
        >>> spectrum(torch.diag(torch.tensor([2.0, 1.0, 3.0])))
        tensor([[1., 4., 9.]], dtype=torch.float64)
    """
    stack = matrices(weight, windows)
    pooled = pool(stack.shape, eigenvalues([stack.flatten(0, 1)], double=True)[0])
    return pooled * CONV_SCALE if weight.ndim > 2 else pooled


def pool(shape: Sequence[int], values: Tensor) -> Tensor:
    """Put eigenvalues (fits * pooled, n) in the order they are fitted in: (fits, pooled * n), ascending."""
    return values.reshape(shape[0], -1).sort().values


def eigenvalues(stacks: Sequence[Tensor], *, double: bool) -> list[Tensor]:
    """Eigenvalues of the Gram matrices of several stacks of matrices.

    On the CPU parcels of matrices are spread over as many threads as torch uses, each matrix on one thread:
    LAPACK's reduction scales poorly inside one matrix, and this way the values depend neither on the number
    of threads nor on what else is in the batch. On a GPU stacks of equal shape are one batch.

    Args:
        stacks: tensors (n, rows, columns).
        double: compute in float64 rather than float32; float64 matrices always are.

    Returns:
        For each stack (n, min(rows, columns)), ascending; a matrix that carries a NaN or an infinity, or
        whose Gram matrix overflows, has NaN throughout.
    """
    if any(stack.device.type != "cpu" for stack in stacks):
        return _batched(stacks, double)
    parcels = [stack.split(max(1, TASK_ELEMENTS // max(1, stack[0].numel()))) for stack in stacks]
    work = functools.partial(_eigenvalues, double=double)
    flat = [parcel for parts in parcels for parcel in parts]
    threads = torch.get_num_threads()
    # the heaviest first, or a thread that meets it last works on alone
    order = sorted(range(len(flat)), key=lambda i: -flat[i].numel() * min(flat[i].shape[1:]))
    run = map if threads == 1 else workers(threads).map
    found = dict(zip(order, run(work, [flat[i] for i in order]), strict=True))
    values = iter([found[i] for i in range(len(flat))])
    return [torch.cat([next(values) for _ in parts]) for parts in parcels]


@functools.cache
def workers(count: int) -> ThreadPoolExecutor:
    """A pool of threads, each of which runs torch's operators on that one thread."""
    pool = ThreadPoolExecutor(count, "fused_opt-spectra")
    barrier = threading.Barrier(count)
    before = torch.get_num_threads()

    def start(_: int) -> None:
        torch.get_num_threads()  # at the first question a thread takes over the common setting: ask before
        torch.set_num_threads(1)
        barrier.wait()

    list(pool.map(start, range(count)))
    torch.set_num_threads(before)  # a thread's own setting is also the one that new threads start with
    return pool


if hasattr(os, "register_at_fork"):  # threads do not survive a fork, and waiting for them would never end
    os.register_at_fork(after_in_child=workers.cache_clear)


@torch.no_grad()
def _eigenvalues(stack: Tensor, double: bool) -> Tensor:
    narrow = stack if stack.shape[-2] <= stack.shape[-1] else stack.mT
    double = double or stack.dtype == torch.float64
    with torch.autocast(stack.device.type, enabled=False):
        work = narrow.double() if double or _reduced_precision(stack.device) else narrow.float()
        gram = (work @ work.mT).to(torch.float64 if double else torch.float32)
    # one matrix that is not finite would fail the whole batch
    finite = gram.isfinite().all(-1).all(-1, keepdim=True)
    values = torch.linalg.eigvalsh(gram.where(finite[..., None], 0.0))
    if double:  # the rounding of float32 is for the caller to judge, who can ask for float64
        noise = gram.shape[-1] * torch.finfo(gram.dtype).eps * values[..., -1:]
        values = values.where(values > noise, 0.0)
    return values.where(finite, math.nan)


def _batched(stacks: Sequence[Tensor], double: bool) -> list[Tensor]:
    shapes: dict[tuple[object, ...], list[int]] = {}
    for i, stack in enumerate(stacks):
        shapes.setdefault((stack.device, stack.dtype, stack.shape[1:]), []).append(i)
    values: dict[int, Tensor] = {}
    for indices in shapes.values():
        together = torch.cat([stacks[i] for i in indices])
        parcels = together.split(max(1, BATCH_ELEMENTS // max(1, together[0].numel())))
        found = torch.cat([_eigenvalues(parcel, double) for parcel in parcels])
        values |= zip(indices, found.split([len(stacks[i]) for i in indices]), strict=True)
    return [values[i] for i in range(len(stacks))]


def _reduced_precision(device: torch.device) -> bool:
    """Whether float32 products may be rounded to tf32 or bfloat16, which moves an exponent by up to 4e-2."""
    backends: Any = torch.backends
    chosen = (backends.cuda if device.type == "cuda" else backends.mkldnn).matmul.fp32_precision
    return (backends.fp32_precision if chosen == "none" else chosen) not in ("ieee", "none")


def _starts(length: int, window: int, count: int) -> list[int]:
    step = max(1, (length - window) // max(1, count - 1))
    return list(range(0, length - window + 1, step))[:count]
