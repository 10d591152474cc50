"""What users do with an optimizer between two steps, in any order; what happens to its tensors is in plan_events."""

import copy
import io
import math
import pickle
from unittest import mock

import torch

import fused_opt
from fused_opt import EMA, PSWA, PSWM, PWALKS, SWM, TrustRatio, WeightNoise, plan
from fused_opt.parts.tracker import wants_parts

from . import plan_events
from .compare import unchanged
from .kernels import as_on_a_gpu
from .parameters import checkpoint, clones
from .plan_events import new_values


class Run(plan_events.Run):
    """A run of plan_events with what else a program has: a GradScaler, a part tracker; and a log of what was seen.

    Args:
        make: the class of the optimizer.
        extras: whether the run it is compared with has them as well.
        options: the optimizer's.
    """

    def __init__(self, make, extras, **options):
        super().__init__(make, **options)
        self.options = options
        self.fused = isinstance(self.optimizer, fused_opt.FusedOptimizer)
        self.extras = extras
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.tracker = None
        self.tied = False
        self.log = []
        self.bound = 1e-11

    def do(self, action, index):
        """An action, and what torch itself raises in it, as when an expanded gradient is clipped."""
        try:
            action(self, index)
        except RuntimeError as error:
            self.log.append(type(error))

    def attempt(self, call, made=False):
        """Log what a call raises; unless it was ``made`` all the same, nothing has changed then."""
        look = unchanged(self.optimizer)
        look.__enter__()
        try:
            call()
        except (MemoryError, RuntimeError, TypeError, ValueError) as error:
            if self.fused and not made:
                look.__exit__(None, None, None)
            self.log.append(type(error))
        else:
            self.log.append(None)

    def retire(self, tensor):
        """Unless another parameter may have the same memory."""
        if not self.tied:
            super().retire(tensor)

    def step(self, *args, made=False):
        before = [(p, p._version) for p in self.parameters()]
        self.attempt(lambda: self.optimizer.step(*args), made)
        for tensor, values in self.retired:
            assert torch.equal(tensor, values)
        self.log.append([p._version > version for p, version in before])  # what a step writes, autograd knows
        if self.extras and self.log[-2] is None:
            ratios, with_gradient = self.optimizer.trust_ratios(), [p for p in self.parameters() if p.grad is not None]
            self.log.append([ratios.get(name, 1.0) for name, p in self.names() if any(p is q for q in with_gradient)])
            self.log.append(self.optimizer.grad_norm)

    def names(self):
        groups = enumerate(self.optimizer.param_groups)
        return [(f"{i} of group {g}", p) for g, group in groups for i, p in enumerate(group["params"])]

    def another_optimizer(self, parameters):
        """Made as this one was, with groups of the same sizes, and with what has been loaded from its checkpoint."""
        rest, asked = iter(parameters), ("backend", "foreach", "coefficient")
        groups = [{"params": [next(rest) for _ in group["params"]]} for group in self.optimizer.param_groups]
        options = {key: value for key, value in self.options.items() if key in asked}
        other = type(self.optimizer)(groups, lr=9.0, **options)
        other.load_state_dict(checkpoint(self.optimizer))
        for group, of_other in zip(self.optimizer.param_groups, other.param_groups):  # what a class asks for stays
            of_other.update({key: value for key, value in group.items() if key != "params"})
        return other

    def group(self, index):
        return self.optimizer.param_groups[index % len(self.optimizer.param_groups)]

    def forget_strangers(self):
        """States of parameters that have left, of which no state_dict can be made."""
        for p in self.optimizer.state.keys() - set(self.parameters()):
            del self.optimizer.state[p]

    def untrack(self):
        if self.tracker is not None:
            self.tracker.remove()
            self.tracker = None

    def adopt(self, optimizer):
        """Go on with a copy; what it was copied from changes no more."""
        self.untrack()
        for p in self.parameters():
            self.retire(p)
            for value in self.state(p).values():
                self.retire(value)
        self.optimizer = optimizer
        self.module = torch.nn.ParameterList(self.parameters())


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


# ------------------------------------------------------------------------------------------------ copies, checkpoints


def through_a_checkpoint(run, index):
    run.forget_strangers()
    saved = checkpoint(run.optimizer)
    run.attempt(lambda: run.optimizer.load_state_dict(saved))


def load_into_another_optimizer(run, index):
    run.forget_strangers()
    run.untrack()
    run.optimizer = run.another_optimizer(run.parameters())


def load_a_bad_state_dict(run, index):
    if not run.fused:
        return
    run.forget_strangers()
    saved = copy.deepcopy(run.optimizer.state_dict())
    key, value = [("lr", -1.0), ("weight_decay", "much"), ("nonfinite", "bogus"), ("steps", None)][index % 4]
    saved["param_groups"][index % len(saved["param_groups"])][key] = value
    before = len(run.log)
    run.attempt(lambda: run.optimizer.load_state_dict(saved))
    assert run.log.pop() is not None, (key, value)
    assert len(run.log) == before


def deepcopy(run, index):
    run.adopt(copy.deepcopy(run.optimizer))
    run.gradients(index)


def pickled(run, index):
    run.adopt(pickle.loads(pickle.dumps(run.optimizer)))
    run.gradients(index)


def saved_whole(run, index):
    file = io.BytesIO()
    torch.save(run.optimizer, file)
    file.seek(0)
    run.adopt(torch.load(file, weights_only=False))
    run.gradients(index)


def step_beside_a_resumed_one(run, index):
    """A run that is resumed from a checkpoint gives the same bits."""
    run.forget_strangers()
    run.gradients(index)
    run.untrack()  # or parts would have been taken in one of the two only
    other = None
    alike = all(value.dtype in (p.dtype, torch.float32) for p in run.parameters() for value in run.state(p).values())
    if run.fused and not run.tied and alike:
        twins = clones(run.parameters())
        other = run.another_optimizer(twins)
        scales = run.optimizer._scales
        twin_of = dict(zip(run.parameters(), twins))
        other._scales = {k: {twin_of[p]: v for p, v in of.items() if p in twin_of} for k, of in scales.items()}
        for p, twin in twin_of.items():
            twin.grad = p.grad.clone()
    before = len(run.log)
    run.step()
    if other is not None and run.log[before] is None:
        other.step()
        for p, twin in twin_of.items():
            assert torch.equal(p, twin)
            (group,) = (group for group in run.optimizer.param_groups if any(p is q for q in group["params"]))
            for slot, value in other.state[twin].items():
                if slot != "average" or group["samples"] or group["periods"]:  # before, nobody reads it
                    assert torch.equal(value, run.optimizer.state[p][slot])


# --------------------------------------------------------------------------------------------------------- the extras


NOISE = [
    None,
    WeightNoise(std=0.01),
    WeightNoise(temperature=0.001, relative=True, seed=3),
    WeightNoise(std=0.1, schedule="cycle", period=3),
    WeightNoise(std=0.1, schedule="decay"),
]
AVERAGING = [
    None,
    EMA(0.5),
    PSWA(3),
    PSWM(period=4, beta=0.5, fraction=0.5),
    SWM(period=3, beta=0.3, on_write_back="zero"),
    PWALKS(period=4, samples=2, interval=2),
    PSWA(2, probability=0.5, start=2),
]
RATIOS = [
    None,
    TrustRatio("lars", coefficient=0.1),
    TrustRatio("clars", exempt=-1),
    TrustRatio("lamb", cap=0.5),
    TrustRatio("clars", coefficient=0.5, cap=2.0),
]


def noise(run, index):
    if run.extras:
        run.group(index)["noise"] = NOISE[index % len(NOISE)]


def averaging(run, index):
    """Another kind begins anew."""
    if run.extras:
        run.group(index).update(averaging=AVERAGING[index % len(AVERAGING)], samples=0, periods=0)


def trust_ratio(run, index):
    if run.extras:
        run.group(index)["trust_ratio"] = RATIOS[index % len(RATIOS)]


def decay(run, index):
    group = run.group(index)
    if run.extras and not group.get("decoupled_weight_decay"):
        group["decay"] = [None, "coupled", "decoupled", "independent"][index % 4]


def clipping(run, index):
    if run.extras:
        for group in run.optimizer.param_groups:
            group["max_grad_norm"] = [None, 0.5, 2.0][index % 3]
            group["nonfinite"] = ["pass", "skip", "raise"][index // 3 % 3]


def clipping_in_one_group(run, index):
    """It is about all groups: an error in words, until they agree."""
    if run.extras and len(run.optimizer.param_groups) > 1:
        good = [dict(group) for group in run.optimizer.param_groups]
        run.group(index)["max_grad_norm"] = 0.123
        run.attempt(run.optimizer.step)
        assert run.log[-1] is ValueError
        for group, before in zip(run.optimizer.param_groups, good):
            group["max_grad_norm"] = before["max_grad_norm"]


def step_with_a_nan(run, index):
    if run.extras and run.group(0)["nonfinite"] != "pass":
        run.gradients(index)
        p = run.pick(index)
        if p.numel():
            p.grad[(0,) * p.ndim] = [math.nan, -math.inf][index % 2]
        run.step()
        run.gradients(index)


def track_parts(run, index):
    if run.extras and run.tracker is None and wants_parts(run.optimizer.param_groups):
        run.tracker = run.optimizer.track_parts()
    else:
        run.untrack()


def scale_layers(run, index):
    if run.extras:
        p, q = run.pick(index), run.pick(index + 1)
        bad = {q: -1.0} if index % 4 == 0 else {q: 0.5}
        run.attempt(lambda: run.optimizer.scale_layers(lr={p: 0.1 * (index % 12)}, weight_decay=bad))


def averaged_weights(run, index):
    """Looked at; left by an exception; with a step asked for inside."""
    if not run.extras:
        return

    def evaluate():
        with run.optimizer.averaged_weights():
            run.log.append([p.detach().clone() for p in run.parameters()])
            if index % 3 == 1:
                raise ValueError("from the evaluation")
            if index % 3 == 2:
                run.optimizer.step()

    with unchanged(run.optimizer):
        run.attempt(evaluate)


def cast(run, index):
    """A parameter and, where it is not compared with torch.optim, its states or not."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16] if run.extras else [torch.float32, torch.float64]
    p, dtype = run.pick(index), dtypes[index % len(dtypes)]
    if p.dtype == dtype:
        return
    run.retire(p.data)
    p.grad = None
    p.data = p.data.to(dtype)
    for slot, value in run.state(p).items():
        if value.dtype != dtype and (index % 2 or not run.extras):
            run.retire(value)
            run.optimizer.state[p][slot] = value.to(dtype)
    p.grad = new_values(p, index)


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
    through_a_checkpoint,
    load_into_another_optimizer,
    load_a_bad_state_dict,
    deepcopy,
    pickled,
    saved_whole,
    step_beside_a_resumed_one,
    noise,
    averaging,
    trust_ratio,
    decay,
    clipping,
    clipping_in_one_group,
    step_with_a_nan,
    track_parts,
    scale_layers,
    averaged_weights,
    cast,
    *(event for event in plan_events.EVENTS if event not in NOT_HERE),
]
