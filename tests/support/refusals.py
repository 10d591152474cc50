"""Refusals in words."""

import pytest

from .compare import unchanged

# At the first step, when states would be made, and later, when they would be written.
whenever = pytest.mark.parametrize("steps_before", [0, 2], ids=["first step", "later"])


def refuses(optimizer, match, error=RuntimeError):
    """The step raises, twice alike, and changes nothing."""
    for _ in range(2):
        with unchanged(optimizer), pytest.raises(error, match=match):
            optimizer.step()
