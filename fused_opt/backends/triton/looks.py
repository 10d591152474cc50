"""What a step asks of its tensors in Python, where there is no compiled core: as csrc/python/looks.h."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

_grad, _dtype, _shape = map(attrgetter, ("grad", "dtype", "shape"))


def _layouts(gradients: Sequence[Tensor]) -> list[list[Any]]:
    """What must not change of the gradients, of which there are new ones every step."""
    looks = (type, _dtype, _shape, Tensor.stride, Tensor.is_neg)
    return [list(map(look, gradients)) for look in looks]


class Looks:
    """Looks at tensors in every step.

    Args:
        parameters: each has a gradient.
        others: what else must not move.
    """

    def __init__(self, parameters: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self._parameters = parameters
        # A tensor that is moved no longer has its alias's address, and the alias keeps that memory from being reused.
        self._held = [(tensor, tensor.detach()) for tensor in parameters]
        self._others = [(tensor, tensor.detach()) for tensor in others]
        self._layouts = _layouts([_grad(p) for p in parameters])
        self._here: list[bool] = []
        self._found = b""
        self._versions: list[int | None] = []

    def gradients(self, with_others: bool) -> bytes | None:
        """The address of every gradient as int64, in the object of before where all are as before.

        None: a tensor has moved, or lies otherwise; ``with_others``: of the others, too.
        """
        gradients, layouts = list(map(_grad, self._parameters)), self._layouts
        self._here = [gradient is not None for gradient in gradients]
        present = list(compress(gradients, self._here))
        if len(present) < len(gradients):
            layouts = [list(compress(looks, self._here)) for looks in layouts]
        try:
            if _layouts(present) != layouts or not all(
                tensor.is_set_to(alias) for tensor, alias in self._held + (self._others if with_others else [])
            ):
                return None
        except RuntimeError:  # a sparse tensor has no strides
            return None
        found = array("q", [-1 if gradient is None else gradient.data_ptr() for gradient in gradients]).tobytes()
        if found != self._found:
            self._found = found
        return self._found

    def here(self) -> list[bool] | None:
        """Which parameters had one then; None: all."""
        return None if all(self._here) else self._here

    def remember(self, which: Sequence[bool]) -> None:
        """Remember some parameters' weights as a step has left them."""
        self._versions = [p._version if one else None for p, one in zip(self._parameters, which)]

    def written(self) -> list[int]:
        """The places of those of them to which autograd has counted a write since then."""
        versions = zip(self._parameters, self._versions)
        return [place for place, (p, version) in enumerate(versions) if version is not None and p._version != version]


class Seen:
    """The objects in parameter groups and states, whose replacement makes a plan stale."""

    def __init__(self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> None:
        self._in_groups, self._in_state = [*_in_groups(param_groups)], [*_in_state(state)]

    def unchanged(self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any] | None) -> bool:
        """Whether they are the same ones. No state: it is not looked at."""
        return all(map(is_, _in_groups(param_groups), self._in_groups)) and (
            state is None or all(map(is_, _in_state(state), self._in_state))
        )


def _in_groups(param_groups: list[dict[str, Any]]) -> Iterator[Any]:
    """The objects, and an end that only as many have in their place."""
    return chain(chain.from_iterable((group, *group["params"]) for group in param_groups), (Ellipsis,))


def _in_state(state: Mapping[Tensor, Any]) -> Iterator[Any]:
    return chain(state, chain.from_iterable(map(dict.values, state.values())), (Ellipsis,))
