"""For the Trainer of Hugging Face's transformers; the optimizers themselves need nothing of this.

    class Trainer(AveragedEvaluation, CyclicalBatches, transformers.Trainer):
        ...

    Trainer(..., optimizer_cls_and_kwargs=(fused_opt.AdamW, {"lr": 1e-3}), callbacks=[TempBalanceCallback()])

Where the Trainer has a callback for it, it is a callback; before an evaluation and at the choice of batches it has none,
and a class that comes before ``transformers.Trainer`` takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import transformers
from torch.utils.data import DataLoader, DistributedSampler

from ..batch_size import CyclicalBatchSampler, CyclicalBatchSize
from ..shards import is_spread
from ..snapshots import Snapshots
from ..warn import warn_once
from .loop import AllEpochs, EpochBalance, averaged

Passed = Callable[[int], float]  # epochs that have passed after so many updates


class AveragedEvaluation:
    """``evaluate`` and ``predict`` see the averages of an optimizer that has ``averaging=``, within ``train`` and after it.

    The weights are swapped in before the evaluation, and back after it, whatever happens in it: checkpoints hold the weights
    that train, and the averages in the optimizer's state. With ``load_best_model_at_end`` the averages are saved beside every
    checkpoint, as by :class:`SaveAverages`, and at the end of ``train`` the model has those of the best: they are what was
    evaluated.
    """

    args: Any
    model: Any
    optimizer: Any
    state: Any
    _best = False  # the model has the best averages, and not weights that train

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.load_best_model_at_end and not any(
            isinstance(callback, SaveAverages)
            for callback in self.callback_handler.callbacks  # type: ignore[attr-defined]
        ):
            self.add_callback(SaveAverages())  # type: ignore[attr-defined]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in ``transformers.Trainer``; the best model is the one that was evaluated."""
        self._best = False
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best:
            self._best = True
            if (folder := Path(best) / SaveAverages.FOLDER).exists():
                self.model.load_state_dict(type(self.model).from_pretrained(folder).state_dict())
            else:
                warn_once(
                    f"{best} has no averages beside its weights, and the model has these: it was saved without SaveAverages"
                )
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in ``transformers.Trainer``, with the averages."""
        with averaged([] if self.optimizer is None or self._best else [self.optimizer]):
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]


class SaveAverages(transformers.TrainerCallback):
    """Saves the averages in every checkpoint, as a model of its own: ``from_pretrained("checkpoint-500/averages")`` loads it.

    Raises:
        ValueError: at the first checkpoint, of a model without ``save_pretrained``, or whose parameters are sharded.
    """

    FOLDER = "averages"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save, in one process."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if not isinstance(model, transformers.PreTrainedModel) or any(map(is_spread, model.parameters())):
            kind = "sharded" if isinstance(model, transformers.PreTrainedModel) else f"a {type(model).__name__}"
            raise ValueError(
                f"the averages are saved as a transformers model, whole, and this one is {kind}. Within "
                f"averaged_weights() torch.distributed.checkpoint.state_dict.get_model_state_dict has any model's"
            )
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FOLDER
            with averaged([optimizer]):
                model.save_pretrained(folder)
            if (processing := kwargs.get("processing_class")) is not None:
                processing.save_pretrained(folder)


class CyclicalBatches:
    """Trains on the batches of a :class:`fused_opt.CyclicalBatchSize`.

    The Trainer takes all epochs to have equally many updates. So they are one to it, of exactly as many updates as there
    are: its schedules of the learning rate end where training ends, and it resumes where it was. ``state.epoch`` then
    counts this one; :func:`fused_opt.by_update` gives the true epoch, also to the callbacks below.

    Args:
        schedule: the batch sizes, on each process; ``per_device_train_batch_size`` is not looked at.
        epochs: passes over the data.

    Raises:
        ValueError: if ``num_train_epochs`` is not 1, or gradients are accumulated, which the larger batches are for.
    """

    args: Any

    def __init__(self, *args: Any, schedule: CyclicalBatchSize, epochs: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        found = self.args.num_train_epochs, self.args.gradient_accumulation_steps
        if found != (1, 1):
            raise ValueError(
                f"num_train_epochs={found[0]:g} and gradient_accumulation_steps={found[1]}; all {epochs} epochs of cyclical "
                f"batches are one to the Trainer, and its updates are of one batch: both must be 1"
            )
        self.schedule, self.epochs = schedule, epochs

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One pass over all epochs; each process has its own examples, so that nothing is left for Accelerate to divide."""
        given = super().get_train_dataloader()  # type: ignore[misc]
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler: DistributedSampler[Any] = DistributedSampler(
            given.dataset, args.world_size, args.process_index, seed=seed
        )
        batches = CyclicalBatchSampler(sampler, self.schedule, args.dataloader_drop_last)
        kept = ("collate_fn", "num_workers", "pin_memory", "worker_init_fn", "prefetch_factor", "persistent_workers")
        options = {name: getattr(given, name) for name in kept}
        return DataLoader(given.dataset, batch_sampler=AllEpochs(batches, self.epochs), **options)


class TempBalanceCallback(EpochBalance, transformers.TrainerCallback):
    """TempBalance, with a step at the beginning of every epoch; it travels in the Trainer's ``trainer_state.json``.

    Args:
        passed: the epochs that have passed after so many updates; None for what the Trainer says.
        **settings: those of :class:`fused_opt.TempBalance` after ``model`` and ``optimizer``.
    """

    KEY = "fused_opt.TempBalance"

    def __init__(self, passed: Passed | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.passed = passed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer is made and loaded, and so is the state of a run that is resumed."""
        self.load_state_dict(state.stateful_callbacks.get(self.KEY, {}))
        self.begin(kwargs["model"], kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Balance, if the step is an epoch's first."""
        self.at(_passed(self.passed, state))
        state.stateful_callbacks[self.KEY] = self.state_dict()


class SnapshotsCallback(transformers.TrainerCallback):
    """Saves the model whenever a largest batch comes to its end; see :class:`fused_opt.Snapshots`.

    Args:
        schedule: the batch sizes.
        directory: where the snapshots go.
        passed: the epochs that have passed after so many updates; None for what the Trainer says.
    """

    snapshots: Snapshots
    """Made when training begins; ``snapshots.paths`` are the files."""

    def __init__(
        self, schedule: CyclicalBatchSize, directory: str | PathLike[str], passed: Passed | None = None
    ) -> None:
        self.schedule, self.directory, self.passed = schedule, directory, passed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Snapshots of epochs before a resume stay."""
        self.snapshots = Snapshots(kwargs["model"], self.schedule, self.directory, _passed(self.passed, state))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save, where it is time to."""
        if state.is_world_process_zero:
            self.snapshots(_passed(self.passed, state))


def _passed(passed: Passed | None, state: Any) -> float:
    return passed(state.global_step) if passed is not None else float(state.epoch or 0)
