"""GradInit: learn one scale per parameter tensor before training starts."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

NORM_ORDER = {"sgd": 2, "adam": 1}

# A word in the reason why there is no second derivative -> what would work; the first that occurs counts.
WAYS_OUT = {
    "attention": "gradinit selects torch's math attention kernel, so the model selects another one itself; "
    "let that part run under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    "cudnn_rnn": "call gradinit under torch.backends.cudnn.flags(enabled=False)",
    "aot_autograd": "pass the module as it was before torch.compile",
    "the loss is linear": "a gamma above the norm",
    "": "build that part from differentiable operations while gradinit runs, and swap it back for training",
}


class GradInitIteration(NamedTuple):
    """What one iteration saw.

    Attributes:
        loss: L(S; theta_m), before the trial step.
        gradient_norm: ||g_S||, l2 for ``"sgd"`` and l1 for ``"adam"``.
        updated_loss: L(S~; theta') after the trial step; None where the norm was above ``gamma`` and the
            iteration lowered the norm instead.
    """

    loss: float
    gradient_norm: float
    updated_loss: float | None = None


@dataclass(frozen=True)
class GradInitResult:
    """What :func:`gradinit` did.

    Attributes:
        scales: parameter name -> the factor that its tensor was multiplied with; tied weights under their
            first name, frozen tensors not at all.
        history: one entry per iteration.
    """

    scales: dict[str, float]
    history: list[GradInitIteration]


def gradinit(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    *,
    algorithm: Literal["sgd", "adam"] = "sgd",
    eta: float = 0.1,
    gamma: float = 1.0,
    lr: float = 1e-2,
    iterations: int = 390,
    min_scale: float = 0.01,
    scale_clip: float = 1.0,
    normalize: bool = True,
    progress: bool = True,
) -> GradInitResult:
    r"""Scale every parameter tensor so that the first optimizer step lowers the loss as far as it can.

    *GradInit: Learning to Initialize Neural Networks for Stable and Efficient Training* (arXiv 2102.08098).

    .. math::

        \min_m L(\tilde S;\ \theta_m - \eta\,A[g_S]) \quad\text{s.t.}\quad \|g_S\|_p \le \gamma,\
        m_i \ge m_{\min},\qquad \theta_m = \{m_i W_i\},\quad g_S = \nabla L(S; \theta_m)

    with :math:`p = 2`, :math:`A[g] = g/\|g\|` for SGD and :math:`p = 1`, :math:`A[g] = \operatorname{sign} g`
    for Adam. An iteration draws two half batches S = [h0; h1]. Where the norm is above ``gamma`` it descends
    the norm, which takes a second derivative; otherwise it draws h2 and descends L(S~; theta')/eta on
    S~ = [h0; h2] with A held constant. Both take an Adam step on m; each keeps its own first moment and they
    share one second moment.

    Any architecture will do: the parameters are replaced, not the modules. The model runs in its own
    precision with autocast and dropout off; modules that keep running statistics use those of the batch and
    leave the stored ones alone. Attention runs with torch's math kernel: it computes the same function as the
    fused ones, which cannot be differentiated twice, and it holds the whole attention matrix in memory. Tied
    weights get one scale; zero and frozen (``requires_grad=False``) tensors stay as they are. Nothing is
    written before the end: after an exception the model is as it was.

    Args:
        model: the initialized module, before it is compiled or wrapped for distributed training; its
            trainable parameters are float32 or float64 and are scaled in place.
        loss_fn: ``loss_fn(output, target)`` -> mean loss, a tensor with one element. It must not read the
            model's parameters itself.
        batches: half batches ``(input, target)``, started again when they end. Both are tensors, or tuples,
            lists and mappings of tensors, batch first; a tuple or list of inputs is called ``model(*input)``,
            a mapping ``model(**input)``. They are moved to the device of the first trainable parameter.
        algorithm: the optimizer that will train, ``"sgd"`` or ``"adam"``.
        eta: learning rate of the trial step, > 0. Published: 0.1 for SGD, 1e-3 for Adam.
        gamma: bound of the gradient norm, >= 0. Published: 1 for SGD, 1000 for Adam, whose l1 norm grows with
            the number of parameters: the default is far too small for it.
        lr: learning rate of the scales, > 0: about what a scale can move in one iteration. Published: 1e-3 to
            1e-1 by model.
        iterations: how many, >= 0. Published: 390 or 780.
        min_scale: smallest scale of a weight, 0 to 1. Biases (``bias`` in the last part of the name) may go
            to 0.
        scale_clip: bound of each scale's derivative, > 0; ``math.inf`` for none.
        normalize: divide the trial step of SGD by the gradient norm.
        progress: show a progress bar.

    Returns:
        The scales by parameter name, and the history.

    Raises:
        ValueError: an argument outside its range; no trainable parameter; batches that cannot be started
            again; a loss that is not one number or does not depend on the parameters.
        TypeError: a batch that is not a pair of (nested) tensors; a parameter in reduced precision.
        RuntimeError: the norm was above ``gamma`` and an operation has no second derivative; the message
            names the operation and the way out.
        FloatingPointError: the gradient norm or a derivative was not finite.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.ReLU())]
        >>> model = nn.Sequential(*layers, nn.Linear(16, 4))
        >>> batches = [(torch.randn(32, 16), torch.randint(4, (32,))) for _ in range(6)]
        >>> result = gradinit(model, nn.functional.cross_entropy, batches, iterations=60, progress=False)
        >>> len(result.scales), len(result.history)
        (18, 60)
        >>> result.scales["8.weight"] > 1  # the signal fades on its way through eight layers
        True
    """
    for name, value, valid, needed in (
        ("algorithm", algorithm, algorithm in NORM_ORDER, "'sgd' or 'adam'"),
        ("eta", eta, eta > 0, "a number > 0"),
        ("gamma", gamma, gamma >= 0, "a number >= 0"),
        ("lr", lr, lr > 0, "a number > 0"),
        ("iterations", iterations, iterations >= 0, "a number >= 0"),
        ("min_scale", min_scale, 0 <= min_scale <= 1, "a number from 0 to 1"),
        ("scale_clip", scale_clip, scale_clip > 0, "a number > 0, math.inf for no bound"),
    ):
        if not valid:
            raise ValueError(f"Invalid {name}: {value}; gradinit needs {needed}")
    weights = _trainable(model)
    device = next(iter(weights.values())).device
    floor = torch.tensor([0.0 if "bias" in name.rpartition(".")[2] else min_scale for name in weights])
    adam = _ScaleAdam(lr, floor.to(next(iter(weights.values())).dtype))
    loss_of = partial(_loss, model, loss_fn, device)
    halves = _endless(batches)
    history: list[GradInitIteration] = []
    with (
        _batch_statistics(model),
        sdpa_kernel(SDPBackend.MATH),
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
    ):
        for _ in (bar := tqdm(range(iterations), desc="gradinit", disable=not progress)):
            scales = adam.scales.clone().requires_grad_()
            theta = {name: m * w for (name, w), m in zip(weights.items(), scales.unbind(), strict=True)}
            h0, h1 = next(halves), next(halves)
            loss = loss_of(theta, h0, h1)
            opaque = _watch(loss)
            g = torch.autograd.grad(loss, list(theta.values()), create_graph=True, materialize_grads=True)
            norm = _norm(g, NORM_ORDER[algorithm])
            seen = GradInitIteration(loss.item(), norm.item())
            constrained = seen.gradient_norm > gamma
            if constrained:
                h = _second_derivative(norm, scales, opaque)
            else:
                length = max(seen.gradient_norm, torch.finfo(norm.dtype).tiny) if normalize else 1.0
                a = [(part.sign() if algorithm == "adam" else part / length).detach() for part in g]
                del loss, norm, g  # frees the graph of the gradient before the next forward pass
                updated = {name: t - eta * part for (name, t), part in zip(theta.items(), a, strict=True)}
                updated_loss = loss_of(updated, h0, next(halves))
                seen = seen._replace(updated_loss=updated_loss.item())
                (h,) = torch.autograd.grad(updated_loss / eta, scales)
            if not (math.isfinite(seen.gradient_norm) and h.isfinite().all()):
                raise FloatingPointError(
                    f"gradinit needs finite derivatives: in iteration {len(history)} it found {seen}; "
                    "begin with smaller weights, or run it on model.double()"
                )
            adam.step(h.clamp(-scale_clip, scale_clip), constrained)
            history.append(seen)
            bar.set_postfix(loss=f"{seen.loss:.3g}", gradient_norm=f"{seen.gradient_norm:.3g}")
    with torch.no_grad():
        for weight, m in zip(weights.values(), adam.scales, strict=True):
            weight.mul_(m)
    return GradInitResult(dict(zip(weights, adam.scales.tolist(), strict=True)), history)


class _ScaleAdam:
    """Adam on the scales: a first moment for each of the two branches, one second moment for both."""

    def __init__(self, lr: float, floor: Tensor) -> None:
        # On the CPU whatever the model's device: a 0-dim CPU tensor multiplies a tensor of any device.
        self.lr, self.floor, self.scales = lr, floor, torch.ones_like(floor)
        self.first, self.count = [torch.zeros_like(floor), torch.zeros_like(floor)], [0, 0]
        self.second = torch.zeros_like(floor)

    def step(self, h: Tensor, branch: int) -> None:
        self.count[branch] += 1
        self.first[branch].lerp_(h, 1 - 0.9)
        self.second.lerp_(h.square(), 1 - 0.999)
        mean = self.first[branch] / (1 - 0.9 ** self.count[branch])
        deviation = (self.second / (1 - 0.999 ** sum(self.count))).sqrt()
        self.scales = torch.maximum(self.scales - self.lr * mean / (deviation + 1e-8), self.floor)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError("gradinit scales trainable parameters (requires_grad=True): the model has none")
    for name, weight in weights.items():
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"gradinit differentiates twice, in float32 or float64: found {weight.dtype} in {name!r}; "
                "call it on model.float() and convert the model afterwards"
            )
    return weights


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules but those with running statistics; every flag as it was on leaving."""
    training = {module: module.training for module in model.modules()}
    try:
        for module in training:
            module.training = hasattr(module, "running_mean")
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _endless(batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    while True:
        batch = None
        for batch in batches:
            if not (isinstance(batch, Sequence) and len(batch) == 2):
                raise TypeError(f"batches must give pairs (input, target): found {type(batch).__name__}")
            yield batch
        if batch is None:
            raise ValueError(
                "batches are empty, or they ended and iterating again gave none: "
                "pass a list or a DataLoader rather than an iterator"
            )


def _join(parts: Sequence[Any], device: torch.device) -> Any:
    """Concatenate tensors, or tuples and mappings of them, along the batch."""
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat([part.to(device) for part in parts])
    if isinstance(parts[0], Mapping):
        return {key: _join([part[key] for part in parts], device) for key in parts[0]}
    if isinstance(parts[0], (tuple, list)):
        return tuple(_join(group, device) for group in zip(*parts, strict=True))
    raise TypeError(f"gradinit joins half batches of tensors: found {type(parts[0]).__name__}")


def _loss(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    device: torch.device,
    parameters: dict[str, Tensor],
    *halves: tuple[Any, Any],
) -> Tensor:
    inputs, target = (_join(parts, device) for parts in zip(*halves, strict=True))
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss: Tensor = loss_fn(functional_call(model, (parameters, buffers), args, kwargs), target)
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            "loss_fn must return one number that depends on the parameters: "
            f"found shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
        )
    return loss


def _norm(tensors: Sequence[Tensor], order: int) -> Tensor:
    parts = [torch.linalg.vector_norm(tensor, order).to(tensors[0].device) for tensor in tensors]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts), order)
    return norm


def _watch(loss: Tensor) -> set[str]:
    """Names, once the gradient exists, of the custom functions whose backward autograd cannot follow.

    Differentiating the gradient does not fail there: their share of the derivative is silently missing.
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
    return opaque


def _second_derivative(norm: Tensor, scales: Tensor, opaque: set[str]) -> Tensor:
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
