"""What applies a rule to tensors: modules with the interface of interface.py, tried in this order by ``backend="auto"``."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, cast

from torch import Tensor

from . import self_check
from .interface import Backend

if TYPE_CHECKING:
    from . import foreach, native, reference, triton

    _: tuple[Backend, ...] = (native, triton, foreach, reference)

BACKENDS = ("native", "triton", "foreach", "reference")


@lru_cache
def get(name: str) -> Backend:
    """The backend of that name; a ValueError names the ones there are."""
    if name not in BACKENDS:
        raise ValueError(f"Invalid backend: {name!r}; there are 'auto', {', '.join(map(repr, BACKENDS))}")
    return cast(Backend, import_module(f".{name}", __name__))


def available() -> dict[str, str | None]:
    """Every backend with None where it can run on this machine, or the reason why it cannot.

    Example:
        >>> fused_opt.backends.available()["reference"] is None
        True
    """
    return {name: get(name).unavailable() for name in BACKENDS}


def accumulate(total: Tensor | None, part: Tensor, backend: str = "auto") -> tuple[float, float]:
    """``total += part`` in one pass with the sums of squares of the part and of the new total; None: there is only a part.

    A named backend does it where it can; otherwise, and for ``"auto"``, the first that can does.
    """
    tensors = [part] if total is None else [total, part]
    for name in BACKENDS if backend == "auto" else (backend, *BACKENDS):
        module = get(name)
        if module.unsupported(None, tensors) is None and not self_check.failure(
            name, module, part, lambda: self_check.Variant(None, tuple(tensor.dtype for tensor in tensors))
        ):
            return module.accumulate(total, part)
    raise AssertionError("the reference backend supports everything")
