"""On a GPU: every rule with every extra, in every dtype, no worse than PyTorch."""

import copy

import pytest
import torch
from rules import BY_NAME, every_rule, kernels
from support.compare import distance
from support.gpus import (
    DEVICE,
    DTYPES,
    REHEARSAL,
    each_backend,
    feed,
    gradients,
    laid_out,
    make,
    needs_gpu,
    steppable,
    tensors_that_hurt,
)

import fused_opt
from fused_opt import TrustRatio, WeightNoise, backends
from fused_opt.backends import self_check

pytestmark = pytest.mark.gpu

PLAIN, MOMENTUM = (("SGD", BY_NAME["SGD"].options[i]) for i in (0, 2))
AMSGRAD = ("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True})
EXTENDED = [MOMENTUM] if REHEARSAL else [PLAIN, MOMENTUM, AMSGRAD, ("AdamW", {"lr": 0.01, "weight_decay": 0.3})]
EXTRAS = {
    "lars": {"trust_ratio": TrustRatio("lars", exempt=-1)},
    "clars": {"trust_ratio": TrustRatio("clars", exempt=-1)},
    "lamb": {"trust_ratio": TrustRatio("lamb", exempt=-1)},
    "noise": {"noise": WeightNoise(std=0.01, seed=2**63 + 11)},
    "relative noise": {"noise": WeightNoise(std=0.01, relative=True, seed=5)},
    "EMA": {"averaging": fused_opt.EMA(0.9)},
    "PSWA": {"averaging": fused_opt.PSWA(2)},
    "clipping": {"max_grad_norm": 1.0},
    "skipping": {"nonfinite": "skip"},
    "together": {
        "trust_ratio": TrustRatio("clars", exempt=-1),
        "noise": WeightNoise(std=0.01, seed=3),
        "averaging": fused_opt.EMA(0.9),
        "max_grad_norm": 1.0,
    },
}


def values(optimizer, parameters):
    """The parameters, and each state of all of them."""
    slots = sorted({slot for p in parameters for slot in optimizer.state.get(p, {})})
    found = {"parameters": [p.detach().cpu() for p in parameters]}
    for slot in slots:
        found[slot] = [optimizer.state[p][slot].detach().cpu() for p in parameters]
    return found


def no_worse_than_pytorch(name, options, dtype, backend):
    """Truth: the reference in float64. Baseline: the reference in the tested dtype, on the same device."""
    noisy = options.get("noise") is not None
    source = steppable(backend, tensors_that_hurt(dtype), noisy)
    states = {"state_dtype": torch.float32} if options.get("state_dtype") else {}

    def run(dtype_of_run, which, device):
        own = {**options, **(states if dtype_of_run == dtype else {})}
        optimizer, parameters = make(name, own, which, source, dtype_of_run, device)
        for step in range(3):
            feed(parameters, gradients(parameters, step, dtype))
            optimizer.step()
        return values(optimizer, parameters)

    truth = run(torch.float64, "reference", "cpu")
    baseline, found = run(dtype, "reference", DEVICE), run(dtype, backend, DEVICE)
    on_cpu = run(dtype, "native", "cpu") if backends.get("native").unavailable() is None else baseline
    assert found.keys() == truth.keys()
    for slot, of_truth in truth.items():
        assert [x.dtype for x in found[slot]] == [x.dtype for x in baseline[slot]]
        eps = max(torch.finfo(x.dtype).eps for x in found[slot])
        # Float64 has no wider truth: both sides round as often. The normal numbers are float32's everywhere but in the
        # reference.
        spare = eps if dtype != torch.float64 else 1e-8 if noisy else 8 * eps
        assert distance(found[slot], of_truth) <= 1.1 * distance(baseline[slot], of_truth) + spare, slot
        assert distance(found[slot], on_cpu[slot]) <= 8 * spare, slot


@needs_gpu
@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_self_check_passes(backend, dtype):
    module, p = backends.get(backend), torch.empty(0, device=DEVICE)
    for rule in kernels().values() if backend == "native" else [kernels()["momentum_sgd"]]:
        variant = self_check.Variant(rule, (dtype,) * (2 + len(rule.states)), self_check.EXTRAS)
        assert self_check.run(module, module.standard(p), p.device, variant) is None


@needs_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_auto_takes_the_first_that_passes():
    optimizer, parameters = make("AdamW", {}, "auto", tensors_that_hurt()[:3])
    feed(parameters, gradients(parameters, 0))
    optimizer.step()
    expected = "triton" if backends.get("native").unsupported(None, parameters) else "native"
    assert type(optimizer._last.buckets[0]).__module__ == f"fused_opt.backends.{expected}"


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_rule
def test_every_rule(name, options, dtype, backend):
    no_worse_than_pytorch(name, options, dtype, backend)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("name", "options"), EXTENDED, ids=str)
def test_every_extra(name, options, extra, dtype, backend):
    no_worse_than_pytorch(name, {**options, **copy.deepcopy(EXTRAS[extra])}, dtype, backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16] if REHEARSAL else [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "options"), [MOMENTUM, AMSGRAD], ids=str)
def test_states_in_full(name, options, dtype, backend):
    no_worse_than_pytorch(name, {**options, "state_dtype": torch.float32}, dtype, backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16] if REHEARSAL else [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_the_nearest(dtype, backend):
    """Every bit of it: halves go to the even neighbour, what is too large to infinity, what is small is not flushed."""
    bits = torch.randint(0, 2**16, (5003,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    weights = bits.to(torch.uint16).view(dtype)
    weights = torch.where(weights.isinf(), torch.ones_like(weights), weights)  # 0 * inf is the weight decay's, and NaN
    steps = torch.randn(5003, generator=torch.Generator().manual_seed(1)).to(dtype) * weights.nan_to_num(1.0, 1.0, 1.0)
    optimizer, (p,) = make("SGD", {"lr": 0.5}, backend, [torch.nn.Parameter(weights)])
    p.grad = steps.to(DEVICE)
    optimizer.step()
    expected = (weights.float() - 0.5 * steps.float()).to(dtype)
    assert torch.equal(p.detach().cpu().isnan(), expected.isnan())
    assert torch.equal(p.detach().cpu().nan_to_num(0.0), expected.nan_to_num(0.0))


@each_backend
def test_splitting_and_permuting_change_nothing(backend):
    whole = torch.randn(40000, generator=torch.Generator().manual_seed(0))
    whole = whole[:4000] if REHEARSAL else whole

    def run(cuts, order=None):
        parameters = [torch.nn.Parameter(laid_out(part.clone())) for part in whole.tensor_split(cuts)]
        order = order or range(len(parameters))
        optimizer = fused_opt.AdamW([parameters[i] for i in order], lr=0.1, backend=backend)
        for step in range(2):
            gradient = torch.randn(len(whole), generator=torch.Generator().manual_seed(step))
            for p, part in zip(parameters, gradient.tensor_split(cuts)):
                p.grad = part.clone().to(DEVICE)
            optimizer.step()
        return torch.cat([p.detach().cpu() for p in parameters])

    expected = run([])
    assert torch.equal(run([1, 17, 1024, 2999]), expected)
    assert torch.equal(run([100, 2000], order=[2, 0, 1]), expected)


@each_backend
def test_a_gradient_of_another_layout(backend):
    """Stepped right, or refused in words; a wrong step is silent."""
    p = torch.nn.Parameter(torch.arange(24.0, device=DEVICE).reshape(4, 6))
    p.grad = torch.arange(24.0, device=DEVICE).reshape(6, 4).t()
    before = p.detach().clone()
    if why := backends.get(backend).unsupported(None, [p, p.grad]):
        with pytest.raises(RuntimeError, match=f"backend {backend!r} cannot step parameter"):
            fused_opt.SGD([p], lr=0.5, backend=backend).step()
        assert why
        assert torch.equal(p, before)
    else:
        fused_opt.SGD([p], lr=0.5, backend=backend).step()
        assert torch.equal(p, before - 0.5 * p.grad)
