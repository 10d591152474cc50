"""What tests/backends/test_triton.py runs under TRITON_INTERPRET=1: the kernels' values against the reference, on the CPU.

bfloat16 is left out: Triton's interpreter truncates float32 to bfloat16 where a GPU rounds to the nearest.
"""

import math

import pytest
import torch
from rules import every_elementwise_rule, every_rule, kernels
from support.interpreted import DTYPES, STATES, assert_alike, both, contiguous, few, train
from support.kernels import run_with
from support.parameters import clones, set_gradients
from triton import language as tl

import fused_opt
from fused_opt import backends, warn
from fused_opt.backends import self_check
from fused_opt.backends import triton as backend
from fused_opt.extras.noise import normal, philox

kernel, rules, table = backend.kernel, backend.rules, backend.table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_rule
def test_every_rule(name, options, dtype):
    runs = both(name, options, dtype=dtype)
    train(*runs, steps=2)
    assert_alike(*runs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_elementwise_rule
def test_the_bits_are_the_native_backends(name, options, dtype, monkeypatch):
    """Where a multiplication and an addition are two roundings, as on a GPU. Norms are summed in another order."""
    run_with("baseline", monkeypatch)
    ours = contiguous(dtype)
    theirs = clones(ours)
    options = {**options, "noise": fused_opt.WeightNoise(std=0.01, seed=5), "averaging": fused_opt.EMA(0.9)}
    a, b = (
        getattr(fused_opt, name)(p, backend=which, **options) for p, which in ((ours, "triton"), (theirs, "native"))
    )
    train(a, b, ours, theirs, steps=2)
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q)
        for slot, state in b.state[q].items():
            assert torch.equal(torch.as_tensor(a.state[p][slot]), torch.as_tensor(state)), slot


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_elementwise_rule
def test_states_of_16_bits_have_the_native_backends_bits(name, options, dtype, monkeypatch):
    run_with("baseline", monkeypatch)
    ours = contiguous(dtype)
    theirs = clones(ours)
    options = {**options, "state_dtype": torch.float16}
    a, b = (
        getattr(fused_opt, name)(p, backend=which, **options) for p, which in ((ours, "triton"), (theirs, "native"))
    )
    train(a, b, ours, theirs, steps=2)
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q)
        for slot, state in b.state[q].items():
            assert a.state[p][slot].dtype == state.dtype
            assert torch.equal(torch.as_tensor(a.state[p][slot]), torch.as_tensor(state)), slot


@pytest.mark.parametrize("averaging", [None, fused_opt.EMA(0.9), fused_opt.PSWA(period=2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_rounding_at_random_has_the_native_backends_bits(name, dtype, averaging, monkeypatch):
    """bfloat16 too: what is rounded so is stored without rounding."""
    run_with("baseline", monkeypatch)
    ours = contiguous(dtype)
    theirs = clones(ours)
    options = {"lr": 0.01, "averaging": averaging, "rounding": fused_opt.StochasticRounding(seed=2**63 + 5)}
    if name == "SGD":
        options["momentum"] = 0.9
    a, b = (
        getattr(fused_opt, name)(p, backend=which, **options) for p, which in ((ours, "triton"), (theirs, "native"))
    )
    train(a, b, ours, theirs, steps=2)
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q)
        for slot, state in b.state[q].items():
            assert torch.equal(torch.as_tensor(a.state[p][slot]), torch.as_tensor(state)), slot


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


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("name", ["LARS", "CLARS", "LAMB"])
def test_trust_ratios_where_norms_come_first_and_where_they_are_carried(name, noisy, monkeypatch):
    """And noise relative to the same norms."""
    noise = fused_opt.WeightNoise(std=0.01, relative=True, seed=5) if noisy else None
    a, b, ours, theirs = both(name, {"lr": 0.1, "exempt": -1, "noise": noise}, make=contiguous)
    launches = []
    launch = table.launch
    monkeypatch.setattr(table, "launch", lambda f, *rest: (launches.append((f, rest[-2])), launch(f, *rest)))
    train(a, b, ours, theirs, steps=3)
    assert_alike(a, b, ours, theirs, bound=1e-6)
    for mine, other in zip(a.trust_ratios().values(), b.trust_ratios().values(), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    first = kernel.WANT_DIRECTION.value if name == "LAMB" else kernel.WANT_GRAD.value
    sums = [wanted for function, wanted in launches if function is kernel.norms]
    assert sums == [kernel.WANT_WEIGHT.value | first] + [first] * 2
    assert len(launches) == 6  # and each step's update


def test_one_launch_where_norms_are_carried_and_the_parts_are_known(monkeypatch):
    parameters = [torch.nn.Parameter(torch.ones(3, 2000)), torch.nn.Parameter(torch.ones(5))]
    optimizer = fused_opt.CLARS(parameters, lr=0.1, backend="triton")
    optimizer.track_parts()
    launches = []
    launch = table.launch
    monkeypatch.setattr(table, "launch", lambda f, *rest: (launches.append(f), launch(f, *rest)))
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.square().sum() for p in parameters).backward()
        optimizer.step()
    assert launches == [kernel.norms, *[kernel.update] * 3]


def weights_written(p):
    with torch.no_grad():
        p.mul_(2.0)


def weights_replaced(p):
    p.data = p.detach() * 2.0


def stepped_without_ratio(p, optimizer):
    group = optimizer.param_groups[0]
    ratio, group["trust_ratio"] = group["trust_ratio"], None
    optimizer.step()
    group["trust_ratio"] = ratio


def rested(p, optimizer):
    """A step in which this parameter had no gradient, and another hand wrote it."""
    gradient, p.grad = p.grad, None
    optimizer.step()
    p.grad = gradient


@pytest.mark.parametrize("event", [weights_written, weights_replaced, stepped_without_ratio, rested])
def test_a_carried_norm_is_summed_anew_where_the_weights_were_changed(event):
    a, b, ours, theirs = both(
        "LARS", {"lr": 10.0}, make=lambda dtype: [torch.nn.Parameter(torch.ones(3, 2000)) for _ in "ab"]
    )
    train(a, b, ours, theirs, steps=2)
    for optimizer, parameters in ((a, ours), (b, theirs)):
        event(parameters[0], *[optimizer] * (event.__code__.co_argcount - 1))
    train(a, b, ours, theirs, steps=2, first=2)
    assert_alike(a, b, ours, theirs)
    for mine, other in zip(a.trust_ratios().values(), b.trust_ratios().values(), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


def test_a_write_that_cannot_be_seen_is_missed_for_one_step():
    """One through p.data."""
    a, b, ours, theirs = both("LARS", {"lr": 0.1}, make=lambda dtype: [torch.nn.Parameter(torch.ones(3, 20))])
    train(a, b, ours, theirs, steps=2)
    ours[0].data.mul_(3.0)
    theirs[0].data.mul_(3.0)
    train(a, b, ours, theirs, steps=1, first=2)
    assert a.trust_ratios()["0 of group 0"] == pytest.approx(b.trust_ratios()["0 of group 0"] / 3, rel=1e-3)
    train(a, b, ours, theirs, steps=1, first=3)
    assert a.trust_ratios()["0 of group 0"] == pytest.approx(b.trust_ratios()["0 of group 0"], rel=1e-2)


def test_lamb_beside_clars_whose_parts_are_known():
    """The norm of its gradient is known, too, and is not the direction's."""
    found = []
    for name in ("triton", "reference"):
        parameters = [torch.nn.Parameter(torch.full((3, 4), 1.0 + k)) for k in range(2)]
        groups = [
            {"params": p, "trust_ratio": fused_opt.TrustRatio(kind)} for p, kind in zip(parameters, ("clars", "lamb"))
        ]
        optimizer = fused_opt.SGD(groups, lr=0.1, weight_decay=0.3, backend=name)
        optimizer.track_parts()
        for _ in range(2):
            sum(p.square().sum() for p in parameters).backward()
        optimizer.step()
        found.append(list(optimizer.trust_ratios().values()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def self_check_of(rule, extras=frozenset()):
    variant = self_check.Variant(rule, (torch.float32,) * (2 + len(rule.states)), extras)
    return self_check.run(backend, backend.standard(torch.empty(0)), torch.device("cpu"), variant)


@pytest.mark.parametrize("rule", kernels().values(), ids=kernels())
def test_the_self_check_passes_and_runs_what_is_needed_alone(rule, monkeypatch):
    launches = []
    launch = table.launch
    monkeypatch.setattr(table, "launch", lambda f, *rest: (launches.append((f, rest[-2:])), launch(f, *rest)))
    assert self_check_of(rule) is None
    assert set(launches) == {(kernel.update, (False, False))}


def test_the_self_check_of_everything_passes_and_notices_what_is_wrong(monkeypatch):
    rule = kernels()["momentum_sgd"]
    assert self_check_of(rule, self_check.EXTRAS) is None
    variant = self_check.Variant(None, (torch.float32, torch.float32))
    assert self_check.run(backend, backend.standard(torch.empty(0)), torch.device("cpu"), variant) is None
    pack = table.pack
    monkeypatch.setattr(table, "pack", lambda args: pack(args._replace(coupled_decay=args.coupled_decay * 1.01)))
    assert "numbers differ" in self_check_of(rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_once(dtype):
    """Two groups with their own ratios, noise, averages and coefficients, clipped, written back."""

    def make(dtype):
        some = contiguous(dtype)
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


def test_rows_of_sums_are_aligned_alike():
    """Or the steps would alternate between two kernels, which add up in other orders perhaps."""
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (3, 4097)]
    optimizer = fused_opt.LARS(parameters, lr=0.1, backend="triton")
    set_gradients(parameters, 0)
    optimizer.step()
    (made,) = optimizer._plan.buckets[0].tables
    assert made.chunks == 3
    assert [row.data_ptr() % 16 for row in made.sums] == [0, 0, 0, 0]


def test_clipping_serves_the_ratio_with_the_same_sums(monkeypatch):
    wanted = []
    launch = table.launch
    monkeypatch.setattr(
        table, "launch", lambda f, *rest: (f is kernel.norms and wanted.append(rest[-2]), launch(f, *rest))
    )
    a, b, ours, theirs = both("LARS", {"lr": 0.1, "max_grad_norm": 0.5, "exempt": -1}, make=contiguous)
    train(a, b, ours, theirs, steps=2)
    assert wanted == [2, 1, 2]  # the gradients for the norm, the weights once, the gradients again
    assert_alike(a, b, ours, theirs)


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
    w0, w1, w2, w3 = rules.words(counters, index, t, seed)
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


def test_pieces_cover_every_element_once_and_their_sums_are_cheap_to_add():
    for numel in (1, 4096, 2**22, 2**22 + 1, 2_359_296, 10**9, 2**33):
        size = kernel.chunk_size(numel)
        pieces = -(-numel // size)
        assert size % kernel.FULL.value == 0
        assert 8 * pieces <= 2 * size + 8
        assert size == 4096 or pieces > size / 16  # nor larger than that needs


def test_a_tensor_of_several_pieces_and_the_search_for_it():
    a, b, ours, theirs = both("CLARS", {"lr": 0.1}, make=lambda dtype: [
        torch.nn.Parameter(torch.randn(n, 3, generator=torch.Generator().manual_seed(n))) for n in (1, 0, 7000, 3, 1400)
    ])  # fmt: skip
    train(a, b, ours, theirs)
    assert_alike(a, b, ours, theirs)


def test_the_same_bits_every_time_and_whatever_lies_beside():
    def run(order):
        parameters = contiguous()
        optimizer = fused_opt.LAMB([parameters[i] for i in order], lr=0.1, exempt=-1, backend="triton")
        for step in range(2):
            set_gradients(parameters, step)
            optimizer.step()
        return parameters

    count = len(contiguous())
    first = run(range(count))
    for order in (range(count), reversed(range(count))):
        assert all(torch.equal(a, b) for a, b in zip(first, run(order)))


def test_gradients_that_come_and_go():
    a, b, ours, theirs = both("AdamW", {"lr": 0.01, "trust_ratio": fused_opt.TrustRatio("lars")}, make=few)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        ours[step].grad = theirs[step].grad = None
        a.step()
        b.step()
    assert_alike(a, b, ours, theirs)
    assert [a.state[p]["step"] for p in ours] == [b.state[p]["step"] for p in theirs]


def test_a_gradient_of_another_layout_is_noticed(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", ("triton", "reference"))
    a, b, ours, theirs = both("AdamW", {"lr": 0.01}, make=lambda dtype: [torch.nn.Parameter(torch.ones(6, 4))])
    a.backend = "auto"
    for step, turned in enumerate([False, False, True, False]):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        if turned:
            ours[0].grad = ours[0].grad.t().contiguous().t()
        a.step()
        b.step()
        assert_alike(a, b, ours, theirs)


def test_a_gradient_that_becomes_sparse_is_noticed(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", ("triton", "reference"))
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = fused_opt.SGD([p], lr=0.5)
    for gradient in (torch.ones(4, 3), torch.ones(4, 3).to_sparse()):
        p.grad = gradient
        optimizer.step()
    assert torch.equal(p.data, torch.zeros(4, 3))


def test_what_it_leaves_to_the_reference_and_why():
    p = torch.nn.Parameter(torch.ones(4, 6))
    for tensors, reason in (
        ([p, torch.ones(6, 4).t()], r"strides (1, 4) beside (6, 1)"),
        ([torch.nn.Parameter(torch.ones(8, 6)[::2])], "a tensor with gaps (strides (12, 1))"),
        ([p, torch.ones(()).expand(4, 6)], "strides (0, 0) beside (6, 1)"),
        ([torch.ones(2, dtype=torch.complex64)], "a torch.complex64 tensor"),
        ([torch.ones(2).to_sparse()], "a torch.sparse_coo tensor"),
        ([torch.ones(2, device="meta")], "a tensor on meta; it steps those on cpu and cuda"),
    ):
        assert reason in backend.unsupported(None, tensors)
    turned = torch.nn.Parameter(torch.ones(4, 6).t())
    assert backend.unsupported(None, [turned]) is None
    assert "it counts the elements of contiguous ones" in backend.unsupported(None, [turned], noisy=True)
    assert backend.unsupported(None, [torch.ones(5, 1), torch.ones(1, 5).t()]) is None  # alike but for idle strides


def test_a_nan_stays_in_its_element_and_makes_no_ratio(monkeypatch):
    monkeypatch.setattr(warn, "_said", set())
    a, b, ours, theirs = both("LARS", {"lr": 0.1}, make=lambda dtype: [torch.nn.Parameter(torch.ones(2, 3))])
    for p in (*ours, *theirs):
        p.grad = torch.ones(2, 3)
        p.grad[0, 1] = math.nan
    a.step()  # without a word: to know it, the host would have to wait for the GPU
    with pytest.warns(UserWarning, match="the norms of parameter 0 of group 0 are not finite"):
        b.step()
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    assert ours[0].isnan().sum() == 1
    assert a.trust_ratios() == b.trust_ratios() == {"0 of group 0": 1.0}


def test_amsgrad_keeps_a_nan():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_opt.Adam([p], lr=0.1, amsgrad=True, backend="triton")
    for bad in (1.0, math.nan, 1.0):
        p.grad = torch.tensor([1.0, bad, 1.0])
        optimizer.step()
    assert optimizer.state[p]["max_exp_avg_sq"].isnan().tolist() == [False, True, False]


def test_a_plan_that_nothing_happened_to_is_kept():
    a, _, ours, _ = both("Adam", {"lr": 0.1}, make=few)
    set_gradients(ours, 0)
    a.step()
    plan = a._plan
    tables = [bucket_table.tensors for bucket in plan.buckets for bucket_table in bucket.tables]
    for step in range(2):
        a.zero_grad()
        set_gradients(ours, step)
        a.param_groups[0]["lr"] = 0.1 * step
        a.step()
        assert a._plan is plan
    assert [bucket_table.tensors for bucket in plan.buckets for bucket_table in bucket.tables] == tables
    ours[1].data = ours[1].detach().clone()
    a.step()
    assert a._plan is not plan


def test_a_count_that_was_moved_is_noticed():
    a, b, ours, theirs = both("AdamW", {"lr": 0.01}, make=few)
    train(a, b, ours, theirs, steps=2)
    for optimizer, p in ((a, ours[1]), (b, theirs[1])):
        optimizer.state[p]["step"].data = torch.tensor(7.0)
    train(a, b, ours, theirs, steps=2, first=2)
    assert_alike(a, b, ours, theirs)
    assert a.state[ours[1]]["step"].item() == 9.0


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
