"""Warnings that are said once, at the line of the program that they are about."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_LIBRARIES = tuple(str(Path(module).parent) for module in (__file__, torch.__file__))
_said: set[str] = set()


class FusedOptWarning(UserWarning):
    """What this package warns of."""


def warn_once(message: str) -> None:
    """Warn, once per process and message, of the innermost line that is neither this package's nor torch's."""
    if message in _said:
        return
    _said.add(message)
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FusedOptWarning, stacklevel=level)
