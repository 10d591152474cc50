"""PyTorch optimizers whose whole step is one pass over memory."""

from . import backends
from ._version import __version__
from .accumulation import MicroBatch, accumulate
from .balance import TempBalance
from .batch_size import CyclicalBatchSampler, CyclicalBatchSize, by_update
from .extras import (
    EMA,
    PSWA,
    PSWM,
    PWALKS,
    SWM,
    Averaging,
    Cautious,
    ScheduleFree,
    StochasticRounding,
    TrustRatio,
    WeightNoise,
)
from .gradinit import GradInitIteration, GradInitResult, gradinit
from .optimizer import FusedOptimizer
from .parts.probe import probe_parts
from .precision import to_16bit
from .rules.adagrad import Adagrad
from .rules.adam import Adam, AdamW
from .rules.adamax import Adamax
from .rules.ademamix import AdEMAMix
from .rules.lamb import LAMB
from .rules.lars import CLARS, LARS
from .rules.lion import Lion
from .rules.muon import Muon
from .rules.nadam import NAdam
from .rules.radam import RAdam
from .rules.rmsprop import RMSprop
from .rules.sgd import SGD
from .snapshots import Snapshots, average_predictions

__all__ = [
    "CLARS",
    "EMA",
    "LAMB",
    "LARS",
    "PSWA",
    "PSWM",
    "PWALKS",
    "SGD",
    "SWM",
    "AdEMAMix",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Averaging",
    "Cautious",
    "CyclicalBatchSampler",
    "CyclicalBatchSize",
    "FusedOptimizer",
    "GradInitIteration",
    "GradInitResult",
    "Lion",
    "MicroBatch",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "ScheduleFree",
    "Snapshots",
    "StochasticRounding",
    "TempBalance",
    "TrustRatio",
    "WeightNoise",
    "__version__",
    "accumulate",
    "average_predictions",
    "backends",
    "by_update",
    "gradinit",
    "probe_parts",
    "to_16bit",
]
