"""What the step is to reach on an H200, judged by the figures: met, not met, or not measured and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import BACKENDS

Figures = Mapping[tuple[str, str, str], dict[str, Any]]  # by shape, case and contender
Value = Callable[..., float]
EVERY = ("ResNet-50", "GPT-2 medium", "Llama-1B", "1 G flat")
LARGE = EVERY[1:]  # 100 million parameters and more


@dataclass(frozen=True)
class Target:
    """A bound on what ``value`` makes of one or two contenders' figures; ``{b}`` stands for every backend."""

    text: str
    value: Value
    bound: float
    case: str
    contenders: tuple[str, ...]
    at_least: bool = False
    shapes: tuple[str, ...] = EVERY


def share(of: dict[str, Any]) -> float:
    """Of the bandwidth of a copy of memory."""
    return of["share_of_copy"]


def host(of: dict[str, Any]) -> float:
    """Microseconds."""
    return of["host_us"]["median"]


def kernels(of: dict[str, Any]) -> float:
    """Launches of kernels in a step."""
    return of["launches"]["kernels"]


def ratio(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Of the GPU's times."""
    return a["gpu_us"]["median"] / b["gpu_us"]["median"]


SGD, ADAMW, LARS = "SGD", "AdamW", "LARS"
TARGETS = [
    Target("share of the copy's bandwidth", share, 0.9, SGD, ("{b} SGD",), True, LARGE),
    Target("share of the copy's bandwidth", share, 0.9, ADAMW, ("{b} AdamW",), True, LARGE),
    Target("share of the copy's bandwidth", share, 0.9, LARS, ("{b} CLARS",), True, LARGE),
    Target("time over torch's fused SGD", ratio, 1.0, SGD, ("{b} SGD", "torch fused SGD")),
    Target("time over torch's fused AdamW", ratio, 1.0, ADAMW, ("{b} AdamW", "torch fused AdamW")),
    Target("time over our SGD", ratio, 1.05, LARS, ("{b} CLARS", "{b} SGD")),
    Target("time over our SGD", ratio, 1.1, "SGD with extras, {b}", ("{b} SGD, noise", "{b} SGD")),
    Target("time over our SGD", ratio, 1.1, "SGD with extras, {b}", ("{b} SGD, EMA between samples", "{b} SGD")),
    Target("times as fast as a foreach LARS", ratio, 3.0, LARS, ("foreach LARS", "{b} CLARS"), True),
    *(
        target
        for case, of in ((SGD, "SGD"), (ADAMW, "AdamW"), (LARS, "CLARS"))
        for target in (
            Target("host, microseconds", host, 60.0, case, (f"{{b}} {of}",), shapes=EVERY[:1]),
            Target("launches", kernels, 1.0, case, (f"{{b}} {of}",)),
        )
    ),
]


def judge(figures: Sequence[dict[str, Any]], reasons: Mapping[str, str], instead: str = "") -> list[dict[str, Any]]:
    """A verdict for every target, backend and shape.

    Args:
        figures: the benchmark's lines.
        reasons: why there is no figure, by the name of the line that is missing.
        instead: why nothing counts as measured; empty: it does.
    """
    found: Figures = {(f["shape"], f["case"], f["contender"]): f for f in figures}
    verdicts = []
    for target in TARGETS:
        for backend in BACKENDS:
            for shape in target.shapes:
                case, *names = (text.format(b=backend) for text in (target.case, *target.contenders))
                line: dict[str, Any] = {
                    "target": f"{names[0 if target.contenders[0] != 'foreach LARS' else 1]}: {target.text}",
                    "backend": backend,
                    "shape": shape,
                    "bound": f"{'at least' if target.at_least else 'at most'} {target.bound:g}",
                }
                missing = [name for name in names if (shape, case, name) not in found]
                why = instead or next((reasons.get(f"{shape}: {case}: {name}") or "no figure" for name in missing), "")
                if not why and target.value is kernels and not found[shape, case, names[0]]["launches"]:
                    why = "launches were not counted"
                if why:
                    verdicts.append({**line, "verdict": "not measured", "why": why.splitlines()[0]})
                    continue
                value = target.value(*(found[shape, case, name] for name in names))
                met = value >= target.bound if target.at_least else value <= target.bound
                verdicts.append({**line, "verdict": "met" if met else "not met", "found": round(value, 4)})
    return verdicts
