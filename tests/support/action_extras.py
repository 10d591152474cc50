"""Extras, multipliers, averages and casts among the actions."""

import math

import torch

from fused_opt import EMA, PSWA, PSWM, PWALKS, SWM, TrustRatio, WeightNoise
from fused_opt.parts.tracker import wants_parts

from .compare import unchanged
from .plan_events import new_values

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
