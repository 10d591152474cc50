"""Shards stepped by the kernels for GPUs, run by the host: the checks of test_shards.py; and the host waits for nothing."""

import functools
from contextlib import ExitStack
from unittest import mock

import pytest
import test_shards
import torch
from support.processes import in_processes, same_everywhere
from support.shards import assert_alike, both, layouts, parameters_of, set_gradients
from test_shards import model_of, sharded

import fused_opt
from fused_opt.backends import native


def on_a_gpu(check):
    @functools.wraps(check)
    def on_the_host_in_its_place(rank, world):
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(native, "EMULATE_GPU", True))
            stack.enter_context(mock.patch.object(test_shards, "BACKENDS", ["native"]))
            check(rank, world)

    on_the_host_in_its_place.__module__ = __name__  # where the processes look for it
    return on_the_host_in_its_place


globals().update({n: on_a_gpu(check) for n, check in vars(test_shards).items() if n.startswith("check_")})
del check_zero_redundancy_optimizer  # noqa: F821  # of whole tensors


def refuse(*_, **__):
    raise AssertionError("the host waited")


WAITS = [(torch.Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__")]
WAITS += [(native.GPUBucket, "grad_norm2"), (native.GPUBucket, "ratios")]
FEATURES = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.01},
    "lars": {"trust_ratio": fused_opt.TrustRatio("lars", exempt=0)},
    "clars": {"trust_ratio": fused_opt.TrustRatio("clars", exempt=0)},
    "clipped lamb": {"trust_ratio": fused_opt.TrustRatio("lamb", exempt=0), "max_grad_norm": 0.01},
    "noise and averages": {"noise": fused_opt.WeightNoise(std=0.1, relative=True), "averaging": fused_opt.EMA(0.9)},
}


@on_a_gpu
def check_the_host_waits_for_nothing(rank, world):
    for features in FEATURES.values():
        plain, spread = both(lambda p: fused_opt.AdamW(p, lr=0.1, **features), *layouts(world)[0], torch.float64)  # noqa: B023
        for step in range(4):
            without = [2] if step == 2 else []  # for which other sums are prepared
            set_gradients(plain, spread, step, without)
            plain.step()
            with ExitStack() as stack:
                for owner, name in WAITS if step else ():  # the first step makes the plan
                    stack.enter_context(mock.patch.object(owner, name, refuse))
                spread.step()
        assert (spread.grad_norm or 0.0) == pytest.approx(plain.grad_norm or 0.0, rel=1e-12)
        assert_alike(plain, spread, 1e-12)


@on_a_gpu
def check_a_scaler_whose_numbers_stay_on_the_gpu(rank, world):
    """An overflow in one process is in all, as GradScaler sees to it; the scale comes before the norm that is clipped."""
    for features in (FEATURES["clipped lamb"], FEATURES["lars"]):
        make = lambda p: fused_opt.AdamW(p, lr=0.1, **features)  # noqa: B023, E731
        plain, spread = both(make, *layouts(world)[0], torch.float64)
        for step in range(4):
            set_gradients(plain, spread, step)
            for optimizer in (plain, spread):
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(step == 2))
                optimizer.step()
        assert parameters_of(spread)[0] in spread.state
        assert spread.state[parameters_of(spread)[0]]["step"].item() == 3
        assert_alike(plain, spread, 1e-12)


def check_shards_and_whole_tensors_in_one_optimizer(rank, world):
    """In two arithmetics, with complex ones, and through one all-reduce; wherever the numbers of a bucket are."""
    for gpu, complex_too in ((False, False), (True, False), (True, True)):
        with mock.patch.object(native, "EMULATE_GPU", gpu):
            make = lambda p: fused_opt.LAMB(p, lr=0.1, max_grad_norm=3.0)  # noqa: E731
            mesh, cut = layouts(world)[0]
            pairs = [both(make, mesh, cut, dtype) for dtype in (torch.float64, torch.float32)]
            generator = torch.Generator().manual_seed(0)
            alone = torch.randn(5, 4, generator=generator, dtype=torch.complex128 if complex_too else torch.float32)
            optimizers = []
            for side in (0, 1):
                own = torch.nn.Parameter(alone.clone())
                own.grad = alone + 1
                optimizers.append(make([own, *(p for pair in pairs for p in parameters_of(pair[side]))]))
            for step in range(3):
                for pair in pairs:
                    set_gradients(*pair, step)
                for optimizer in optimizers:
                    optimizer.step()
            ratios, expected = (optimizer.trust_ratios() for optimizer in reversed(optimizers))
            assert len({*expected.values()}) > 6
            assert ratios == pytest.approx(expected, rel=1e-6)
            assert same_everywhere([torch.tensor(list(ratios.values()))], rank, world)
            assert optimizers[1].grad_norm == pytest.approx(optimizers[0].grad_norm, rel=1e-12)
            own, theirs = (parameters_of(optimizer)[0].detach() for optimizer in optimizers)
            assert (own - theirs).abs().max() <= 1e-6
            assert not torch.equal(own, alone)


@on_a_gpu
def check_what_reads_the_shards_is_the_gpus_kernel(rank, world):
    optimizer = fused_opt.LARS(sharded(model_of()).parameters(), lr=0.1)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [type(bucket).__name__ for bucket in optimizer._plan.buckets] == ["GPUBucket"]
    assert optimizer._plan.device == torch.device("cpu")


test_in_processes = in_processes(globals(), 2, 4)
