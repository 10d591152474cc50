"""The parts that a gradient is a sum of, and their norms, taken while the gradient is accumulated."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge, register_multi_grad_hook
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .. import backends
from ..backends.interface import PartNorms
from ..shards import is_spread, like, local
from ..tensors import norm2, overlaps
from .tracker import PartTracker, WeakHook, data_parallel


@dataclass
class _Sum:
    """A gradient as the last backward left it."""

    grad: Tensor
    version: int
    norms: float  # sum of the norms of this process's parts
    grad2: float  # squared norm of their sum, or of the mean over processes
    parts: int
    squares: tuple[float, ...] = ()  # of a shard instead of the norms: every part's sum of squares that is here
    whole: float | None = None  # sum of the norms of all processes' parts, once they are added up


def fully_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 runs any of its modules."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


class Microbatches(PartTracker):
    """Every ``backward`` between two steps is a part of the gradient.

    Two hooks per parameter: one sets the gradient aside before autograd adds to it, so that autograd hands over the new part
    as it is; the other adds the part to what was set aside and sums both squares in the same pass. Between the
    backwards ``p.grad`` is what it always is. Gradients that were changed since (clipping, unscaling, zeroing) are
    noticed by their version, and the parts' norms scaled as the gradient's norm was. Writes that do not count in the
    version (``p.grad.data.mul_``, numpy) are not: measuring every gradient again would cost as much as the step. Call
    :meth:`recheck` after them.

    Parameters that come later (a layer unfrozen, a group added, one replaced) are hooked when the backward is over, or the
    step: what one backward has left in ``p.grad`` by then is one part, as it should be.

    In a model under DistributedDataParallel the parts are those of all processes: norms are taken before the gradients are
    averaged, divided by the number of processes as the gradients are, and added up by one all-reduce of a number per
    parameter, which runs from the end of the backward that synchronizes to the step. Of the averaged gradients the norms
    are taken too, since clipping and unscaling are noticed by them.

    Of a DTensor (FSDP2, tensor parallelism) a part is what one backward adds to it over all processes together; the
    squares of its shards are added up in the step. FSDP2 adds up gradients by itself, outside of autograd: they are set
    aside when the backward reaches the model's outputs. Backwards without ``set_requires_gradient_sync`` are one part
    together with the next one that has it.

    Args:
        optimizer: whose gradients.
        model: what the backward runs through, where processes train together.
        backend: the optimizer's.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None = None, backend: str = "auto"
    ) -> None:
        super().__init__(optimizer, model, backend)
        self._tracked: dict[Tensor, None] = {}  # in the order of the groups
        self._trainable: list[int] = []  # ids of the parameters that required gradients when last looked at
        self._synchronizes = True  # the backward of the last forward
        self._sent: tuple[list[Tensor], Callable[[], list[float]]] | None = None
        self._queued: dict[str, int] = {}  # by method: the backward at whose end it is called
        self._sums: dict[Tensor, _Sum] = {}
        self._aside: dict[Tensor, Tensor | None] = {}
        self._nodes: dict[Tensor, Node] = {}
        self._find()
        if self._replicas is not None:
            self._hold(self._replicas, self._replicas.register_forward_pre_hook(WeakHook(self._before_forward)))
        elif model is not None and fully_sharded(model):
            self._hold(model, model.register_forward_hook(WeakHook(self._after_forward)))

    def _doing(self) -> str:
        parts = sum(known.parts for known in self._sums.values())
        return f"{parts} parts of the gradients of {len(self._tracked)} parameters since the last step"

    def _hold(self, owner: Any, handle: RemovableHandle) -> None:
        self._handles.setdefault(id(owner), []).append(handle)

    def _find(self) -> bool:
        """Hook the parameters that came since the last call, and remove the hooks of those that left; whether any did."""
        parameters = self._parameters()
        trainable = [id(p) for p in parameters if p.requires_grad]
        if trainable == self._trainable or not self.active:
            return False
        tracked = {p: None for p in parameters if p.requires_grad or p in self._tracked}
        self._admit(tracked)
        for p in self._tracked:
            if p not in tracked:
                for handle in self._handles.pop(id(p), ()):
                    handle.remove()
                for of_p in (self._sums, self._nodes):
                    of_p.pop(p, None)
        for p in tracked:
            if p not in self._tracked:
                self._hook(p)
        self._tracked, self._trainable = tracked, trainable
        return True

    def _admit(self, tracked: Iterable[Tensor]) -> None:
        """Raise a ValueError where the gradients of these parameters cannot be tracked."""
        self._replicas = data_parallel(self._model, tracked)

    def _hook(self, p: Tensor) -> None:
        self._watch(p)
        handle = p.register_post_accumulate_grad_hook(WeakHook(self._add))
        # First of all, or the hooks of others would see a part instead of the gradient. (Not by move_to_end: what
        # runs them from C++ sees the order of insertion.)
        hooks: dict[int, Any] = p._post_accumulate_grad_hooks
        for key in [key for key in hooks if key != handle.id]:
            hooks[key] = hooks.pop(key)
        self._hold(p, handle)

    def _before_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            assert self._replicas is not None
            if getattr(getattr(self._replicas, "_join_config", None), "enable", False):
                raise RuntimeError(
                    "parts of the gradient are tracked in all processes, and under join() some have no more batches; give "
                    "all as many, or remove() what track_parts returned first"
                )
            self._synchronizes = self._replicas.require_backward_grad_sync

    def _after_forward(self, module: Any, args: Any, output: Any) -> None:
        self._restore()  # what a backward that failed left aside
        begun = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if begun and torch.is_grad_enabled():
            register_multi_grad_hook(begun, WeakHook(self._backward_begins), mode="any")

    def _backward_begins(self, _: Any) -> None:
        if self.active:
            for p in self._tracked:
                if is_spread(p):
                    self._set_aside(p)
            self._at_the_end(self._restore)

    def _restore(self) -> None:
        """Put back what nothing was added to."""
        for p, total in self._aside.items():
            if p.grad is None:
                p.grad = total
        self._aside.clear()

    def _at_the_end(self, method: Callable[[], Any]) -> None:
        """Call a method when this backward is over, after what others do then, who may have queued it only there."""
        task = torch._C._current_graph_task_id()
        if self._queued.get(method.__name__) != task:
            self._queued[method.__name__] = task
            queue, call = torch.autograd.Variable._execution_engine.queue_callback, WeakHook(method)
            queue(lambda: queue(lambda: queue(call)))

    def _watch(self, p: Tensor) -> None:
        # A hook on the tensor would also run in torch.autograd.grad, which hands nothing over: p.grad would be lost.
        node = self._nodes[p] = get_gradient_edge(p).node  # kept, since its hooks are gone when it is
        self._hold(p, node.register_prehook(WeakHook(self._set_aside, p)))

    def _set_aside(self, p: Tensor, _: Any = None) -> None:
        if p.grad is not None and overlaps(p.grad):
            return  # autograd refuses to add to it
        self._aside.setdefault(p, p.grad)
        p.grad = None

    @torch.no_grad()
    def _add(self, p: Tensor) -> None:
        if p not in self._aside:  # moved to another dtype or device, and with it to another node
            self._watch(p)
        total, part = self._aside.pop(p, None), like(p.grad, p)
        assert part is not None
        self._sent = None
        before = None if total is None else self._current(p, total)
        if part.requires_grad or (total is not None and (part.is_sparse or total.is_sparse)):
            part2 = norm2(part.detach())
            with torch.enable_grad():
                p.grad = part if total is None else total + part
            grad2 = norm2(p.grad.detach())
        else:
            part2, grad2 = backends.accumulate(None if total is None else local(total), local(part), self._backend)
            if total is not None and is_spread(total):
                torch.autograd.graph.increment_version(total)
            p.grad = part if total is None else total
        added, count = self._measure(p, part.detach(), math.sqrt(part2))
        norms, parts, squares = (before.norms, before.parts, before.squares) if before else (0.0, 0, ())
        assert p.grad is not None
        squares = (*squares, part2) if is_spread(p) else ()
        self._sums[p] = _Sum(p.grad, p.grad._version, norms + added, grad2, parts + count, squares)
        if self._replicas is not None and self._synchronizes:
            self._at_the_end(self._synchronized)
        self._at_the_end(self._find)

    def _synchronized(self) -> None:
        """The gradients have become means over processes; start the all-reduce of the norms of the terms."""
        for p in self._tracked:
            if p.grad is not None:
                known = self._sums.get(p, _Sum(p.grad, 0, 0.0, 0.0, 0))  # only other processes had a gradient
                grad2 = backends.accumulate(None, p.grad.detach())[0]
                self._sums[p] = replace(known, grad=p.grad, version=p.grad._version, grad2=grad2)
        self._sent = self._send()

    def _send(self) -> tuple[list[Tensor], Callable[[], list[float]]]:
        tracked = list(self._tracked)
        norms = [self._sums[p].norms if p in self._sums else 0.0 for p in tracked]
        return tracked, self._mean(norms, tracked[0].device)

    def share(self) -> None:
        """Wait for the norms of the other processes' parts, before a step."""
        if self._replicas is None or not self._tracked:
            return
        tracked, means = self._sent or self._send()
        self._sent = None
        for p, norms in zip(tracked, means()):
            if p in self._sums:
                self._sums[p].whole = norms

    def _measure(self, p: Tensor, part: Tensor, norm: float) -> tuple[float, int]:
        """Sum of the norms of the parts in what one backward adds to ``p.grad``, and their number."""
        return norm, 1

    def _current(self, p: Tensor, grad: Tensor) -> _Sum:
        """What is known of a gradient, corrected for what has happened to it since."""
        known = self._sums.get(p)
        if known is None:  # not made by a tracked backward: one part, none if zeroed
            grad2 = norm2(grad)
            # Of a shard even a zero is a part, or processes would have different numbers of them.
            squares: tuple[float, ...] = (grad2,) if is_spread(grad) else ()
            return _Sum(grad, grad._version, math.sqrt(grad2), grad2, int(grad2 > 0), squares)
        # torch's foreach operations, clip_grad_norm_ with them, do not count what they write in DTensors.
        if known.grad is not grad or known.version != grad._version or is_spread(grad):
            grad2 = norm2(grad)
            parts = known.parts if grad2 > 0 or known.squares else 0
            if 0 < known.grad2 < math.inf:
                factor2 = grad2 / known.grad2
                norms, squares = known.norms * math.sqrt(factor2), tuple(square * factor2 for square in known.squares)
                whole = None if known.whole is None else known.whole * math.sqrt(factor2)
            else:  # nothing of an overflow, or of zeros, is in what is there now: it is one part
                norms, squares = math.sqrt(grad2), (grad2, *(0.0 for _ in known.squares[1:])) if known.squares else ()
                whole, parts = None if known.whole is None else norms, len(squares) or int(grad2 > 0)
            known = _Sum(grad, grad._version, norms, grad2, parts, squares, whole)
            self._sums[p] = known
        return known

    def norms(self, p: Tensor) -> PartNorms | None:
        """Sum of the norms of the parts of ``p.grad``, and its squared norm; None where no backward was seen."""
        if p.grad is None or p not in self._sums:
            return None
        known = self._current(p, p.grad)
        return PartNorms(known.norms if known.whole is None else known.whole, known.grad2)

    def squares(self, p: Tensor) -> list[float]:
        """Of a DTensor every part's sum of squares, of its local part: these add up over processes, norms do not."""
        return list(self._current(p, p.grad).squares) if p.grad is not None and p in self._sums else []

    def _counts(self) -> dict[Tensor, int]:
        return {p: known.parts for p, known in self._sums.items()}

    def recheck(self) -> None:
        """Measure every gradient anew at the step, after writes that its version does not count.

        torch.amp.GradScaler.unscale_ makes such writes, and the step asks for this by itself then. Call it after others:
        ``p.grad.data.mul_(0.5)``, or through numpy.
        """
        for known in self._sums.values():
            known.version = -1

    def reset(self) -> None:
        """Begin anew, after a step."""
        self._sums.clear()
        self._sent = None
        self._find()

    def remove(self) -> None:
        """Take the hooks away; nothing is left in the backward."""
        super().remove()
        self._nodes.clear()
        self._sums.clear()
        self._sent = None
