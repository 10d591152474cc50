"""``python -m studies.codes [--data DIR]``: what codes of 8 bits do to Adam's updates, map by map, in docs/precision.md.

The gradients are those of the ``precision`` study's transformer, trained in float32. Beside float32 moments every map has its
own, which are put into its codes and read again after each step; its update is compared with float32's. Adam's update does
not change where all gradients of an element are multiplied by a number, so the same is done once more with a fixed factor
:math:`10^z`, z standard normal, for every element: moments over many decades within a block.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fused_opt
from fused_opt.eight_bits import LEAST, SIGNED, UNSIGNED, coded, decoded

from .data import language, standard_library, words
from .precision import BATCH, LENGTH, Transformer, load
from .training import batches, scheduled, set_rate

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
RATE, WARMUP, FIRST = 3e-3, 0.1, 50  # the update from which on errors count

Map = Callable[[Tensor], Tensor]  # numbers in codes and back, by blocks of the last dimension


def share(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the block's largest magnitude, and that."""
    largest = x.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, x / largest, 0.0), largest


def power(root: float, levels: int, least: int = 0) -> Map:
    """Codes of ``sign(x) |x|^(1 / root)``; ``least``: of what is not 0."""

    def of(x: Tensor) -> Tensor:
        part, largest = share(x)
        code = (part.abs().pow(1 / root) * levels).round()
        code = torch.where(part != 0, code.clamp(min=least), code)
        return part.sign() * (code / levels).pow(root) * largest

    return of


def softsign(x: Tensor) -> Tensor:
    """FlashOptim's for momenta, from its paper: 2 x / (1 + |x|) in 127 steps."""
    part, largest = share(x)
    code = (2 * part / (1 + part.abs()) * 127).round() / 127
    return code / (2 - code.abs()) * largest


def dynamic(signed: bool) -> Map:
    """The map of bitsandbytes, from its paper (arXiv 2110.02861): a decade more has half as many codes."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1 if signed else 2 ** (decade + 1) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += middles.tolist() + (-middles).tolist() * signed
    table = torch.tensor(sorted(values))
    between = (table[1:] + table[:-1]) / 2

    def of(x: Tensor) -> Tensor:
        part, largest = share(x)
        return table[torch.bucketize(part, between)] * largest

    return of


def in_blocks(of: Map, size: int) -> Map:
    """A map for tensors whose number of elements is a multiple of the size."""
    return lambda x: of(x.view(-1, size)).view_as(x)


def ours(dtype: torch.dtype) -> Map:
    """That of the package."""
    return lambda x: decoded(*coded(x, dtype))


def same(x: Tensor) -> Tensor:
    """In full."""
    return x


#: Of the first moment, and of the second.
MAPS: dict[str, tuple[Map, Map]] = {
    "m: ours, 128": (ours(SIGNED), same),
    "m: square, 128": (in_blocks(power(2, 127), 128), same),
    "m: linear, 128": (in_blocks(power(1, 127), 128), same),
    "m: cube, 128": (in_blocks(power(3, 127), 128), same),
    "m: softsign, 32 (FlashOptim)": (in_blocks(softsign, 32), same),
    "m: dynamic, 256 (bitsandbytes)": (in_blocks(dynamic(True), 256), same),
    "v: ours, 128": (same, ours(UNSIGNED)),
    "v: fourth power, 128, none to 0": (same, in_blocks(power(4, 255, 1), 128)),
    "v: square, 128, none to 0": (same, in_blocks(power(2, 255, 1), 128)),
    "v: eighth power, 128, none to 0": (same, in_blocks(power(8, 255, 1), 128)),
    "v: square, 32 (FlashOptim)": (same, in_blocks(power(2, 255), 32)),
    "v: dynamic, 256 (bitsandbytes)": (same, in_blocks(dynamic(False), 256)),
    "both: ours": (ours(SIGNED), ours(UNSIGNED)),
    "both: FlashOptim": (in_blocks(softsign, 32), in_blocks(power(2, 255), 32)),
    "both: bitsandbytes": (in_blocks(dynamic(True), 256), in_blocks(dynamic(False), 256)),
    "both: bfloat16": (lambda x: x.bfloat16().float(),) * 2,
}


class Moments:
    """Adam's of some tensors, through a map after every step."""

    def __init__(self, maps: tuple[Map, Map]) -> None:
        self.maps = maps
        self.of: dict[int, list[Tensor]] = {}
        self.error = self.size = self.worst = self.lost = self.seen = 0.0

    def update(self, k: int, g: Tensor, step: int) -> Tensor:
        """That of tensor k, before its moments are stored."""
        m, v = self.of.setdefault(k, [torch.zeros_like(g), torch.zeros_like(g)])
        m, v = m.lerp(g, 1 - BETA1), BETA2 * v + (1 - BETA2) * g * g
        self.of[k] = [of(moment) for of, moment in zip(self.maps, (m, v))]
        return m / (1 - BETA1**step) / ((v / (1 - BETA2**step)).sqrt() + EPS)

    def compare(self, k: int, found: Tensor, expected: Tensor) -> None:
        """Add up how far an update is from float32's."""
        m, v = self.of[k]
        self.error += (found - expected).double().square().sum().item()
        self.size += expected.double().square().sum().item()
        self.worst = max(self.worst, (found - expected).abs().max().item())
        self.lost += ((v == 0) & (m != 0)).sum().item()
        self.seen += v.numel()


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m studies.codes", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the King James Bible, as of python -m studies")
    parser.add_argument("--quick", action="store_true", help="prove that it runs, on data that is always there")
    options = parser.parse_args()
    torch.manual_seed(1)
    text = language(words(standard_library()), 100, LENGTH, 160, 40) if options.quick else load(options.data)
    model = Transformer(text.classes, LENGTH)
    optimizer = fused_opt.AdamW(model.parameters(), RATE, weight_decay=0.1)
    watched = [p for p in model.parameters() if p.numel() >= LEAST and p.numel() % 256 == 0]
    factors = [torch.ones(()), *[10 ** torch.randn(p.shape) for p in watched]]
    found = {spread: {name: Moments(maps) for name, maps in MAPS.items()} for spread in (False, True)}
    exact = {spread: Moments((same, same)) for spread in found}
    steps = len(text.train.targets) // BATCH * (1 if options.quick else 2)
    for step, x, y in batches(text.train, BATCH, 1 if options.quick else 2, 1):
        set_rate(optimizer, RATE * scheduled("cosine", step / steps, WARMUP))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        for k, p in enumerate(watched):
            for spread, by_map in found.items():
                assert p.grad is not None
                g = p.grad * factors[k + 1 if spread else 0]
                expected = exact[spread].update(k, g, step + 1)
                for moments in by_map.values():
                    update = moments.update(k, g, step + 1)
                    if step >= FIRST or options.quick:
                        moments.compare(k, update, expected)
        optimizer.step()
    print(
        "| map, block | error | largest | v = 0, m not | error, spread | largest | v = 0, m not |\n|---|" + "---:|" * 6
    )
    for name in MAPS:
        cells = [
            f"{100 * math.sqrt(m.error / m.size):.1f} % | {m.worst:.2g} | {1e6 * m.lost / m.seen:.3g}"
            for m in (found[False][name], found[True][name])
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
