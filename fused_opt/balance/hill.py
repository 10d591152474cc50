"""The Hill exponent of a spectrum, and of many layers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .spectrum import Windows, eigenvalues, matrices, pool

Fit = Literal["median", "ks", "peak"]
Tail = Literal["code", "paper"]

BINS = 100
FLOAT32_SPREAD = 1e-5  # below this share of the largest eigenvalue float32 moves the exponent
FLOAT32_RANGE = (1e-30, 1e30)  # outside it squares under- or overflow in float32


class PowerLaw(NamedTuple):
    """A fitted tail: the density beyond eigenvalue number ``start`` falls as ``eigenvalue ** -alpha``."""

    alpha: Tensor
    start: Tensor


def hill(lam: Tensor, fit: Fit = "median", tail: Tail = "code") -> PowerLaw:
    r"""Hill exponent of ascending eigenvalues (arXiv 2312.00359).

    .. math:: \alpha = 1 + n \Big/ \sum_{j=i}^{N-1} \ln(\lambda_j / \lambda_i), \qquad n = N - i

    ``fit`` chooses the threshold ``i``: the median, or the one whose power law is nearest to the spectrum in
    the Kolmogorov-Smirnov distance, among all (``ks``, the authors' "goodness-of-fit") or among those near
    the tallest bin of the histogram of log10(lam) (``peak``, their "fix-finger"). The authors' lower bound
    for ``peak`` compares an eigenvalue with a logarithm; 0.95 to 1.5 times the bin's left edge is our
    definition.

    Args:
        lam: (..., N), ascending, non-negative.
        fit: ``"median"``, ``"ks"`` or ``"peak"``.
        tail: for ``"median"``, ``"code"`` as in the authors' published runs (i = N // 2, the threshold
            counted in n) or ``"paper"`` (k = N // 2 eigenvalues above the threshold, n = k).

    Returns:
        ``alpha`` and ``start``, each (...); ``alpha`` is not finite where the spectrum has no tail to fit.

    Raises:
        ValueError: on an unknown ``fit`` or ``tail``, or ``tail="paper"`` with a fit other than ``"median"``.

    Example:
        >>> lam = torch.arange(1.0, 9.0)
        >>> round(hill(lam).alpha.item(), 6), round(hill(lam, tail="paper").alpha.item(), 6)
        (5.045318, 3.126108)
    """
    check_fit(fit, tail)
    lam = lam.double()
    if fit != "median":
        rows = [_scan(row, fit) for row in lam.reshape(-1, lam.shape[-1])]
        found = [torch.stack(column).reshape(lam.shape[:-1]) for column in zip(*rows, strict=True)]
        return PowerLaw(*found)
    start = median_start(lam.shape[-1], tail)
    log = lam[..., start:].log()
    n = log.shape[-1] - (tail == "paper")
    alpha = 1 + n / (log - log[..., :1]).sum(-1)
    return PowerLaw(alpha, torch.full_like(alpha, start, dtype=torch.long))


def median_start(count: int, tail: Tail) -> int:
    """Index of the threshold that ``fit="median"`` takes among ``count`` eigenvalues."""
    return count // 2 if tail == "code" else max(0, count - count // 2 - 1)


def check_fit(fit: str, tail: str) -> None:
    """Raise ValueError unless the pair can be computed."""
    if fit not in get_args(Fit):
        raise ValueError(f"fit={fit!r} is not known; choose from {', '.join(get_args(Fit))}")
    if tail not in get_args(Tail):
        raise ValueError(f"tail={tail!r} is not known; choose from {', '.join(get_args(Tail))}")
    if tail == "paper" and fit != "median":
        raise ValueError(f"tail='paper' is defined for fit='median', found fit={fit!r}; leave tail at 'code'")


def layer_alphas(
    weights: Sequence[Tensor], *, fit: Fit = "median", tail: Tail = "code", windows: Windows | None = None
) -> list[float]:
    """Hill exponents of several weights.

    Spectra are taken in float32, and again in float64 for the layers where the smallest eigenvalue that the
    fit reads is below 1e-5 of the largest, or the largest is outside 1e-30 .. 1e30.

    Args:
        weights: each of at least two dimensions, any floating dtype, on any device.
        fit: see :func:`hill`.
        tail: see :func:`hill`.
        windows: see :func:`~fused_opt.balance.spectrum.matrices`.

    Returns:
        One exponent for each weight, in order; NaN or infinite where there is no tail to fit.

    Example:
        >>> lam = torch.arange(1.0, 9.0)
        >>> [round(alpha, 5) for alpha in layer_alphas([lam.sqrt().diag(), torch.zeros(8, 8)])]
        [5.04532, nan]
    """
    check_fit(fit, tail)
    stacks = [matrices(weight, windows) for weight in weights]
    alphas = [math.nan] * len(stacks)
    todo = [i for i, stack in enumerate(stacks) if stack.numel()]
    for double in (False, True):
        found = _estimate([stacks[i] for i in todo], fit, tail, double)
        again = []
        for i, (alpha, trusted) in zip(todo, found, strict=True):
            alphas[i] = alpha
            if not trusted:
                again.append(i)
        todo = again
    return alphas


def _estimate(stacks: Sequence[Tensor], fit: Fit, tail: Tail, double: bool) -> list[tuple[float, bool]]:
    spectra = [
        pool(stack.shape, values)
        for stack, values in zip(stacks, eigenvalues([s.flatten(0, 1) for s in stacks], double=double), strict=True)
    ]
    lengths: dict[tuple[int, torch.device], list[int]] = {}
    for i, lam in enumerate(spectra):
        lengths.setdefault((lam.shape[-1], lam.device), []).append(i)
    found: dict[torch.device, list[tuple[list[int], Tensor]]] = {}
    for (length, device), indices in lengths.items():
        lam = torch.cat([spectra[i] for i in indices])
        read = lam[:, median_start(length, tail) if fit == "median" else 0]
        top = lam[:, -1]
        trusted = (read >= FLOAT32_SPREAD * top) & (top > FLOAT32_RANGE[0]) & (top < FLOAT32_RANGE[1])
        found.setdefault(device, []).append((indices, torch.stack([hill(lam, fit, tail).alpha, trusted.double()])))
    estimates: dict[int, tuple[float, bool]] = {}
    for parts in found.values():
        columns = iter(torch.cat([part for _, part in parts], dim=1).T.tolist())  # the one transfer to the host
        for i in (i for indices, _ in parts for i in indices):
            fits = [next(columns) for _ in range(len(spectra[i]))]
            estimates[i] = math.fsum(alpha for alpha, _ in fits) / len(fits), all(sure for _, sure in fits)
    return [estimates[i] for i in range(len(spectra))]


def _scan(lam: Tensor, fit: Fit) -> tuple[Tensor, Tensor]:
    count = len(lam)
    log = lam.log()
    index = torch.arange(count, device=lam.device)
    n = (count - index).double()
    alpha = 1 + n / (log.flip(0).cumsum(0).flip(0) - n * log)
    allowed = (alpha > 1) & alpha.isfinite()
    if fit == "peak":
        edge = _peak(log)
        allowed &= (lam >= 0.95 * edge) & (lam <= 1.5 * edge)
    distance = torch.full_like(lam, math.inf)
    for rows in index.split(max(1, 2**22 // count)):
        model = torch.exp((1 - alpha[rows, None]) * (log - log[rows, None]))
        gap = (1 - model - (index - rows[:, None]) / n[rows, None]).abs()
        distance[rows] = gap.where(index >= rows[:, None], 0.0).amax(1)
    start = distance.where(allowed, math.inf).argmin()
    return alpha[start].where(allowed.any(), math.nan), start


def _peak(log: Tensor) -> Tensor:
    """Left edge of the tallest of 100 bins of the logarithms, as an eigenvalue."""
    positive = log.isfinite()
    low, high = log.where(positive, math.inf).amin(), log.where(positive, -math.inf).amax()
    bins = ((log - low) / (high - low) * BINS).nan_to_num(0.0).clamp(0, BINS - 1).long()
    counts = torch.zeros(BINS, device=log.device).scatter_add(0, bins, positive.float())
    return torch.exp(low + counts.argmax() * (high - low) / BINS)
