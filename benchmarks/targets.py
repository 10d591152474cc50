"""Targets and verdicts. Imports no torch: the command for a GPU judges even where torch is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .gpu import BACKENDS

WORDS = {
    "speed": "≥ {bound:.3g}x {of}",
    "time": "≤ {bound:.3g}x time of {of}",
    "host": "≤ {bound:g} µs of the host's time",
    "share": "≥ {bound:g} of a copy's bandwidth",
    "launches": "≤ {bound:g} launches",
}


@dataclass(frozen=True)
class Target:
    """A bound on what was measured of one contender, or on its ratio to another one's.

    Args:
        contender: the label of whose figure is judged.
        quantity: "speed" and "time": how many times as fast as ``of``, or how many times its time; "host", "share" and
            "launches": the figure itself.
        bound: a lower one for "speed" and "share", an upper one for the others.
        of: the label of the contender to compare with.
        beyond: the label of a contender whose figure is subtracted first.
        of_part: the figures are those of the optimizer's part of iterations.
    """

    contender: str
    quantity: str
    bound: float
    of: str | None = None
    beyond: str | None = None
    of_part: bool = False

    def __str__(self) -> str:
        beyond = f"beyond {self.beyond} " if self.beyond else "its part " if self.of_part else ""
        return beyond + WORDS[self.quantity].format(bound=self.bound, of=self.of)

    def found(self, figure: Callable[[str], float]) -> float:
        """The value that is bounded, from each contender's figure (by label)."""
        mine = figure(self.contender) - (figure(self.beyond) if self.beyond else 0.0)
        if self.of is None:
            return mine
        return figure(self.of) / mine if self.quantity == "speed" else mine / figure(self.of)

    def met(self, found: float) -> bool:
        """Whether the value keeps to the bound."""
        return found >= self.bound if self.quantity in ("speed", "share") else found <= self.bound


EVERY = ("ResNet-50", "GPT-2 medium", "Llama-1B", "1 G flat")
LARGE = EVERY[1:]  # 100 million parameters and more


def on_gpu(backend: str) -> Iterator[tuple[str, Sequence[str], Target]]:
    """What a backend is to reach on an H200: case, models, target."""
    for case, optimizer in (("SGD", "SGD"), ("AdamW", "AdamW"), ("LARS", "CLARS")):
        ours = f"{backend} {optimizer}"
        yield case, LARGE, Target(ours, "share", 0.9)
        if case == optimizer:
            yield case, EVERY, Target(ours, "time", 1.0, f"torch fused {optimizer}")
        yield case, EVERY[:1], Target(ours, "host", 60)
        yield case, EVERY, Target(ours, "launches", 1)
    yield "LARS", EVERY, Target(f"{backend} CLARS", "time", 1.05, f"{backend} SGD")
    yield "LARS", EVERY, Target(f"{backend} CLARS", "speed", 3, "foreach LARS")
    for extra in ("noise", "EMA between samples"):
        target = Target(f"{backend} SGD, {extra}", "time", 1.1, f"{backend} SGD")
        yield f"SGD with extras, {backend}", EVERY, target


ON_GPU = [of_case for backend in BACKENDS for of_case in on_gpu(backend)]


QUARTILES = {"host": "host_us", "time": "gpu_us", "speed": "gpu_us"}


def quantity_of(figure: Mapping[str, Any], quantity: str) -> float | None:
    """A quantity of a line of the GPU's benchmark; None where launches were not counted."""
    if quantity == "launches":
        return figure["launches"].get("kernels")
    return figure["share_of_copy"] if quantity == "share" else figure[QUARTILES[quantity]]["median"]


def judge(figures: Sequence[Mapping[str, Any]], reasons: Mapping[str, str], instead: str = "") -> list[dict[str, Any]]:
    """A verdict for every target and model on a GPU: met, not met, or not measured and why.

    Args:
        figures: the benchmark's lines.
        reasons: why there is no figure, by the name of the line that is missing.
        instead: why nothing counts as measured; empty: it does.
    """
    found = {(f["shape"], f["case"], f["contender"]): f for f in figures}
    verdicts = []
    for case, shape, target in ((case, shape, target) for case, shapes, target in ON_GPU for shape in shapes):
        line: dict[str, Any] = {"target": f"{target.contender}: {target}", "shape": shape}
        verdicts.append(line)
        quantities: dict[str, Any] = {}
        why = instead
        for label in filter(None, (target.contender, target.of)):
            if figure := found.get((shape, case, label)):
                quantities[label] = quantity_of(figure, target.quantity)
                why = why or ("launches were not counted" if quantities[label] is None else "")
            else:
                why = why or reasons.get(f"{shape}: {case}: {label}") or "no figure"
        if why:
            line |= {"verdict": "not measured", "why": why.splitlines()[0]}
        else:
            value = target.found(quantities.__getitem__)
            line |= {"verdict": "met" if target.met(value) else "not met", "found": round(value, 4)}
    return verdicts
