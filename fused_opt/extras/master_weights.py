"""Float32 weights behind parameters of 16 bits: a step reads and writes them, and the model sees them rounded.

Beside a bfloat16 a state ``remainder`` keeps the lower half of the float32's bits, 2 bytes a parameter; beside a float16, of
which not every float32 is a small distance away, a state ``master`` keeps the float32. How: fused_opt/exact.py.
"""

from __future__ import annotations

from typing import Any

from .extra import Extra


def _check(value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"master_weights takes True or False, not {value!r}")


MASTER_WEIGHTS = Extra(
    "master_weights",
    _check,
    """True: behind bfloat16 and float16 parameters are float32 weights, which steps, norms and averages go by:
            :meth:`master_parameters`, :func:`fused_opt.to_16bit`. The parameters are these rounded to the nearest, of
            bfloat16 with ties away from zero, whatever ``rounding`` says of the states.""",
    default=False,
)
