"""What trackers of a gradient's parts share: whose parameters, in which processes, and for how long."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..backends.interface import PartNorms
from ..groups import name_of
from ..shards import is_spread
from ..warn import warn_once


def wants_parts(param_groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any group has CLARS's trust ratio, which is formed from the norms of the gradient's parts."""
    return any(group["trust_ratio"] is not None and group["trust_ratio"].kind == "clars" for group in param_groups)


def warn_without_parts(param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Say once that CLARS has no parts, for an optimizer that steps without a tracker."""
    if wants_parts(param_groups):
        warn_once(
            "CLARS steps without track_parts: the whole gradient counts as one part, so that its norm takes the place of "
            "the sum of the parts' norms. Call optimizer.track_parts() once, before the first backward"
        )


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


class WeakHook:
    """A tracker's method as a hook that does not keep the tracker alive; copies of it, deep or pickled, do nothing.

    Models keep their hooks, and copies of models copies of them; the garbage collector cannot see those of autograd nodes.

    Args:
        method: of the tracker.
        args: what it is called with before what the hook is called with.
    """

    def __init__(self, method: Callable[..., Any], *args: Any) -> None:
        self._tracker = ref(method.__self__)  # type: ignore[attr-defined]
        self._method = method.__func__  # type: ignore[attr-defined]
        self._args = args

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        tracker = self._tracker()
        return None if tracker is None else self._method(tracker, *self._args, *args, **kwargs)

    def __reduce__(self) -> Any:
        return _Nothing, ()


class _Nothing:
    """What copies of hooks are."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


def _take_away(handles: dict[int, list[RemovableHandle]]) -> None:
    for of_one in handles.values():
        for handle in of_one:
            handle.remove()
    handles.clear()


class PartTracker(ABC):
    """The norms of the parts that the gradients of an optimizer's parameters are sums of.

    The optimizer is referenced weakly, and its parameters are read when needed. Its deletion removes the tracker's hooks.

    Args:
        optimizer: whose gradients; its groups name the parameters.
        model: what the backward runs through, where processes train together.
        backend: the optimizer's, which adds up gradients and their squares.

    Raises:
        ValueError: where several processes train and the model does not tell how.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None = None, backend: str = "auto"
    ) -> None:
        self._optimizer = ref(optimizer)
        self._model = model
        self._backend = backend
        self._active = True
        self._replicas = data_parallel(model, [p for p in self._parameters() if p.requires_grad])
        self._handles: dict[int, list[RemovableHandle]] = {}  # by id of the parameter or module that has the hooks
        finalize(optimizer, _take_away, self._handles).atexit = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._doing() if self.active else 'removed'}>"

    @abstractmethod
    def _doing(self) -> str:
        """What it tracks now, in words."""

    def _groups(self) -> Sequence[Mapping[str, Any]]:
        optimizer = self._optimizer()
        return () if optimizer is None else optimizer.param_groups

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._groups() for p in group["params"]]

    def _mean(self, numbers: Sequence[float], device: torch.device) -> Callable[[], list[float]]:
        """Begin to take the mean over the processes that train together; what is returned waits for it."""
        assert self._replicas is not None
        group = self._replicas.process_group
        vector = torch.tensor(numbers, dtype=torch.float64, device=device)
        work = torch.distributed.all_reduce(vector, group=group, async_op=True)

        def mean() -> list[float]:
            work.wait()
            return (vector / torch.distributed.get_world_size(group)).tolist()

        return mean

    @abstractmethod
    def norms(self, p: Tensor) -> PartNorms | None:
        """Of the parts of ``p.grad``; None: nothing is known."""

    def squares(self, p: Tensor) -> list[float]:
        """Of a DTensor every part's sum of squares, of its local part: these add up over processes, norms do not."""
        return []

    @abstractmethod
    def _counts(self) -> dict[Tensor, int]: ...

    def counts(self) -> dict[str, int]:
        """How many parts each gradient has had since the last step, by the parameter's name (see ``trust_ratios``)."""
        counts = self._counts()
        return {
            name_of(group, g, i): counts[p]
            for g, group in enumerate(self._groups())
            for i, p in enumerate(group["params"])
            if p in counts
        }

    def share(self) -> None:  # noqa: B027  # not all have to
        """Wait for the norms of other processes, before a step."""

    def recheck(self) -> None:  # noqa: B027
        """Measure every gradient anew at the step, after writes to ``p.grad`` that its version does not count."""

    def reset(self) -> None:  # noqa: B027
        """Begin anew, after a step."""

    @property
    def active(self) -> bool:
        """Whether it still tracks: it was not removed, and its optimizer exists."""
        return self._active and self._optimizer() is not None

    def remove(self) -> None:
        """Take the hooks away, and forget the norms; the gradient is one part from then on."""
        self._active = False
        _take_away(self._handles)
