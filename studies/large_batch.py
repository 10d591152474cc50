"""Large batches on a deep plain network: trust ratios, with and without warmup, two initializations, three batch sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from torch import nn

import fused_opt

from .data import Data, Split, digits, fashion_mnist
from .harness import Arm, Study
from .training import accuracy, batches, scheduled, set_rate

IMAGES, BATCH, EPOCHS = 10240, 1024, 5
MANY, LARGER = 49152, (4096, 16384)  # images, and the batches that divide them
DEPTH, WIDTH = 10, 64
WARMUP = 0.2  # of the updates
RATIOS = ("matrices with a ratio of 0.1 or more", "median ratio of the matrices")  # of CLARS, half way
SGD = {"momentum": 0.9, "weight_decay": 2e-4}


def network(split: Split, classes: int, init: str) -> nn.Module:
    """Ten layers of 64 without normalization; ``init`` is ``He`` or PyTorch's own, whose weights are 2.4 times as small."""
    inputs = split.inputs[0].numel()
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(DEPTH - 1):
        layers += [nn.Linear(WIDTH if i else inputs, WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, classes))
    for module in model if init == "He" else ():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


OPTIMIZERS = {
    "SGD": lambda p, lr: fused_opt.SGD(p, lr, **SGD),
    "LARS": lambda p, lr: fused_opt.LARS(p, lr, **SGD, coefficient=0.01),
    "CLARS": lambda p, lr: fused_opt.CLARS(p, lr, **SGD),
    "CLARS, no cap": lambda p, lr: fused_opt.CLARS(p, lr, **SGD, cap=float("inf")),
    "AdamW": lambda p, lr: fused_opt.AdamW(p, lr),
    "LAMB": lambda p, lr: fused_opt.LAMB(p, lr),
}
AGAINST: dict[str, tuple[str, ...]] = {
    "SGD": (),
    "LARS": ("SGD",),
    "CLARS": ("LARS", "SGD"),
    "CLARS, no cap": ("CLARS", "LARS", "SGD"),
    "AdamW": ("SGD",),
    "LAMB": ("AdamW", "SGD"),
}
GRIDS = {
    "SGD": (-4, -3, -2, -1, 0),
    "LARS": (-2, -1, 0),
    "CLARS": (-1, 0, 1),
    "AdamW": (-6, -5, -4),
    "LAMB": (-5, -4, -3),
}


def train(
    options: Mapping[str, Any], lr: float, seed: int, data: Split, held_out: Split, classes: int
) -> dict[str, Any]:
    """Linear decay; CLARS by the norms of the samples' gradients."""
    epochs, size = options.get("epochs", EPOCHS), options.get("batch", BATCH)
    model = network(data, classes, options["init"])
    optimizer = OPTIMIZERS[options["optimizer"]](model.parameters(), lr)
    clars = options["optimizer"].startswith("CLARS")
    if clars:
        optimizer.track_parts("sample", model)
        optimizer.name_parameters(model)
    steps = len(data.targets) // size
    half, of_clars = 0.0, dict[str, Any].fromkeys(RATIOS, "")
    for update, x, y in batches(data, size, epochs, seed):
        set_rate(optimizer, lr * scheduled("linear", update / (steps * epochs), options["warmup"]))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if update + 1 == steps * epochs // 2:
            half = accuracy(model, held_out)
            if clars:
                ratios = [ratio for name, ratio in optimizer.trust_ratios().items() if name.endswith("weight")]
                of_clars = dict(zip(RATIOS, (mean(ratio >= 0.0999 for ratio in ratios), median(ratios))))
    return {
        "score": accuracy(model, held_out),
        "examples": steps * size * epochs,
        "updates": steps * epochs,
        "half way": half,
        **of_clars,
    }


def arms(
    init: str, names: Sequence[str], warmed: Sequence[str] = (), points: int | None = None, **options: Any
) -> list[Arm]:
    """Of one setting; those in ``warmed`` with warmup, too, which is judged at the rate without it as well."""
    batch = f", batch {options['batch']:,}" if "batch" in options else ""
    return [
        Arm(
            f"{init} initialization{batch}",
            f"{name}, warmup" if warmup else name,
            GRIDS[name.partition(",")[0]][:points],
            {"init": init, "optimizer": name, "warmup": warmup, **options},
            (name,) if warmup else tuple(other for other in AGAINST[name] if other in names),
            same_rate=bool(warmup),
        )
        for name in names
        for warmup in ((0.0, WARMUP) if name in warmed else (0.0,))
    ]


def load(given: Path | None) -> dict[str, Data]:
    """10,240 images to train on, and 49,152 with the larger batches."""
    few, many = (fashion_mnist(given, images, 3000) for images in (IMAGES, MANY))
    return {arm.setting: many if "batch" in arm.options else few for arm in study().arms}


def study(quick: bool = False) -> Study:
    """The study, or the least of it that runs everything."""
    every, layerwise = list(OPTIMIZERS), ["LARS", "CLARS", "CLARS, no cap"]
    chosen = arms("He", every, [name for name in every if name != "CLARS, no cap"]) + arms("PyTorch", every)
    for batch in LARGER:
        chosen += arms("He", every, ["LARS", "CLARS"], batch=batch) + arms("PyTorch", layerwise, batch=batch)
    if quick:
        chosen = arms("He", ["SGD", "CLARS"], ["SGD", "CLARS"], points=2, epochs=2, batch=100)
    return Study(
        name="large_batch",
        title="Large batches: trust ratios and warmup",
        arms=chosen,
        metric="test accuracy, per cent",
        higher=True,
        load=(lambda given: digits()) if quick else load,
        train=train,
        extras=("half way", *RATIOS),
        digits=1,
    )
