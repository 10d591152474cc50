"""A small transformer that predicts the next character, for the studies that need one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .data import Data, kjv, language, standard_library

LENGTH, VOCABULARY = 32, 50


def characters(given: Path | None, sequences: int, quick: bool = False) -> Data:
    """Sequences of 32 characters of the King James Bible, and half as many to choose rates by and to test with."""
    text = standard_library() if quick else kjv(given)
    return language(list(text), VOCABULARY, LENGTH, sequences, sequences // 2)


class Block(nn.Module):
    """Causal attention and two layers, each beside the identity; normalized before them (``pre``) or after the sum."""

    def __init__(self, width: int, pre: bool) -> None:
        super().__init__()
        self.heads, self.pre = width // 16, pre
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def attention(self, x: Tensor) -> Tensor:
        """As many numbers; every place sees those before it."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))

    def layers(self, x: Tensor) -> Tensor:
        """Of each place."""
        return self.narrow(nn.functional.relu(self.wide(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width)."""
        if self.pre:
            x = x + self.attention(self.norm1(x))
            return x + self.layers(self.norm2(x))
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.layers(x))


class Transformer(nn.Module):
    """From characters to scores of the next one, (batch, length, classes)."""

    def __init__(self, classes: int, width: int, depth: int, pre: bool) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(classes, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, pre) for _ in range(depth)))
        self.norm = nn.LayerNorm(width) if pre else nn.Identity()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Characters (batch, length)."""
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(self.embedding(x) + places)))
