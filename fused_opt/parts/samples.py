"""The samples of a batch as parts of the gradient: hooks that bring what their norms are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..shards import is_spread
from .microbatches import Microbatches
from .per_sample_norms import FORMS, Form, Part, norm2, size, together

LARGEST = 2**24  # elements of a temporary; samples are taken in as many turns as that needs


class _Forward(nn.Module):
    """Only a module's ``forward``: its hooks have had their turn."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


@dataclass(eq=False)
class _Call:
    """One call of a module in a forward pass. What it was called with is kept elsewhere, by this key."""

    name: str
    module: nn.Module
    owned: dict[Tensor, str]
    forms: dict[str, Form]
    batch: int  # which call of the model it was part of
    samples: int
    arrival: Callable[[], _Arrival | None] = lambda: None


@dataclass(eq=False)
class _Arrival:
    """The gradients of a call's outputs in one backward; held only until its parameters have theirs."""

    call: _Call
    inputs: tuple[list[Any], list[bool], Any]  # leaves, whether they have samples, how to put them together
    task: int
    gradients: dict[int, Tensor] = field(default_factory=dict)
    norm2: dict[Tensor, Tensor] = field(default_factory=dict)
    total: dict[Tensor, Tensor] = field(default_factory=dict)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _widen(value: Any, p: Tensor) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.promote_types(p.dtype, torch.float32)) if floating else value


class Samples(Microbatches):
    """Every sample of a batch is a part of the gradient: dimension 0 of what a module is called with.

    Hooks on the modules keep the inputs, hooks on their outputs receive the gradients, and when a parameter has its own,
    the norms of all samples are taken at once. A module that is called several times, or a parameter that several
    modules share, adds up by sample within one call of ``model``; each call of ``model`` has samples of its own, and so has
    each backward. What reaches a parameter without a call of its module (a penalty in the loss, ``F.linear(x,
    embedding.weight)``, a second derivative) is not seen beside its samples. An input that has as many rows as there are
    samples is taken to have one for each, which positions of as many tokens have not.

    Linear, Conv1d to 3d, Embedding, LayerNorm, GroupNorm, InstanceNorm and BatchNorm in evaluation mode have forms of
    their own. Other modules are called again for their gradients by sample, with torch.func, and the first time their sum
    is compared with the gradient. Inputs are kept until the backward, also through torch.utils.checkpoint.

    Args:
        parameters: the optimizer's.
        model: contains the modules that own them.

    Raises:
        ValueError: where a parameter is not in the model, or a module mixes its samples or does not have them in
            dimension 0.
    """

    def __init__(self, parameters: Iterable[Tensor], model: nn.Module | None) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"samples are told apart by the model's modules: model= takes an nn.Module, not {model!r}")
        tracked = [p for p in parameters if p.requires_grad]
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters(remove_duplicate=False)}
        if strangers := [tuple(p.shape) for p in tracked if p not in self._names]:
            raise ValueError(
                f"parameters of shapes {', '.join(map(str, strangers))} are optimized and not in the model; give the "
                f"model that contains all of them"
            )
        if cut := [self._names[p] for p in tracked if is_spread(p)]:
            raise ValueError(
                f"{', '.join(cut)}: of a sample's gradient every process has a part (DTensor), and its norm is not added up; "
                f"'microbatch' takes them"
            )
        if bent := [self._names[p] for p in tracked if p.is_complex()]:
            raise ValueError(f"{', '.join(bent)}: complex parameters have no norms by sample; 'microbatch' takes them")
        modules = {module: name for name, module in model.named_modules() if module is not model}
        modules[model] = "the model"
        for module, name in modules.items():
            if reason := self._mixes(module):
                raise ValueError(f"{name} ({type(module).__name__}) {reason}")
        self._pending: dict[int, dict[Tensor, list[_Arrival]]] = {}
        self._inputs: WeakKeyDictionary[_Call, tuple[list[Any], list[bool], Any]] = WeakKeyDictionary()
        self._checked: set[Tensor] = set()
        self._busy = False
        self._batch, self._samples = 0, -1  # calls of the model so far; samples in this one, -1 outside of it
        super().__init__(tracked, model)
        self._handles += [
            model.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        inside = {m for module in modules if isinstance(module, nn.MultiheadAttention) for m in module.children()}
        for module, name in modules.items():
            if isinstance(module, _BatchNorm):
                self._handles.append(module.register_forward_pre_hook(partial(self._before_batch_norm, name)))
            if module not in inside and not self._tracked.keys().isdisjoint(self._owned(module)):
                hook = partial(self._called, name)
                self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

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
        if getattr(module, "scale_grad_by_freq", False):
            return "has scale_grad_by_freq, which counts over the whole batch; scale_grad_by_freq=False does not"
        return None

    @staticmethod
    def _owned(module: nn.Module) -> dict[Tensor, str]:
        """The parameters whose gradients come from calls of this module itself."""
        # MultiheadAttention uses the weights of its output projection without calling it.
        attends = isinstance(module, nn.MultiheadAttention)
        return {p: name for name, p in module.named_parameters(recurse=attends)}

    def _before_batch_norm(self, name: str, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and not self._busy and (reason := self._mixes(module)):
            raise RuntimeError(f"{name} ({type(module).__name__}) {reason}")

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and not self._busy:
            self._batch += 1
            self._samples = next((len(t) for t in _tensors((args, kwargs)) if t.ndim), -1)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._busy:
            self._samples = -1

    def _called(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._busy or not torch.is_grad_enabled():
            return
        outputs = [(k, t) for k, t in enumerate(_tensors(output)) if t.requires_grad]
        owned = {p: of_p for p, of_p in self._owned(module).items() if p in self._tracked and p.requires_grad}
        if not owned or not outputs:
            return
        where = f"{name} ({type(module).__name__})"
        leaves, spec = tree_flatten((args, kwargs))
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
        if not shapes or not shapes[0]:
            raise RuntimeError(
                f"{where} was called without a tensor that has samples; track_parts('microbatch') needs none"
            )
        samples = shapes[0][0]
        ndim, forms = FORMS.get(getattr(module.forward, "__func__", None), (1, {}))
        if len(shapes[0]) < ndim or self._samples not in (-1, samples):
            raise RuntimeError(
                f"{where} was called with a tensor of shape {tuple(shapes[0])}, and its samples are looked for in dimension "
                f"0 of at least {ndim}" + f": the model was called with {self._samples}" * (self._samples >= 0) + ". "
                "Expand or reshape that tensor so that it has them there, or use track_parts('microbatch')"
            )
        forms = forms if all(of_p in forms for of_p in owned.values()) else {}
        # An attention mask of two dimensions is the same for all samples, also where it happens to have as many rows.
        attends = isinstance(module, nn.MultiheadAttention)
        mask = kwargs.get("attn_mask", args[5] if len(args) > 5 else None) if attends else None
        sampled = [isinstance(x, Tensor) and x.ndim > 0 and len(x) == samples and x is not mask for x in leaves]
        leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        call = _Call(name, module, owned, forms, self._batch, samples)
        self._inputs[call] = (leaves, sampled, spec)
        for k, t in outputs:
            # Linear returns a view, and what writes into a view later (ReLU(inplace=True)) takes the view's own hooks out of
            # the graph. Its base keeps them. Module hooks for the backward would forbid such writes.
            base = t._base if forms and t._is_view() else None
            (t if base is None else base).register_hook(partial(self._arrived, call, k, t.shape))

    def _arrived(self, call: _Call, k: int, shape: torch.Size, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        arrival = call.arrival()
        if arrival is None or arrival.task != task:
            if (inputs := self._inputs.get(call)) is None:  # removed meanwhile
                return
            if task not in self._pending:
                self._pending[task] = {}
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._forget(task))
            arrival = _Arrival(call, inputs, task)
            call.arrival = ref(arrival)
            for p in call.owned:
                self._pending[task].setdefault(p, []).append(arrival)
        arrival.gradients[k] = gradient.detach().reshape(shape)
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
        batches: dict[int, list[_Arrival]] = {}
        for arrival in arrivals:
            batches.setdefault(arrival.call.batch, []).append(arrival)
        norms, samples = 0.0, 0
        with torch.autocast(p.device.type, enabled=False):
            for of_batch in batches.values():
                sizes = {arrival.call.samples for arrival in of_batch}
                if len(sizes) > 1:
                    uses = " and ".join(f"{arrival.call.name} with {arrival.call.samples}" for arrival in of_batch)
                    raise RuntimeError(
                        f"{self._names[p]} is used by {uses} samples in one call of the model, and they are added by "
                        f"sample. Use it with as many each time, or use track_parts('microbatch')"
                    )
                squares = self._squares(p, of_batch)
                norms += squares.clamp(min=0).sqrt().sum(dtype=torch.float64).item()
                samples += sizes.pop()
            self._check(p, part, arrivals, norms)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            for arrival in arrivals:
                self._inputs.pop(arrival.call, None)
        return max(norms, norm), samples  # the triangle inequality, which rounding must not undo

    def _squares(self, p: Tensor, arrivals: list[_Arrival]) -> Tensor:
        """Squared norms of the gradients by sample, from all calls together."""
        first, samples = arrivals[0], arrivals[0].call.samples
        if len(arrivals) == 1 and p in first.norm2:
            return first.norm2.pop(p)
        direct = len(arrivals) > 1 or bool(first.call.forms)

        def part(s: slice) -> Part:
            return together(p, [self._form(arrival, p, s) for arrival in arrivals])

        if not samples:
            return p.new_zeros(0)
        elements = size(p, part(slice(1))) if direct else sum(q.numel() for q in first.call.owned)
        step = max(1, LARGEST // max(1, elements))
        turns = [slice(start, start + step) for start in range(0, samples, step)]
        if direct:
            return torch.cat([norm2(p, part(s)) for s in turns])
        # A module called again has the gradients of all its parameters at once.
        for s in turns:
            for q, of_q in self._call_again(first, list(first.call.owned), s).items():
                first.norm2[q] = torch.cat([first.norm2.get(q, of_q.new_zeros(0)), of_q.flatten(1).square().sum(1)])
                if q not in self._checked:
                    first.total[q] = first.total.get(q, 0) + of_q.sum(0)
        return first.norm2.pop(p)

    def _form(self, arrival: _Arrival, p: Tensor, s: slice) -> Part:
        call = arrival.call
        if not call.forms:
            return self._call_again(arrival, [p], s)[p]
        x, (e,) = next(x for x in arrival.inputs[0] if isinstance(x, Tensor)), arrival.gradients.values()
        return call.forms[call.owned[p]](call.module, _widen(x[s], p), _widen(e[s], p))

    def _call_again(self, arrival: _Arrival, parameters: list[Tensor], s: slice) -> dict[Tensor, Tensor]:
        """The gradients by sample of a module of any kind."""
        call, (leaves, sampled, spec) = arrival.call, arrival.inputs
        where = f"{call.name} ({type(call.module).__name__})"
        if any(not e.ndim or len(e) != call.samples for e in arrival.gradients.values()):
            raise RuntimeError(f"{where} returns a tensor that does not have the samples in dimension 0")
        own = {f"inner.{call.owned[p]}": _widen(p.detach(), p) for p in parameters}
        forward, p = _Forward(call.module), parameters[0]

        def objective(own: dict[str, Tensor], gradients: dict[int, Tensor], given: list[Tensor]) -> Tensor:
            parts = iter(given)
            now = [next(parts).unsqueeze(0) if by_sample else leaf for leaf, by_sample in zip(leaves, sampled)]
            args, kwargs = tree_unflatten([_widen(leaf, p) for leaf in now], spec)
            outputs = _tensors(functional_call(forward, own, args, kwargs))
            return torch.stack([(outputs[k].squeeze(0) * e).sum() for k, e in gradients.items()]).sum()

        gradients = {k: _widen(e[s], p) for k, e in arrival.gradients.items()}
        given = [leaf[s] for leaf, by_sample in zip(leaves, sampled) if by_sample]
        one = grad(objective)
        self._busy = True
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the one that vmap knows
                found = vmap(one, in_dims=(None, 0, 0), randomness="error")(own, gradients, given)
        except RuntimeError as error:
            if "random" in str(error):
                raise RuntimeError(
                    f"{where} draws random numbers, and is called again for its gradients by sample: it would draw others. "
                    f"Set its dropout to 0, or use track_parts('microbatch')"
                ) from error
            each = [
                one(own, {k: e[i] for k, e in gradients.items()}, [x[i] for x in given]) for i in range(len(given[0]))
            ]
            found = {name: torch.stack([of_one[name] for of_one in each]) for name in own}
        finally:
            self._busy = False
        return {p: found[f"inner.{call.owned[p]}"] for p in parameters}

    def _check(self, p: Tensor, part: Tensor, arrivals: list[_Arrival], norms: float) -> None:
        """What a module called again says of its samples must add up to the gradient, the first time."""
        if p in self._checked or any(p not in arrival.total for arrival in arrivals):
            return
        self._checked.add(p)
        missing = torch.linalg.vector_norm(part - sum(arrival.total.pop(p) for arrival in arrivals)).item()
        if missing > 0.05 * norms:
            raise RuntimeError(
                f"the gradients by sample of {self._names[p]}, from calling {arrivals[0].call.name} again sample by sample, "
                f"do not add up to its gradient: {missing:.3g} is missing from it. Either its samples mix or it is used "
                f"elsewhere too; track_parts('microbatch') takes it"
            )

    def __reduce__(self) -> Any:
        return _inert, ()  # copies of the model, deep or pickled, have copies of the hooks: they do nothing

    def reset(self) -> None:
        """Begin anew, after a step."""
        super().reset()
        self._pending.clear()

    def remove(self) -> None:
        """Take the hooks away; nothing is left in the forward and the backward, nor of the inputs."""
        super().remove()
        self._inputs.clear()


def _inert() -> Samples:
    tracker = Samples.__new__(Samples)
    tracker._busy = True
    return tracker
