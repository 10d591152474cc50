"""Lightning on Fashion-MNIST: with torch.optim.SGD, and with fused_opt's, averages, cyclical batches and snapshots.

    python examples/trainer_lightning.py [--data FOLDER] [--quick] [--epochs N] [--seeds N]

Trains a residual network of nine convolutions in bfloat16 mixed precision on 60,000 images of 28x28. The lines that
fused_opt changes or adds are marked; without them it is a usual program for Lightning. Printed for both: the updates, and
the accuracy on the 10,000 test images, at the end and, for fused_opt, of the snapshots' mean prediction. The images are
Zalando's (arXiv 1708.07747); where they are not found, a message says how to get them.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_opt  # new
from fused_opt.integrations.lightning import AveragedWeights, SnapshotsCallback  # new

FOLDERS = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw")


def images(folder: Path | None, part: str, limit: int | None) -> TensorDataset:
    """The first images, 1 x 28 x 28 in [0, 1], and their labels, from files as they are published, gzipped or not."""
    found: list[Tensor] = []
    for name, header in ((f"{part}-images-idx3-ubyte", 16), (f"{part}-labels-idx1-ubyte", 8)):
        folders = [folder] if folder else list(map(Path, FOLDERS))
        paths = [path for each in folders for path in (each / f"{name}.gz", each / name) if path.exists()]
        if not paths:
            sys.exit(
                f"{name} is not in {' or '.join(map(str, folders))}: apt install dataset-fashion-mnist (Debian), or "
                f"torchvision.datasets.FashionMNIST('data', download=True); --data names another folder"
            )
        content = paths[0].read_bytes()
        content = gzip.decompress(content) if paths[0].suffix == ".gz" else content
        found.append(torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8))
    return TensorDataset(found[0].view(-1, 1, 28, 28)[:limit] / 255, found[1][:limit].long())


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which is a third one where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Clothes(pl.LightningModule):
    """The network and its two ways of training."""

    def __init__(
        self, ours: bool, schedule: fused_opt.CyclicalBatchSize, data: list[TensorDataset], width: int
    ) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
        )  # fmt: skip
        self.training_data, self.test_data = data
        self.ours = ours
        order = torch.utils.data.RandomSampler(self.training_data)
        self.batches = fused_opt.CyclicalBatchSampler(order, schedule)  # new

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def train_dataloader(self) -> DataLoader[Any]:
        if self.ours:
            self.batches.set_epoch(self.current_epoch)  # new
            return DataLoader(self.training_data, batch_sampler=self.batches)  # new
        return DataLoader(self.training_data, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test_data, batch_size=600)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ours:
            extras = {"averaging": fused_opt.EMA(0.95), "max_grad_norm": 1.0}  # new
            return fused_opt.SGD(self.parameters(), lr=0.05, momentum=0.9, **extras)  # changed
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(ours: bool, seed: int, epochs: int, data: list[TensorDataset], width: int) -> str:
    """What was measured, in words."""
    pl.seed_everything(seed, verbose=False)
    schedule = fused_opt.CyclicalBatchSize(32, levels=3, width=1)  # new
    with tempfile.TemporaryDirectory() as folder:
        snapshots = SnapshotsCallback(schedule, folder)  # new
        model = Clothes(ours, schedule, data, width)
        trainer = pl.Trainer(
            accelerator="cpu", precision="bf16-mixed", max_epochs=epochs, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            gradient_clip_val=None if ours else 1.0,  # changed: in the step
            callbacks=[AveragedWeights(), snapshots] if ours else [],  # new
            reload_dataloaders_every_n_epochs=int(ours),  # new: epochs differ in length
        )  # fmt: skip
        trainer.fit(model)
        found = f"{trainer.global_step} updates, accuracy {100 * trainer.callback_metrics['accuracy'].item():.2f} %"
        if ours:
            shown, labels = model.test_data.tensors
            paths = snapshots.snapshots.paths
            mean = fused_opt.average_predictions(model, paths, shown)  # new
            found += f", of {len(paths)} snapshots {100 * (mean.argmax(1) == labels).float().mean():.2f} %"
    return found


def main() -> None:
    """Train both ways and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one cycle of three epochs, 1,200 images")
    parser.add_argument("--data", type=Path, help=f"folder of the images; default: {' or '.join(FOLDERS)}")
    parser.add_argument("--epochs", type=int, default=6, help="cycles take three")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.quick else options.threads)
    epochs, seeds, width = (3, 1, 8) if options.quick else (options.epochs, options.seeds, 32)
    limits = (1200, 600) if options.quick else (None, None)
    data = [images(options.data, part, limit) for part, limit in zip(("train", "t10k"), limits)]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    for ours in (False, True):
        for seed in range(seeds):
            found = train(ours, seed, epochs, data, width)
            print(
                f"  {'fused_opt.SGD, averaged, cyclical batches' if ours else 'torch.optim.SGD':42} seed {seed}: {found}"
            )
    if options.quick:
        print("--quick: this shows that the example runs; its figures mean nothing")


if __name__ == "__main__":
    main()
