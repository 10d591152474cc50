"""What every element becomes: the native backend's bits, other dtypes, noise, sums of parts."""

import math

import pytest
import torch
from rules import every_elementwise_rule
from support.interpreted import DTYPES, STATES, assert_alike, both, contiguous, train
from support.kernels import run_with
from support.parameters import clones
from triton import language as tl

import fused_opt
from fused_opt.backends import triton as backend
from fused_opt.extras.noise import normal, philox

device, kernel, noise, table = backend.device, backend.kernel, backend.noise, backend.table


def within_a_block(dtype):
    return [p for p in contiguous(dtype) if p.numel() < 300]


def assert_native_bits(name, options, dtype, monkeypatch, make=contiguous):
    """Two steps end in the native backend's numbers, states included."""
    run_with("baseline", monkeypatch)
    ours = make(dtype)
    theirs = clones(ours)
    a, b = (
        getattr(fused_opt, name)(p, backend=which, **options) for p, which in ((ours, "triton"), (theirs, "native"))
    )
    train(a, b, ours, theirs, steps=2)
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q)
        for slot, state in b.state[q].items():
            mine, other = torch.as_tensor(a.state[p][slot]), torch.as_tensor(state)
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other), slot


BESIDE = {"noise": fused_opt.WeightNoise(std=0.01, seed=5), "averaging": fused_opt.EMA(0.9)}


@every_elementwise_rule
def test_the_bits_are_the_native_backends(name, options, monkeypatch):
    """Where a multiplication and an addition are two roundings, as on a GPU. Norms are summed in another order."""
    assert_native_bits(name, {**options, **BESIDE}, torch.float32, monkeypatch, within_a_block)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adagrad"])
def test_the_bits_of_other_dtypes_are_the_native_backends(name, dtype, monkeypatch):
    assert_native_bits(name, {"lr": 0.01, "weight_decay": 0.1, **BESIDE}, dtype, monkeypatch, within_a_block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.9}), ("AdamW", {"amsgrad": True})])
def test_states_of_16_bits_have_the_native_backends_bits(name, options, dtype, monkeypatch):
    assert_native_bits(name, {"lr": 0.01, **options, "state_dtype": torch.float16}, dtype, monkeypatch)


@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.9}), ("AdamW", {"amsgrad": True})])
def test_states_in_8_bits_have_the_native_backends_bits(name, options, monkeypatch):
    assert_native_bits(name, {"lr": 0.01, **options, **BESIDE, "state_dtype": "8bit"}, torch.float32, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_exact_weights_have_the_native_backends_bits(name, dtype, monkeypatch):
    options = {"lr": 0.01, "averaging": fused_opt.PSWA(period=2), "master_weights": True, **STATES}
    assert_native_bits(name, options, dtype, monkeypatch)


@pytest.mark.parametrize("averaging", [None, fused_opt.EMA(0.9), fused_opt.PSWA(period=2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.9}), ("AdamW", {})])
def test_rounding_at_random_has_the_native_backends_bits(name, options, dtype, averaging, monkeypatch):
    """bfloat16 too: what is rounded so is stored without rounding."""
    make = contiguous if name == "SGD" else within_a_block
    rounding = fused_opt.StochasticRounding(seed=2**63 + 5)
    options = {"lr": 0.01, **options, "averaging": averaging, "rounding": rounding}
    assert_native_bits(name, options, dtype, monkeypatch, make)


@pytest.mark.parametrize(("parameter", "gradient"), [(torch.float16, torch.float32), (torch.float64, torch.float16)])
def test_states_and_gradients_of_other_dtypes(parameter, gradient):
    a, b, ours, theirs = both("AdamW", {"lr": 0.01, **STATES}, dtype=parameter)
    for p, q in zip(ours, theirs):
        p.grad_dtype = q.grad_dtype = gradient
        p.grad = torch.empty_like(p, dtype=gradient).copy_(torch.randn(p.shape))
        q.grad = p.grad.clone()
    a.step()
    b.step()
    assert_alike(a, b, ours, theirs, parameter)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_once(dtype):
    """Two groups with their own ratios, noise, averages and coefficients, clipped, written back."""

    def make(dtype):
        some = contiguous(dtype) if dtype == torch.float32 else within_a_block(dtype)
        return [
            {"params": some[::2], "trust_ratio": fused_opt.TrustRatio("lamb", exempt=-1), "weight_decay": 0.1},
            {"params": some[1::2], "averaging": fused_opt.EMA(0.9), "noise": None, "lr": 0.02},
        ]

    ours, theirs = make(dtype), make(dtype)
    options = {
        "lr": 0.01, "max_grad_norm": 1.0, "averaging": fused_opt.PSWA(2),
        "noise": fused_opt.WeightNoise(std=0.01, seed=2**63 + 11),
    }  # fmt: skip
    a, b = (fused_opt.AdamW(p, backend=which, **options) for p, which in ((ours, "triton"), (theirs, "reference")))
    ours, theirs = ([p for group in groups for p in group["params"]] for groups in (ours, theirs))
    a.scale_layers(lr={ours[3]: 0.5}, weight_decay={ours[4]: 3.0})
    b.scale_layers(lr={theirs[3]: 0.5}, weight_decay={theirs[4]: 3.0})
    train(a, b, ours, theirs, steps=4)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-12)
    # The kernel's normal numbers are float32's; once rounded to float16, a last bit of it.
    assert_alike(a, b, ours, theirs, dtype, bound=1e-8 if dtype == torch.float64 else None)


def test_amsgrad_keeps_a_nan():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_opt.Adam([p], lr=0.1, amsgrad=True, backend="triton")
    for bad in (1.0, math.nan, 1.0):
        p.grad = torch.tensor([1.0, bad, 1.0])
        optimizer.step()
    assert optimizer.state[p]["max_exp_avg_sq"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam"])
def test_a_parameter_twice_in_a_group(name):
    options = {"lr": 0.01, **({"momentum": 0.9, "dampening": 0.3} if name == "SGD" else {})}
    p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5])) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ours = getattr(fused_opt, name)([p, p], backend="triton", **options)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        theirs = getattr(fused_opt, name)([q, q], backend="reference", **options)
    train(ours, theirs, [p], [q])
    assert_alike(ours, theirs, [p], [q])


def test_the_words_of_the_noise_are_the_references():
    """The kernel's generator, lane for lane, at counters beyond 2**32 too."""
    counter = torch.tensor([0, 1, 2**32 - 1, 2**32, 5 * 2**32 + 7, 2**40, 3, 2**45 + 1])
    for seed in (0, 1, 2**63 + 12345, 2**64 - 1):
        words = torch.zeros(4, 8, dtype=torch.int64)
        draw[(1,)](counter, words, seed - (2**64 if seed >= 2**63 else 0), 77, 99)
        low, high = counter & 0xFFFFFFFF, counter >> 32
        expected = philox([low, high, torch.full_like(low, 77), torch.full_like(low, 99)], seed)
        assert torch.equal(words, torch.stack(expected))


@backend.triton.jit
def draw(counter, words, seed, index, t):
    counters = tl.load(counter + tl.arange(0, 8))
    w0, w1, w2, w3 = noise.words(counters, index, t, seed)
    tl.store(words + tl.arange(0, 8), w0.to(tl.int64))
    tl.store(words + 8 + tl.arange(0, 8), w1.to(tl.int64))
    tl.store(words + 16 + tl.arange(0, 8), w2.to(tl.int64))
    tl.store(words + 24 + tl.arange(0, 8), w3.to(tl.int64))


@pytest.mark.parametrize("numel", [1, 5, 1030, 5000])
def test_noise_is_the_references(numel):
    """Within what float32 leaves of a logarithm and a sine, over the whole range of both."""
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(numel, dtype=torch.float64))
    noise = fused_opt.WeightNoise(std=1.0, seed=3)
    optimizer = fused_opt.SGD([p, q], lr=1.0, noise=noise, backend="triton")
    for t in range(2):
        with torch.no_grad():
            q.zero_()
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
        optimizer.step()
        z = normal(3, 1, t, numel)
        assert ((q.detach() - z).abs() <= 1.3e-7 * (1 + z.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulate(dtype):
    generator = torch.Generator().manual_seed(1)
    for offset, numel in ((0, 0), (0, 1), (0, 4097), (1, 1030), (0, 9000)):
        total, part = (torch.randn(numel + offset, generator=generator).to(dtype)[offset:] for _ in range(2))
        expected = total + part
        version = total._version
        sums = backend.accumulate(total, part)
        assert torch.equal(total, expected)
        assert total._version == version + 1
        assert sums == pytest.approx([x.double().square().sum().item() for x in (part, expected)], rel=1e-13)
        assert backend.accumulate(None, part) == (sums[0], sums[0])
