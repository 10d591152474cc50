"""Averages of a model's buffers, beside those of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..backends.interface import Fold
from ..tensors import buffers_restored
from ..warn import warn_once
from .averaging import EMA


class AveragedBuffers:
    """What ``optimizer.average_buffers(model)`` returns: the averages of the model's floating point buffers.

    Args:
        model: whose buffers are averaged, by name: a buffer may be replaced.
        groups: of the optimizer; those that have an averaging.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
        found = list(dict.fromkeys(group["averaging"] for group in groups))
        if len(found) != 1 or not isinstance(found[0], EMA):
            raise ValueError(
                f"average_buffers needs one averaging=fused_opt.EMA(beta) for all groups that average; found {found}. For "
                f"others: torch.optim.swa_utils.update_bn within averaged_weights(model)"
            )
        self.model = model
        self.averages: dict[str, Tensor] = {}
        """Of those sampled so far, in float32 or float64, by the buffer's name."""

    @torch.no_grad()
    def fold(self, folds: Iterable[Fold | None]) -> None:
        """Take a sample where the weights had one in a group; the first is the buffer itself."""
        fold = next((fold for fold in folds if fold is not None), None)
        if fold is None:
            return
        for name, buffer in self.model.named_buffers():
            if not buffer.is_floating_point():
                continue
            average = self.averages.get(name)
            buffer = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
            if average is None or average.shape != buffer.shape or average.device != buffer.device:
                self.averages[name] = buffer.clone()
            else:  # equal ones stay as they are, of which infinities, in masks, have no difference
                average.copy_(torch.where(average == buffer, average, average.lerp(buffer, fold.add)))

    def refuse_capture(self) -> None:
        """Raise, since a replay runs nothing of this."""
        raise RuntimeError(
            "a step cannot be captured in a CUDA graph with average_buffers: its replays would take no samples of buffers. "
            "torch.optim.swa_utils.update_bn within averaged_weights(model) would work"
        )

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the buffers hold their averages, those without one what they held."""
        with buffers_restored(self.model):
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    if name in self.averages:
                        buffer.copy_(self.averages[name])
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, for a checkpoint: the optimizer's state_dict does not have them."""
        return dict(self.averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from those.

        Raises:
            ValueError: for a buffer that the model lacks, or that has another shape; nothing is changed then.
        """
        here = dict(self.model.named_buffers())
        other = [name for name, average in state.items() if name not in here or here[name].shape != average.shape]
        if other:
            raise ValueError(f"averages of buffers that the model lacks, or has with another shape: {', '.join(other)}")
        self.averages = {
            name: average.to(here[name].device, torch.promote_types(here[name].dtype, torch.float32), copy=True)
            for name, average in state.items()
        }


@contextmanager
def batch_norm_noticed() -> Iterator[None]:
    """Warn where a module changes its running statistics within the block."""

    def notice(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, _NormBase) and module.training and module.track_running_stats:
            warn_once(
                "BatchNorm runs in training mode within averaged_weights(), and its running statistics will stay as the "
                "block leaves them; averaged_weights(model) swaps them back with the weights"
            )

    hook = torch.nn.modules.module.register_module_forward_pre_hook(notice)
    try:
        yield
    finally:
        hook.remove()
