"""What the table of iterations trains: models, each with the loss of one batch of random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Training = tuple[nn.Module, Callable[[], Tensor]]


def of_classes(model: nn.Module, inputs: Tensor, classes: int) -> Training:
    """A model and its cross entropy on a batch."""
    targets = torch.randint(classes, inputs.shape[: 1 if inputs.is_floating_point() else 2])

    def loss() -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    return model, loss


def perceptron(tiny: bool) -> Training:
    """Three linear layers, 6 tensors, 9,000 numbers; a batch of 64."""
    width = 8 if tiny else 64
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return of_classes(nn.Sequential(*layers), torch.randn(64, width), 10)


class Residual(nn.Module):
    """Two convolutions of 3x3 beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, outputs, 3, stride), nn.ReLU(), *convolution(outputs, outputs, 3, 1)
        )
        plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if plain else nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Of images, images."""
        return F.relu(self.body(x) + self.shortcut(x))


def convolution(inputs: int, outputs: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """With its batch norm."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)


def resnet18(tiny: bool) -> Training:
    """ResNet-18 (He et al., arXiv:1512.03385) as for CIFAR: 62 tensors, 11.2 million numbers; 8 images of 32x32."""
    width = 4 if tiny else 64
    layers: list[nn.Module] = [*convolution(3, width, 3, 1), nn.ReLU()]
    for inputs, outputs, stride in [(1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 8, 2)]:
        layers += [Residual(width * inputs, width * outputs, stride), Residual(width * outputs, width * outputs, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))
    return of_classes(model, torch.randn(2 if tiny else 8, 3, 32, 32), 10)


class Transformer(nn.Module):
    """A decoder with layer norms before its parts, as GPT-2 is, and a tied head."""

    def __init__(self, words: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 4 * width, **options) for _ in range(layers))
        self.norm, self.mask = nn.LayerNorm(width), nn.Transformer.generate_square_subsequent_mask(length)

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the next word."""
        x = self.words(text) + self.places
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return F.linear(self.norm(x), self.words.weight)


def transformer(tiny: bool) -> Training:
    """Eight blocks of width 256, 100 tensors, 6.9 million numbers; 4 texts of 64 words."""
    words, width, layers = (16, 8, 1) if tiny else (2048, 256, 8)
    model = Transformer(words, width, layers, 64)
    return of_classes(model, torch.randint(words, (4, 64)), words)


MODELS = {"MLP": perceptron, "ResNet-18": resnet18, "transformer": transformer}
