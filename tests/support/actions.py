"""What users do with an optimizer between two steps, in any order; what happens to its tensors is in plan_events."""

import math
from unittest import mock

import torch

import fused_opt
from fused_opt import EMA, plan

from . import action_copies, action_extras, plan_events
from .action_run import Run
from .kernels import as_on_a_gpu
from .plan_events import new_values

__all__ = ["ACTIONS", "OFTEN", "Run"]


# ----------------------------------------------------------------------------------------------- steps and gradients


def step(run, index):
    run.step()


def gradients(run, index):
    run.gradients(index)


def backwards(run, index):
    """One to three micro-batches."""
    run.optimizer.zero_grad()
    for part in range(1 + index % 3):
        loss = [(p * new_values(p, index + part)).sum() for p in run.parameters() if p.requires_grad]
        if loss:
            sum(loss).backward()


def clip_gradients(run, index):
    torch.nn.utils.clip_grad_norm_(run.parameters(), 0.1 * (1 + index % 9))


def step_with_a_scaler(run, index):
    """Unscaled by the step or before it, and clipped; every third gradient overflows.

    A GPU counts overflowed steps unless noise or averages are counted by them, and the reference never does.
    """
    optimizer, scaler = run.optimizer, run.scaler
    counted = run.extras and all(group["noise"] is group["averaging"] is None for group in optimizer.param_groups)
    of = [p for p in run.parameters() if p.grad is not None]
    if not of:
        return
    scaler.scale(torch.ones(()))
    for p in of:
        p.grad = p.grad * scaler.get_scale()
        if index % 3 == 0 and p.numel() and not (counted and as_on_a_gpu()):
            p.grad[(0,) * p.ndim] = math.inf
    if index % 2 or not getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)  # as GradScaler does itself before it calls such a step, which may raise
    if index % 2:
        torch.nn.utils.clip_grad_norm_(of, 0.5)
    run.attempt(lambda: scaler.step(optimizer))
    for attribute in ("found_inf", "grad_scale"):  # where the step raised, GradScaler leaves them
        optimizer.__dict__.pop(attribute, None)
    scaler.update()
    run.gradients(index)


def step_with_a_closure(run, index):
    def closure():
        if index % 3 == 0:
            raise ValueError("from the closure")
        assert torch.is_grad_enabled()
        return torch.tensor(1.0)

    run.gradients(index)
    run.step(closure)


def step_with_a_hook_that_raises(run, index):
    def hook(*_):
        raise ValueError("from the hook")

    after = index % 2 == 1
    register = run.optimizer.register_step_post_hook if after else run.optimizer.register_step_pre_hook
    handle = register(hook)
    run.step(made=after)
    handle.remove()


def step_with_a_sparse_gradient(run, index):
    """Of SGD, or a refusal; a buffer of momentum is sparse in torch.optim, and decay is refused there."""
    p = run.pick(index)
    (group,) = (group for group in run.optimizer.param_groups if any(p is q for q in group["params"]))
    plain = not group.get("momentum", 1) and not group["weight_decay"]
    if p.ndim == 0 or not p.numel() or (isinstance(run.optimizer, (torch.optim.SGD, fused_opt.SGD)) and not plain):
        return
    if run.extras and run.group(0)["nonfinite"] == "raise":
        return
    if not run.fused and not isinstance(run.optimizer, torch.optim.SGD):  # it would make states before it refuses
        return run.log.extend([RuntimeError, [False] * len(run.parameters())])
    rows = torch.tensor([[index % len(p)] * 2])
    kept, p.grad = p.grad, None
    p.grad = torch.sparse_coo_tensor(rows, new_values(p, index)[:1].repeat_interleave(2, 0), p.shape)
    run.step()
    p.grad = None
    p.grad = kept


def step_with_zeros_without_memory(run, index):
    p = run.pick(index)
    p.grad = torch._efficientzerotensor(p.shape, dtype=p.dtype)
    run.step()
    p.grad = None


def step_that_runs_out_of_memory(run, index):
    """In the nth state that is made, or else before anything is stepped."""
    if not run.fused:
        return
    made, zeros_like = [], torch.zeros_like

    def few(*args, **kwargs):
        made.append(args)
        if len(made) > index % 5:
            raise MemoryError
        return zeros_like(*args, **kwargs)

    with mock.patch.object(torch, "zeros_like", few), mock.patch.object(plan.Plan, "run", side_effect=MemoryError):
        before = len(run.log)
        run.attempt(run.optimizer.step)
    del run.log[before:]


# -------------------------------------------------------------------------------------------------- parameter groups


def settings_of_a_group(run, index):
    group = run.group(index)
    group["lr"] = 0.01 * (index % 6)
    group["weight_decay"] = 0.1 * (index % 3)
    group["maximize"] = index % 5 == 0
    if "nesterov" in group:
        group.update(momentum=0.3 * (index % 4), dampening=0.0, nesterov=index % 8 in (1, 3, 6))
    elif "eps" in group:
        group["betas"] = (0.1 * (index % 10), 0.9)


def move_a_parameter_to_another_group(run, index):
    source, target = run.group(index), run.group(index + 1)
    if len(source["params"]) > 1:
        target["params"].insert(
            index % (len(target["params"]) + 1), source["params"].pop(index % len(source["params"]))
        )


def remove_a_group(run, index):
    if len(run.optimizer.param_groups) > 1:
        for p in run.optimizer.param_groups.pop(index % len(run.optimizer.param_groups))["params"]:
            run.retire(p)


def add_what_is_there(run, index):
    run.attempt(lambda: run.optimizer.add_param_group({"params": [run.pick(index)]}))


BAD = [
    ("weight_decay", -1.0),
    ("weight_decay", "much"),
    ("lr", math.nan),
    ("lr", "fast"),
    ("lr", None),
    ("max_grad_norm", 0),
    ("max_grad_norm", "small"),
    ("nonfinite", "bogus"),
    ("noise", 0.1),
    ("averaging", EMA),
    ("trust_ratio", "lars"),
    ("betas", (1.0, 0.9)),
    ("eps", -1.0),
    ("momentum", math.nan),
    ("dampening", "little"),
]


def step_with_a_bad_setting(run, index):
    group, (key, value) = run.group(index), BAD[index % len(BAD)]
    if not run.fused or key not in group:
        return
    good, group[key] = group[key], value
    before = len(run.log)
    run.attempt(run.optimizer.step)
    assert run.log.pop() is not None, (key, value)
    assert len(run.log) == before
    group[key] = good


def tie_memory(run, index):
    """Of two parameters, exactly or with a shift."""
    p, q = run.pick(index), run.pick(index + 1)
    shift = index % 3
    if p is q or p.dtype != q.dtype or p.numel() + shift > q.numel() or not q.is_contiguous():
        return
    run.tied = True
    run.retired.clear()
    p.grad = None
    p.data = q.data.flatten()[shift : shift + p.numel()].view(p.shape)
    p.grad = new_values(p, index)


# --------------------------------------------------------------------------------------------------------- all of them

# The first three are above in other forms. After a step of ours torch refuses to swap a parameter that was cast: a kept plan
# refers to its gradient's place in the graph (native.py). torch.optim keeps the buffers of gradients of another dtype in that
# dtype, or raises.
NOT_HERE = (
    plan_events.cast,
    plan_events.load_state_dict,
    plan_events.hyper_parameters,
    plan_events.swap_tensors,
    plan_events.gradient_of_another_dtype,
)
OFTEN = [step, gradients, backwards]
ACTIONS = [
    *OFTEN,
    clip_gradients,
    step_with_a_scaler,
    step_with_a_closure,
    step_with_a_hook_that_raises,
    step_with_a_sparse_gradient,
    step_with_zeros_without_memory,
    step_that_runs_out_of_memory,
    settings_of_a_group,
    move_a_parameter_to_another_group,
    remove_a_group,
    add_what_is_there,
    step_with_a_bad_setting,
    tie_memory,
    action_copies.through_a_checkpoint,
    action_copies.load_into_another_optimizer,
    action_copies.load_a_bad_state_dict,
    action_copies.deepcopy,
    action_copies.pickled,
    action_copies.saved_whole,
    action_copies.step_beside_a_resumed_one,
    action_extras.noise,
    action_extras.averaging,
    action_extras.trust_ratio,
    action_extras.decay,
    action_extras.clipping,
    action_extras.clipping_in_one_group,
    action_extras.step_with_a_nan,
    action_extras.track_parts,
    action_extras.scale_layers,
    action_extras.averaged_weights,
    action_extras.cast,
    *(event for event in plan_events.EVENTS if event not in NOT_HERE),
]
