"""Second derivatives for GradInit: taken, or refused in words where autograd would fail or leave something out."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

# A word in the reason why there is no second derivative -> what would work; the first that occurs counts.
WAYS_OUT = {
    "attention": "gradinit selects torch's math attention kernel, so the model selects another one itself; "
    "let that part run under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    "cudnn_rnn": "call gradinit under torch.backends.cudnn.flags(enabled=False)",
    "aot_autograd": "pass the module as it was before torch.compile",
    "the loss is linear": "a gamma above the norm",
    "": "build that part from differentiable operations while gradinit runs, and swap it back for training",
}


class Uses(TorchFunctionMode):
    """Ids of the tensors that operations were given with autograd on (True) and off (False)."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: dict[bool, set[int]] = {True: set(), False: set()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)):  # a question for a dtype or a shape is none
            for given in (*args, *(kwargs or {}).values()):
                members = given if isinstance(given, (tuple, list)) else [given]
                self.ids[torch.is_grad_enabled()].update(id(t) for t in members if isinstance(t, Tensor))
        return result


def watch(loss: Tensor, theta: Mapping[str, Tensor], uses: Uses) -> set[str]:
    """Names, once the gradient exists, of the custom functions whose backward autograd cannot follow.

    Differentiating the gradient does not fail there: their share of the derivative is silently missing. So is that
    of parameters which are only used where autograd is off, for which this raises.
    """
    opaque: set[str] = set()

    def hook(name: str, results: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
        for result in results:
            node = None if result is None else result.grad_fn
            # once_differentiable marks what it returns with an Error node; raw kernels return plain tensors.
            cut = node is None or node.name().endswith("::Error")
            if result is not None and cut and result.any():
                opaque.add(name)

    nodes, visited = [loss.grad_fn], set[Node | None]([None])
    while nodes:
        if (node := nodes.pop()) is not None and node not in visited:
            visited.add(node)
            nodes.extend(following for following, _ in node.next_functions)
            if isinstance(node, BackwardCFunction):
                node.register_hook(partial(hook, node.name()))
    dark = uses.ids[False] - uses.ids[True]
    if lost := [name for name, t in theta.items() if id(t) in dark and t.grad_fn not in visited]:
        raise RuntimeError(
            f"gradinit needs the derivatives by all trainable parameters, and {', '.join(lost)} are used where autograd "
            "is off, as in a reentrant activation checkpoint. What would work: checkpoint(..., use_reentrant=False), or "
            "requires_grad_(False) on parameters that are not to be scaled."
        )
    return opaque


def second_derivative(norm: Tensor, scales: Tensor, opaque: set[str]) -> Tensor:
    """The norm's derivative by the scales, or an error that names the operation in the way."""
    cause: RuntimeError | None = None
    if opaque:
        reason = f"autograd cannot differentiate what these return: {', '.join(sorted(opaque))}"
    elif not norm.requires_grad:
        reason = "the gradient does not depend on the parameters: the loss is linear in them"
    else:
        try:
            (h,) = torch.autograd.grad(norm, scales)
            return h
        except RuntimeError as error:
            if not re.search("derivative for .* is not implemented|double backward", str(error)):
                raise
            cause, reason = error, str(error)
    way_out = next(advice for word, advice in WAYS_OUT.items() if word in reason)
    raise RuntimeError(
        f"gradinit must differentiate the gradient norm to bring it below gamma, and {reason}. "
        f"What would work: {way_out}."
    ) from cause
