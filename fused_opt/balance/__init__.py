"""Layer-wise learning rates and weight decay from the spectra of the weights."""

from .assignment import assign
from .hill import layer_alphas
from .presets import PRESETS
from .temp_balance import TempBalance

__all__ = ["PRESETS", "TempBalance", "assign", "layer_alphas"]
