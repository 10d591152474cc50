"""PyTorch optimizers whose whole step is one pass over memory."""

from . import backends
from ._version import __version__
from .optimizer import FusedOptimizer
from .rules.adam import Adam, AdamW
from .rules.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "FusedOptimizer", "__version__", "backends"]
