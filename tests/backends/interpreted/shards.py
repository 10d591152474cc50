"""Shards of DTensors, in real processes: the whole tensor's step, cut, and the host waits for nothing."""

from contextlib import ExitStack
from functools import partial
from unittest import mock

import pytest
import torch
from support.processes import in_processes
from support.shards import assert_alike, both, set_gradients
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import fused_opt
from fused_opt.backends import triton as backend

SHAPES = [(9, 5), (8, 4), (1,)]  # not cut at a multiple of four elements; cut at one; an empty shard
WAITS = [(torch.Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__")]
WAITS += [(backend.Bucket, "grad_norm2"), (backend.Bucket, "ratios")]


def check_elementwise_steps_are_the_same_to_the_last_bit(rank, world):
    """Noise, averages and rounding at random included, whether rows are cut or columns."""
    line = init_device_mesh("cpu", (world,))
    beside = {"noise": fused_opt.WeightNoise(std=0.01, seed=5), "averaging": fused_opt.PSWA(period=2)}
    rounded = {"rounding": "stochastic", "state_dtype": torch.float16}
    for dtype, options in ((torch.float32, beside), (torch.float16, rounded)):
        for cut in (lambda ndim: [Shard(0)], lambda ndim: [Shard(ndim - 1)]):
            make = partial(fused_opt.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, backend="triton", **options)
            plain, spread = both(make, line, cut, dtype, SHAPES)
            for step in range(2):
                set_gradients(plain, spread, step, without=[2] if step else [])
                plain.step()
                spread.step()
            assert_alike(plain, spread, 0)


def check_norms_are_those_of_the_whole_tensors_and_the_host_waits_for_nothing(rank, world):
    """Though its launches are the interpreter's. A GradScaler's numbers stay there, too, and a step overflows."""
    launch = backend.device.launch

    def waiting(*_, **__):
        raise AssertionError("the host waited")

    features = {
        "clipped lamb": {"trust_ratio": fused_opt.TrustRatio("lamb", exempt=0), "max_grad_norm": 0.01},
        "lars": {"trust_ratio": fused_opt.TrustRatio("lars", exempt=0)},
        "relative": {"noise": fused_opt.WeightNoise(std=0.1, relative=True)},
    }
    line = init_device_mesh("cpu", (world,))
    for name, options in features.items():
        make = partial(fused_opt.AdamW, lr=0.1, **options)
        plain, spread = both(
            lambda p: make(p, backend="reference" if type(p[0].data) is torch.Tensor else "triton"),  # noqa: B023
            line, lambda ndim: [Shard(0)], torch.float64, SHAPES,
        )  # fmt: skip
        for step in range(3):
            set_gradients(plain, spread, step, without=[0] if step == 2 else [])
            for optimizer in (plain, spread) if name != "relative" else ():
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(step == 1))
            plain.step()
            with ExitStack() as stack:
                held = [(owner, attribute, getattr(owner, attribute)) for owner, attribute in WAITS]

                def within(*arguments, held=held):
                    with ExitStack() as lifted:
                        for owner, attribute, its in held:
                            lifted.enter_context(mock.patch.object(owner, attribute, its))
                        return launch(*arguments)

                stack.enter_context(mock.patch.object(backend.device, "launch", within))
                for owner, attribute in WAITS if step else ():  # the first step makes the plan
                    stack.enter_context(mock.patch.object(owner, attribute, waiting))
                spread.step()
        assert [type(bucket) for bucket in spread._plan.buckets] == [backend.Bucket]
        assert (spread.grad_norm or 0.0) == pytest.approx(plain.grad_norm or 0.0, rel=1e-12)
        assert_alike(plain, spread, 1e-6 if name == "relative" else 1e-12)  # the kernels' normal numbers are float32's


test_in_processes = in_processes(globals(), 2)
