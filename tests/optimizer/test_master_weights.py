"""Float32 weights behind 16 bits: the trajectory is float32's, bit for bit, and the model sees it rounded."""

import copy

import pytest
import torch
from rules import BY_NAME, every_rule
from support.compare import same_bits, unchanged
from support.parameters import checkpoint, clones, layouts, parameters_of, set_gradients, train_both

import fused_opt
from fused_opt import EMA, PSWA, SGD, AdamW, ScheduleFree, WeightNoise, to_16bit
from fused_opt.exact import exact_weights, kept_for, set_exact_weights

HALVES = [torch.bfloat16, torch.float16]
both_halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
EXACT = {"master_weights": True, "state_dtype": torch.float32}


class Module(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.weights = torch.nn.ParameterList(tensors)


def beside_float32(name, dtype, backend, shapes=layouts, **options):
    """An optimizer of 16 bits with exact weights, and the same of float32, on equal weights."""
    theirs = shapes(chunk=600)
    ours = clones(theirs)
    pair = [
        getattr(fused_opt, name)(some, backend=backend, **options, **more)
        for some, more in ((ours, EXACT), (theirs, {}))
    ]
    to_16bit(Module(ours), pair[0], dtype)
    return (*pair, ours, theirs)


def give(ours, theirs, seed):
    """The gradients of 16 bits, to both."""
    set_gradients(ours, seed)
    for p, q in zip(ours, theirs):
        q.grad = torch.empty_like(q).copy_(p.grad)


def assert_exact(optimizer, ours, theirs, bound=None):
    exact = optimizer.master_parameters()
    for p, q in zip(ours, theirs):
        assert exact[p].dtype == torch.float32
        if bound is None:
            assert torch.equal(exact[p], q)
        else:
            torch.testing.assert_close(exact[p], q.detach(), rtol=bound, atol=bound)
        half = torch.finfo(p.dtype).eps / 2
        assert ((p.float() - exact[p]).abs() <= half * exact[p].abs() + torch.finfo(p.dtype).tiny).all()


@both_halves
@every_rule
def test_the_trajectory_is_float32s(name, options, dtype, backend):
    optimizer, oracle, ours, theirs = beside_float32(name, dtype, backend, **options)
    for step in range(4):
        give(ours, theirs, step)
        optimizer.step()
        oracle.step()
        # On a GPU the last bit of a norm depends on addresses.
        assert_exact(optimizer, ours, theirs, 1e-6 if BY_NAME[name].normed else None)
    for p, q in zip(ours, theirs):
        assert p.dtype == dtype
        for slot, state in oracle.state[q].items():
            mine = optimizer.state[p][slot]
            assert torch.equal(mine, state) or (BY_NAME[name].normed and torch.allclose(mine, state, atol=1e-5))


@pytest.mark.parametrize(
    "extras",
    [
        {"noise": WeightNoise(0.01), "averaging": PSWA(period=2)},
        {"averaging": ScheduleFree(0.5)},
        {"averaging": EMA(0.9), "max_grad_norm": 1.0, "cautious": fused_opt.Cautious("both"), "decay": "independent"},
    ],
    ids=str,
)
@both_halves
def test_with_everything_else_in_the_step(dtype, extras, backend):
    optimizer, oracle, ours, theirs = beside_float32("AdamW", dtype, backend, lr=0.01, **extras)
    for step in range(5):
        give(ours, theirs, step)
        if step == 3:
            ours[1].grad = theirs[1].grad = None  # whose sample the host takes
        optimizer.step()
        oracle.step()
        assert_exact(optimizer, ours, theirs)
    for p, q in zip(ours, theirs):
        assert torch.equal(optimizer.state[p]["average"], oracle.state[q]["average"])


@both_halves
def test_norms_are_those_of_the_exact_weights(dtype, backend):
    """Carried from step to step: the ratios are float32's, where those of rounded weights differ."""
    optimizer, oracle, ours, theirs = beside_float32("LARS", dtype, backend, lr=0.1, exempt=-1)
    for step in range(3):
        give(ours, theirs, step)
        optimizer.step()
        oracle.step()
        for mine, other in zip(optimizer.trust_ratios().values(), oracle.trust_ratios().values(), strict=True):
            assert mine == pytest.approx(other, rel=1e-12)


def test_what_the_model_sees():
    """The nearest bfloat16, ties away from zero; infinities and NaN as they are; every float32 comes back."""
    x = torch.tensor(
        [1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-9, 3.4e38, torch.inf, -torch.inf, torch.nan, -0.0]
    )
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = torch.cat([x, bits.view(torch.float32)])
    p = torch.zeros(len(x), dtype=torch.bfloat16)
    kept = kept_for(p)
    set_exact_weights(p, kept, x)
    seen = [1.0, 1 + 2**-7, 1 + 2**-6, -1 - 2**-7, 1.0, torch.inf, torch.inf, -torch.inf]
    assert p[:8].tolist() == seen
    found = exact_weights(p, kept)
    number = ~x.isnan()
    assert torch.equal(found[number].view(torch.int32), x[number].view(torch.int32))
    assert (found.isnan() == x.isnan()).all()
    assert (p.isnan() == x.isnan()).all()
    to_even = x.to(torch.bfloat16)[number]
    tie = (x[number].view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(p[number][~tie], to_even[~tie])


@both_halves
def test_a_step_that_changes_nothing_keeps_every_float32(dtype, every_kernel):
    """Whatever lies beside a number that is none."""
    bits = torch.randint(-(2**31), 2**31, (5_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = bits.view(torch.float32)
    model = Module([torch.nn.Parameter(x.clone())])
    optimizer = SGD(model.parameters(), lr=0.0, backend=every_kernel, master_weights=True)
    to_16bit(model, optimizer, dtype)
    (p,) = model.parameters()
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    number = ~x.isnan()
    assert torch.equal(optimizer.master_parameters()[p][number], x[number])
    assert torch.equal(p[number], before[number])
    assert p[~number].isnan().all()


def test_numbers_that_are_none_stay_so(backend):
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = SGD([p], lr=1.0, backend=backend, master_weights=True)
    p.grad = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0], dtype=torch.bfloat16)
    optimizer.step()
    exact = optimizer.master_parameters()[p]
    assert p.isnan().tolist() == exact.isnan().tolist() == [True, False, False, False]
    assert p.tolist()[1:] == exact.tolist()[1:] == [-torch.inf, torch.inf, 1.0]


@both_halves
def test_a_resumed_run_has_the_same_bits(dtype, backend):
    def fresh(values, **options):
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        return AdamW(parameters, lr=1e-3, state_dtype=torch.float32, backend=backend, **options)

    optimizer = fresh([torch.linspace(-1, 1, 70).to(dtype), torch.ones(2, 3, dtype=dtype)], master_weights=True)
    for step in range(3):
        set_gradients(parameters_of(optimizer), step)
        optimizer.step()
    resumed = fresh([p.detach() for p in parameters_of(optimizer)])
    resumed.load_state_dict(checkpoint(optimizer))  # with the setting
    slot, kind = ("remainder", torch.int16) if dtype == torch.bfloat16 else ("master", torch.float32)
    assert {of_p[slot].dtype for of_p in resumed.state.values()} == {kind}
    train_both(resumed, optimizer)
    same_bits(resumed, optimizer)
    for mine, other in zip(resumed.master_parameters().values(), optimizer.master_parameters().values()):
        assert torch.equal(mine, other)


@both_halves
def test_a_float32_run_goes_on_in_16_bits_and_comes_out_again(dtype, backend):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 1))
    optimizer = AdamW(model.parameters(), lr=0.01, backend=backend, **EXACT)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    other = copy.deepcopy(model)
    oracle = AdamW(other.parameters(), lr=0.01, backend=backend)
    oracle.load_state_dict(checkpoint(optimizer))
    parameters = list(model.parameters())
    to_16bit(model, optimizer, dtype)
    assert all(p is q for p, q in zip(parameters, model.parameters()))
    assert {p.dtype for p in parameters} == {dtype}
    for step in range(3):
        give(parameters, list(other.parameters()), step)
        optimizer.step()
        oracle.step()
    exact = optimizer.master_parameters()
    out = {name: exact.get(value, value) for name, value in model.state_dict(keep_vars=True).items()}
    other_out = other.state_dict()
    for name, p in other.named_parameters():
        assert torch.equal(out[name], p)
    assert out.keys() == other_out.keys()
    float32 = copy.deepcopy(other)
    float32.load_state_dict(out)
    assert all(torch.equal(p, q) for p, q in zip(float32.parameters(), other.parameters()))


def test_who_writes_the_parameter(backend):
    """Of float16 the written number counts; of bfloat16 it does to within half a unit, since the remainder stays."""
    for dtype in HALVES:
        p = torch.nn.Parameter(torch.full((9,), 1.0, dtype=dtype))
        optimizer = SGD([p], lr=2.0**-13, backend=backend, master_weights=True)
        p.grad = torch.ones_like(p)
        optimizer.step()
        with torch.no_grad():
            p.fill_(2.0)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        exact = optimizer.master_parameters()[p]
        assert torch.equal(p, torch.full_like(p, 2.0))
        off = 0.0 if dtype == torch.float16 else 2.0**-7
        assert ((exact - 2).abs() <= off).all()


def test_averages_swapped_in_leave_the_exact_weights(backend):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 50).to(torch.bfloat16))
    optimizer = SGD([p], lr=0.01, backend=backend, master_weights=True, averaging=EMA(0.5))
    p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    before = optimizer.master_parameters()[p]
    with optimizer.averaged_weights():
        assert not torch.equal(p.float(), before)
    assert torch.equal(optimizer.master_parameters()[p], before)


def test_float32_parameters_are_exact_already(backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], backend=backend, master_weights=True)
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.master_parameters()[p].data_ptr() == p.data_ptr()


def test_checkpoints_without_the_low_bits(backend):
    """As torch.optim writes them: the weights are what the parameters hold."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 5).to(torch.bfloat16))
    oracle = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    oracle.step()
    optimizer = AdamW([p], backend=backend, master_weights=True)
    optimizer.load_state_dict(oracle.state_dict())
    assert torch.equal(optimizer.master_parameters()[p], p)
    optimizer.step()
    assert optimizer.state[p]["remainder"].dtype == torch.int16
    saved = optimizer.state_dict()
    assert saved["state"][0]["remainder"].dtype == torch.bfloat16  # the same bits: collectives know no int16
    assert torch.equal(saved["state"][0]["remainder"].view(torch.int16), optimizer.state[p]["remainder"])
    float32 = AdamW([torch.nn.Parameter(p.detach().float())], backend=backend)
    float32.load_state_dict(saved)
    assert "remainder" not in float32.state[parameters_of(float32)[0]]


@pytest.mark.parametrize("bad", [torch.zeros(5), torch.zeros(4, dtype=torch.int16), 7], ids=str)
def test_a_remainder_that_is_none(bad, backend):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 5).to(torch.bfloat16))
    optimizer = AdamW([p], backend=backend, master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"] = {0: {**saved["state"][0], "remainder": bad}}
    with unchanged(optimizer), pytest.raises(ValueError, match="state 'remainder' of parameter 0 of group 0 is"):
        optimizer.load_state_dict(saved)
    optimizer.state[p]["remainder"] = bad
    with unchanged(optimizer), pytest.raises(RuntimeError, match="has a state 'remainder' that is"):
        optimizer.step()


def test_a_remainder_that_lies_otherwise(backend):
    p = torch.nn.Parameter(torch.randn(4, 6).to(torch.bfloat16).t())
    optimizer = SGD([p], lr=0.1, backend=backend, master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = optimizer.master_parameters()[p]
    optimizer.state[p]["remainder"] = optimizer.state[p]["remainder"].contiguous()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(optimizer.master_parameters()[p], before)
    assert optimizer.state[p]["remainder"].stride() == p.stride()


def test_what_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="master_weights takes True or False, not 1"):
        SGD([p], master_weights=1)
    with pytest.raises(ValueError, match="autograd cannot follow weights that are kept in two parts"):
        SGD([p], master_weights=True, differentiable=True)
    model = Module([p])
    for optimizer, other, dtype, message in (
        (SGD([p]), model, torch.bfloat16, "group 0 would lose its low bits; set its master_weights to True"),
        (SGD([p], master_weights=True), torch.nn.Linear(1, 1), torch.bfloat16, "it is none of this Linear's"),
        (
            SGD([p], master_weights=True),
            model,
            torch.float32,
            "Invalid dtype: torch.float32; there are torch.bfloat16 and",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            to_16bit(other, optimizer, dtype)
        assert p.dtype == torch.float32
        assert not optimizer.state
