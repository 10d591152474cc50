"""TempBalance and FARMS on a residual network with batch normalization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fused_opt

from .data import Data, Split, digits, fashion_mnist, glyphs
from .harness import Arm, Study
from .training import accuracy, batches, scheduled, set_rate

IMAGES, FAMILIES, BATCH = 1024, 20, 64
SETTINGS = {  # epochs
    "1,024 images, cosine": 8,
    "1,024 images, cosine, 40 epochs": 40,
    "1,240 glyphs of 62 classes, cosine, 30 epochs": 30,
}
PRESETS = {"cosine alone": None, "TempBalance": "temp_balance", "FARMS": "farms"}


class Block(nn.Module):
    """Two normalized convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """As many channels and pixels."""
        return nn.functional.relu(x + self.bn2(self.conv2(nn.functional.relu(self.bn1(self.conv1(x))))))


def down(inputs: int, outputs: int) -> nn.Module:
    """A convolution that halves the resolution."""
    layers = nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    return nn.Sequential(*layers)


def network(classes: int) -> nn.Module:
    """Eight convolutions of 8 and 16 channels, and a linear layer; 72 to 144 eigenvalues a balanced layer."""
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)
    return nn.Sequential(down(1, 8), Block(8), down(8, 16), Block(16), Block(16), *end)


def train(
    options: Mapping[str, Any], lr: float, seed: int, data: Split, held_out: Split, classes: int
) -> dict[str, Any]:
    """SGD with momentum and weight decay, cosine; the multipliers anew in every epoch."""
    epochs, model = options["epochs"], network(classes)
    optimizer = fused_opt.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    preset = PRESETS[options["preset"]]
    balance = fused_opt.TempBalance(model, optimizer, preset=preset) if preset else None
    steps = len(data.targets) // BATCH
    spread = 1.0
    for update, x, y in batches(data, BATCH, epochs, seed):
        if update % steps == 0 and balance is not None:
            balance.step()
            multipliers = balance.multipliers.values()
            spread = max(multipliers) / min(multipliers)
        set_rate(optimizer, lr * scheduled("cosine", update / (steps * epochs)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {
        "score": accuracy(model, held_out),
        "examples": steps * BATCH * epochs,
        "updates": steps * epochs,
        "largest over smallest multiplier": spread,
    }


def load(given: Path | None) -> dict[str, Data]:
    """Fewer images and typefaces to train on than are comfortable, as in the regime where the papers report gains."""
    images, letters = fashion_mnist(given, IMAGES, 3000), glyphs(given, FAMILIES, 100)
    return {setting: letters if "glyphs" in setting else images for setting in SETTINGS}


def study(quick: bool = False) -> Study:
    """The study, or the least of it that runs everything."""
    names, grid, settings = list(PRESETS), (-3, -2, -1), SETTINGS
    if quick:
        names, grid, settings = names[:2], (-3, -2), dict.fromkeys(list(SETTINGS)[:1], 2)
    return Study(
        name="temp_balance",
        title="TempBalance and FARMS",
        arms=[
            Arm(setting, name, grid, {"preset": name, "epochs": epochs}, tuple(names[: i > 0]), same_rate=i > 0)
            for setting, epochs in settings.items()
            for i, name in enumerate(names)
        ],
        metric="test accuracy, per cent",
        higher=True,
        load=(lambda given: digits(256, 100)) if quick else load,
        train=train,
        extras=("largest over smallest multiplier",),
        digits=2,
    )
