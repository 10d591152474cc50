"""States in 8 bits: the codes, the step with them on every backend, checkpoints, and what is refused."""

import math

import pytest
import torch
from support.compare import assert_close, distance, same_bits, unchanged
from support.kernels import EVERY_KERNEL, GPU, choose
from support.parameters import checkpoint, clones, parameters_of, set_gradients

import fused_opt
from fused_opt.eight_bits import BLOCK, CODES, LEAST, SIGNED, UNSIGNED, coded, decoded, encode

SHAPES = [(LEAST,), (70, 61), (3, BLOCK * 137 + 5)]  # one block's end is a row's, others' are not; two chunks


@pytest.fixture(params=[kernel for kernel in EVERY_KERNEL if not kernel.endswith(GPU)])
def kernel(request, monkeypatch):
    """The backends that step states in 8 bits."""
    return choose(request.param, monkeypatch)


def heavy_tailed(shape, seed, signs=True):
    """Numbers over a dozen decades, some 0, whose squares are float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
    x = x.clamp(-6e4, 6e4).half().float() * (torch.rand(shape, generator=generator) > 0.05)
    return x if signs else x.abs()


def parameters():
    return [torch.nn.Parameter(heavy_tailed(shape, k)) for k, shape in enumerate(SHAPES)]


def train(optimizer, steps, first=0):
    for step in range(first, first + steps):
        for k, p in enumerate(parameters_of(optimizer)):
            p.grad = heavy_tailed(p.shape, 10 * step + k).to(p.dtype)
        optimizer.step()


# ---- codes


def values_of(dtype):
    """What each code is of its scale, by the definition in words: (1 + r) 2^e, where e + r is 2 or 4 times as far below 0."""
    root, most = (2, 127) if dtype == SIGNED else (4, 255)

    def logarithm(x):  # with straight lines between the powers of 2
        mantissa, exponent = math.frexp(x)
        return exponent - 1 + 2 * mantissa - 1

    shares = [0.0]
    for code in range(1, most + 1):
        below = root * (logarithm(code) - logarithm(most))
        exponent = math.floor(below)
        shares.append((1 + below - exponent) * 2.0**exponent)
    return torch.tensor(shares, dtype=torch.float64)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_codes_are_what_their_definition_says(dtype):
    shares = values_of(dtype)
    codes = torch.arange(len(shares)).to(dtype)
    for scale in (1.0, 0.375):
        scales = torch.full((len(codes) // BLOCK + 1,), scale)[: -(-len(codes) // BLOCK)]
        assert torch.equal(decoded(codes, scales).double(), (shares.float() * scale).double())
        if dtype == SIGNED:
            assert torch.equal(decoded(-codes, scales), -decoded(codes, scales))
    about = (torch.arange(len(shares)) / (len(shares) - 1)).double() ** (2 if dtype == SIGNED else 4)
    torch.testing.assert_close(shares[1:], about[1:], rtol=0.21, atol=0)
    assert shares[-1] == 1


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_number_becomes_one_of_the_two_codes_around_it(dtype):
    x = heavy_tailed((5, 1000), 3, signs=dtype == SIGNED)
    codes, scales = coded(x, dtype)
    blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    assert torch.equal(scales, blocks.abs().amax(1))
    size = codes.flatten().int().abs()
    share = (blocks.abs().double() / scales.unsqueeze(1)).flatten()[: x.numel()]
    shares = torch.cat([values_of(dtype), torch.ones(1)])
    least = 0 if dtype == SIGNED else 1
    assert (share <= shares[size + 1])[(share > 0)].all()
    assert (share >= shares[(size - 1).clamp(min=0)] - 1e-7)[size > least].all()
    assert ((size >= least) | (share == 0)).all()
    # to the nearer one in the middle of an octave, where codes are evenly spaced
    steady = (size > 1) & (shares[size + 1] - shares[size] == shares[size] - shares[size - 1])
    assert steady.sum() > 100
    half = (shares[size + 1] - shares[size]) / 2
    assert ((share - shares[size]).abs() <= half * 1.001)[steady].all()
    signs = x.flatten().sign() * (size > 0)
    assert torch.equal(codes.flatten().sign().float(), signs)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_codes_come_back(dtype):
    """What codes stand for becomes the same codes and scales, so that a state that is not changed does not creep."""
    every = torch.arange(-127, 128) if dtype == SIGNED else torch.arange(256)
    codes = torch.cat([every[-1:], every[:100], every[-28:-1], every[-1:], every[100:]]).to(dtype)
    for size in (1.0, 3.3e-38, 3e38, 1 / 3):
        scales = torch.full((len(codes) // BLOCK + 1,), size)
        again, of_again = coded(decoded(codes, scales), dtype)
        assert torch.equal(of_again, scales)
        if size > 1e-30:
            assert torch.equal(again, codes)


def test_what_divides_stays_above_0():
    v = torch.full((BLOCK,), 1e-30)
    v[0], v[1] = 1.0, 0.0
    codes, scales = coded(v, UNSIGNED)
    assert codes[:3].tolist() == [255, 0, 1]
    assert decoded(codes, scales)[2].item() == pytest.approx(255**-4, rel=0.02)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_block_with_a_number_that_is_not_finite_is_none(dtype, bad):
    x = torch.ones(2 * BLOCK)
    x[3] = bad
    codes, scales = coded(x, dtype)
    assert scales.isnan().tolist() == [True, False]
    assert decoded(codes, scales).isnan().tolist() == [True] * BLOCK + [False] * BLOCK


def test_a_block_below_all_normal_numbers_is_0():
    codes, scales = torch.ones(4, dtype=SIGNED), torch.ones(1)
    encode(torch.full((4,), 1e-39), codes, scales)
    assert scales.tolist() == [0.0]
    assert decoded(codes, scales).tolist() == [0.0] * 4


# ---- the step


@pytest.mark.parametrize(
    ("name", "options"), [("SGD", {"lr": 1.0, "momentum": 0.5}), ("RMSprop", {"lr": 1.0, "alpha": 0.5})]
)
def test_every_backend_has_the_same_codes(name, options, kernel):
    """Of numbers that no instruction for a product and a sum rounds otherwise: halves, and squares that are exact."""
    ours, theirs = (
        getattr(fused_opt, name)(parameters(), state_dtype="8bit", backend=backend, **options)
        for backend in (kernel, "reference")
    )
    train(ours, 3)
    train(theirs, 3)
    for p, q in zip(parameters_of(ours), parameters_of(theirs)):
        assert ours.state[p].keys() == theirs.state[q].keys()
        for slot, state in theirs.state[q].items():
            assert torch.equal(ours.state[p][slot], state), slot
    assert distance(parameters_of(ours), parameters_of(theirs)) < 1e-4  # weights are small differences of large steps


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [("SGD", {"momentum": 0.5}, SIGNED), ("RMSprop", {"alpha": 0.0}, UNSIGNED)],
)
def test_numbers_at_the_edges_of_codes_and_scales(name, options, dtype, kernel):
    """Halfway between two codes the last bit of a product decides, and so that of the scale's inverse."""
    generator = torch.Generator().manual_seed(5)
    shares = values_of(dtype)[-BLOCK:]
    edges = torch.cat([(shares[1:] + shares[:-1]) / 2, torch.ones(1)])
    exponents = torch.arange(-126, 128).repeat(4).unsqueeze(1)
    state = (edges * (1 + torch.rand(exponents.shape, generator=generator)) * 2.0**exponents).float()
    state[::7, 3], state[::7, 5] = 0.0, 1e-45
    state[:, 7] *= torch.randint(2, (len(state),), generator=generator)
    special = torch.zeros(6, BLOCK)
    special[1:, ::3] = torch.tensor([-0.0, 1e-39, torch.nan, torch.inf, 2.0**-126]).unsqueeze(1)
    state = torch.cat([state, special])
    p = torch.nn.Parameter(torch.zeros_like(state))
    p.grad = state * torch.tensor([1, -1])[torch.randint(2, state.shape, generator=generator)]
    if dtype == UNSIGNED:
        p.grad = state.sqrt()
        state = p.grad * p.grad
    else:
        state = p.grad
    optimizer = getattr(fused_opt, name)([p], lr=0.5, state_dtype="8bit", backend=kernel, **options)
    optimizer.step()
    (slot,) = (slot for slot, kept in optimizer.state[p].items() if kept.dtype == dtype)
    codes, scales = coded(state, dtype)
    assert torch.equal(optimizer.state[p][slot], codes)
    assert torch.equal(optimizer.state[p][f"{slot}_scale"].view(torch.int32), scales.view(torch.int32))


EXTRAS = {"averaging": fused_opt.EMA(0.5), "max_grad_norm": 1.0, "cautious": fused_opt.Cautious("both")}


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        ("AdamW", {"amsgrad": True}, torch.float32),
        ("LAMB", EXTRAS, torch.float32),
        ("NAdam", {"master_weights": True}, torch.bfloat16),
        ("Adam", {}, torch.float64),
    ],
)
def test_a_step_is_the_oracles_with_its_states_in_codes(name, options, dtype, kernel):
    """The oracle is the reference in full, whose states are put into codes and read again after every step."""
    ours = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters()]
    theirs = clones(ours)
    optimizer = getattr(fused_opt, name)(ours, backend=kernel, state_dtype="8bit", **options)
    oracle = getattr(fused_opt, name)(theirs, backend="reference", state_dtype=torch.float32, **options)
    rule = oracle._rule(oracle.param_groups[0])
    for step in range(3):
        train(optimizer, 1, step)
        train(oracle, 1, step)
        for p, q in zip(ours, theirs):
            for slot in rule.states:
                state = oracle.state[q][slot]
                expected, scales = coded(state, UNSIGNED if slot in rule.unsigned else SIGNED)
                state.copy_(decoded(expected, scales))
                # A number between two codes may become the other one.
                assert ((optimizer.state[p][slot].int() - expected.int()).abs() <= 1).all()
                torch.testing.assert_close(optimizer.state[p][f"{slot}_scale"], scales, rtol=1e-5, atol=0)
    assert distance(ours, theirs) <= 2e-4


def test_bytes_and_small_tensors(kernel):
    large, small = torch.nn.Parameter(torch.ones(64, 64)), torch.nn.Parameter(torch.ones(LEAST - 1))
    optimizer = fused_opt.AdamW([large, small], state_dtype="8bit", backend=kernel)
    train(optimizer, 1)
    moments = [state for slot, state in optimizer.state[large].items() if slot != "step"]
    assert sum(state.nbytes for state in moments) == (2 + 2 * 4 / BLOCK) * LEAST <= 2.13 * LEAST
    assert {slot: state.dtype for slot, state in optimizer.state[small].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), torch.float32
    )


def test_one_state_alone(kernel):
    p = torch.nn.Parameter(torch.ones(LEAST))
    optimizer = fused_opt.AdamW([p], state_dtype={"exp_avg": "8bit"}, backend=kernel)
    train(optimizer, 2)
    found = {slot: state.dtype for slot, state in optimizer.state[p].items()}
    assert found == {
        "step": torch.float32,
        "exp_avg": SIGNED,
        "exp_avg_scale": torch.float32,
        "exp_avg_sq": torch.float32,
    }


def test_a_gradient_with_other_strides(kernel):
    ours, theirs = (torch.nn.Parameter(heavy_tailed((64, 70), 1)) for _ in range(2))
    a, b = (fused_opt.SGD([p], lr=1.0, momentum=0.5, state_dtype="8bit", backend=kernel) for p in (ours, theirs))
    theirs.grad = heavy_tailed((64, 70), 2)
    ours.grad = theirs.grad.t().contiguous().t()
    a.step()
    b.step()
    same_bits(a, b)


def test_a_scale_that_was_replaced_makes_the_plan_anew(kernel):
    p = torch.nn.Parameter(torch.zeros(LEAST))
    optimizer = fused_opt.SGD([p], lr=1.0, momentum=0.5, state_dtype="8bit", backend=kernel)
    p.grad = torch.ones(LEAST)
    optimizer.step()
    optimizer.state[p]["momentum_buffer_scale"] = torch.full((LEAST // BLOCK,), 3.0)
    optimizer.step()
    assert torch.equal(p, torch.full((LEAST,), -1 - 2.5))


# ---- checkpoints


def test_a_resumed_run_has_the_same_bits(kernel):
    optimizer = fused_opt.AdamW(parameters(), state_dtype="8bit", backend=kernel)
    train(optimizer, 2)
    resumed = fused_opt.AdamW(clones(parameters_of(optimizer)), state_dtype="8bit", backend=kernel)
    resumed.load_state_dict(checkpoint(optimizer))
    same_bits(resumed, optimizer)
    train(optimizer, 1, 2)
    train(resumed, 1, 2)
    same_bits(resumed, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_goes_in_and_comes_out(dtype):
    oracle = torch.optim.AdamW([torch.nn.Parameter(p.detach().to(dtype)) for p in parameters()])
    train(oracle, 2)
    optimizer = fused_opt.AdamW(clones(parameters_of(oracle)), state_dtype="8bit")
    optimizer.load_state_dict(oracle.state_dict())
    back = fused_opt.AdamW(clones(parameters_of(oracle)), state_dtype=torch.float32)
    back.load_state_dict(optimizer.state_dict())
    for p, q, r in zip(*map(parameters_of, (oracle, optimizer, back))):
        for slot, codes in (("exp_avg", SIGNED), ("exp_avg_sq", UNSIGNED)):
            expected = coded(oracle.state[p][slot], codes)
            assert_close([optimizer.state[q][slot], optimizer.state[q][f"{slot}_scale"]], list(expected), 0)
            assert torch.equal(back.state[r][slot], decoded(*expected))
            assert f"{slot}_scale" not in back.state[r]
    train(optimizer, 1)
    train(back, 1)


@pytest.mark.parametrize("scale", [None, torch.ones(3), torch.ones(LEAST // BLOCK, dtype=torch.float64)], ids=str)
def test_codes_without_their_scales_are_refused(scale):
    p = torch.nn.Parameter(torch.ones(LEAST))
    optimizer = fused_opt.SGD([p], momentum=0.9, state_dtype="8bit")
    train(optimizer, 1)
    saved = checkpoint(optimizer)
    saved["state"][0]["momentum_buffer_scale"] = scale
    with unchanged(optimizer), pytest.raises(ValueError, match=r"'momentum_buffer_scale' beside it is .*; it must be"):
        optimizer.load_state_dict(saved)
    optimizer.state[p]["momentum_buffer_scale"] = scale
    set_gradients([p], 0)
    with (
        unchanged(optimizer),
        pytest.raises(RuntimeError, match=r"a state 'momentum_buffer' in 8 bits that does not fit"),
    ):
        optimizer.step()


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Adagrad", {}, r"'sum' of rule 'adagrad'.* state_dtype=torch.bfloat16 would work"),
        ("Adamax", {}, r"'exp_inf' .* state_dtype=\{'exp_avg': '8bit'\} would work"),
        ("AdEMAMix", {}, r"'exp_avg_slow' .*\{'exp_avg_fast': '8bit', 'exp_avg_sq': '8bit'\} would work"),
        ("RMSprop", {"centered": True}, r"'square_avg' of rule 'centered_rmsprop' .* a difference of two states"),
        ("Muon", {"lr": 0.02}, r"'momentum_buffer' of rule 'muon'"),
        ("AdamW", {"differentiable": True}, r"autograd"),
    ],
)
def test_rules_that_codes_would_break(name, options, words):
    with pytest.raises(ValueError, match=words):
        getattr(fused_opt, name)([torch.nn.Parameter(torch.ones(64, 64))], state_dtype="8bit", **options)


def test_a_group_that_is_changed_to_such_a_rule():
    p = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = fused_opt.RMSprop([p], state_dtype="8bit")
    set_gradients([p], 0)
    optimizer.param_groups[0]["centered"] = True
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"group 0: the state 'square_avg'"):
        optimizer.step()


def test_a_parameter_in_another_order():
    p = torch.nn.Parameter(torch.ones(64, 70).t())
    optimizer = fused_opt.AdamW([p], state_dtype="8bit")
    p.grad = torch.ones_like(p)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"its strides are \(1, 70\), .*contiguous\(\)"):
        optimizer.step()


@pytest.mark.skipif("native-gpu" not in EVERY_KERNEL, reason="without the compiled core")
def test_the_kernels_of_gpus_leave_them_to_others(monkeypatch):
    choose("native-gpu", monkeypatch)
    p = torch.nn.Parameter(torch.ones(LEAST))
    p.grad = torch.ones(LEAST)
    named = fused_opt.AdamW([p], state_dtype="8bit", backend="native")
    with unchanged(named), pytest.raises(RuntimeError, match="many threads have in their registers"):
        named.step()
    optimizer = fused_opt.AdamW([p], state_dtype="8bit")
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].tolist() == [127] * LEAST
