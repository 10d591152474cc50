"""Snapshot ensembles: the model at the end of each cycle of the batch size, and the mean prediction."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from .batch_size import CyclicalBatchSize

probabilities = partial(torch.softmax, dim=-1)


class Snapshots:
    """Hook that saves the model whenever a largest batch, the time of least noise, comes to its end.

    *Snapshot Ensembles* (arXiv 1704.00109) with the cycle of the batch size (arXiv 1812.01216) in the place
    of the learning rate's. With the sawtooth and cosine shapes that is each cycle's end. A file is written under
    another name and renamed when it is whole, so that a run that is killed leaves none cut short.

    Args:
        model: the model to save.
        schedule: the batch sizes.
        directory: where `snapshot-1.pt`, `snapshot-2.pt` and so on are written; made when the first is.
        epoch: epochs completed before the first call, in a resumed run: its snapshots stay in `paths`, but for
            files that are not whole, of which a warning tells.

    Example:
        >>> import tempfile
        >>> model, folder = nn.Linear(4, 3), tempfile.TemporaryDirectory()
        >>> snapshots = Snapshots(model, CyclicalBatchSize(32, levels=2, width=1), folder.name)
        >>> for epoch in range(5):
        ...     saved = snapshots(epoch + 1)  # after training for an epoch
        >>> [path.name for path in snapshots.paths]
        ['snapshot-1.pt', 'snapshot-2.pt']
        >>> average_predictions(model, snapshots.paths, torch.zeros(5, 4)).shape
        torch.Size([5, 3])
        >>> folder.cleanup()
    """

    def __init__(
        self, model: nn.Module, schedule: CyclicalBatchSize, directory: str | PathLike[str], epoch: float = 0
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.directory = Path(directory)
        self._cycles = schedule.cycles(epoch)
        found = [path for n in range(1, self._cycles + 1) if (path := self._path(n)).exists()]
        self.paths = [path for path in found if _is_whole(path)]
        if cut := [str(path) for path in found if path not in self.paths]:
            warnings.warn(f"snapshots that cannot be read, cut short or overwritten, are left out: {cut}", stacklevel=2)

    def _path(self, number: int) -> Path:
        return self.directory / f"snapshot-{number}.pt"

    def __call__(self, epoch: float) -> Path | None:
        """Call after each epoch or update with the epochs completed; returns the file, if one was written."""
        cycles = self.schedule.cycles(epoch)
        if cycles <= self._cycles:
            return None
        self.directory.mkdir(parents=True, exist_ok=True)
        aside = self._path(cycles).with_suffix(".tmp")
        torch.save(self.model.state_dict(), aside)
        os.replace(aside, self._path(cycles))
        self._cycles = cycles
        self.paths.append(self._path(cycles))
        return self.paths[-1]


def _is_whole(path: Path) -> bool:
    """Whether the archive's directory, which is written last, is there."""
    try:
        ZipFile(path).close()
    except BadZipFile:
        return False
    return True


@torch.no_grad()
def average_predictions(
    model: nn.Module,
    snapshots: Iterable[Mapping[str, Any] | str | PathLike[str]],
    *inputs: Any,
    transform: Callable[[Tensor], Tensor] = probabilities,
) -> Tensor:
    """Mean over snapshots of `transform(model(*inputs))`, in evaluation mode (arXiv 1704.00109).

    Args:
        model: gives the architecture and the device; it is not changed.
        snapshots: state dicts or files of them. For many batches, load the files once.
        inputs: what the model takes.
        transform: from the model's output to what is averaged; by default softmax over the last dimension.

    Raises:
        ValueError: there are no snapshots.
    """
    states = list(snapshots)
    if not states:
        raise ValueError("no snapshots to average: the first is saved when a largest batch comes to its end")
    member = copy.deepcopy(model).eval()

    def predict(state: Mapping[str, Any] | str | PathLike[str]) -> Tensor:
        member.load_state_dict(state if isinstance(state, Mapping) else torch.load(state, map_location="cpu"))
        return transform(member(*inputs))

    return sum(map(predict, states), start=torch.zeros(())) / len(states)
