"""Lightning on handwritten digits: with torch.optim.SGD, and with fused_opt's, averages, cyclical batches and snapshots.

    python examples/trainer_lightning.py [--quick] [--seeds N]

Trains a small convolutional network in bfloat16 mixed precision. The lines that fused_opt changes or adds are marked;
without them it is a usual program for Lightning. Printed for both: the updates, and the accuracy on the test images, at
the end and, for fused_opt, of the snapshots' mean prediction.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_opt  # new
from fused_opt.integrations.lightning import AveragedWeights, SnapshotsCallback  # new


class Digits(pl.LightningModule):
    """The network and its two ways of training."""

    def __init__(self, ours: bool, schedule: fused_opt.CyclicalBatchSize) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels))
        self.training_data, self.test_data = TensorDataset(*data[:1200]), TensorDataset(*data[1200:])
        self.ours = ours
        order = torch.utils.data.RandomSampler(self.training_data)
        self.batches = fused_opt.CyclicalBatchSampler(order, schedule)  # new

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def train_dataloader(self) -> DataLoader[Any]:
        if self.ours:
            self.batches.set_epoch(self.current_epoch)  # new
            return DataLoader(self.training_data, batch_sampler=self.batches)  # new
        return DataLoader(self.training_data, batch_size=32, shuffle=True)

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


def train(ours: bool, seed: int, epochs: int) -> str:
    """What was measured, in words."""
    pl.seed_everything(seed, verbose=False)
    schedule = fused_opt.CyclicalBatchSize(16, levels=3, width=1)  # new
    with tempfile.TemporaryDirectory() as folder:
        snapshots = SnapshotsCallback(schedule, folder)  # new
        model = Digits(ours, schedule)
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
            images, labels = model.test_data.tensors
            paths = snapshots.snapshots.paths
            mean = fused_opt.average_predictions(model, paths, images)  # new
            found += f", of {len(paths)} snapshots {100 * (mean.argmax(1) == labels).float().mean():.2f} %"
    return found


def main() -> None:
    """Train both ways and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one cycle of three epochs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="the networks are so small that a second does not pay")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    for ours in (False, True):
        for seed in range(1 if options.quick else options.seeds):
            found = train(ours, seed, 3 if options.quick else 9)
            print(
                f"  {'fused_opt.SGD, averaged, cyclical batches' if ours else 'torch.optim.SGD':42} seed {seed}: {found}"
            )


if __name__ == "__main__":
    main()
