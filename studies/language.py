"""Rates by layer and trust ratios on a small language model, beside AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fused_opt

from .data import Data, Split
from .harness import Arm, Study
from .training import batches, bits, loss_of, scheduled, set_rate
from .transformer import Transformer, characters

WIDTH, LAYERS, SEQUENCES, BATCH, EPOCHS, WARMUP = 64, 3, 2048, 16, 2, 0.1
SETTING = "Pre-LN transformer"
ENDS = 5.0  # LLR's factor for embedding and head
#: Every 100 updates at 1B parameters: here as often over the run.
LLR: dict[str, Any] = {"preset": "llr", "every": 10, "ramp": 5}
OPTIMIZERS = {"LAMB": fused_opt.LAMB, "LARS": fused_opt.LARS}
GRIDS = {"LAMB": (-5, -4, -3), "LARS": (0, 1, 2)}
AGAINST: dict[str, tuple[str, ...]] = {
    "AdamW": (),
    "AdamW, ends x 5": ("AdamW",),
    "LLR": ("AdamW", "AdamW, ends x 5"),
    "LAMB": ("AdamW",),
    "LARS": ("AdamW",),
}


def train(
    options: Mapping[str, Any], lr: float, seed: int, data: Split, held_out: Split, classes: int
) -> dict[str, Any]:
    """Cosine after warmup for everyone; LLR looks at the spectra in the first fifth."""
    epochs, name = options.get("epochs", EPOCHS), options["arm"]
    model = Transformer(classes, WIDTH, LAYERS, pre=True)
    steps = len(data.targets) // BATCH * epochs
    optimizer = OPTIMIZERS.get(name, fused_opt.AdamW)(model.parameters(), lr)
    balance = fused_opt.TempBalance(model, optimizer, total_steps=steps, **LLR) if name == "LLR" else None
    if name == "AdamW, ends x 5":
        optimizer.scale_layers(lr=dict.fromkeys((model.embedding.weight, model.head.weight, model.head.bias), ENDS))
    for update, x, y in batches(data, BATCH, epochs, seed):
        set_rate(optimizer, lr * scheduled("cosine", update / steps, WARMUP))
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        if balance is not None:
            balance.step()
    middle = [m for name, m in balance.multipliers.items() if name.startswith("blocks")] if balance else [1.0]
    return {
        "score": bits(model, held_out, classes),
        "examples": steps * BATCH,
        "updates": steps,
        "largest multiplier of the blocks": max(middle),
    }


def load(given: Path | None) -> Data:
    """2,048 sequences to train on."""
    return characters(given, SEQUENCES)


def study(quick: bool = False) -> Study:
    """The study, or the least of it that runs everything."""
    names = ["AdamW", "LLR"] if quick else list(AGAINST)
    options = {"epochs": 1} if quick else {}
    return Study(
        name="language",
        title="A small language model: LLR, LAMB and LARS beside AdamW",
        arms=[
            Arm(
                SETTING,
                name,
                GRIDS.get(name, (-6, -5, -4))[: 2 if quick else None],
                {"arm": name, **options},
                tuple(other for other in AGAINST[name] if other in names),
                same_rate=name in ("AdamW, ends x 5", "LLR"),
            )
            for name in names
        ],
        metric="test bits a character",
        higher=False,
        load=(lambda given: characters(None, 256, quick=True)) if quick else load,
        train=train,
        extras=("largest multiplier of the blocks",),
        digits=3,
    )
