"""Gradients by sample of a module of any kind: its forward is called again, sample by sample, with torch.func."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

# Forward pre-hooks that make a module's weight of its parameters; parametrizations do it where the weight is read.
MAKE_WEIGHTS = (WeightNorm, BasePruningMethod)


class Inputs(NamedTuple):
    """What a module was called with."""

    leaves: list[Any]
    dims: list[int | None]  # in which dimension each leaf has the samples
    spec: Any  # how the leaves are put together


def tensors(value: Any) -> list[Tensor]:
    """The tensors in whatever a module is called with or returns."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def widen(value: Any, p: Tensor) -> Any:
    """A floating-point tensor in the dtype in which the norms of p are computed, at least float32."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.promote_types(p.dtype, torch.float32)) if floating else value


_NO_MODULES = nn.ModuleDict()


def parametrizations_of(module: nn.Module) -> nn.Module:
    """What of torch.nn.utils.parametrize makes a module's weights of its parameters."""
    found = module._modules.get("parametrizations")
    return _NO_MODULES if found is None else found


def inputs_of(module: nn.Module, args: Any, kwargs: Any, samples: int) -> Inputs:
    """What a module is called with, and in which dimension of each leaf its samples are."""
    leaves, spec = tree_flatten((args, kwargs))
    # An attention mask of two dimensions is the same for all samples, also where it happens to have as many rows.
    attends = isinstance(module, nn.MultiheadAttention)
    mask = kwargs.get("attn_mask", args[5] if len(args) > 5 else None) if attends else None
    dims: list[int | None] = []
    for leaf in leaves:
        # Beside its input a recurrent module takes states: layers x samples x features.
        dim = int(isinstance(module, nn.RNNBase) and any(d is not None for d in dims))
        sampled = isinstance(leaf, Tensor) and leaf.ndim > dim and leaf.shape[dim] == samples and leaf is not mask
        dims.append(dim if sampled else None)
    return Inputs([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], dims, spec)


def output_dim(module: nn.Module, k: int) -> int:
    """In which dimension of the k-th tensor that a module returns its samples are."""
    return int(isinstance(module, nn.RNNBase) and k > 0)


class _Forward(nn.Module):
    """A module's ``forward`` and what makes its weights; its other hooks have run already."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for hook in self.inner._forward_pre_hooks.values():
            if isinstance(hook, MAKE_WEIGHTS):
                hook(self.inner, args)
        return self.inner.forward(*args, **kwargs)


@contextmanager
def _left_as_it_is(module: nn.Module) -> Iterator[None]:
    """Put back the attributes that hooks set, and do without the power iterations of spectral_norm, which writes buffers."""
    before = dict(vars(module))
    modes = {m: m.training for m in parametrizations_of(module).modules()}
    for m in modes:
        m.training = False
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
        for name, value in before.items():
            if vars(module).get(name) is not value:
                setattr(module, name, value)


def call_again(
    where: str,
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    inputs: Inputs,
    gradients: Mapping[int, Tensor],
    of: slice,
) -> dict[str, Tensor]:
    """The gradients by sample of some of a module's parameters.

    Args:
        where: what errors call the module.
        module: whose ``forward`` is called.
        parameters: by the names that they have in it.
        inputs: what it was called with.
        gradients: of the tensors that it returned, by their place among these; samples first.
        of: which samples.

    Returns:
        samples x the parameter's shape, by name, at least in float32.

    Raises:
        RuntimeError: where the module draws random numbers.
    """
    p = next(iter(parameters.values()))
    own = {f"inner.{name}": widen(q.detach(), q) for name, q in parameters.items()}
    forward = _Forward(module)

    def objective(own: dict[str, Tensor], gradients: dict[int, Tensor], given: list[Tensor]) -> Tensor:
        parts = iter(given)
        now = [leaf if d is None else next(parts).unsqueeze(d) for leaf, d in zip(inputs.leaves, inputs.dims)]
        args, kwargs = tree_unflatten([widen(leaf, p) for leaf in now], inputs.spec)
        outputs = tensors(functional_call(forward, own, args, kwargs))
        return torch.stack(
            [(outputs[k].select(output_dim(module, k), 0) * e).sum() for k, e in gradients.items()]
        ).sum()

    of_outputs = {k: widen(e[of], p) for k, e in gradients.items()}
    given = [leaf.movedim(d, 0)[of] for leaf, d in zip(inputs.leaves, inputs.dims) if d is not None]
    one = grad(objective)
    with _left_as_it_is(module):
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the one that vmap knows
                found = vmap(one, in_dims=(None, 0, 0), randomness="error")(own, of_outputs, given)
        except RuntimeError as error:
            if "random" in str(error):
                raise RuntimeError(
                    f"{where} draws random numbers, and is called again for its gradients by sample: it would draw others. "
                    f"Set its dropout to 0, or use track_parts('microbatch')"
                ) from error
            each = [
                one(own, {k: e[i] for k, e in of_outputs.items()}, [x[i] for x in given]) for i in range(len(given[0]))
            ]
            found = {name: torch.stack([of_one[name] for of_one in each]) for name in own}
    return {name: found[f"inner.{name}"] for name in parameters}
