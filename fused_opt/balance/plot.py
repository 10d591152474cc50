"""Pictures of what TempBalance saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .hill import hill
from .spectrum import spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .temp_balance import TempBalance


def plot(balance: TempBalance, layers: Sequence[str] | None = None) -> Figure:
    """Draw the exponents of all layers over time, and spectra of some with their fitted tails on logarithmic
    axes.

    A spectrum is drawn as the share of eigenvalues above each value, where a power law of exponent alpha is a
    straight line of slope 1 - alpha.

    Args:
        balance: a TempBalance that has been stepped.
        layers: module names of the spectra; by default those of the least, the middle and the largest
            exponent.

    Returns:
        A matplotlib figure, to be shown or saved.

    Raises:
        ImportError: without matplotlib.
        ValueError: if nothing has been computed yet, or a name is unknown.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
    if not balance.alphas:
        raise ValueError("there are no exponents to draw yet: call step() first")
    if layers is None:
        ranked = sorted(balance.alphas, key=balance.alphas.__getitem__)
        layers = list(dict.fromkeys([ranked[0], ranked[len(ranked) // 2], ranked[-1]]))
    if unknown := [name for name in layers if name not in balance.layers]:
        raise ValueError(f"no layers {unknown}; choose from {list(balance.alphas)}")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    over_time, tails = figure.subplots(1, 2)
    calls = [number for number, _ in balance.history]
    for name in balance.alphas:
        values = [alphas.get(name, float("nan")) for _, alphas in balance.history]
        over_time.plot(calls, values, marker=".", linewidth=1, label=name)
    over_time.set(xlabel="call of step()", ylabel="alpha")
    over_time.legend(fontsize=6, ncols=2)
    for name in layers:
        with torch.no_grad():
            lam = spectrum(balance.layers[name].weight(), balance.estimator["windows"])[0].cpu()
        alpha, start = (x.item() for x in hill(lam, balance.estimator["fit"], balance.estimator["tail"]))
        above = 1 - torch.arange(len(lam)) / len(lam)
        (line,) = tails.plot(lam, above, ".", markersize=3, label=f"{name}: alpha {alpha:.2f}")
        tail = lam[int(start) :]
        tails.plot(tail, above[int(start)] * (tail / tail[0]) ** (1 - alpha), "--", color=line.get_color())
    tails.set(xscale="log", yscale="log", xlabel="eigenvalue", ylabel="share of eigenvalues above")
    tails.set_ylim(bottom=0.5 / max(2, len(lam)))
    tails.legend(fontsize=7)
    return figure
