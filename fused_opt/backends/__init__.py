"""Who applies a rule to tensors. Siblings with the same interface, tried in this order by ``backend="auto"``.

A backend is a module with

- ``unavailable() -> None or the reason in words``: whether it can run on this machine at all;
- ``DEVICES``: the types of device that it is for;
- ``unsupported(rule, tensors, noisy) -> None or the reason in words``: whether it can step one parameter, whose
  ``tensors`` are the parameter, then its gradient and states where it has them;
- ``accumulate(total, part)``: see below;
- ``Bucket(rule, members, param_groups, state, noisy)``: the parameters it was given, prepared for many steps. With
  ``norms`` and ``know_norms`` it steps shards of DTensors, too: before a step it is asked for what its shards' norms are,
  and told those of the whole tensors.


One that leaves numbers on a device has ``counts_there(p)``, whether it counts the steps of a parameter there, and buckets
with a ``device``, ``signals`` and ``sum_gradients`` (see native.py).
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType

from torch import Tensor

# Triton stands behind the reference, where "auto" never gets to, until its kernels have been seen to run on a GPU.
BACKENDS = ("native", "reference", "triton")
# What "auto" leaves alone for the same reason: backend and type of device.
UNSEEN = {("native", "cuda")}


@lru_cache
def get(name: str) -> ModuleType:
    """The backend of that name; a ValueError names the ones there are."""
    if name not in BACKENDS:
        raise ValueError(f"Invalid backend: {name!r}; there are 'auto', {', '.join(map(repr, BACKENDS))}")
    return import_module(f".{name}", __name__)


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
    device = part.device.type
    for name in BACKENDS if backend == "auto" else (backend, *BACKENDS):
        if name != backend and (name, device) in UNSEEN:
            continue
        module = get(name)
        if module.unsupported(None, [part] if total is None else [total, part]) is None:
            return module.accumulate(total, part)
    raise AssertionError("the reference backend supports everything")
