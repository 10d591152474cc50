"""What rides in the same pass as the update: trust ratios, noise, averaging; and how checkpoints carry their settings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .averaging import EMA, PSWA, PSWM, PWALKS, SWM
from .noise import WeightNoise
from .trust_ratio import TrustRatio

SETTINGS = {cls.__name__: cls for cls in (TrustRatio, WeightNoise, PSWA, PWALKS, PSWM, SWM, EMA)}


def pack(value: Any) -> Any:
    """A setting as plain types, which ``torch.load(weights_only=True)`` reads; anything else as it is."""
    name = type(value).__name__
    return {"setting": name, **asdict(value)} if SETTINGS.get(name) is type(value) else value


def unpack(value: Any) -> Any:
    """What ``pack`` was given."""
    if not (isinstance(value, dict) and value.get("setting") in SETTINGS):
        return value
    return SETTINGS[value["setting"]](**{key: item for key, item in value.items() if key != "setting"})
