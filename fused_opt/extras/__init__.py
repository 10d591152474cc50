"""What rides in the same pass as the update: trust ratios, noise, averaging; and how checkpoints carry their settings."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from .averaging import EMA, PSWA, PSWM, PWALKS, SWM
from .noise import WeightNoise
from .trust_ratio import TrustRatio

SETTINGS = {cls.__name__: cls for cls in (TrustRatio, WeightNoise, PSWA, PWALKS, PSWM, SWM, EMA)}


def pack(value: Any) -> Any:
    """A setting as one string, which ``torch.load(weights_only=True)`` reads; anything else as it is.

    torch.distributed.checkpoint takes dicts and tuples apart, and could load them only into a setting of the same kind.

    Example:
        >>> pack(TrustRatio("lars", coefficient=0.5))
        'TrustRatio {"kind": "lars", "coefficient": 0.5, "cap": Infinity, "eps": 0.0, "exempt": 1}'
    """
    name = type(value).__name__
    return f"{name} {json.dumps(asdict(value))}" if SETTINGS.get(name) is type(value) else value


def unpack(value: Any) -> Any:
    """What ``pack`` was given."""
    name, _, fields = value.partition(" ") if isinstance(value, str) else ("", "", "")
    return SETTINGS[name](**json.loads(fields)) if name in SETTINGS else value
