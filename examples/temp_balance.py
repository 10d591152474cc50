"""Digits with SGD and a cosine schedule, with and without TempBalance: same seeds, same budget.

    python examples/temp_balance.py [--quick] [--seeds N] [--epochs N] [--out DIR]

Trains a small residual network on scikit-learn's digits, prints the test accuracy of both with its spread
over the seeds and the exponents with their multipliers, and draws the exponents and some spectra.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from fused_opt.balance import TempBalance


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(width_in, width, 1, bias=False) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, width_in, height, width) to (batch, width, height, width)."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def network() -> nn.Sequential:
    """A residual network of nine convolutions for 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        Block(8, 8),
        Block(8, 16),
        nn.MaxPool2d(2),
        Block(16, 16),
        Block(16, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def digits(seed: int) -> list[Tensor]:
    """Images and labels to train on, then to test on: half and half."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.5, random_state=seed, stratify=labels
    )
    pictures = [torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for x in (train_x, test_x)]
    return [pictures[0], torch.tensor(train_y), pictures[1], torch.tensor(test_y)]


def train(seed: int, epochs: int, balanced: bool) -> tuple[float, TempBalance]:
    """Accuracy on the test half after training; both variants see the same weights and batches at first."""
    train_x, train_y, test_x, test_y = digits(seed)
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    balance = TempBalance(model, optimizer)
    for _ in range(epochs):
        if balanced:
            balance.step()
        for batch in torch.randperm(len(train_x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
        scheduler.step()
    balance.step()
    model.eval()
    with torch.no_grad():
        return (model(test_x).argmax(1) == test_y).float().mean().item(), balance


def main() -> None:
    """Train every seed both ways and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds, one epoch")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--threads", type=int, default=1, help="the networks are so small that a second does not pay")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seeds, epochs = (2, 1) if options.quick else (options.seeds, options.epochs)
    accuracies: dict[bool, list[float]] = {False: [], True: []}
    for seed in tqdm(range(seeds), desc="seeds"):
        for balanced, found in accuracies.items():
            accuracy, balance = train(seed, epochs, balanced)
            found.append(100 * accuracy)
    for balanced, found in accuracies.items():
        name = "SGD, cosine, TempBalance" if balanced else "SGD, cosine"
        spread = statistics.stdev(found)
        listed = ", ".join(f"{accuracy:.2f}" for accuracy in found)
        print(f"{name:25}: {statistics.mean(found):.2f} % +- {spread:.2f} (standard deviation; {listed})")
    gains = [b - a for a, b in zip(accuracies[False], accuracies[True], strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    print(f"difference, seed by seed : {statistics.mean(gains):+.2f} +- {error:.2f} (standard error)")
    for name, alpha in balance.alphas.items():
        print(f"  {name:8} alpha {alpha:6.3f}  multiplier {balance.multipliers[name + '.weight']:.3f}")
    options.out.mkdir(parents=True, exist_ok=True)
    balance.plot().savefig(options.out / "temp_balance.png", dpi=120)
    print(f"drawn: {options.out / 'temp_balance.png'}")
    if options.quick:
        print("--quick: this shows that the example runs; its figures mean nothing")


if __name__ == "__main__":
    main()
