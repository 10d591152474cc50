"""The samples of a batch as parts of the gradient: hooks that bring what their norms are computed from."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from .. import tensors as of_any_kind
from ..shards import is_spread
from .call_again import Inputs, call_again, inputs_of, output_dim, parametrizations_of, tensors, widen
from .microbatches import Microbatches
from .per_sample_norms import Form, Part, forms_of, norm2, size, together, total
from .tracker import WeakHook

LARGEST = 2**24  # elements of a temporary; samples are taken in as many turns as that needs
MISSING = 0.05  # of the norms' sum may be missing between the samples' sum and the gradient: 16-bit arithmetic


@dataclass(eq=False)
class _Call:
    """One call of a module in a forward pass. What it was called with is kept elsewhere, by this key."""

    name: str
    module: nn.Module
    owned: dict[Tensor, str]
    forms: dict[str, Form]  # empty: it is called again
    batch: int  # which call of the model it was part of
    samples: int
    arrival: Callable[[], _Arrival | None] = lambda: None

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"


@dataclass(eq=False)
class _Arrival:
    """The gradients of a call's outputs in one backward; held only until its parameters have theirs."""

    call: _Call
    inputs: Inputs
    task: int
    gradients: dict[int, Tensor] = field(default_factory=dict)  # samples first
    norm2: dict[Tensor, Tensor] = field(default_factory=dict)
    total: dict[Tensor, Tensor] = field(default_factory=dict)


class Samples(Microbatches):
    """Every sample of a batch is a part of the gradient: dimension 0 of what a module is called with.

    Hooks on the modules keep the inputs, hooks on their outputs receive the gradients, and when a parameter has its own,
    the norms of all samples are taken at once. A module that is called several times, or a parameter that several
    modules share, adds up by sample within one call of ``model``; each call of ``model`` has samples of its own, and so has
    each backward. What reaches a parameter without a call of its module (a penalty in the loss, ``F.linear(x,
    embedding.weight)``, a second derivative) is not seen beside its samples. An input that has as many rows as there are
    samples is taken to have one for each, which positions of as many tokens have not.

    Linear, Conv1d to 3d, Embedding, LayerNorm, GroupNorm, InstanceNorm and BatchNorm in evaluation mode have forms of
    their own, where what runs is torch's own code. Other modules are called again for their gradients by sample, with
    torch.func; so are those with weight_norm, parametrizations or prune. The first time, the sum over the samples is
    compared with the gradient: where a form differs, the module is called again, and where that differs, it is refused.
    Inputs are kept until the backward, also through torch.utils.checkpoint. Code that was compiled before is compiled anew.

    Args:
        optimizer: whose gradients.
        model: contains the modules that own its parameters.
        backend: the optimizer's.

    Raises:
        ValueError: where a parameter is not in the model, or a module mixes its samples or does not have them in
            dimension 0.
    """

    _model: nn.Module

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module | None = None, backend: str = "auto") -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"samples are told apart by the model's modules: model= takes an nn.Module, not {model!r}")
        self._names: dict[Tensor, str] = {}
        self._pending: dict[int, dict[Tensor, list[_Arrival]]] = {}
        self._inputs: WeakKeyDictionary[_Call, Inputs] = WeakKeyDictionary()
        self._hooked: WeakSet[nn.Module] = WeakSet()
        self._without_forms: WeakSet[nn.Module] = WeakSet()  # of which a form was wrong
        self._checked: set[Tensor] = set()
        self._busy = False
        self._batch, self._samples = 0, -1  # calls of the model so far; samples in this one, -1 outside of it
        super().__init__(optimizer, model, backend)
        self._hold(model, model.register_forward_pre_hook(WeakHook(self._begin), prepend=True, with_kwargs=True))
        self._hold(model, model.register_forward_hook(WeakHook(self._end), always_call=True))

    def _modules(self) -> dict[nn.Module, str]:
        """All but the model itself come before it."""
        modules = {module: name for name, module in self._model.named_modules() if module is not self._model}
        return {**modules, self._model: "the model"}

    def _admit(self, tracked: Iterable[Tensor]) -> None:
        super()._admit(tracked)
        names: dict[Tensor, str] = {p: name for name, p in self._model.named_parameters(remove_duplicate=False)}
        if strangers := [tuple(p.shape) for p in tracked if p not in names]:
            raise ValueError(
                f"parameters of shapes {', '.join(map(str, strangers))} are optimized and not in the model; give the "
                f"model that contains all of them"
            )
        if cut := [names[p] for p in tracked if is_spread(p)]:
            raise ValueError(
                f"{', '.join(cut)}: of a sample's gradient every process has a part (DTensor), and its norm is not added up; "
                f"'microbatch' takes them"
            )
        if bent := [names[p] for p in tracked if p.is_complex()]:
            raise ValueError(f"{', '.join(bent)}: complex parameters have no norms by sample; 'microbatch' takes them")
        for module, name in self._modules().items():
            if reason := self._mixes(module):
                raise ValueError(f"{name} ({type(module).__name__}) {reason}")
        self._names = names

    def _find(self) -> bool:
        if not (found := super()._find()):
            return False
        self._checked.intersection_update(self._tracked)
        modules = self._modules()
        inside = {m for module in modules for m in self._parts_of(module)}
        for module, name in modules.items():
            if module in self._hooked:
                continue
            if isinstance(module, _BatchNorm):
                hook = WeakHook(self._before_batch_norm, name)
                self._hold(module, module.register_forward_pre_hook(hook))
                self._hooked.add(module)
            if module not in inside and not self._tracked.keys().isdisjoint(self._owned(module)):
                hook = WeakHook(self._called, name)
                self._hold(module, module.register_forward_hook(hook, prepend=True, with_kwargs=True))
                self._hooked.add(module)
        if "torch._dynamo" in sys.modules:  # what was compiled without these hooks does not look for them
            torch.compiler.reset()
        return found

    @staticmethod
    def _mixes(module: nn.Module) -> str | None:
        """Why its samples cannot be told apart, or None."""
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return (
                "normalizes with the statistics of the whole batch, so that there is no gradient of one sample. What would "
                "work: GroupNorm in its place, evaluation mode (its .eval()), or track_parts('microbatch')"
            )
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and not module.batch_first:
            return (
                "takes the samples in dimension 1; batch_first=True has them in dimension 0, where they are looked for"
            )
        if any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
            return (
                "has torch.nn.utils.spectral_norm, which writes its buffers whenever its weight is asked for; "
                "torch.nn.utils.parametrizations.spectral_norm works"
            )
        if getattr(module, "scale_grad_by_freq", False):
            return "has scale_grad_by_freq, which counts over the whole batch; scale_grad_by_freq=False does not"
        return None

    @staticmethod
    def _parts_of(module: nn.Module) -> list[nn.Module]:
        """The modules whose parameters it uses in calls of its own."""
        if isinstance(
            module, nn.MultiheadAttention
        ):  # which uses the weights of its output projection without calling it
            return list(module.modules())[1:]
        return list(parametrizations_of(module).modules())

    @staticmethod
    def _owned(module: nn.Module) -> dict[Tensor, str]:
        """The parameters whose gradients come from calls of this module itself."""
        owned = module.named_parameters(recurse=isinstance(module, nn.MultiheadAttention))
        made = parametrizations_of(module).named_parameters("parametrizations")
        return {p: name for name, p in (*owned, *made)}

    def _before_batch_norm(self, name: str, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and not self._busy and (reason := self._mixes(module)):
            raise RuntimeError(f"{name} ({type(module).__name__}) {reason}")

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and not self._busy:
            self._find()
            self._batch += 1
            self._samples = next((len(t) for t in tensors((args, kwargs)) if t.ndim), -1)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._busy:
            self._samples = -1

    def _called(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._busy or not torch.is_grad_enabled():
            return
        outputs = [(k, t) for k, t in enumerate(tensors(output)) if t.requires_grad]
        owned = {p: of_p for p, of_p in self._owned(module).items() if p in self._tracked and p.requires_grad}
        if not owned or not outputs:
            return
        shapes = [t.shape for t in tensors((args, kwargs))]
        if not shapes or not shapes[0]:
            raise RuntimeError(
                f"{name} ({type(module).__name__}) was called without a tensor that has samples; "
                f"track_parts('microbatch') needs none"
            )
        samples = shapes[0][0]
        ndim, forms = forms_of(module)
        if module in self._without_forms or not all(of_p in forms for of_p in owned.values()):
            forms = {}
        call = _Call(name, module, owned, forms, self._batch, samples)
        if len(shapes[0]) < ndim or self._samples not in (-1, samples):
            raise RuntimeError(
                f"{call} was called with a tensor of shape {tuple(shapes[0])}, and its samples are looked for in dimension "
                f"0 of at least {ndim}" + f": the model was called with {self._samples}" * (self._samples >= 0) + ". "
                "Expand or reshape that tensor so that it has them there, or use track_parts('microbatch')"
            )
        self._inputs[call] = inputs_of(module, args, kwargs, samples)
        for k, t in outputs:
            # Linear returns a view, and what writes into a view later (ReLU(inplace=True)) takes the view's own hooks out of
            # the graph. Its base keeps them. Module hooks for the backward would forbid such writes.
            base = t._base if forms and t._is_view() else None
            (t if base is None else base).register_hook(WeakHook(self._arrived, call, k, t.shape))

    def _arrived(self, call: _Call, k: int, shape: torch.Size, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        arrival = call.arrival()
        if arrival is None or arrival.task != task:
            if (inputs := self._inputs.get(call)) is None:  # removed meanwhile
                return
            if task not in self._pending:
                self._pending[task] = {}
                torch.autograd.Variable._execution_engine.queue_callback(WeakHook(self._forget, task))
            arrival = _Arrival(call, inputs, task)
            call.arrival = ref(arrival)
            for p in call.owned:
                self._pending[task].setdefault(p, []).append(arrival)
        gradient = gradient.detach().reshape(shape)
        dim = output_dim(call.module, k)
        if gradient.ndim <= dim or gradient.shape[dim] != call.samples:
            raise RuntimeError(f"{call} returns a tensor that does not have the samples in dimension {dim}")
        arrival.gradients[k] = gradient.movedim(dim, 0)
        arrival.norm2.clear()
        arrival.total.clear()

    def _forget(self, task: int) -> None:
        self._pending.pop(task, None)

    def _measure(self, p: Tensor, part: Tensor, norm: float) -> tuple[float, int]:
        arrivals = self._pending.get(torch._C._current_graph_task_id(), {}).pop(p, None)
        if arrivals is None:
            raise RuntimeError(
                f"{self._names[p]} has a gradient that comes from no call of the module that owns it, so that it does not "
                f"come apart by samples. Call that module, or use track_parts('microbatch')"
            )
        with torch.autocast(p.device.type, enabled=False):
            norms, samples, whole = self._norms(p, arrivals)
            missing = self._missing(p, part, norms, whole)
            if missing and (wrong := [arrival.call for arrival in arrivals if arrival.call.forms]):
                for call in wrong:
                    call.forms = {}
                    self._without_forms.add(call.module)
                norms, samples, whole = self._norms(p, arrivals)
                missing = self._missing(p, part, norms, whole)
        if missing:
            raise RuntimeError(
                f"the gradients by sample of {self._names[p]}, from calling {arrivals[0].call.name} again sample by sample, "
                f"do not add up to its gradient: {missing:.3g} is missing from it. Either its samples mix or it is used "
                f"elsewhere too; track_parts('microbatch') takes it"
            )
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            for arrival in arrivals:
                self._inputs.pop(arrival.call, None)
        return max(norms, norm), samples  # the triangle inequality, which rounding must not undo

    def _norms(self, p: Tensor, arrivals: list[_Arrival]) -> tuple[float, int, list[Tensor]]:
        """The sum of the samples' norms, how many there are, and, until checked, the sums of their gradients."""
        batches: dict[int, list[_Arrival]] = {}
        for arrival in arrivals:
            batches.setdefault(arrival.call.batch, []).append(arrival)
        norms, samples, whole = 0.0, 0, []
        for of_batch in batches.values():
            sizes = {arrival.call.samples for arrival in of_batch}
            if len(sizes) > 1:
                uses = " and ".join(f"{arrival.call.name} with {arrival.call.samples}" for arrival in of_batch)
                raise RuntimeError(
                    f"{self._names[p]} is used by {uses} samples in one call of the model, and they are added by "
                    f"sample. Use it with as many each time, or use track_parts('microbatch')"
                )
            squares, sums = self._squares(p, of_batch)
            norms += squares.clamp(min=0).sqrt().sum(dtype=torch.float64).item()
            samples += sizes.pop()
            whole += sums
        return norms, samples, whole

    def _squares(self, p: Tensor, arrivals: list[_Arrival]) -> tuple[Tensor, list[Tensor]]:
        """Squared norms of the gradients by sample, from all calls together, and, until checked, sums of the gradients."""
        first, samples = arrivals[0], arrivals[0].call.samples
        if len(arrivals) > 1 or p not in first.norm2:
            direct = len(arrivals) > 1 or bool(first.call.forms)

            def part(s: slice) -> Part:
                return together(p, [self._form(arrival, p, s) for arrival in arrivals])

            elements = size(p, part(slice(1))) if direct and samples else sum(q.numel() for q in first.call.owned)
            step = max(1, LARGEST // max(1, elements))
            turns = [slice(start, start + step) for start in range(0, samples, step)]
            if direct:
                found, sums = [p.new_zeros(0)], []
                for s in turns:
                    of_turn = part(s)
                    found.append(norm2(p, of_turn))
                    if p not in self._checked:
                        sums.append(total(p, of_turn))
                return torch.cat(found), sums
            # A module called again has the gradients of all its parameters at once.
            first.norm2.update({q: q.new_zeros(0) for q in first.call.owned})
            for s in turns:
                for q, of_q in self._call_again(first, list(first.call.owned), s).items():
                    first.norm2[q] = torch.cat([first.norm2[q], of_q.flatten(1).square().sum(1)])
                    if q not in self._checked:
                        first.total[q] = first.total.get(q, 0) + of_q.sum(0)
        return first.norm2.pop(p), [first.total.pop(p)] if p in first.total else []

    def _form(self, arrival: _Arrival, p: Tensor, s: slice) -> Part:
        call = arrival.call
        if not call.forms:
            return self._call_again(arrival, [p], s)[p]
        x, (e,) = next(x for x in arrival.inputs.leaves if isinstance(x, Tensor)), arrival.gradients.values()
        return call.forms[call.owned[p]](call.module, widen(x[s], p), widen(e[s], p))

    def _call_again(self, arrival: _Arrival, parameters: list[Tensor], s: slice) -> dict[Tensor, Tensor]:
        """The gradients by sample of a module of any kind."""
        call = arrival.call
        named = {call.owned[p]: p for p in parameters}
        self._busy = True
        try:
            found = call_again(str(call), call.module, named, arrival.inputs, arrival.gradients, s)
        finally:
            self._busy = False
        return {p: found[name] for name, p in named.items()}

    def _missing(self, p: Tensor, part: Tensor, norms: float, whole: list[Tensor]) -> float:
        """What is missing between the samples' sum and the gradient; 0 where that is rounding, or p was checked before."""
        if p in self._checked or not whole:
            return 0.0
        rest = part if all(of_some.is_sparse for of_some in whole) else part.to_dense()
        for of_some in whole:
            rest = rest - of_some
        missing = math.sqrt(of_any_kind.norm2(rest))
        if not math.isfinite(missing):  # an overflow: another time
            return 0.0
        if missing > MISSING * norms + math.sqrt(p.numel()) * torch.finfo(part.dtype).tiny:
            return missing
        if norms > 0:  # a layer behind weights of zero has no gradient yet, which proves nothing
            self._checked.add(p)
        return 0.0

    def reset(self) -> None:
        """Begin anew, after a step."""
        super().reset()
        self._pending.clear()

    def remove(self) -> None:
        """Take the hooks away; nothing is left in the forward and the backward, nor of the inputs."""
        super().remove()
        self._inputs.clear()
