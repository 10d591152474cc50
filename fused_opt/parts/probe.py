"""The parts of the gradient as CLARS's authors compute them: from fresh batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.interface import PartNorms
from ..tensors import buffers_restored, norm2
from ..warn import warn_once
from .tracker import PartTracker


class Probe(PartTracker):
    """The sum of the parts' norms is what :meth:`set` was given last: CLARS as its authors' code computes it.

    A probe is made of batches of its own, does not cut ``p.grad`` into parts and has no hooks. Parameters that were not given
    count as one part. What was set stays until the next ``set``. In a model under DistributedDataParallel every process
    probes with batches of its own, and ``set``, which all call, takes the mean over them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module | None = None, backend: str = "auto") -> None:
        super().__init__(optimizer, model, backend)
        self._norms: dict[Tensor, float] = {}

    def _doing(self) -> str:
        return f"norms were set for {len(self._norms)} parameters"

    def set(self, norms: Mapping[Tensor, float]) -> None:
        """Take these norms for the coming steps.

        Args:
            norms: by parameter, in the units of ``p.grad`` at the step: what :func:`probe_parts` returns. With a GradScaler
                whose ``unscale_`` is not called before the step, scale the loss of the probe too.

        Raises:
            ValueError: for a norm that is negative; nothing has been changed then.
        """
        if wrong := [norm for norm in norms.values() if norm < 0]:
            raise ValueError(f"Invalid norms of a gradient: {wrong}; they are at least 0")
        found = [float(norm) for norm in norms.values()]
        if self._replicas is not None and found:
            found = self._mean(found, next(iter(norms)).device)()
        self._norms = dict(zip(norms, found))

    def share(self) -> None:
        """Warn once where no norms were set before a step."""
        if not self._norms:
            warn_once(
                "track_parts('probe') without .set(): the whole gradient counts as one part until the tracker that it "
                "returned is given norms; fused_opt.probe_parts computes them"
            )

    def norms(self, p: Tensor) -> PartNorms | None:
        """What was set, and -1: the squared norm of ``p.grad`` is not known."""
        return PartNorms(self._norms[p]) if p in self._norms and p.grad is not None else None

    def _counts(self) -> dict[Tensor, int]:
        return dict.fromkeys(self._norms, 1)

    def remove(self) -> None:
        """Forget the norms."""
        super().remove()
        self._norms = {}


def _differentiate(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: tuple[Any, Any], parameters: Sequence[Tensor]
) -> Iterator[Tensor | None]:
    given, target = batch
    with torch.enable_grad():
        if isinstance(given, Mapping):
            loss = loss_fn(model(**given), target)
        else:
            loss = loss_fn(model(*given) if isinstance(given, tuple | list) else model(given), target)
    yield from torch.autograd.grad(loss, parameters, allow_unused=True)


def probe_parts(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    *,
    parameters: Iterable[Tensor] | None = None,
    count: int = 64,
) -> dict[Tensor, float]:
    r"""Mean norm of the gradients of ``count`` fresh small batches: the parts as CLARS's authors compute them.

    *Large Batch Training Does Not Need Warmup* (arXiv 2002.01576); the authors' code draws 64 batches of 8 samples after
    every step. With the losses :math:`f_j` of the batches and the parameter w,

    .. math:: A = \frac{1}{\mathrm{count}} \sum_j \| \nabla_w f_j \|

    This costs ``count`` forward and backward passes: ``track_parts("microbatch")`` and ``"sample"`` have their norms from the
    passes that training makes anyway. It is here for fidelity.

    Nothing is changed: neither gradients nor buffers (the running statistics of BatchNorm; in training mode the batches
    are normalized by their own), nor the random numbers of the CPU and the parameters' devices, except that drawing the
    batches takes what it takes, so that they are others each time.

    Args:
        model: in the mode in which it trains.
        loss_fn: ``loss_fn(output, target)`` -> mean loss, a tensor with one element.
        batches: ``(input, target)`` pairs, of which the first ``count`` are drawn; the authors' have 8 samples. A tuple or
            list of inputs is called ``model(*input)``, a mapping ``model(**input)``.
        parameters: whose norms; None: all of the model that require gradients.
        count: how many batches, at least 1.

    Returns:
        The mean norm by parameter, for ``set`` of what ``optimizer.track_parts("probe")`` returns; 0 where the loss does not
        depend on it.

    Raises:
        ValueError: where ``count`` is not positive, or there are fewer batches.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = fused_opt.CLARS(model.parameters(), lr=0.1)
        >>> parts = optimizer.track_parts("probe")
        >>> batches = [(torch.tensor([[3.0]]), None), (torch.tensor([[-5.0]]), None)]
        >>> norms = fused_opt.probe_parts(model, lambda output, _: output.mean(), batches, count=2)
        >>> norms[model.weight]
        4.0
        >>> parts.set(norms)
    """
    if count < 1:
        raise ValueError(f"Invalid count of batches: {count}; it must be at least 1")
    chosen = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    devices = sorted({p.device.index for p in chosen if p.device.type == "cuda"})
    sums, drawn = dict.fromkeys(chosen, 0.0), 0
    with buffers_restored(model):
        for batch in islice(batches, count):
            with torch.random.fork_rng(devices):
                for p, gradient in zip(chosen, _differentiate(model, loss_fn, batch, chosen)):
                    if gradient is not None:
                        sums[p] += math.sqrt(norm2(gradient))
            drawn += 1
    if drawn < count:
        raise ValueError(f"the probe takes {count} batches and was given {drawn}; give more, or a smaller count")
    return {p: total / count for p, total in sums.items()}
