"""Callbacks for Lightning (``lightning.pytorch``); the optimizers themselves need none.

    trainer = lightning.Trainer(callbacks=[AveragedWeights(), TempBalanceCallback()])

Cyclical batch sizes need no callback: see docs/trainers.md.
"""

from __future__ import annotations

from contextlib import ExitStack
from os import PathLike
from typing import Any

import lightning.pytorch as pl

from ..batch_size import CyclicalBatchSize
from ..snapshots import Snapshots
from .loop import EpochBalance, averaged, keep_averages


class AveragedWeights(pl.Callback):
    """Validation within ``fit`` sees the averages of the optimizers that have ``averaging=``.

    The weights are swapped in before validation, and back after it, whatever happens in it: checkpoints hold the weights
    that train, and the averages in the optimizer's state. BatchNorm's running statistics stay those of the former,
    unless ``optimizer.average_buffers(model)`` was called.
    ``trainer.validate`` and ``trainer.test`` by themselves take the weights as they are, since what they load may have
    nothing to do with the averages: ``with optimizer.averaged_weights(): trainer.test(model)``.

    Args:
        keep: as Lightning's WeightAveraging does, have checkpoints and, after ``fit``, the model hold the averages, so that
            ``load_from_checkpoint`` gives the model that was validated. The weights that train are in the checkpoint, too,
            and a run that resumes from it with this callback takes them.
    """

    KEY = "fused_opt.trained"  # in checkpoints: the weights that train

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self._swapped = ExitStack()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the averages as the model."""
        if self.keep and trainer.state.fn == "fit":
            checkpoint[self.KEY] = checkpoint["state_dict"]
            with averaged(trainer.optimizers):
                averages = trainer.strategy.lightning_module_state_dict()
                checkpoint["state_dict"] = {name: value.clone() for name, value in averages.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Resume with the weights that train."""
        if trainer.state.fn == "fit" and self.KEY in checkpoint:
            state = {"state_dict": checkpoint[self.KEY]}  # Lightning has loaded the averages by now
            trainer.strategy.load_model_state_dict(state, strict=pl_module.strict_loading)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last checkpoint is written; what is left is the model."""
        if self.keep:
            keep_averages(trainer.optimizers, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap in."""
        if trainer.state.fn == "fit":
            self._swapped.enter_context(averaged(trainer.optimizers))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap back, before a checkpoint is written: Lightning keeps the callbacks that do so last."""
        self._swapped.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Swap back."""
        self._swapped.close()


class TempBalanceCallback(EpochBalance, pl.Callback):
    """TempBalance of the first optimizer: a step at the beginning of every epoch; it travels in Lightning's checkpoints.

    Args:
        **settings: those of :class:`fused_opt.TempBalance` after ``model`` and ``optimizer``.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The optimizers are made and loaded."""
        self.begin(pl_module, trainer.optimizers[0])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Balance."""
        self.at(trainer.current_epoch)


class SnapshotsCallback(pl.Callback):
    """Saves the model at the end of the epoch in which a largest batch comes to its end; see :class:`fused_opt.Snapshots`.

    Args:
        schedule: the batch sizes; a whole number of epochs each.
        directory: where the snapshots go.

    Raises:
        ValueError: for batch sizes that change within epochs.
    """

    snapshots: Snapshots
    """Made when training begins; ``snapshots.paths`` are the files."""

    def __init__(self, schedule: CyclicalBatchSize, directory: str | PathLike[str]) -> None:
        if schedule.width != int(schedule.width):
            raise ValueError(
                f"snapshots are taken at the end of epochs, and the batch size changes every {schedule.width}: take a "
                f"whole width, or call fused_opt.Snapshots in on_train_batch_end"
            )
        self.schedule, self.directory = schedule, directory

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Snapshots of epochs before a resume stay."""
        self.snapshots = Snapshots(pl_module, self.schedule, self.directory, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, where it is time to."""
        if trainer.is_global_zero:
            self.snapshots(trainer.current_epoch + 1)
