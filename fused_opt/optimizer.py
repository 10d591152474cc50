"""The only torch.optim.Optimizer of the package: hyper-parameters in, one fused step out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import backends
from .plan import Plan, name_of
from .rule import Rule

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Extras(TypedDict, total=False):
    """What every optimizer of the package takes beyond torch.optim's arguments."""

    state_dtype: torch.dtype | None
    backend: str


def check_lr(options: Mapping[str, Any]) -> None:
    """Raise, in torch.optim's words, unless the learning rate is one."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")


def check_decay(options: Mapping[str, Any]) -> None:
    """Raise, in torch.optim's words, unless the weight decay is one."""
    if not options["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}")


def check_switches(options: Mapping[str, Any]) -> None:
    """Refuse the switches of torch.optim that would change what a step means."""
    if options["differentiable"]:
        raise RuntimeError(
            "differentiable=True asks for a step that autograd can follow, and a fused step writes in place; "
            "torch.optim's class of the same name takes differentiable=True"
        )
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


class FusedOptimizer(torch.optim.Optimizer):
    """What the optimizers of this package have in common.

    Args:
        params: as torch.optim takes them.
        defaults: the hyper-parameters of a group that does not set its own.
        state_dtype: dtype of the states; None: the parameter's, as torch keeps it. ``torch.float32`` keeps the states
            of bfloat16 and float16 parameters in full, also through ``load_state_dict``.
        backend: ``"auto"`` takes for every parameter the first of :func:`fused_opt.backends.available` that can step
            it; a named one steps it or raises with the reason.
    """

    # torch.amp.GradScaler leaves these two on the instance for the duration of a step.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        if backend != "auto" and (reason := backends.get(backend).unavailable()):
            raise RuntimeError(f"backend {backend!r} cannot run here: {reason}. backend='auto' takes one that can")
        if state_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"Invalid state_dtype: {state_dtype}; None, torch.float32 and torch.float64 are known")
        self._check(defaults)
        self.backend = backend
        self.state_dtype = state_dtype
        self._scales: dict[Tensor, tuple[float, float]] = {}
        self._plan: Plan | None = None
        super().__init__(params, defaults)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        raise TypeError(f"{type(self).__name__} is not an optimizer by itself; fused_opt.SGD is one")

    def _check(self, options: Mapping[str, Any]) -> None:
        """Raise if a hyper-parameter is out of its range."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim does, after its hyper-parameters were found in range."""
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
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
        if self.found_inf is not None and self.found_inf.item():
            return loss
        grad_scale = 1.0 if self.grad_scale is None else 1.0 / self.grad_scale.item()

        groups, state, plan = self.param_groups, self.state, self._plan
        lrs = [float(group["lr"]) for group in groups]
        if any(lr != lr for lr in lrs):
            raise ValueError("Invalid learning rate: nan")
        keys = None
        if plan is not None and plan.rules == [self._rule(group) for group in groups]:
            keys = plan.gather(groups, state)
        if plan is None or keys is None:
            with torch.no_grad():
                plan = Plan(groups, state, self._rule, self.backend, self.state_dtype, self._scales)
                keys = plan.gather(groups, state)
                assert keys is not None
            self._plan = plan if plan.lasting else None
        signs = [-grad_scale if group["maximize"] else grad_scale for group in groups]
        rows = [
            [(lrs[g], signs[g], *plan.rules[g].coefficients(groups[g], t)) for g, t in of_bucket] for of_bucket in keys
        ]
        for bucket, of_bucket in zip(plan.buckets, rows):
            bucket.run(of_bucket)
        return loss

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)

    def __getstate__(self) -> dict[str, Any]:
        own = {"backend": self.backend, "state_dtype": self.state_dtype, "_scales": self._scales}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan = None
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():  # a checkpoint of torch.optim, or one older than the key
                group.setdefault(key, value)
            for p in group["params"]:
                step = self.state[p].get("step") if p in self.state else None
                if step is not None and not isinstance(step, Tensor):
                    self.state[p]["step"] = torch.tensor(float(step))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim's class of the same name.

        Raises:
            ValueError: if the groups do not match, or a saved state has another shape than its parameter; nothing has
                been changed then.
        """
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        named = [
            (p, name_of(group, g, i))
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
        ]
        slots = {slot for group in self.param_groups for slot in self._rule(group).states}
        saved = [(p, name, state_dict["state"].get(index, {})) for (p, name), index in zip(named, saved_ids)]
        for p, name, of_p in saved:
            for slot in slots:
                value = of_p.get(slot)
                if isinstance(value, Tensor) and value.shape != p.shape:
                    raise ValueError(
                        f"state {slot!r} of parameter {name} has shape {tuple(value.shape)} in the loaded state_dict, "
                        f"and the parameter {tuple(p.shape)}; load the state of a model of the same shapes"
                    )
        super().load_state_dict(state_dict)
        if self.state_dtype is not None:  # torch has cast the states to the parameter's dtype
            for p, _, of_p in saved:
                for slot in slots:
                    if isinstance(of_p.get(slot), Tensor):
                        self.state[p][slot] = of_p[slot].to(device=p.device, dtype=self.state_dtype)
