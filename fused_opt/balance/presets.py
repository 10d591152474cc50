"""The settings that each paper published, as keyword arguments of TempBalance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

from torch import nn

from .layers import LAYERS

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2312.00359, image classification with SGD: call step() once per epoch
    "temp_balance": {},
    # its language models with Adam, once per epoch; the LayerNorms follow
    "temp_balance_lm": {"limits": (1.0, 2.0), "norms": "all"},
    # arXiv 2410.12178: one exponent a transformer block ("encoder.layer.3"); strength 0.25 .. 2 by task
    "model_balancing": {"assignment": "sigmoid", "blocks": r".*?\.\d+(?=\.)"},
    # arXiv 2506.06280, image classification: limits 0.1 .. 1.9 to 0.4 .. 1.6 by network
    "farms": {"windows": (100, 100, 9), "limits": (0.2, 1.8), "min_eigenvalues": 5},
    # arXiv 2506.14562: call step() after every optimizer step
    "alpha_decay": {"target": "weight_decay", "limits": (2 / 3, 3.0), "every": 500},
    # arXiv 2605.22297 for 1B parameters (130M: limits (1, 3), every 40, ramp 20): give total_steps, and
    # call step() after every optimizer step
    "llr": {
        "limits": (1.0, 5.0),
        "skipped": 5.0,
        "include": (*LAYERS, nn.Embedding),
        "every": 100,
        "ramp": 50,
        "active": 0.2,
    },
}


P = ParamSpec("P")


def takes_preset(init: Callable[P, None]) -> Callable[P, None]:
    """Add to the settings that a call names those of its ``preset=``, which the former take precedence over.

    Raises:
        ValueError: for a name that is not in ``PRESETS``.
    """

    @functools.wraps(init)
    def with_preset(*args: P.args, **kwargs: P.kwargs) -> None:
        name = kwargs.get("preset")
        if name is not None and name not in PRESETS:
            raise ValueError(f"preset={name!r} is not known; choose from {', '.join(PRESETS)}")
        kwargs.update({**({} if name is None else PRESETS[str(name)]), **kwargs})
        init(*args, **kwargs)

    return with_preset
