"""Rounding at random: without bias, with the same bits whoever draws them, and what it is for."""

import math

import pytest
import torch
from support.compare import same_bits
from support.parameters import checkpoint, clones, layouts, parameters_of, set_gradients, train_both
from support.threads import with_threads

import fused_opt
from fused_opt import EMA, PSWA, SGD, Adam, AdamW, ScheduleFree, StochasticRounding, WeightNoise
from fused_opt.backends.interface import RoundingArgs
from fused_opt.extras.noise import philox
from fused_opt.extras.rounding import bits_of, words

HALVES = [torch.bfloat16, torch.float16]
both_halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
COUNT = 2048  # of draws for every value


def stored(values, dtype, backend, rounding="stochastic"):
    """What float32 values are stored as, COUNT times each: 0 - 1 * (-value) is exact."""
    p = torch.nn.Parameter(torch.zeros(len(values), COUNT, dtype=dtype))
    p.grad_dtype = torch.float32
    p.grad = -values[:, None].expand(-1, COUNT).contiguous()
    SGD([p], lr=1.0, rounding=rounding, backend=backend).step()
    return p.detach()


def neighbours(values, dtype):
    """The stored numbers around each value, the one nearer to 0 first, by their bits; and the share of the other one."""
    nearest = values.to(dtype)
    beyond = nearest.float().abs() > values.abs()
    inner = (nearest.view(torch.int16) - beyond.to(torch.int16)).view(dtype)
    outer = (inner.view(torch.int16) + 1).view(dtype)
    inner, outer = inner.double(), outer.double()
    return inner, outer, (values.double() - inner) / (outer - inner)


def across_binades(dtype):
    """Numbers of every few binades and both signs, denormals, and ties."""
    least, most = (-133, 127) if dtype == torch.bfloat16 else (-27, 15)
    exponents = torch.arange(least, most, 8 if dtype == torch.bfloat16 else 2, dtype=torch.float64)
    fractions = torch.rand(len(exponents), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    some = (2.0**exponents * (1 + fractions)).float()
    info = torch.finfo(dtype)
    ties = torch.tensor([1 + info.eps / 2, 1 + 3 * info.eps / 2, info.tiny * info.eps / 2, 2.5 * info.tiny * info.eps])
    return torch.cat([some, -some, ties, -ties])


@both_halves
def test_the_mean_is_what_was_rounded(dtype, every_kernel):
    values = across_binades(dtype)
    inner, outer, share = neighbours(values, dtype)
    found = stored(values, dtype, every_kernel).double()
    is_outer = found == outer[:, None]
    assert (is_outer | (found == inner[:, None])).all()
    expected, sigma = share * COUNT, (COUNT * share * (1 - share)).sqrt()
    assert ((is_outer.sum(dim=1) - expected).abs() <= 4 * sigma + COUNT * 2.0**-16).all()
    scores = ((is_outer.sum(dim=1) - expected) / sigma)[sigma > 0]
    assert abs(scores.sum().item()) <= 4 * math.sqrt(len(scores))


@both_halves
def test_what_is_exact_stays_and_nothing_finite_becomes_infinite(dtype, every_kernel):
    info = torch.finfo(dtype)
    below = torch.tensor(info.max).nextafter(torch.tensor(0.0))
    values = torch.tensor(
        [1.5, -0.0, info.max, -info.max, info.tiny, info.tiny * info.eps, math.inf, -math.inf, math.nan]
    )
    found = stored(values, dtype, every_kernel)
    for row, value in zip(found, values.to(dtype)):
        same = row.isnan() if value.isnan() else row.view(torch.int16) == value.view(torch.int16)
        assert same.all() or value == 0  # 0 - -0 is 0
    found = stored(torch.stack([below, -below]), dtype, every_kernel).float()
    assert found.isfinite().all()
    assert found[0].max() == info.max
    assert found[1].min() == -info.max
    largest = torch.tensor(info.max)
    beyond = [largest * (1 + info.eps / 8), largest * (1 + info.eps / 2)]  # below and above half a unit
    for value in beyond:
        found = stored(value[None], dtype, every_kernel)
        assert torch.equal(found, value.to(dtype).expand(1, COUNT))


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float16),
    ],
    ids=str,
)
def test_every_backend_stores_the_same_bits(dtype, state_dtype, every_kernel):
    """Of sums and products that are exact, in every layout, with an average that moves the weights, too."""
    for averaging in (PSWA(period=2), ScheduleFree(0.5)):
        ours = [p for p in layouts(dtype, chunk=300) if p.numel() > 1]
        for p in ours:
            p.data.mul_(64).round_().div_(64)
        theirs = clones(ours)
        options = {"lr": 0.125, "momentum": 0.5, "state_dtype": state_dtype, "averaging": averaging}
        pair = [
            SGD(some, rounding=StochasticRounding(7), backend=backend, **options)
            for some, backend in ((ours, every_kernel), (theirs, "reference"))
        ]
        for step in range(2):
            for some in (ours, theirs):
                set_gradients(some, step)
                for p in some:
                    p.grad.mul_(256).round_().div_(256)
            for optimizer in pair:
                optimizer.step()
        for p, q in zip(ours, theirs):
            assert torch.equal(p, q)
            for slot, state in pair[1].state[q].items():
                assert torch.equal(pair[0].state[p][slot], state), slot


def test_known_bits():
    """Element by element, in plain integers; beyond 2**32 elements, too."""
    for word, elements in ((0, [0, 1, 7, 1001, 2**32 - 1, 2**32, 5 * 2**32 + 3]), (1, [0, 1, 2**33 + 1])):
        keys = philox([torch.tensor(c) for c in (0, (1 + word) * 2**29, 3, 41)], 5)
        a, b = keys[0].item(), keys[1].item()
        for i, found in zip(elements, words(5, 3, 41, torch.tensor(elements), word).tolist()):
            x = i % 2**32 ^ a
            x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
            x = ((x ^ x >> 13) + b + (i >> 32) * 0x9E3779B9) % 2**32
            x = x * 0xC2B2AE35 % 2**32
            assert found == x ^ x >> 16
    x = words(5, 3, 41, torch.tensor([9]), 0).item()
    found = [bits_of(RoundingArgs(5, 41), 3, torch.tensor([9]), place).item() for place in range(4)]
    assert found == [x & 0xFFFF, x >> 16, x >> 8 & 0xFFFF, x >> 24 | (x & 0xFF) << 8]


def test_same_bits_with_any_number_of_threads(every_kernel):
    def run():
        parameters = layouts(torch.bfloat16, seed=3, chunk=40000)
        optimizer = AdamW(parameters, lr=0.01, rounding="stochastic", backend=every_kernel)
        for step in range(2):
            set_gradients(parameters, step)
            optimizer.step()
        return parameters

    results = with_threads(run, 1, 2, 3)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@both_halves
def test_a_resumed_run_has_the_same_bits(dtype, backend):
    def fresh(values):
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        extras = {"noise": WeightNoise(0.01), "averaging": EMA(0.9), "rounding": StochasticRounding(seed=2)}
        return AdamW(parameters, lr=0.01, backend=backend, **extras)

    optimizer = fresh([torch.linspace(-1, 1, 700).to(dtype), torch.ones(2, 3, dtype=dtype)])
    for step in range(3):
        set_gradients(parameters_of(optimizer), step)
        optimizer.step()
    resumed = AdamW([torch.nn.Parameter(p.detach().clone()) for p in parameters_of(optimizer)], backend=backend)
    resumed.load_state_dict(checkpoint(optimizer))  # the setting, too
    assert resumed.param_groups[0]["rounding"] == StochasticRounding(seed=2)
    train_both(resumed, optimizer)
    same_bits(resumed, optimizer)


def test_three_hundred_small_steps(backend):
    """1e-4 is a fortieth of the distance between bfloat16s below 1: rounded to the nearest, nothing moves."""

    def run(rounding):
        p = torch.nn.Parameter(torch.ones(COUNT, dtype=torch.bfloat16))
        optimizer = SGD([p], lr=1e-4, rounding=rounding, backend=backend)
        p.grad = torch.ones_like(p)
        for _ in range(300):
            optimizer.step()
        return p.detach().float()

    for rounding in (None, "nearest"):
        assert torch.equal(run(rounding), torch.ones(COUNT))
    moved = run("stochastic")
    sigma = math.sqrt(300 * 1e-4 * 2**8) * 2**-8
    assert abs(moved.mean().item() - 0.97) <= 4 * sigma / math.sqrt(COUNT)
    assert moved.std().item() == pytest.approx(sigma, rel=0.1)


def test_second_moments_of_bfloat16_fall(backend):
    """Rounded to the nearest, 0.999 * v is v."""

    def run(rounding):
        p = torch.nn.Parameter(torch.zeros(COUNT))
        optimizer = Adam([p], lr=0.1, state_dtype=torch.bfloat16, rounding=rounding, backend=backend)
        p.grad = torch.full_like(p, 32.0)
        optimizer.step()
        first = optimizer.state[p]["exp_avg_sq"].double().mean().item()
        p.grad = torch.zeros_like(p)
        for _ in range(500):
            optimizer.step()
        return optimizer.state[p]["exp_avg_sq"].double().mean().item() / first

    assert run("nearest") == 1
    assert run("stochastic") == pytest.approx(0.999**500, rel=0.01)


def test_states_and_weights_draw_bits_of_their_own(backend):
    """Were they the same, weights would go up where states do."""
    p = torch.nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    optimizer = SGD([p], lr=2.0**-9, momentum=0.5, rounding="stochastic", backend=backend)
    p.grad_dtype = torch.float32
    p.grad = torch.full(p.shape, 1 + 2.0**-8)
    optimizer.step()
    ups = [optimizer.state[p]["momentum_buffer"] > 1, p.detach() < 1]
    up_of_state, down_of_weight = (some.double() for some in ups)
    assert 0.45 < up_of_state.mean() < 0.55
    assert 0.45 < down_of_weight.mean() < 0.55
    together = (up_of_state * down_of_weight).mean() - up_of_state.mean() * down_of_weight.mean()
    assert abs(together) <= 4 * 0.25 / math.sqrt(p.numel())


def test_where_there_is_nothing_of_16_bits_nothing_changes(backend):
    ours, theirs = layouts(torch.float32, chunk=300), layouts(torch.float32, chunk=300)
    pair = AdamW(ours, rounding="stochastic", backend=backend), AdamW(theirs, backend=backend)
    for step in range(2):
        for some, optimizer in zip((ours, theirs), pair):
            set_gradients(some, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))


def test_skipped_steps_draw_nothing(backend):
    """An overflow leaves the count of steps, by which bits are drawn, where it is."""

    def run(overflow):
        p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = SGD([p], lr=0.001, rounding="stochastic", backend=backend)
        optimizer.grad_scale = torch.tensor(1.0)
        for bad in (0.0, *([1.0] if overflow else []), 0.0):
            p.grad = torch.ones_like(p)
            optimizer.found_inf = torch.tensor(bad)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", None, StochasticRounding(3)], ids=str)
def test_what_a_checkpoint_has(rounding):
    def fresh(rounding):
        return SGD([torch.nn.Parameter(torch.ones(3))], rounding=rounding)

    saved = checkpoint(fresh(rounding))
    optimizer = fresh(None)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rounding"] == rounding
    saved["param_groups"][0]["rounding"] = "StochasticRounding {"
    with pytest.raises(ValueError, match=r"Invalid rounding in the state_dict: 'StochasticRounding \{'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "Invalid rounding: 'up'; there are 'nearest', 'stochastic' and fused_opt.Stochastic"),
        ({"rounding": StochasticRounding}, "Invalid rounding: <class"),
        ({"rounding": "stochastic", "differentiable": True}, "autograd cannot follow what is rounded at random"),
    ],
    ids=str,
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SGD([torch.nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5])
def test_seeds_that_are_none(seed):
    with pytest.raises(ValueError, match="Invalid seed"):
        StochasticRounding(seed)


def test_muons_momentum_is_rounded_to_the_nearest(backend):
    p = torch.nn.Parameter(torch.eye(8, dtype=torch.bfloat16))
    q = torch.nn.Parameter(torch.eye(8, dtype=torch.bfloat16))
    pair = [
        fused_opt.Muon([some], lr=0.02, rounding=how, backend=backend) for some, how in ((p, "stochastic"), (q, None))
    ]
    p.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    q.grad = p.grad.clone()
    for optimizer in pair:
        optimizer.step()
    assert torch.equal(pair[0].state[p]["momentum_buffer"], pair[1].state[q]["momentum_buffer"])
    assert not torch.equal(p, q)
