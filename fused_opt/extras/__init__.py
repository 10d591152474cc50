"""What is fused into the pass that updates: trust ratios, noise, averaging, masks, kinds of decay, clipping.

``EXTRAS`` is the only list of them: it drives the keywords and their checks, the keys of ``param_groups``, the arguments of a
step, what checkpoints carry, what ZeroRedundancyOptimizer must refuse, and the documentation of the keywords.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, Literal

import torch
from typing_extensions import TypedDict  # whose classes know their annotations in full in Python 3.10, too

from .averaging import AVERAGING, EMA, PSWA, PSWM, PWALKS, SWM, Averaging, ScheduleFree
from .clipping import MAX_GRAD_NORM, NONFINITE, Nonfinite
from .decay import CAUTIOUS, DECAY, Cautious, Decay
from .extra import Extra
from .master_weights import MASTER_WEIGHTS
from .noise import NOISE, WeightNoise
from .rounding import ROUNDING, Rounding, StochasticRounding, rounds_at_random
from .trust_ratio import TRUST_RATIO, TrustRatio

__all__ = [
    "EMA",
    "EXTRAS",
    "PSWA",
    "PSWM",
    "PWALKS",
    "SWM",
    "Averaging",
    "Cautious",
    "Extra",
    "Extras",
    "ExtrasBesideRatio",
    "ScheduleFree",
    "StochasticRounding",
    "TrustRatio",
    "WeightNoise",
]

EXTRAS = (TRUST_RATIO, NOISE, AVERAGING, CAUTIOUS, DECAY, ROUNDING, MASTER_WEIGHTS, MAX_GRAD_NORM, NONFINITE)
#: Those that a step's arguments speak of, in the order of ``StepArgs``.
IN_ARGS = tuple((extra.key, extra.args) for extra in EXTRAS if extra.args is not None)
NO_ARGS = (None,) * len(IN_ARGS)
FOLD = [key for key, _ in IN_ARGS].index("averaging")  # among them
#: Plain numbers in the groups: load_state_dict would cast tensors in the state to the parameter's dtype.
COUNTS = ("steps", *(count for extra in EXTRAS for count in extra.counts))
_SETTINGS: dict[str, dict[str, type[Any]]] = {
    extra.key: {cls.__name__: cls for cls in extra.settings} for extra in EXTRAS if extra.settings
}
_WORDS = {extra.key: extra.words for extra in EXTRAS}


class ExtrasBesideRatio(TypedDict, total=False):
    """What the optimizers take that have a trust ratio of their own, beyond torch.optim's arguments."""

    noise: WeightNoise | None
    averaging: Averaging | None
    cautious: Cautious | None
    decay: Decay | None
    rounding: Rounding | None
    master_weights: bool
    max_grad_norm: float | None
    nonfinite: Nonfinite
    state_dtype: torch.dtype | Literal["8bit"] | Mapping[str, torch.dtype | Literal["8bit"]] | None
    backend: Literal["auto", "native", "triton", "foreach", "reference"]


class Extras(ExtrasBesideRatio, total=False):
    """What every other optimizer of the package takes beyond torch.optim's arguments."""

    trust_ratio: TrustRatio | None


def check_extras(options: Mapping[str, Any]) -> None:
    """Raise where a value is none for its key."""
    for extra in EXTRAS:
        extra.check(options[extra.key])
    if isinstance(options["averaging"], ScheduleFree) and (
        options["noise"] is not None or options.get("differentiable")
    ):
        other = "noise" if options["noise"] is not None else "differentiable=True"
        raise ValueError(
            f"averaging=ScheduleFree(...) and {other}: noise would be that of an iterate which is not stored, and autograd "
            f"would take the weight of a step for a constant. Leave one of them out"
        )
    if options.get("differentiable") and (rounds_at_random(options["rounding"]) or options["master_weights"]):
        key, what = f"rounding={options['rounding']!r}", "what is rounded at random"
        if options["master_weights"]:
            key, what = "master_weights=True", "weights that are kept in two parts"
        raise ValueError(f"differentiable=True and {key}: autograd cannot follow {what}. Leave one of them out")
    if options.get("differentiable"):
        noise = options["noise"]
        asked = [key for key in ("trust_ratio", "max_grad_norm") if options[key] is not None]
        if asked := asked + ["noise that is relative to the weights"] * (noise is not None and noise.relative):
            raise ValueError(
                f"differentiable=True, and {', '.join(asked)}: autograd would take the norms of a step for constants. Leave "
                f"one of them out"
            )


def step_args(group: Mapping[str, Any], lr: Any) -> tuple[Any, ...]:
    """What the step of a group says of the extras, in the order of ``StepArgs``."""
    return tuple([None if group[key] is None else args(group, lr) for key, args in IN_ARGS])


def pack(key: str, value: Any) -> Any:
    """A setting as one string, which ``torch.load(weights_only=True)`` reads; anything else as it is.

    torch.distributed.checkpoint takes dicts and tuples apart, and could load them only into a setting of the same kind.

    Example:
        >>> pack("trust_ratio", TrustRatio("lars", coefficient=0.5))
        'TrustRatio {"kind": "lars", "coefficient": 0.5, "cap": Infinity, "eps": 0.0, "exempt": 1}'
    """
    if is_dataclass(value) and type(value) in _SETTINGS.get(key, {}).values():
        return f"{type(value).__name__} {json.dumps(asdict(value))}"  # type: ignore[arg-type]
    return value


def unpack(key: str, value: Any) -> Any:
    """What ``pack`` was given.

    Raises:
        ValueError: for a string that ``pack`` does not make under this key.
    """
    if key not in _SETTINGS or not isinstance(value, str) or value in _WORDS[key]:
        return value
    name, _, fields = value.partition(" ")
    try:
        return _SETTINGS[key][name](**json.loads(fields))
    except (KeyError, TypeError, ValueError) as error:
        kinds = ", ".join(_SETTINGS[key])
        raise ValueError(f"Invalid {key} in the state_dict: {value!r}; there is None, or one of {kinds}") from error
