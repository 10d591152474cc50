"""Pictures of what TempBalance saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import pictures
from .hill import hill
from .layers import Layer
from .spectrum import spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(
    layers: Mapping[str, Layer],
    history: Sequence[tuple[int, dict[str, float]]],
    estimator: Mapping[str, Any],
    names: Sequence[str] | None = None,
) -> Figure:
    """Draw the exponents of all layers over time, and spectra of some with their fitted tails on logarithmic
    axes.

    A spectrum is drawn as the share of eigenvalues above each value, where a power law of exponent alpha is a
    straight line of slope 1 - alpha.

    Args:
        layers: by module name.
        history: exponents by module name, after each recomputation, with the number of the call.
        estimator: ``fit``, ``tail`` and ``windows`` of the exponents.
        names: module names of the spectra; by default those of the least, the middle and the largest
            exponent.

    Returns:
        A matplotlib figure, to be shown or saved.

    Raises:
        ImportError: without matplotlib.
        ValueError: if nothing has been computed yet, or a name is unknown.
    """
    newest = history[-1][1] if history else {}
    if not newest:
        raise ValueError("there are no exponents to draw yet: call step() first")
    if names is None:
        ranked = sorted(newest, key=newest.__getitem__)
        names = list(dict.fromkeys([ranked[0], ranked[len(ranked) // 2], ranked[-1]]))
    if unknown := [name for name in names if name not in layers]:
        raise ValueError(f"no layers {unknown}; choose from {list(newest)}")
    figure, ((over_time, tails),) = pictures.figure(1, 2, 11, 4.5)
    colours = {name: pictures.SERIES[i % len(pictures.SERIES)] for i, name in enumerate(names)}
    calls = [number for number, _ in history]
    for name in newest:
        values = [alphas.get(name, float("nan")) for _, alphas in history]
        drawn = {"color": colours[name], "zorder": 3} if name in colours else {"color": pictures.ASIDE}
        over_time.plot(calls, values, marker=".", linewidth=1, label=name, **drawn)
    over_time.set(title="exponents; coloured: those on the right", xlabel="call of step()", ylabel="alpha")
    over_time.xaxis.get_major_locator().set_params(integer=True)
    for name in names:
        with torch.no_grad():
            lam = spectrum(layers[name].weight(), estimator["windows"])[0].cpu()
        alpha, start = (x.item() for x in hill(lam, estimator["fit"], estimator["tail"]))
        above = 1 - torch.arange(len(lam)) / len(lam)
        tails.plot(lam, above, ".", markersize=3, label=f"{name}: alpha {alpha:.2f}", color=colours[name])
        tail = lam[int(start) :]
        tails.plot(tail, above[int(start)] * (tail / tail[0]) ** (1 - alpha), "--", color=colours[name])
    tails.set(xscale="log", yscale="log", xlabel="eigenvalue", ylabel="share of eigenvalues above")
    tails.set_title("spectra, and the fitted tails (dashed)")
    tails.set_ylim(bottom=0.5 / max(2, len(lam)))
    tails.set_xlim(left=max(1e-4 * lam[-1].item(), 0.5 * lam[lam > 0][0].item()) if lam[-1] > 0 else None)
    pictures.finish((over_time, tails), legends=(tails,))
    return figure
