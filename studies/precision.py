"""Weights, gradients and states of 16 bits and fewer, on a small transformer that predicts the next word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_opt

from .data import Data, Split, kjv, language, standard_library, words
from .harness import Arm, Study
from .training import batches, bits, scheduled, set_rate

VOCABULARY, LENGTH, SEQUENCES, HELD_OUT = 400, 16, 1600, 400
WIDTH, HEADS, LAYERS, BATCH, EPOCHS = 64, 4, 1, 16, 4
WARMUP = 0.1

#: Of the parameters, and the optimizer's options.
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, states in 8 bits": (torch.float32, {"state_dtype": "8bit"}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "bfloat16, exact weights": (torch.bfloat16, {"master_weights": True}),
    "bfloat16, exact weights, states in 8 bits": (torch.bfloat16, {"master_weights": True, "state_dtype": "8bit"}),
}


class Block(nn.Module):
    """Attention and two layers, with normalization before each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(sequences, places, width), as what is returned."""
        n, length, _ = x.shape
        q, k, v = self.qkv(self.first(x)).view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """Logits of the next word at every place."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, WIDTH), nn.Parameter(torch.zeros(length, WIDTH))
        nn.init.normal_(self.words.weight, std=0.1)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """(sequences, places) of word numbers."""
        return self.head(self.last(self.blocks(self.words(x) + self.places))).float()


def train(
    options: Mapping[str, Any], lr: float, seed: int, data: Split, held_out: Split, classes: int
) -> dict[str, Any]:
    """AdamW, with warmup and a cosine; weights, gradients and arithmetic of the model in the arm's dtype."""
    epochs = options.get("epochs", EPOCHS)
    dtype, form = FORMS[options["form"]]
    model = Transformer(classes, data.inputs.shape[1])
    optimizer = fused_opt.AdamW(model.parameters(), lr, weight_decay=0.1, **form)
    if dtype != torch.float32 and form.get("master_weights"):
        fused_opt.to_16bit(model, optimizer, dtype)
    else:
        model.to(dtype)
    steps = len(data.targets) // BATCH
    for update, x, y in batches(data, BATCH, epochs, seed):
        set_rate(optimizer, lr * scheduled("cosine", update / (steps * epochs), WARMUP))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    return {
        "score": bits(model, held_out, classes),
        "examples": steps * BATCH * epochs,
        "updates": steps * epochs,
    }


def load(given: Path | None) -> Data:
    """1,600 sequences of the King James Bible to train on."""
    return language(words(kjv(given)), VOCABULARY, LENGTH, SEQUENCES, HELD_OUT)


def study(quick: bool = False) -> Study:
    """The study, or the least of it that runs everything."""
    options, grid = {}, (-6, -5, -4)
    if quick:
        options, grid = {"epochs": 1}, (-5, -4)
    return Study(
        name="precision",
        title="Training in 16 bits and fewer",
        arms=[
            Arm(
                "AdamW",
                name,
                grid,
                {"form": name, **options},
                () if name == "float32" else ("float32",),
                same_rate=name != "float32",
            )
            for name in FORMS
        ],
        metric="test loss, bits a word",
        higher=False,
        load=(lambda given: language(words(standard_library()), 100, LENGTH, 160, 40)) if quick else load,
        train=train,
        tuning_seeds=(101,),
        digits=3,
    )
