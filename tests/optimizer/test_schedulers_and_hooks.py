"""Schedulers, hooks and the profiler see what they see of torch.optim's own."""

import copy

import pytest
import torch
from support.compare import assert_close, assert_same
from support.parameters import pair, train_both
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fused_opt

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),  # cycles the momentum or beta1 as well
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2, gamma=0.5)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


def test_every_scheduler_of_torch_is_here():
    assert SCHEDULERS.keys() == set(lr_scheduler.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler, tensor_lr, backend):
    for name, options in (("SGD", {"momentum": 0.9}), ("AdamW", {})):
        optimizer, oracle = pair(name, {**options, "lr": torch.tensor(0.1) if tensor_lr else 0.1}, backend)
        schedulers = [SCHEDULERS[scheduler](each) for each in (optimizer, oracle)]
        for step in range(7):
            train_both(optimizer, oracle, 1, seed=step)
            for each in schedulers:
                each.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            assert_close(optimizer.param_groups[0]["lr"], oracle.param_groups[0]["lr"])
        # torch computes with a lr that is a float32 tensor in float32
        assert_same(optimizer, oracle, bound=1e-6 if tensor_lr else 1e-12)


def test_step_hooks(backend):
    optimizer, _ = pair("AdamW", {}, backend)
    other, _ = pair("SGD", {}, backend)
    log = []

    def record(name):
        def hook(target, args, kwargs):
            assert target in (optimizer, other)
            log.append(name if target is optimizer else f"{name} of another")

        return hook

    handles = [
        optimizer.register_step_pre_hook(record("pre")),
        optimizer.register_step_post_hook(record("post")),
        register_optimizer_step_pre_hook(record("global pre")),
        register_optimizer_step_post_hook(record("global post")),
    ]
    try:
        optimizer.step(lambda: log.append("step"))
        other.step()
    finally:
        for handle in handles:
            handle.remove()
    expected = ["global pre", "pre", "step", "post", "global post"]
    assert log == [*expected, "global pre of another", "global post of another"]
    optimizer.step(lambda: log.append("no hooks"))
    assert log[-1] == "no hooks"
    assert len(log) == 8


def test_hooks_fire_once_in_a_subclass(backend):
    class Mine(fused_opt.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Inherits(fused_opt.AdamW):
        pass

    for kind in (Inherits, Mine):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([p], lr=0.1, weight_decay=0.0, backend=backend)
        calls = []
        optimizer.register_step_post_hook(lambda *_: calls.append(p.detach().clone()))  # noqa: B023
        p.grad = torch.ones(3)
        optimizer.step()
        # torch wraps an overridden step a second time; what is inherited must fire once.
        assert len(calls) == (2 if kind is Mine else 1)
        torch.testing.assert_close(calls[0], torch.full((3,), 0.9))


def test_a_pre_hook_may_replace_the_arguments(backend):
    optimizer, oracle = pair("SGD", {"lr": 0.1}, backend)
    for each in (optimizer, oracle):
        each.register_step_pre_hook(lambda target, args, kwargs: ((target,), {"closure": lambda: "replaced"}))
        assert each.step(lambda: "given") == "replaced"
        each.register_step_pre_hook(lambda *_: "not a pair")
        with pytest.raises(RuntimeError, match="must return None or a tuple of"):
            each.step()


def test_the_profiler_sees_the_step(backend):
    optimizer, oracle = pair("AdamW", {}, backend)
    train_both(optimizer, oracle, 1)
    with torch.profiler.profile() as profiler:
        train_both(optimizer, oracle, 1)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["Optimizer.step#AdamW.step"] == 2  # ours and torch's
    assert_same(optimizer, oracle)


def test_state_dict_hooks(backend):
    optimizer, oracle = pair("SGD", {"momentum": 0.9}, backend)
    train_both(optimizer, oracle)
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "mine": 1})
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved.pop("mine") == 1

    fresh, _ = pair("SGD", {"momentum": 0.9}, backend)
    log = []
    fresh.register_load_state_dict_pre_hook(lambda *_: log.append("pre"))
    fresh.register_load_state_dict_post_hook(lambda target: log.append(len(target.state)))
    fresh.load_state_dict(saved)
    assert log == ["pre", 3]


@pytest.mark.parametrize("state_dtype", [None, torch.float64])
def test_a_load_hook_adapts_a_checkpoint_of_other_shapes(state_dtype, backend):
    """What torch documents these hooks for; the checks look at what the hook returns."""
    p = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = fused_opt.SGD([p], lr=0.1, momentum=0.5, state_dtype=state_dtype, backend=backend)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"momentum_buffer": torch.arange(6.0)}}

    def adapt(_, state_dict):
        buffer = state_dict["state"][0]["momentum_buffer"].reshape(2, 3)
        return {**state_dict, "state": {0: {"momentum_buffer": buffer}}}

    optimizer.register_load_state_dict_pre_hook(adapt)
    optimizer.load_state_dict(saved)
    found = optimizer.state[p]["momentum_buffer"]
    assert found.dtype == (state_dtype or torch.float32)
    assert torch.equal(found, torch.arange(6.0, dtype=found.dtype).reshape(2, 3))
