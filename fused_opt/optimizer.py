"""The only torch.optim.Optimizer of the package: hyper-parameters in, one fused step out."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import backends
from .checkpoint import Checkpoints
from .extras import COUNTS, EXTRAS, FOLD, Extras, check_extras
from .extras.averaging import finish, swapped_in
from .extras.buffers import AveragedBuffers, batch_norm_noticed
from .extras.decay import COUPLED, DECOUPLED, check_together
from .extras.trust_ratio import LOOK, warn_of_cap
from .groups import Groups, WithGroups, extras_of, name_of
from .in_backward import StepInBackward, Stepped
from .keywords import write_out, write_out_root
from .layers import WithLayers
from .parts.microbatches import Microbatches
from .parts.probe import Probe
from .parts.samples import Samples
from .parts.tracker import PartTracker, wants_parts, warn_without_parts
from .plan import Plan
from .shards import within_zero
from .states import StateDtype, check_names_of_states, check_state_dtype, exact_of, refuse_8_bits_under_zero
from .step import DeviceStep, HostStep, host_decides
from .tensors import buffers_restored

__all__ = ["Extras", "FusedOptimizer", "ParamsT"]

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class FusedOptimizer(Checkpoints, WithGroups, WithLayers):
    """What the optimizers of this package have in common.

    Everything but ``state_dtype`` and ``backend`` is in ``param_groups``, where it can be read, changed between steps, and
    (``trust_ratio``, ``noise``, ``averaging``) set for single groups.

    Args:
        params: as torch.optim takes them.
        defaults: the hyper-parameters of a group that does not set its own.
        **extras: from ``EXTRAS``.

    A step in which every group's learning rate is 0 counts for neither noise nor averaging and makes none. If it is the
    first and every gradient is zero, as in the step by which torch.distributed.checkpoint creates the states that it saves
    or loads into, it counts for nothing at all.
    """

    _grad_norm: float | Callable[[], float] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        write_out(cls)

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        state_dtype: StateDtype = None,
        backend: str = "auto",
        **extras: Any,
    ) -> None:
        keywords = [*defaults, *(extra.key for extra in EXTRAS), "state_dtype", "backend"]
        if unknown := extras.keys() - set(keywords):
            meant = [f". Did you mean {near!r}?" for near in get_close_matches(min(unknown), keywords, 1)]
            raise TypeError(
                f"{type(self).__name__}() got an unexpected keyword argument {min(unknown)!r}{''.join(meant)}"
            )
        if backend != "auto" and (reason := backends.get(backend).unavailable()):
            raise RuntimeError(f"backend {backend!r} cannot run here: {reason}. backend='auto' takes one that can")
        check_state_dtype(state_dtype)
        defaults = {**defaults, **extras_of(extras), **dict.fromkeys(COUNTS, 0)}
        self._check_all(defaults)
        self.backend = backend
        self.state_dtype = state_dtype
        self._scales = {}
        self._holds_averages = False
        self._groups = Groups(defaults)
        self._plan: Plan | None = None
        self._before: HostStep | DeviceStep | None = None  # by the kept plan; the coming step may be it once more
        self._parts: PartTracker | None = None
        self._last: Plan | Stepped | None = None  # what the last step was made by
        self._captured: Plan | None = None  # a plan whose steps are in CUDA graphs
        self._given = set()
        super().__init__(params, defaults)
        del self._given
        check_names_of_states(state_dtype, self)
        self._states_are_known = False
        self._partial = within_zero()
        if self._partial:
            refuse_8_bits_under_zero(state_dtype)
        for group in self.param_groups if self._partial else ():
            of_all = [extra for extra in EXTRAS if extra.of_all_parameters]
            if asked := [extra.key for extra in of_all if group[extra.key] != extra.default]:
                raise ValueError(
                    f"{', '.join(asked)}: ZeroRedundancyOptimizer makes an optimizer of some of the parameters in every "
                    f"process, and this is about all of them (noise is counted by their places). What would work: "
                    f"torch.nn.utils.clip_grad_norm_ before the step, or FSDP2 (fully_shard)"
                )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves gradients scaled; Lightning does not clip them then in mixed precision.

        Where parts are tracked it does, so that the step knows whether it has unscaled the gradient and not its parts; and
        where the backward steps, so that the step can refuse it.
        """
        return self.defaults.get("fused") is True or self._parts is not None or self._in_backward is not None

    def _check(self, options: Mapping[str, Any]) -> None:
        """Raise if a hyper-parameter of the rule is out of its range."""

    def _decouples(self, group: Mapping[str, Any]) -> bool:
        """Whether the class adds a group's weight decay to the rule's update, and not to the gradient."""
        return False

    def _decay(self, group: Mapping[str, Any]) -> str:
        """What a group's weight decay is: see ``decay`` above."""
        return group["decay"] or (DECOUPLED if self._decouples(group) else COUPLED)

    def _check_all(self, options: Mapping[str, Any]) -> None:
        self._check(options)
        check_extras(options)
        check_together(options, self._decay(options))

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Perform a single optimization step.

        Args:
            *args: ``closure``, optional: a function that reevaluates the model and returns the loss.
            **kwargs: ``closure`` by name.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: where a gradient or a state does not fit its parameter; nothing has been changed then.
        """
        if torch.compiler.is_compiling():
            return self._untraced_step(*args, **kwargs)
        # What torch wraps around every step costs as much as stepping 200 small tensors; it is needed only for these.
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        ):
            return self._hooked_step(*args, **kwargs)
        return self._step(*args, **kwargs) if args or kwargs else self._step()

    step.hooked = True  # type: ignore[attr-defined]  # torch: do not wrap it again

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else _evaluate(closure)
        if self._in_backward is not None:
            self._in_backward.end()
            return loss
        before, step = self._before, self._begin()
        if step is before and not step.binds:  # with other gradients: there is nothing to plan, to clip or to take back
            self._run(step)
            self._count(step)
            return loss
        with step:
            if not step.overflowed and self._planned(step):
                self._clip_and_run(step)
        return loss

    def _clip_and_run(self, step: HostStep | DeviceStep) -> None:
        """The step of what is planned, unless its gradients are to be skipped."""
        if self._parts is not None:
            step.take_parts(self._parts)
        step.complete_norms()
        if not step.clip():
            self._skip(step)
            return
        if step.captured and self._buffers is not None:
            self._buffers.refuse_capture()
        self._run(step)
        self._finish(step)

    def _run(self, step: HostStep | DeviceStep) -> None:
        step.run()
        if self._states_are_known:
            step.count_writes_to_states()

    def _begin(self) -> HostStep | DeviceStep:
        """This step's numbers, and the kept plan where it still fits.

        Raises:
            TypeError, ValueError: for a setting that was changed to one that the constructor refuses.
        """
        if self._holds_averages:
            raise RuntimeError(
                "a step was asked for within averaged_weights(): it would move the averages and be undone at the end of the "
                "block. Leave the block first"
            )
        if self._captured is not None or self._in_backward is not None:
            self.read_counts()
        groups, plan, keys = self.param_groups, self._plan, None
        if not self._groups.look(groups, self):
            self._before = None
        # torch.amp.GradScaler sets these for the duration of a step. It multiplies by a grad_scale that it finds, None
        # included, so the class must not have one.
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if self._parts is not None and found_inf is not None and grad_scale is None:
            self._parts.recheck()
        try:
            if plan is not None and plan.specs == self._groups.specs:
                keys = plan.collect_gradients(groups, self._states if self._states_are_known else None)
            if plan is None or keys is None:
                return HostStep(groups, self._groups, None, None, found_inf, grad_scale)
            plain = found_inf is None and grad_scale is None and self._parts is None
            if plain and self._before is not None and self._before.again(keys):
                return self._before
            kind = HostStep if plan.device is None or host_decides(groups, found_inf, plan) else DeviceStep
            step = kind(groups, self._groups, plan, keys, found_inf, grad_scale)
            self._before = step if plain else None
            return step
        except BaseException:
            if plan is not None:
                plan.unbind()
            raise

    def _planned(self, step: HostStep | DeviceStep) -> bool:
        """Make the plan where none fits; False: the step was only to create states."""
        if step.plan is None and not self._make_plan(step):
            return False
        if step.plan is not None and step.plan.shards:
            self._plan = None  # until the step is made, the norms that it carries are those of whole tensors
        return True

    @torch.inference_mode(False)  # states made within it could not be written outside of it
    @torch.no_grad()
    def _make_plan(self, step: HostStep | DeviceStep) -> bool:
        for group, spec in zip(self.param_groups, self._groups.specs):
            spec.rule.numbers(group, 1.0)  # raises, where it must, before any state is made
        self._plan = self._before = self._last = self._captured = None  # what they hold may go before another is made
        if self._parts is None:
            warn_without_parts(self.param_groups)
        step.plan = plan = Plan(
            self.param_groups, self._states, self._groups.specs, self.backend, self.state_dtype, self._multipliers()
        )
        if plan.new_states and not step.stepping and self._gradients_are_zero():
            plan.new_states.keep()  # torch.distributed.checkpoint makes states so: as if it had never stepped
            return False
        keys = plan.collect_gradients(self.param_groups, self._states)
        assert keys is not None
        step.keys = keys
        return True

    def _finish(self, step: HostStep | DeviceStep) -> None:
        """Count what was done."""
        assert step.plan is not None
        self._grad_norm = step.grad_norm if self._groups.wants_norm else self._grad_norm
        self._plan = step.plan if step.plan.reusable else None
        self._last = step.plan
        if step.captured:
            self._captured = step.plan
        else:
            self._count(step)
        if self._parts is not None:
            self._parts.reset()

    def _count(self, step: HostStep | DeviceStep, released: Container[Tensor] = ()) -> None:
        """Count a step in the groups; ``released``: what it has stepped and freed the gradient of."""
        if step.stepping:
            for g, (group, args) in enumerate(zip(self.param_groups, step.extras)):
                group["steps"] = steps = group["steps"] + 1
                if steps == LOOK and group["trust_ratio"] is not None and group["trust_ratio"].kind == "clars":
                    buckets = () if self._last is None else self._last.buckets
                    ratios = {m.parameter: ratio for b in buckets for m, ratio in zip(b.members, b.ratios())}
                    warn_of_cap(group["trust_ratio"], [(p, ratios[p]) for p in group["params"] if p in ratios])
                if (fold := args[FOLD]) is not None:
                    rule = self._groups.specs[g].rule
                    finish(group, self._states, fold, (*rule.states, *rule.scalars), step.lrs[g], released)
                    if fold.write_back and group["averaging"].on_write_back == "zero":
                        self._plan = None  # which may have been told that nobody touches the states
            if self._buffers is not None:
                self._buffers.fold(args[FOLD] for args in step.extras)

    def _skip(self, step: HostStep | DeviceStep) -> None:
        """The gradients are not finite: say so, or count it."""
        self._grad_norm = step.grad_norm
        step.check_finite()
        self._before = self._last = None  # nothing is stepped
        for group in self.param_groups:
            group["skipped_steps"] += 1

    def _gradients_are_zero(self) -> bool:
        """Whether all that may have a gradient have one of zeros, as torch.distributed.checkpoint makes them."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.requires_grad]
        if any(grad is None for grad in grads) or not any(grad.numel() for grad in grads):
            return False
        found = [grad.any() for grad in grads]
        return not any(one.full_tensor() if hasattr(one, "full_tensor") else one for one in found)

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)
    # torch.compile would bake counts and rates into graphs, and cannot see into C++.
    _untraced_step = torch._disable_dynamo(_hooked_step)

    @property
    def grad_norm(self) -> float | None:
        """Norm of all gradients in the last step, where that wanted it; before clipping. A GPU's is waited for here."""
        if callable(self._grad_norm):
            self._grad_norm = self._grad_norm()
        return self._grad_norm

    @property
    def skipped_steps(self) -> int:
        """How many steps ``nonfinite="skip"`` has left out."""
        return self.param_groups[0]["skipped_steps"]

    def read_counts(self) -> None:
        """Bring what ``param_groups`` count (``steps``, ``samples``, ``periods``) up to date with replayed CUDA graphs.

        A replay of a captured step counts on the GPU. ``step``, ``state_dict``, ``averaged_weights``, pickles and copies
        read the counts themselves, so that only who looks at ``param_groups`` needs this. It waits for the GPU if a
        step was captured; in a capture it does nothing.
        """
        if self._in_backward is not None:
            self._in_backward.refuse_open()
        if self._captured is not None and not self._captured.capturing():
            self._captured.read_counts(self.param_groups)

    def trust_ratios(self) -> dict[str, float]:
        """The trust ratio of every parameter that the last step has stepped, by name: see :meth:`name_parameters`.

        A parameter without a gradient has none in that step, and none has one in a step that ``nonfinite="skip"`` leaves out.
        One without a name goes by its place in the groups.
        """
        if self._last is None:
            return {}
        found = {m.name: ratio for bucket in self._last.buckets for m, ratio in zip(bucket.members, bucket.ratios())}
        return {name: ratio for name, ratio in found.items() if not math.isnan(ratio)}

    def master_parameters(self) -> dict[Tensor, Tensor]:
        """The exact weights of every parameter, which ``master_weights=True`` keeps behind those of 16 bits.

        Returns:
            By parameter, in the groups' order: new float32 tensors (DTensors of DTensors) where there are such, elsewhere the
            parameter itself, detached.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
            >>> optimizer = fused_opt.SGD([weight], lr=2.0**-12, master_weights=True)
            >>> weight.grad = torch.ones_like(weight)
            >>> optimizer.step()
            >>> weight.data
            tensor([1., 1.], dtype=torch.bfloat16)
            >>> optimizer.master_parameters()[weight]
            tensor([0.9998, 0.9998])
        """
        return {
            p: exact_of(p, self._states.get(p, {}), group["master_weights"]).detach()
            for group in self.param_groups
            for p in group["params"]
        }

    def name_parameters(self, model: torch.nn.Module) -> None:
        """Call the parameters what the model calls them: in errors, ``trust_ratios()`` and the trackers' ``counts()``.

        The names are ``param_names`` of the groups, as torch.optim makes them of ``model.named_parameters()``, and are in the
        state_dict as there. Groups that are added later then take ``(name, tensor)`` pairs, too.

        Args:
            model: whose ``named_parameters()`` are all that is optimized here, and maybe more.

        Raises:
            ValueError: where it lacks one; nothing has been named then.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = fused_opt.LARS(model.parameters(), lr=1.0)
            >>> optimizer.name_parameters(model)
            >>> model(torch.ones(2)).sum().backward()
            >>> optimizer.step()
            >>> list(optimizer.trust_ratios())
            ['weight', 'bias']
        """
        names = {p: name for name, p in model.named_parameters()}
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p not in names:
                    raise ValueError(
                        f"parameter {name_of(group, g, i)}, of shape {tuple(p.shape)}, is none of this "
                        f"{type(model).__name__}'s; give the model that the parameters are of"
                    )
        for group in self.param_groups:
            group["param_names"] = [names[p] for p in group["params"]]
        self._plan = None

    def track_parts(
        self, kind: Literal["microbatch", "sample", "probe"] = "microbatch", model: torch.nn.Module | None = None
    ) -> PartTracker:
        """Take the norms of the parts that the gradients are sums of, for CLARS; ``.remove()`` on the result ends it.

        Args:
            kind: ``"microbatch"``: every ``backward()`` between two steps is a part, whether or not the loss is divided by
                their number. ``"sample"``: every sample of ``model``'s batches is, without forming its gradient (see
                :class:`fused_opt.parts.samples.Samples` for the modules). ``"probe"``: what ``.set()`` on the result was
                given, which :func:`fused_opt.probe_parts` computes from fresh batches.
            model: what the backward runs through. For ``"sample"``, whose modules own the parameters. Where processes train
                together, as it is wrapped: under DistributedDataParallel the parts are those of all processes; of sharded
                parameters (FSDP2, tensor parallelism) a micro-batch is that of all processes together.

        Raises:
            ValueError: for another kind, a model whose samples cannot be told apart (BatchNorm in training mode), no model
                where several processes train, where parts are tracked already, or where no group has CLARS's trust ratio.
        """
        kinds: dict[str, type[PartTracker]] = {"microbatch": Microbatches, "sample": Samples, "probe": Probe}
        if kind not in kinds:
            raise ValueError(f"Invalid kind of parts: {kind!r}; there are 'microbatch', 'sample' and 'probe'")
        if self._in_backward is not None:
            raise ValueError(
                "step_in_backward is on, which frees a gradient before the next part of it comes; remove() its handle first"
            )
        if self._partial:
            raise ValueError(
                "ZeroRedundancyOptimizer made this optimizer, of the parameters of one process; parts of a gradient are "
                "tracked in all processes. CLARS under DistributedDataParallel or FSDP2 (fully_shard) has them"
            )
        if not wants_parts(self.param_groups):
            raise ValueError(
                "no group of this optimizer has CLARS's trust ratio, and nothing else uses the norms of the gradient's "
                "parts; fused_opt.CLARS and trust_ratio=fused_opt.TrustRatio('clars') have it"
            )
        if self._parts is not None and self._parts.active:
            raise ValueError("parts are tracked already; remove() what track_parts returned first")
        self._parts = kinds[kind](self, model, self.backend)
        return self._parts

    def step_in_backward(self, model: torch.nn.Module) -> StepInBackward:
        """Step every parameter within the backward, and free its gradient at once; ``.remove()`` on the result ends it.

        The loop stays as it is. ``step()`` after every backward counts the step, and steps what has a gradient from
        elsewhere; the weights are those of ordinary steps, bit for bit. Each gradient is complete when it comes: a weight
        that is used twice is stepped once. What looks at all gradients between backward and step finds none.

        Args:
            model: what the backward runs through, wrapped as it is.

        Raises:
            ValueError: with ``max_grad_norm``, ``nonfinite``, ``differentiable``, tracked parts, a parameter that is in the
                groups twice, DistributedDataParallel, ZeroRedundancyOptimizer, or where it is on already. A second gradient
                of a parameter before ``step()``, a GradScaler, and a capture in a CUDA graph raise a RuntimeError when they
                are met.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = fused_opt.SGD(model.parameters(), lr=0.1)
            >>> handle = optimizer.step_in_backward(model)
            >>> model(torch.ones(2)).sum().backward()
            >>> model.weight.grad is None
            True
            >>> optimizer.step()
            >>> handle.remove()
        """
        if self._in_backward is not None:
            raise ValueError("step_in_backward is on already; remove() what it returned first")
        self._in_backward = StepInBackward(self, model)
        self._plan = self._before = self._last = None
        return self._in_backward

    def average_buffers(self, model: torch.nn.Module) -> AveragedBuffers:
        """From now on average the model's buffers, such as BatchNorm's running statistics, at every sample of the weights.

        As timm's ``ModelEmaV3`` and torch's ``AveragedModel(use_buffers=True)`` do: :meth:`averaged_weights` then has both,
        and needs no ``update_bn``. Averages are in float32 or float64; buffers that are not floating point stay as they are.

        Args:
            model: whose buffers. Another call is about another model.

        Returns:
            Has the ``averages`` by name, and ``state_dict()`` and ``load_state_dict()``: save it beside the optimizer. It
            does not travel with pickles and copies of the optimizer.

        Raises:
            ValueError: where the groups have no averaging, several, or another one than :class:`EMA`. A step captured in a
                CUDA graph raises a RuntimeError.

        Example:
            >>> norm = torch.nn.BatchNorm1d(1)
            >>> optimizer = fused_opt.SGD(norm.parameters(), lr=0.1, averaging=fused_opt.EMA(beta=0.5))
            >>> buffers = optimizer.average_buffers(norm)
            >>> for mean in (10.0, 20.0):
            ...     norm(torch.tensor([[mean], [mean]])).sum().backward()
            ...     optimizer.step()
            >>> round(norm.running_mean.item(), 4)  # 1 first, then 0.9 * 1 + 0.1 * 20
            2.9
            >>> with optimizer.averaged_weights():
            ...     round(norm.running_mean.item(), 4)
            1.95
        """
        averaged = [group for group in self.param_groups if group["averaging"] is not None]
        self._buffers = AveragedBuffers(model, averaged)
        return self._buffers

    @contextmanager
    def averaged_weights(self, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Within the block the parameters hold their averages; afterwards what they held before, whatever happens.

        Parameters of which no sample was taken yet keep their weights. BatchNorm's running statistics belong to the
        weights they were made with: estimate them anew within the block with torch.optim.swa_utils.update_bn, or have them
        averaged, too, by :meth:`average_buffers`.

        Args:
            model: whose buffers, such as BatchNorm's running statistics, are swapped back with the weights. Without it they
                stay as the block leaves them, with a warning where BatchNorm runs in training mode.

        Raises:
            RuntimeError: where no group has an averaging.
        """
        self.read_counts()
        averaged = [group for group in self.param_groups if group["averaging"] is not None]
        if not averaged:
            raise RuntimeError("no group of this optimizer has averaging=; fused_opt.EMA(beta) is one")
        with ExitStack() as stack:
            stack.enter_context(swapped_in(averaged, self._states))
            if model is not None:
                stack.enter_context(buffers_restored(model))
            if self._buffers is not None:
                stack.enter_context(self._buffers.swapped_in())
            elif model is None:
                stack.enter_context(batch_norm_noticed())
            before, self._holds_averages = self._holds_averages, True
            try:
                yield
            finally:
                self._holds_averages = before


write_out_root(FusedOptimizer)


def _evaluate(closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        return closure()
