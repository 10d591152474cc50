"""The parts that a gradient is a sum of, and their norms, taken while the gradient is accumulated."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge, register_multi_grad_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .. import backends
from ..backends.interface import PartNorms
from ..shards import is_spread, like, local


@dataclass
class _Sum:
    """A gradient as the last backward left it."""

    grad: Tensor
    version: int
    norms: float  # sum of the norms of this process's parts
    norm2: float  # squared norm of their sum, or of the mean over processes
    parts: int
    squares: tuple[
        float, ...
    ] = ()  # of a shard instead of the norms: every part's sum of squares, as far as it is here
    whole: float | None = None  # sum of the norms of all processes' parts, once they are added up


def squared_norm(gradient: Tensor) -> float:
    """Sum of squares, in float64; of a DTensor, of the part that is here."""
    gradient = local(gradient)
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return float(torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float64)).item()) ** 2


def fully_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 runs any of its modules."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


def data_parallel(model: torch.nn.Module | None, parameters: Iterable[Tensor]) -> DistributedDataParallel | None:
    """What of a model averages gradients over processes.

    Raises:
        ValueError: where that cannot be told.
    """
    if model is None:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if (together and torch.distributed.get_world_size() > 1) or any(is_spread(p) for p in parameters):
            raise ValueError(
                "several processes train here, and whether the gradients are sums over them decides what their parts are: "
                "give track_parts the model= that the backward runs through, wrapped as it is (DistributedDataParallel, "
                "fully_shard, parallelize_module), or, where each process trains alone, as it is"
            )
        return None
    replicas = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if not replicas:
        return None
    inside = set(replicas[0].parameters())
    if len(replicas) > 1 or any(p not in inside for p in parameters):
        raise ValueError(
            f"the model has {len(replicas)} modules under DistributedDataParallel, and not all optimized parameters are in "
            f"the first; parts are tracked for one that contains all of them"
        )
    return replicas[0]


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor do."""
    strided = tensor.layout == torch.strided
    return strided and any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))


class Microbatches:
    """Every ``backward`` between two steps is a part of the gradient.

    Two hooks per parameter: one sets the gradient aside before autograd adds to it, so that autograd hands over the new part
    as it is; the other adds the part to what was set aside and sums both squares in the same pass. Between the
    backwards ``p.grad`` is what it always is. Gradients that somebody has changed since (clipping, unscaling, zeroing) are
    noticed by their version, and the parts' norms scaled as the gradient's norm was.

    In a model under DistributedDataParallel the parts are those of all processes: norms are taken before the gradients are
    averaged, divided by the number of processes as the gradients are, and added up by one all-reduce of a number per
    parameter, on its way from the end of the backward that synchronizes to the step. Of the averaged gradients the norms
    are taken too, since clipping and unscaling are noticed by them.

    Of a DTensor (FSDP2, tensor parallelism) a part is what one backward adds to it over all processes together; the
    squares of its shards are added up in the step. FSDP2 adds up gradients by itself, outside of autograd: they are set
    aside when the backward reaches the model's outputs. Backwards without ``set_requires_gradient_sync`` are one part
    together with the next one that has it.

    Args:
        parameters: the optimizer's.
        model: what the backward runs through, where processes train together.
    """

    backend = "auto"  # the optimizer's

    def __init__(self, parameters: Iterable[Tensor], model: torch.nn.Module | None = None) -> None:
        parameters = list(parameters)
        self._tracked = {p: None for p in parameters if p.requires_grad}  # in their order
        self._replicas = data_parallel(model, self._tracked)
        self._synchronizes = True  # the backward of the last forward
        self._sent: tuple[Tensor, Any] | None = None
        self._task = -1
        self._sums: dict[Tensor, _Sum] = {}
        self._aside: dict[Tensor, Tensor | None] = {}
        self._nodes: dict[Tensor, Node] = {}
        self._handles: list[RemovableHandle] = []
        for p in parameters:
            if p.requires_grad:
                self._watch(p)
                handle = p.register_post_accumulate_grad_hook(self._weakly(type(self)._add))
                # First of all, or the hooks of others would see a part instead of the gradient. (Not by move_to_end: what
                # runs them from C++ sees the order of insertion.)
                hooks: dict[int, Any] = p._post_accumulate_grad_hooks
                for key in [key for key in hooks if key != handle.id]:
                    hooks[key] = hooks.pop(key)
                self._handles.append(handle)
        if self._replicas is not None:
            before = self._weakly(type(self)._before_forward)
            self._handles.append(self._replicas.register_forward_pre_hook(lambda *_: before(None)))
        elif model is not None and fully_sharded(model):
            after = self._weakly(type(self)._after_forward)
            self._handles.append(model.register_forward_hook(lambda module, args, output: after(output)))

    def _before_forward(self, _: Any) -> None:
        if torch.is_grad_enabled():
            assert self._replicas is not None
            if getattr(getattr(self._replicas, "_join_config", None), "enable", False):
                raise RuntimeError(
                    "parts of the gradient are tracked in all processes, and under join() some have no more batches; give "
                    "all as many, or remove() what track_parts returned first"
                )
            self._synchronizes = self._replicas.require_backward_grad_sync

    def _after_forward(self, output: Any) -> None:
        self._restore(None)  # what a backward that failed left aside
        begun = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if begun and torch.is_grad_enabled():
            hook = self._weakly(type(self)._backward_begins)
            register_multi_grad_hook(begun, hook, mode="any")

    def _backward_begins(self, _: Any) -> None:
        if self.active:
            for p in self._tracked:
                if is_spread(p):
                    self._set_aside(p)
            self._at_the_end(type(self)._restore)

    def _restore(self, _: Any) -> None:
        """Put back what nothing was added to."""
        for p, total in self._aside.items():
            if p.grad is None:
                p.grad = total
        self._aside.clear()

    def _at_the_end(self, method: Callable[[Any, Any], None]) -> None:
        """Call a method when this backward is over, after what others do then, who may have queued it only there."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            queue, call = torch.autograd.Variable._execution_engine.queue_callback, self._weakly(method)
            queue(lambda: queue(lambda: queue(lambda: call(None))))

    def _watch(self, p: Tensor) -> None:
        # A hook on the tensor would also run in torch.autograd.grad, which hands nothing over: p.grad would be lost.
        node = self._nodes[p] = get_gradient_edge(p).node  # kept, since its hooks are gone when it is
        hook = self._weakly(type(self)._set_aside)
        self._handles.append(node.register_prehook(lambda _: hook(p)))

    def _weakly(self, method: Callable[[Any, Any], None]) -> Callable[[Any], None]:
        """The method as a hook that does not keep this object alive: the collector does not see references from nodes."""
        this = ref(self)
        return lambda p: None if (tracker := this()) is None else method(tracker, p)

    def _set_aside(self, p: Tensor) -> None:
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
            part2 = squared_norm(part.detach())
            with torch.enable_grad():
                p.grad = part if total is None else total + part
            norm2 = squared_norm(p.grad.detach())
        else:
            part2, norm2 = backends.accumulate(None if total is None else local(total), local(part), self.backend)
            if total is not None and is_spread(total):
                torch.autograd.graph.increment_version(total)
            p.grad = part if total is None else total
        added, count = self._measure(p, part.detach(), math.sqrt(part2))
        norms, parts, squares = (before.norms, before.parts, before.squares) if before else (0.0, 0, ())
        assert p.grad is not None
        squares = (*squares, part2) if is_spread(p) else ()
        self._sums[p] = _Sum(p.grad, p.grad._version, norms + added, norm2, parts + count, squares)
        if self._replicas is not None and self._synchronizes:
            self._at_the_end(type(self)._synchronized)

    def _synchronized(self, _: Any) -> None:
        """The gradients have become means over processes; the norms of what they are means of are sent on their way."""
        for p in self._tracked:
            if p.grad is not None:
                known = self._sums.get(p, _Sum(p.grad, 0, 0.0, 0.0, 0))  # only other processes had a gradient
                self._sums[p] = replace(
                    known, grad=p.grad, version=p.grad._version, norm2=backends.accumulate(None, p.grad.detach())[0]
                )
        self._send()

    def _send(self) -> tuple[Tensor, Any]:
        assert self._replicas is not None
        norms = [self._sums[p].norms if p in self._sums else 0.0 for p in self._tracked]
        vector = torch.tensor(norms, dtype=torch.float64, device=next(iter(self._tracked)).device)
        work = torch.distributed.all_reduce(vector, group=self._replicas.process_group, async_op=True)
        self._sent = vector, work
        return self._sent

    def share(self) -> None:
        """Wait for the norms of the other processes' parts, before a step."""
        if self._replicas is None or not self._tracked:
            return
        vector, work = self._sent or self._send()
        self._sent = None
        work.wait()
        processes = torch.distributed.get_world_size(self._replicas.process_group)
        for p, norms in zip(self._tracked, vector.tolist()):
            if p in self._sums:
                self._sums[p].whole = norms / processes

    def _measure(self, p: Tensor, part: Tensor, norm: float) -> tuple[float, int]:
        """Sum of the norms of the parts in what one backward adds to ``p.grad``, and their number."""
        return norm, 1

    def _current(self, p: Tensor, grad: Tensor) -> _Sum:
        """What is known of a gradient, corrected for what has happened to it since."""
        known = self._sums.get(p)
        if known is None:  # left by somebody else: one part, none if zeroed
            norm2 = squared_norm(grad)
            # Of a shard even a zero is a part, or processes would have different numbers of them.
            squares: tuple[float, ...] = (norm2,) if is_spread(grad) else ()
            return _Sum(grad, grad._version, math.sqrt(norm2), norm2, int(norm2 > 0), squares)
        # torch's foreach operations, clip_grad_norm_ with them, do not count what they write in DTensors.
        if known.grad is not grad or known.version != grad._version or is_spread(grad):
            norm2 = squared_norm(grad)
            factor2 = norm2 / known.norm2 if known.norm2 > 0 else 1.0
            norms = known.norms * math.sqrt(factor2) if known.norm2 > 0 else math.sqrt(norm2)
            squares = tuple(square * factor2 for square in known.squares)
            whole = None if known.whole is None else known.whole * math.sqrt(factor2)
            parts = known.parts if norm2 > 0 or squares else 0
            known = _Sum(grad, grad._version, norms, norm2, parts, squares, whole)
            self._sums[p] = known
        return known

    def norms(self, p: Tensor) -> PartNorms | None:
        """Sum of the norms of the parts of ``p.grad``, and its squared norm; None where no backward was seen."""
        if p.grad is None or p not in self._sums:
            return None
        known = self._current(p, p.grad)
        return PartNorms(known.norms if known.whole is None else known.whole, known.norm2)

    def squares(self, p: Tensor) -> list[float]:
        """Of a DTensor every part's sum of squares, as far as it is here: these add up over processes, norms do not."""
        return list(self._current(p, p.grad).squares) if p.grad is not None and p in self._sums else []

    def counts(self) -> dict[Tensor, int]:
        """How many parts each gradient has had since the last step."""
        return {p: known.parts for p, known in self._sums.items()}

    def recheck(self) -> None:
        """Measure every gradient anew: torch.amp.GradScaler.unscale_ changes them and not their versions."""
        for known in self._sums.values():
            known.version = -1

    def reset(self) -> None:
        """Begin anew, after a step."""
        self._sums.clear()
        self._sent = None

    @property
    def active(self) -> bool:
        """Whether the hooks are still there."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks away; nothing is left in the backward."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        self.reset()
