"""A float32 model and its optimizer are brought to 16 bits."""

from __future__ import annotations

import torch
from torch import nn

from .exact import KEPT, kept_for, set_exact_weights
from .groups import name_of
from .optimizer import FusedOptimizer
from .shards import is_spread


@torch.no_grad()
def to_16bit(model: nn.Module, optimizer: FusedOptimizer, dtype: torch.dtype = torch.bfloat16) -> None:
    """Make a model's floating point parameters and buffers bfloat16 or float16, and keep the optimizer's weights exact.

    The model is moved as by ``model.to(dtype)``; of every float32 parameter of the optimizer the low bits go to its state, so
    that training continues from the same weights, bit for bit. States that there are keep their dtype; with
    ``state_dtype=torch.float32`` new ones, and those of checkpoints, are float32, too. To start from a checkpoint in
    float32, load it into model and optimizer first.

    Args:
        model: with the optimizer's parameters, and maybe more.
        optimizer: with ``master_weights=True`` in every group that has float32 parameters.
        dtype: torch.bfloat16 or torch.float16.

    Raises:
        ValueError: for another dtype, a group without ``master_weights``, a parameter that is not the model's, or a DTensor:
            FSDP2 keeps the dtype that it was given. Nothing has been changed then.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1.001)
        >>> optimizer = fused_opt.AdamW(model.parameters(), master_weights=True, state_dtype=torch.float32)
        >>> fused_opt.to_16bit(model, optimizer)
        >>> model.weight.item(), round(optimizer.master_parameters()[model.weight].item(), 6)
        (1.0, 1.001)
    """
    if dtype not in KEPT:
        raise ValueError(f"Invalid dtype: {dtype}; there are {' and '.join(map(str, KEPT))}")
    of_model = set(model.parameters())
    exact = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if p.dtype != torch.float32:
                continue
            name, why = name_of(group, g, i), None
            if not group["master_weights"]:
                why = f"group {g} would lose its low bits; set its master_weights to True"
            elif p not in of_model:
                why = f"it is none of this {type(model).__name__}'s; give the model that the parameters are of"
            elif is_spread(p):
                why = "it is a DTensor; bring the model to 16 bits before it is sharded"
            if why is not None:
                raise ValueError(f"parameter {name} cannot be brought to {dtype}: {why}")
            exact[p] = p.detach().clone(memory_format=torch.preserve_format)
    model.to(dtype)
    for p, weights in exact.items():
        slot, kept = KEPT[dtype][0], kept_for(p)
        set_exact_weights(p, kept, weights)
        optimizer.state[p][slot] = kept
    optimizer._plan = optimizer._before = optimizer._last = None
