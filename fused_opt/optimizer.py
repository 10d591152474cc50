"""The only torch.optim.Optimizer of the package: hyper-parameters in, one fused step out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import backends
from .checkpoint import COUNTS, Checkpoints
from .extras import TrustRatio, WeightNoise
from .extras.averaging import Averaging, Fold, sample_idle, swapped_in
from .extras.clipping import NONFINITE, PASS, RAISE, allows, clip_factor, wants_norm
from .parts.microbatches import Microbatches
from .parts.probe import Probe
from .parts.samples import Samples
from .plan import AVERAGE, Plan, Row, Shape, Signals
from .shard_norms import DIRECTION, GRADIENT, WEIGHT, agree
from .shards import within_zero
from .step import host_decides, norm_reader, rates

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Extras(TypedDict, total=False):
    """What every optimizer of the package takes beyond torch.optim's arguments."""

    trust_ratio: TrustRatio | None
    noise: WeightNoise | None
    averaging: Averaging | None
    max_grad_norm: float | None
    nonfinite: str
    state_dtype: torch.dtype | None
    backend: str


class FusedOptimizer(Checkpoints):
    """What the optimizers of this package have in common.

    Everything but ``state_dtype`` and ``backend`` is in ``param_groups``, where it can be read, changed between steps, and
    (``trust_ratio``, ``noise``, ``averaging``) set for single groups.

    Args:
        params: as torch.optim takes them.
        defaults: the hyper-parameters of a group that does not set its own.
        trust_ratio: a :class:`TrustRatio`, or None.
        noise: a :class:`WeightNoise`, or None.
        averaging: :class:`PSWA`, :class:`PWALKS`, :class:`PSWM`, :class:`SWM` or :class:`EMA`, or None.
        max_grad_norm: clip the norm of all gradients together to this, as torch.nn.utils.clip_grad_norm_ before the step
            would, without writing the gradients; the norm is then ``grad_norm``.
        nonfinite: what to do when a gradient is not finite: ``"pass"`` it on as torch.optim does, ``"skip"`` the step
            (nothing changes; ``skipped_steps`` counts), or ``"raise"`` a RuntimeError that names the parameter.
        state_dtype: dtype of the states; None: the parameter's, as torch keeps it. ``torch.float32`` keeps the states of
            bfloat16 and float16 parameters in full, also through ``load_state_dict``.
        backend: ``"auto"`` takes for every parameter the first of :func:`fused_opt.backends.available` that can step
            it; a named one steps it or raises with the reason.

    A step in which every group's learning rate is 0 counts for neither noise nor averaging and makes none. If it is the
    first and every gradient is zero, as in the step by which torch.distributed.checkpoint creates the states that it saves
    or loads into, it counts for nothing at all.
    """

    _grad_norm: float | Callable[[], float] | None = None

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        trust_ratio: TrustRatio | None = None,
        noise: WeightNoise | None = None,
        averaging: Averaging | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "pass",
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        if backend != "auto" and (reason := backends.get(backend).unavailable()):
            raise RuntimeError(f"backend {backend!r} cannot run here: {reason}. backend='auto' takes one that can")
        if state_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"Invalid state_dtype: {state_dtype}; None, torch.float32 and torch.float64 are known")
        extras = {
            "trust_ratio": trust_ratio,
            "noise": noise,
            "averaging": averaging,
            "max_grad_norm": max_grad_norm,
            "nonfinite": nonfinite,
        }
        counts = dict.fromkeys(COUNTS, 0)
        defaults = {**defaults, **extras, **counts}
        self._check_all(defaults)
        self.backend = backend
        self.state_dtype = state_dtype
        self._scales: dict[Tensor, tuple[float, float]] = {}
        self._plan: Plan | None = None
        self._parts: Microbatches | None = None
        self._last: Plan | None = None  # the plan of the last step
        super().__init__(params, defaults)
        self._partial = within_zero()
        for group in self.param_groups if self._partial else ():
            off = {"max_grad_norm": None, "nonfinite": PASS, "noise": None}
            if asked := [name for name, value in off.items() if group[name] != value]:
                raise ValueError(
                    f"{', '.join(asked)}: ZeroRedundancyOptimizer makes an optimizer of some of the parameters in every "
                    f"process, and this is about all of them (noise is counted by their places). What would work: "
                    f"torch.nn.utils.clip_grad_norm_ before the step, or FSDP2 (fully_shard)"
                )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves gradients scaled; Lightning does not clip them then in mixed precision."""
        return self.defaults.get("fused") is not False

    def _check(self, options: Mapping[str, Any]) -> None:
        """Raise if a hyper-parameter of the rule is out of its range."""

    def _check_all(self, options: Mapping[str, Any]) -> None:
        self._check(options)
        for name, kind in (("trust_ratio", TrustRatio), ("noise", WeightNoise), ("averaging", Averaging)):
            if not isinstance(options[name], kind | None):
                raise TypeError(f"{name} takes a fused_opt.{kind.__name__} or None, not {options[name]!r}")
        limit = options["max_grad_norm"]
        if limit is not None and not limit > 0:
            raise ValueError(f"Invalid max_grad_norm: {limit}; it must be positive, or None for no clipping")
        if options["nonfinite"] not in NONFINITE:
            raise ValueError(
                f"Invalid nonfinite: {options['nonfinite']!r}; there are {', '.join(map(repr, NONFINITE))}"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does, after its hyper-parameters were found in range."""
        if isinstance(param_group, dict):
            self._check_all({**self.defaults, **param_group})
            if self.param_groups:  # it joins the others' count of steps
                oldest = self.param_groups[0]
                alike = param_group.get("averaging", self.defaults["averaging"]) == oldest["averaging"]
                param_group.update({name: oldest[name] for name in (COUNTS if alike else ("steps", "skipped_steps"))})
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            tensors = [item[1] if isinstance(item, tuple) else item for item in params]
            first = {id(p): i for i, p in reversed(list(enumerate(tensors)))}
            if twice := [i for i, p in enumerate(tensors) if first[id(p)] != i]:
                raise ValueError(
                    f"parameter {twice[0]} of group {len(self.param_groups)} is a duplicate of one before it, and a step "
                    f"takes each once; list it once"
                )
            if not isinstance(param_group["params"], set):
                param_group["params"] = params  # an iterator is spent now
        super().add_param_group(param_group)

    def scale_layers(
        self, *, lr: Mapping[Tensor, float] | None = None, weight_decay: Mapping[Tensor, float] | None = None
    ) -> None:
        """Set multipliers of the learning rate or the weight decay for single parameters; no parameter groups needed.

        They take effect at the next step, multiply whatever the groups say then, and stay until set again; parameters
        not named keep theirs, 1 at first. They travel with pickle and deepcopy but not in the state_dict.

        Raises:
            ValueError: for a multiplier that is negative or not finite, or a tensor that is not optimized here.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = fused_opt.SGD([weight], lr=0.1)
            >>> optimizer.scale_layers(lr={weight: 0.5})
            >>> weight.sum().backward()
            >>> optimizer.step()
            >>> weight.data
            tensor([0.9500, 0.9500])
        """
        known = {p for group in self.param_groups for p in group["params"]}
        scales = dict(self._scales)
        for index, given in enumerate((lr or {}, weight_decay or {})):
            for p, scale in given.items():
                if p not in known:
                    raise ValueError(f"a multiplier for a tensor of shape {tuple(p.shape)} that is not optimized here")
                if not 0 <= scale < float("inf"):
                    raise ValueError(f"Invalid multiplier: {scale}; it must be finite and at least 0")
                old = scales.get(p, (1.0, 1.0))
                scales[p] = (float(scale), old[1]) if index == 0 else (old[0], float(scale))
        self._scales = scales
        self._plan = None

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
            or torch.autograd._profiler_enabled()
        ):
            return self._hooked_step(*args, **kwargs)
        return self._step(*args, **kwargs)

    step.hooked = True  # type: ignore[attr-defined]  # torch: do not wrap it again

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # torch.amp.GradScaler sets these for the duration of a step. It multiplies by a grad_scale that it finds, None
        # included, so the class must not have one.
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        groups, state, plan = self.param_groups, self.state, self._plan
        # Where the plan's GPU can be left alone with them, nobody waits for what it knows.
        device = None if plan is None or plan.device is None or host_decides(groups, found_inf) else plan.device
        if device is None and found_inf is not None and found_inf.item():
            return loss
        scale = 1.0 if device is not None or grad_scale is None else 1.0 / grad_scale.item()
        signals = None if device is None else Signals(found_inf, grad_scale)
        lrs = rates(groups, device)
        wants = wants_norm(groups)
        shapes = [Shape(self._rule(g), g["noise"] is not None, g["averaging"] is not None) for g in groups]
        keys = None
        if plan is not None and plan.shapes == shapes:
            keys = plan.gather(groups, state)
        if plan is None or keys is None:
            self._plan = None
            if signals is not None:  # to make a plan, the host must know them after all
                self._step()
                return loss
            for group, shape in zip(groups, shapes):
                shape.rule.coefficients(group, 1.0)  # raises, where it must, before any state is made
            with torch.no_grad():
                plan = Plan(groups, state, shapes, self.backend, self.state_dtype, self._scales)
                if plan.creates and not any(lrs) and self._gradients_are_zero():
                    return loss  # how torch.distributed.checkpoint makes states: as in an optimizer that never stepped
                keys = plan.gather(groups, state)
                assert keys is not None
        if self._parts is not None:
            if found_inf is not None and grad_scale is None:
                self._parts.recheck()
            self._parts.share()
            for bucket in plan.buckets:
                bucket.know([self._parts.norms(member.parameter) for member in bucket.members])

        stepping = any([isinstance(lr, Tensor) or lr for lr in lrs])  # noqa: C419  # as in rates()
        extras = [self._extras(group, lr) if stepping else (None, None, None) for group, lr in zip(groups, lrs)]

        def rows() -> list[list[Row]]:
            scales = [-scale if group["maximize"] else scale for group in groups]
            return [
                [Row(lrs[g], scales[g], shapes[g].rule.coefficients(groups[g], t), *extras[g]) for g, t in of_bucket]
                for of_bucket in keys
            ]

        if plan.shards:
            self._plan = None  # until the step is made, the norms that it carries are those of whole tensors
            first = {WEIGHT, GRADIENT} if wants else {WEIGHT, GRADIENT, DIRECTION}
            agree(plan, rows(), extras, self._parts, gradients=wants, among=first)
        if wants and signals is not None:
            norm2 = plan.sum_gradients()
            signals = signals._replace(norm2=norm2, max_norm=groups[0]["max_grad_norm"])
            self._grad_norm = norm_reader(norm2, grad_scale)
        elif wants:
            self._grad_norm = norm = scale * math.sqrt(sum(bucket.grad_norm2() for bucket in plan.buckets))
            if not allows(groups[0]["nonfinite"], norm):
                named = ", ".join(plan.nonfinite()) if groups[0]["nonfinite"] == RAISE else None
                plan.undo(state)
                if named is not None:
                    raise RuntimeError(
                        f"the gradient of parameter {named} is not finite, and nonfinite='raise' was asked for; "
                        f"nonfinite='skip' leaves out such steps"
                    )
                for group in groups:
                    group["skipped_steps"] += 1
                return loss
            scale *= clip_factor(norm, groups[0]["max_grad_norm"])
            if plan.shards:
                agree(plan, rows(), extras, None, gradients=False, among={DIRECTION})
        plan.run(rows(), signals)
        self._plan = plan if plan.lasting else None
        self._last = plan
        if stepping:
            self._count(extras)
        if self._parts is not None:
            self._parts.reset()
        return loss

    def _gradients_are_zero(self) -> bool:
        found = [p.grad.any() for group in self.param_groups for p in group["params"] if p.grad is not None]
        return not any(one.full_tensor() if hasattr(one, "full_tensor") else one for one in found)

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)
    # torch.compile would bake counts and rates into graphs, and cannot see into C++.
    _untraced_step = torch._disable_dynamo(_hooked_step)

    @staticmethod
    def _extras(group: dict[str, Any], lr: float | Tensor) -> tuple[Any, Any, Any]:
        """The rest of a group's row: trust ratio, noise, average."""
        ratio, noise, averaging, t = group["trust_ratio"], group["noise"], group["averaging"], group["steps"]
        return (
            None if ratio is None else ratio.row(),
            None if noise is None else (noise.sigma(t, float(lr)), noise.relative, noise.seed, t),
            None if averaging is None else averaging.fold(t + 1, group["samples"], group["periods"]),
        )

    def _count(self, extras: list[tuple[Any, Any, Fold | None]]) -> None:
        for group, (_, _, fold) in zip(self.param_groups, extras):
            group["steps"] += 1
            if fold is None:
                continue
            sample_idle(group["params"], self.state, AVERAGE, fold)
            group["samples"] += fold.add > 0
            if fold.write_back:
                group["samples"] = 0
                group["periods"] += 1
                if group["averaging"].on_write_back == "zero":
                    rule = self._rule(group)
                    for p in group["params"]:
                        for slot in (*rule.states, "step"):
                            self.state[p].pop(slot, None)

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

    def trust_ratios(self) -> dict[str, float]:
        """The trust ratio of every parameter in the last step, by name (its place in the groups where it has none)."""
        if self._last is None:
            return {}
        return {m.name: ratio for b in self._last.buckets for m, ratio in zip(b.members, b.ratios())}

    def track_parts(self, kind: str = "microbatch", model: torch.nn.Module | None = None) -> Microbatches:
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
                where several processes train, or where parts are tracked already.
        """
        if kind not in ("microbatch", "sample", "probe"):
            raise ValueError(f"Invalid kind of parts: {kind!r}; there are 'microbatch', 'sample' and 'probe'")
        if self._partial:
            raise ValueError(
                "ZeroRedundancyOptimizer made this optimizer, of the parameters of one process; parts of a gradient are "
                "tracked in all processes. CLARS under DistributedDataParallel or FSDP2 (fully_shard) has them"
            )
        if self._parts is not None and self._parts.active:
            raise ValueError("parts are tracked already; remove() what track_parts returned first")
        parameters = [p for group in self.param_groups for p in group["params"]]
        if kind == "probe":
            self._parts = Probe(model)
        else:
            self._parts = (Samples if kind == "sample" else Microbatches)(parameters, model)
        self._parts.backend = self.backend
        return self._parts

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the parameters hold their averages; afterwards what they held before, whatever happens.

        Parameters of which no sample was taken yet keep their weights. BatchNorm's running statistics belong to the
        weights they were made with: estimate them anew within the block with torch.optim.swa_utils.update_bn.

        Raises:
            RuntimeError: where no group has an averaging.
        """
        averaged = [group for group in self.param_groups if group["averaging"] is not None]
        if not averaged:
            raise RuntimeError("no group of this optimizer has averaging=; fused_opt.EMA(beta) is one")
        with swapped_in(averaged, self.state, AVERAGE):
            yield
