"""GradInit: learn one scale per parameter tensor before training starts."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from .second_derivative import Uses, second_derivative, watch

Batch = tuple[Any, Any] | Mapping[str, Any]
LossFunction = Callable[[Any, Any], Tensor]

NORM_ORDER = {"sgd": 2, "adam": 1}
ETA = {"sgd": 0.1, "adam": 1e-3}


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
    loss_fn: LossFunction | None,
    batches: Iterable[Batch],
    *,
    algorithm: Literal["sgd", "adam"] = "sgd",
    eta: float | None = None,
    gamma: float | None = None,
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
    fused ones, which cannot be differentiated twice, and it holds the whole attention matrix in memory.
    Activation checkpoints may be non-reentrant; reentrant ones have no second derivative. Tied weights get one
    scale; zero and frozen (``requires_grad=False``) tensors stay as they are. Nothing is written before the
    end: after an exception the model is as it was.

    Args:
        model: the initialized module, before it is compiled or wrapped for distributed training; its
            trainable parameters are float32 or float64 and are scaled in place.
        loss_fn: ``loss_fn(output, target)`` -> mean loss, a tensor with one element; None for ``output.loss``,
            of models that are given their labels. Where it reads parameters, it reads them from the model.
        batches: half batches, started again when they end: pairs ``(input, target)``, or mappings
            ``model(**batch)``, labels included, which are their own target. All are tensors, or tuples, lists
            and mappings of tensors, batch first; a tuple or list of inputs is called ``model(*input)``, a
            mapping ``model(**input)``. They are moved to the device of the first trainable parameter.
        algorithm: the optimizer that will train, ``"sgd"`` or ``"adam"``.
        eta: learning rate of the trial step, > 0; None for the published 0.1 for SGD, 1e-3 for Adam.
        gamma: bound of the gradient norm, >= 0; None for the published 1 for SGD, and for Adam, whose l1 norm
            grows with the number N of parameters, :math:`\sqrt N`: no gradient of l2 norm 1 has a larger l1 norm
            (our definition; published is 1000 for one Transformer).
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
        TypeError: a batch that is neither a pair nor a mapping of (nested) tensors; an output without a loss; a
            parameter in reduced precision.
        RuntimeError: the norm was above ``gamma`` and an operation has no second derivative, or parameters are
            used where autograd is off, as in reentrant checkpoints; the message names them and the way out.
        FloatingPointError: the gradient norm or a derivative was not finite.

    Warns:
        UserWarning: the norm never came under ``gamma``, so that the loss after the trial step was never looked at; or it
            was there from the start, where gradinit did harm in our study.

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
    if algorithm not in NORM_ORDER:
        raise ValueError(f"Invalid algorithm: {algorithm}; gradinit needs 'sgd' or 'adam'")
    weights = _trainable(model)
    eta = ETA[algorithm] if eta is None else eta
    if gamma is None:
        gamma = math.sqrt(sum(weight.numel() for weight in weights.values())) if algorithm == "adam" else 1.0
    for name, value, valid, needed in (
        ("eta", eta, eta > 0, "a number > 0"),
        ("gamma", gamma, gamma >= 0, "a number >= 0"),
        ("lr", lr, lr > 0, "a number > 0"),
        ("iterations", iterations, iterations >= 0, "a number >= 0"),
        ("min_scale", min_scale, 0 <= min_scale <= 1, "a number from 0 to 1"),
        ("scale_clip", scale_clip, scale_clip > 0, "a number > 0, math.inf for no bound"),
    ):
        if not valid:
            raise ValueError(f"Invalid {name}: {value}; gradinit needs {needed}")
    device = next(iter(weights.values())).device
    floor = torch.tensor([0.0 if "bias" in name.rpartition(".")[2] else min_scale for name in weights])
    adam = _ScaleAdam(lr, floor.to(next(iter(weights.values())).dtype))
    swapped, loss_of = _Swapped(model), partial(_loss, model, loss_fn, device)

    def gradient(
        theta: dict[str, Tensor], scales: Tensor, *batch: Batch
    ) -> tuple[GradInitIteration, list[Tensor], Tensor | None]:
        """What was seen, the trial step's direction, and where the norm is above gamma its derivative."""
        with Uses() as uses:
            loss = loss_of(*batch)
        opaque = watch(loss, theta, uses)
        g = torch.autograd.grad(loss, list(theta.values()), create_graph=True, materialize_grads=True)
        norm = _norm(g, NORM_ORDER[algorithm])
        seen = GradInitIteration(loss.item(), norm.item())
        if seen.gradient_norm > gamma:
            return seen, [], second_derivative(norm, scales, opaque)
        length = max(seen.gradient_norm, torch.finfo(norm.dtype).tiny) if normalize else 1.0
        return seen, [(part.sign() if algorithm == "adam" else part / length).detach() for part in g], None

    def objective(scales: Tensor, *batch: Batch) -> tuple[float, Tensor]:
        """The loss after the trial step, and its derivative over eta."""
        loss = loss_of(*batch)
        (h,) = torch.autograd.grad(loss / eta, scales)
        return loss.item(), h

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
            seen, a, h = swapped.call(theta, partial(gradient, theta, scales, h0, h1))
            constrained = h is not None
            if h is None:
                updated = {name: t - eta * part for (name, t), part in zip(theta.items(), a, strict=True)}
                updated_loss, h = swapped.call(updated, partial(objective, scales, h0, next(halves)))
                seen = seen._replace(updated_loss=updated_loss)
            if not (math.isfinite(seen.gradient_norm) and h.isfinite().all()):
                raise FloatingPointError(
                    f"gradinit needs finite derivatives: in iteration {len(history)} it found {seen}; "
                    "begin with smaller weights, or run it on model.double()"
                )
            adam.step(h.clamp(-scale_clip, scale_clip), constrained)
            history.append(seen)
            bar.set_postfix(loss=f"{seen.loss:.3g}", gradient_norm=f"{seen.gradient_norm:.3g}")
    if history and all(seen.updated_loss is None for seen in history):
        least = min(seen.gradient_norm for seen in history)
        warnings.warn(
            f"gradinit lowered the gradient norm and nothing else: in {iterations} iterations it came down to {least:.4g}, "
            f"never under gamma={gamma:.4g}; raise gamma, lr={lr:g} or the number of iterations",
            stacklevel=2,
        )
    elif history and history[0].gradient_norm <= gamma:
        warnings.warn(
            f"the gradient norm was {history[0].gradient_norm:.4g} before gradinit changed anything, under "
            f"gamma={gamma:.4g}: a network that began so was made worse (docs/methods.md); compare with the weights before, "
            "or lower gamma",
            stacklevel=2,
        )
    with torch.no_grad():
        for weight, m in zip(weights.values(), adam.scales, strict=True):
            weight.mul_(m)
    return GradInitResult(dict(zip(weights, adam.scales.tolist(), strict=True)), history)


class _Swapped(nn.Module):
    """Runs functions while the model has other parameters.

    ``functional_call`` on the model itself would put the parameters back after the forward pass, and activation
    checkpoints run the model again in the backward passes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()

    def call(self, parameters: Mapping[str, Tensor], function: Callable[[], Any]) -> Any:
        """The function's result; buffers are copies in the meantime."""
        values = dict(parameters) | {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return functional_call(self, {f"model.{name}": value for name, value in values.items()}, (function,))


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


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        batch = None
        for batch in batches:
            if not (isinstance(batch, Mapping) or (isinstance(batch, Sequence) and len(batch) == 2)):
                raise TypeError(f"batches must give pairs (input, target), or mappings: found {type(batch).__name__}")
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


def _loss(model: nn.Module, loss_fn: LossFunction | None, device: torch.device, *halves: Batch) -> Tensor:
    if isinstance(halves[0], Mapping):
        inputs = target = _join(halves, device)
    else:
        inputs, target = (_join(parts, device) for parts in zip(*halves, strict=True))
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    if loss_fn is None and not isinstance(getattr(output, "loss", None), Tensor):
        raise TypeError(
            f"loss_fn=None takes the loss from the model's output: found {type(output).__name__} without one; "
            "give the labels in batches that are mappings, or pass loss_fn(output, target)"
        )
    loss: Tensor = output.loss if loss_fn is None else loss_fn(output, target)
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
