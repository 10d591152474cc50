"""The noise as noise, and as the same noise whoever draws it."""

import copy
import io
import math

import pytest
import torch
from support.kernels import GPU, INSTRUCTION_SETS, run_with
from support.parameters import layouts, set_gradients
from support.threads import with_threads

from fused_opt import EMA, SGD, AdamW, WeightNoise
from fused_opt.extras.noise import normal, philox, uniform

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL, FULL, FULL, FULL), (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_philox(counter, key, expected):
    """Random123's, one counter at a time and several at once."""
    seed = key[0] | key[1] << 32
    for count in (1, 3):
        words = philox([torch.full((count,), word) for word in counter], seed)
        assert [word.tolist() for word in words] == [[word] * count for word in expected]


def multiply(a, b):
    return a * b >> 32, a * b & FULL


def philox_by_hand(counter, seed):
    """In Python's integers, which do not overflow."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & FULL, seed >> 32
    for _ in range(10):
        (h0, l0), (h1, l1) = multiply(c0, 0xD2511F53), multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & FULL, (k1 + 0xBB67AE85) & FULL
    return c0, c1, c2, c3


def test_lanes_and_counters():
    """Element i is lane i % 4 of the counter (i // 4, parameter, step); Box-Muller turns two words into two numbers."""
    seed, index, t = 0x1234_5678_9ABC_DEF0, 3, 41
    z = normal(seed, index, t, 4003)
    for i in (0, 1, 2, 3, 4, 1001, 4000, 4002):
        words = philox_by_hand((i // 4, 0, index, t), seed)
        w0, w1 = words[:2] if i % 4 < 2 else words[2:]
        r = math.sqrt(-2 * math.log(((w0 >> 9) + 0.5) / 2**23))
        low = (w1 & 0x3FFFFFFF) * 4  # of w1 the highest bits are sign and swap, the rest is in two's complement
        angle = (low - 2**32 if low >= 2**31 else low) / 2**32 * math.pi / 2
        pair = [r * math.cos(angle) * (-1 if w1 >> 31 else 1), r * math.sin(angle)]
        expected = pair[::-1] if w1 >> 30 & 1 else pair
        assert z[i].item() == pytest.approx(expected[i % 2], rel=1e-12, abs=1e-12)
    assert uniform(seed, t) == philox_by_hand((0, 0, FULL, t), seed)[0] / 2**32


def drawn(backend, shapes=((40000,),), steps=1, dtype=torch.float32, std=1.0, **options):
    """What the noise alone adds, step for step: weights 0, gradients 0, sigma 1."""
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    optimizer = SGD(parameters, lr=1.0, noise=WeightNoise(std=std, **options), backend=backend)
    found = []
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.zeros_like(p)
            p.data.zero_()
        optimizer.step()
        found.append([p.detach().double().clone() for p in parameters])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_instruction_set_draws_what_the_reference_draws(dtype, every_kernel):
    """To float32's rounding; float64 parameters get the same float32 numbers."""
    seed = 2**63 + 12345
    for step, tensors in enumerate(drawn(every_kernel, ((300001,), (7,), (70, 33)), 3, dtype, seed=seed)):
        for index, z in enumerate(tensors):
            expected = normal(seed, index, step, z.numel())
            torch.testing.assert_close(z.flatten(), expected, rtol=2e-6, atol=5e-7)


def moments(z):
    z = z.flatten()
    mean, variance = z.mean().item(), z.var().item()
    return (
        mean,
        variance,
        ((z - mean) ** 3).mean().item() / variance**1.5,
        ((z - mean) ** 4).mean().item() / variance**2,
    )


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_moments_of_the_normal_distribution(backend):
    """Each within five standard errors."""
    n = 1 << 18
    ((z,),) = drawn(backend, ((n,),), seed=11)
    mean, variance, skewness, kurtosis = moments(z)
    assert abs(mean) < 5 / math.sqrt(n)
    assert abs(variance - 1) < 5 * math.sqrt(2 / n)
    assert abs(skewness) < 5 * math.sqrt(6 / n)
    assert abs(kurtosis - 3) < 5 * math.sqrt(24 / n)
    for x in (-3, -2, -1, -0.3, 0, 0.5, 1.5, 2.5, 3.5):  # and the distribution function
        expected = 0.5 * math.erfc(-x / math.sqrt(2))
        assert abs((z < x).double().mean().item() - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
    assert 4 < z.abs().max() < 5.9


def test_each_lane_is_normal(every_kernel):
    """The four numbers of one counter, which come by different branches of Box-Muller."""
    ((z,),) = drawn(every_kernel, ((1 << 16,),), seed=3)
    for lane in z.view(-1, 4).unbind(1):
        mean, variance, _, kurtosis = moments(lane)
        n = lane.numel()
        assert abs(mean) < 5 / math.sqrt(n)
        assert abs(variance - 1) < 5 * math.sqrt(2 / n)
        assert abs(kurtosis - 3) < 5 * math.sqrt(24 / n)


def test_neighbours_parameters_steps_and_seeds_are_independent(backend):
    """Neither they nor their squares correlate: the two numbers of one Box-Muller pair share a radius."""
    n = 1 << 16
    (a, b), (c, _) = drawn(backend, ((n,), (n,)), 2, seed=5)
    ((d, _),) = drawn(backend, ((n,), (n,)), 1, seed=5 + 2**32)
    pairs = [(a[:-lag], a[lag:]) for lag in (1, 2, 3, 4, 64, 256, 16384)] + [(a, b), (a, c), (b, c), (a, d)]
    pairs += [(a[0::2], a[1::2]), (a[0::4], a[1::4]), (a[2::4], a[3::4])]
    for x, y in pairs:
        bound = 5 / math.sqrt(x.numel())
        assert abs(correlation(x, y)) < bound
        assert abs(correlation(x.square(), y.square())) < bound


def test_no_two_elements_draw_the_same_counter(every_kernel):
    """Over chunk and block borders, parameters and steps."""
    everything = torch.cat([z for tensors in drawn(every_kernel, ((70000,), (513,), (511,)), 2) for z in tensors])
    quads = everything[: everything.numel() // 4 * 4].float()
    assert quads.unique().numel() > 0.97 * quads.numel()  # a handful agree by chance among 2**24
    shifted = everything[:70000]
    for lag in (4, 64, 128, 256, 512, 1024, 16384):
        assert (shifted[lag:] == shifted[:-lag]).double().mean() < 1e-3


def test_memory_layout_does_not_matter(every_kernel):
    """The element's place in row-major order decides."""
    shape = (6, 5, 4, 7)
    expected = normal(9, 0, 0, 6 * 5 * 4 * 7).view(shape)
    for data in (
        torch.zeros(shape),
        torch.zeros(shape).to(memory_format=torch.channels_last),
        torch.zeros(7, 4, 5, 6).permute(3, 2, 1, 0),
        torch.zeros(6, 5, 4, 14)[..., ::2],
        torch.zeros(6 * 5 * 4 * 7 + 1)[1:].view(shape),
    ):
        p = torch.nn.Parameter(data)
        p.grad = torch.zeros(shape)
        SGD([p], lr=1.0, noise=WeightNoise(std=1.0, seed=9), backend=every_kernel).step()
        torch.testing.assert_close(p.detach().double(), expected, rtol=2e-6, atol=5e-7)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "rows apart": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),  # neighbours share counters
    "of one element": lambda x: x[:, :1, :, :1].contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_bits(layout, dtype, every_kernel):
    """Dense ones are walked as they lie in memory, with each element's noise."""
    values = torch.linspace(-1, 1, 37 * 30 * 5 * 19, dtype=dtype).view(37, 30, 5, 19)  # more than a few chunks
    runs = []
    for data in (LAYOUTS[layout](values), LAYOUTS[layout](values).contiguous()):
        p = torch.nn.Parameter(data)
        noise = WeightNoise(std=0.1, seed=9)
        optimizer = SGD([p], lr=0.5, momentum=0.9, noise=noise, averaging=EMA(0.5), backend=every_kernel)
        for step in range(2):
            p.grad = torch.empty_like(p).copy_(values[:, : p.shape[1], :, : p.shape[3]] + step)
            p.grad = p.grad if p.grad.stride() == p.stride() else torch.stack([p.grad] * 2, -1)[..., 0]
            optimizer.step()
        runs.append((p, *(value for _, value in sorted(optimizer.state[p].items()))))
    for ours, contiguous in zip(*runs, strict=True):
        assert torch.equal(ours, contiguous)
    if every_kernel == "native":
        assert optimizer._last.buckets[0].core.strided() == []


def test_any_number_of_threads_draws_the_same(every_kernel):
    results = with_threads(lambda: drawn(every_kernel, ((70001,), (3,)), 2), 1, 2, 3)
    for other in results[1:]:
        assert all(torch.equal(a, b) for x, y in zip(results[0], other) for a, b in zip(x, y))


def test_who_else_is_stepped_does_not_matter(backend):
    """A parameter without a gradient, one on the other backend, another chunking: the index in the optimizer decides."""
    a, b, c = drawn(backend, ((5,), (300,), (70,)), 2)[1]
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (5, 300, 70)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    optimizer = SGD(groups, lr=1.0, noise=WeightNoise(std=1.0), backend=backend)
    parameters[2].grad = torch.zeros(70)
    optimizer.step()
    for p in parameters[1:]:
        p.grad = torch.zeros_like(p)
        p.data.zero_()
    optimizer.step()
    assert torch.equal(parameters[0].detach(), torch.zeros(5))
    assert torch.equal(parameters[1].double(), b)
    assert torch.equal(parameters[2].double(), c)
    assert not torch.equal(a, b[:5])


def test_complex_parameters_get_noise_in_both_parts():
    p = torch.nn.Parameter(torch.zeros(5000, dtype=torch.complex128))
    p.grad = torch.zeros_like(p)
    SGD([p], lr=1.0, noise=WeightNoise(std=0.5, seed=1)).step()
    assert torch.equal(torch.view_as_real(p.detach()).flatten(), 0.5 * normal(1, 0, 0, 10000))


SCHEDULES = {
    "constant": ({"std": 0.3}, lambda t, lr: 0.3),
    "decay": ({"std": 0.3, "schedule": "decay"}, lambda t, lr: math.sqrt(0.3**2 / (1 + t) ** 0.55)),
    "cycle": ({"std": 0.3, "schedule": "cycle", "period": 3}, lambda t, lr: 0.3 * [1, 2 / 3, 1 / 3][t % 3]),
    "langevin": ({"temperature": 0.02}, lambda t, lr: math.sqrt(2 * lr * 0.02)),
    "annealed langevin": (
        {"temperature": 0.02, "schedule": "cycle", "period": 2},
        lambda t, lr: math.sqrt(2 * lr * 0.02) * [1, 1 / 2][t % 2],
    ),
    "cooling langevin": (
        {"temperature": 0.02, "schedule": "decay"},
        lambda t, lr: math.sqrt(2 * lr * 0.02 / (1 + t) ** 0.55),
    ),
}


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sigma_by_its_definition(name, relative, every_kernel):
    """Added to the update of the rule, not through its momentum; relative: to the weights before the step."""
    options, sigma = SCHEDULES[name]
    parameters = layouts(torch.float64, chunk=300)
    weights = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(w) for w in weights]
    noise = WeightNoise(**options, relative=relative, seed=4)
    optimizer = SGD(parameters, lr=0.1, momentum=0.9, noise=noise, backend=every_kernel)
    for t, lr in enumerate((0.1, 0.4, 0.2, 0.1)):
        optimizer.param_groups[0]["lr"] = lr
        set_gradients(parameters, 100 + t)
        for i, p in enumerate(parameters):
            buffers[i] = 0.9 * buffers[i] + p.grad
            scale = sigma(t, lr)
            if relative and p.numel():
                scale *= math.sqrt(weights[i].square().sum().item() / p.numel())
            weights[i] = weights[i] - lr * buffers[i] + scale * normal(4, i, t, p.numel()).view(p.shape)
        assert noise.sigma(t, lr) == pytest.approx(sigma(t, lr), rel=1e-14)
        optimizer.step()
    for i, (p, w) in enumerate(zip(parameters, weights)):
        torch.testing.assert_close(p.detach(), w, rtol=2e-6, atol=4e-6)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], buffers[i], rtol=1e-12, atol=1e-12)


def test_sigma_of_zero_is_no_noise(backend):
    for noise in (WeightNoise(std=0.0), WeightNoise(std=0.0, relative=True), WeightNoise(temperature=0.0)):
        ours, theirs = layouts(chunk=300), layouts(chunk=300)
        optimizer, oracle = AdamW(ours, noise=noise, backend=backend), AdamW(theirs, backend=backend)
        for step in range(2):
            set_gradients(ours, step)
            set_gradients(theirs, step)
            optimizer.step()
            oracle.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_once(dtype, every_kernel):
    p = torch.nn.Parameter(torch.full((3000,), 1.0, dtype=dtype))
    p.grad = torch.full_like(p, 0.5)
    SGD([p], lr=0.25, noise=WeightNoise(std=0.1, seed=2), backend=every_kernel).step()
    exact = 0.875 + 0.1 * normal(2, 0, 0, 3000)
    wrong = p.detach() != exact.to(dtype)
    assert wrong.double().mean() < 1e-3  # float32's rounding before the storage's
    torch.testing.assert_close(p.detach().double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_groups_have_noise_of_their_own(backend):
    a, b, c = (torch.nn.Parameter(torch.zeros(100)) for _ in range(3))
    groups = [
        {"params": [a], "noise": WeightNoise(std=1.0, seed=1)},
        {"params": [b]},
        {"params": [c], "noise": WeightNoise(std=2.0, seed=2)},
    ]
    optimizer = SGD(groups, lr=1.0, backend=backend)
    for p in (a, b, c):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(a.detach().double(), normal(1, 0, 0, 100), rtol=2e-6, atol=5e-7)
    assert torch.equal(b.detach(), torch.zeros(100))
    torch.testing.assert_close(c.detach().double(), 2 * normal(2, 2, 0, 100), rtol=2e-6, atol=1e-6)


def test_a_resumed_run_draws_on(backend):
    expected = drawn(backend, ((1000,), (30,)), 5, seed=6, schedule="cycle", period=3)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (1000, 30)]
    optimizer = SGD(parameters, lr=1.0, noise=WeightNoise(std=1.0, seed=6, schedule="cycle", period=3), backend=backend)
    for step in range(5):
        if step == 2:  # a new process knows only what the file says
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = SGD(parameters, lr=0.5, backend=backend)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        if step == 4:
            optimizer = copy.deepcopy(optimizer)
            parameters = optimizer.param_groups[0]["params"]
        for p in parameters:
            p.grad = torch.zeros_like(p)
            p.data.zero_()
        optimizer.step()
        for p, z in zip(parameters, expected[step]):
            assert torch.equal(p.detach().double(), z)


def test_a_learning_rate_of_zero_draws_nothing(backend):
    """And does not count: the next step draws what it would have drawn."""
    p = torch.nn.Parameter(torch.zeros(100))
    optimizer = SGD([p], lr=0.0, noise=WeightNoise(std=1.0), backend=backend)
    p.grad = torch.zeros(100)
    optimizer.step()
    assert torch.equal(p.detach(), torch.zeros(100))
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert torch.equal(p.detach().double(), drawn(backend, ((100,),))[0][0])


def test_invalid_settings():
    for options, words in (
        ({}, "either std or temperature"),
        ({"std": 1.0, "temperature": 1.0}, "either std or temperature"),
        ({"std": -1.0}, "Invalid std: -1.0"),
        ({"std": math.nan}, "Invalid std: nan"),
        ({"temperature": math.inf}, "Invalid temperature: inf"),
        ({"std": 1.0, "schedule": "cosine"}, "Invalid schedule: 'cosine'"),
        ({"std": 1.0, "schedule": "cycle"}, "Invalid period: None"),
        ({"std": 1.0, "period": 3}, "Invalid period: 3"),
        ({"std": 1.0, "schedule": "cycle", "period": 0}, "Invalid period: 0"),
        ({"std": 1.0, "seed": -1}, "Invalid seed"),
        ({"std": 1.0, "seed": 2**64}, "Invalid seed"),
    ):
        with pytest.raises(ValueError, match=words):
            WeightNoise(**options)


@pytest.mark.skipif("avx2" not in INSTRUCTION_SETS, reason="needs a processor with more than one instruction set")
def test_instruction_sets_agree(monkeypatch):
    found = []
    for name in (*INSTRUCTION_SETS, GPU):
        run_with(name, monkeypatch)
        found.append(drawn("native", ((1 << 16,),))[0][0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=2e-7)
