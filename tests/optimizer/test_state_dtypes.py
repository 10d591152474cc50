"""States in other dtypes than their parameters', of one dtype or by name, on every backend and through checkpoints."""

import pytest
import torch
from rules import both_kinds, each_rule_once
from rules import oracle as oracle_of
from support.compare import distance, same_bits, unchanged
from support.parameters import checkpoint, clones, layouts, parameters_of, set_gradients, train_both

import fused_opt
from fused_opt.states import dtype_of_state

FORMS = [torch.bfloat16, torch.float16, torch.float64, "one"]
HALVES = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.float16}


def form_of(form, name, options):
    """A dtype, or for ``one`` a dict that speaks of the rule's first state alone."""
    optimizer = getattr(fused_opt, name)([torch.nn.Parameter(torch.ones(1, 1))], **options)
    slots = optimizer._rule(optimizer.param_groups[0]).states
    if not slots:
        pytest.skip("no states")
    return {slots[0]: torch.bfloat16} if form == "one" else form, slots


@pytest.mark.parametrize("form", FORMS, ids=str)
@each_rule_once
def test_a_step_is_the_oracles_with_its_states_rounded(name, options, form, every_kernel):
    form, slots = form_of(form, name, options)
    ours = layouts(chunk=300)
    theirs = clones(ours, torch.float64)
    optimizer = getattr(fused_opt, name)(ours, backend=every_kernel, state_dtype=form, **options)
    oracle = oracle_of(name)(theirs, foreach=False, **options)
    for step in range(4):
        set_gradients(ours, step)
        for p, q in zip(ours, theirs):
            q.grad = p.grad.double()
        optimizer.step()
        oracle.step()
        for q in theirs:
            for slot in slots:
                stored = oracle.state[q][slot].to(dtype_of_state(form, slot) or torch.float32)
                oracle.state[q][slot].copy_(stored)
    for slot in slots:
        found = [optimizer.state[p][slot] for p in ours]
        dtype = dtype_of_state(form, slot) or torch.float32
        assert {state.dtype for state in found} == {dtype}
        expected = [oracle.state[q][slot] for q in theirs]
        assert distance(found, expected) <= max(2 * torch.finfo(dtype).eps, 1e-3)
    # A state that lies between two numbers of 16 bits may be rounded to the other one, and an update with it.
    assert distance(ours, theirs) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_float32_is_stored_as_torch_rounds_it(dtype, every_kernel):
    """Denormal, infinite or next to a number that is none."""
    bits = torch.randint(-(2**31), 2**31, (5_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    bits[::1000], bits[500::1000] = 2**31 - 1, -1  # NaN, to which rounding must not add
    p = torch.nn.Parameter(torch.zeros(5_000))
    p.grad = bits.view(torch.float32)
    optimizer = fused_opt.SGD([p], lr=1.0, momentum=0.9, backend=every_kernel, state_dtype=dtype)
    optimizer.step()
    found, expected = optimizer.state[p]["momentum_buffer"], p.grad.to(dtype)
    number = ~expected.isnan()
    assert torch.equal(found[number], expected[number])
    assert found[~number].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@both_kinds
def test_a_resumed_run_has_the_same_bits(name, options, dtype, backend):
    form, slots = form_of("one", name, options)
    form = {slots[0]: torch.float16, slots[-1]: torch.float32} if name == "AdamW" else form

    def fresh(values):
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        return getattr(fused_opt, name)(parameters, state_dtype=form, backend=backend, **options)

    optimizer = fresh([torch.linspace(-1, 1, 7).to(dtype), torch.ones(2, 3, dtype=dtype)])
    for step in range(3):
        set_gradients(parameters_of(optimizer), step)
        optimizer.step()
    resumed = fresh([p.detach() for p in parameters_of(optimizer)])
    resumed.load_state_dict(checkpoint(optimizer))
    for p in parameters_of(resumed):
        assert {slot: resumed.state[p][slot].dtype for slot in slots} == {slot: form[slot] for slot in slots}
    train_both(resumed, optimizer)
    same_bits(resumed, optimizer)


def test_checkpoints_of_torch_whose_moments_are_bfloat16(backend):
    """They are not cast to the parameter's dtype, as torch.optim's load_state_dict does, where the dtype was asked for."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    oracle = torch.optim.AdamW([p])
    p.grad = torch.ones(5)
    oracle.step()
    saved = oracle.state_dict()
    for slot in HALVES:
        saved["state"][0][slot] = saved["state"][0][slot].to(torch.bfloat16)
    optimizer = fused_opt.AdamW([p], state_dtype=torch.bfloat16, backend=backend)
    optimizer.load_state_dict(saved)
    for slot in HALVES:
        assert optimizer.state[p][slot].dtype == torch.bfloat16
        assert torch.equal(optimizer.state[p][slot], saved["state"][0][slot])
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def test_muon_has_states_of_two_rules(backend):
    matrix, vector = (torch.nn.Parameter(torch.eye(4)[:n].squeeze(0)) for n in (3, 1))
    form = {"momentum_buffer": torch.bfloat16, "exp_avg": torch.float16}
    optimizer = fused_opt.Muon([matrix, vector], state_dtype=form, backend=backend)
    for step in range(2):
        set_gradients([matrix, vector], step)
        optimizer.step()
    assert optimizer.state[matrix]["momentum_buffer"].dtype == torch.bfloat16
    assert optimizer.state[vector]["exp_avg"].dtype == torch.float16
    assert optimizer.state[vector]["exp_avg_sq"].dtype == torch.float32


def test_complex_states_stay_complex():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = fused_opt.Adam([p], state_dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.complex64


def test_adagrads_states_that_are_made_before_the_first_step():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_opt.Adagrad([p], initial_accumulator_value=0.1, state_dtype={"sum": torch.float16})
    assert torch.equal(optimizer.state[p]["sum"], torch.full((3,), 0.1, dtype=torch.float16))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (torch.int8, "Invalid state_dtype: torch.int8; there are None, torch.float32, torch.float64, torch.bfloat16, "),
        ({"exp_avg": torch.int8}, "Invalid state_dtype: .*torch.int8.*; there are None"),
        ("4bit", "Invalid state_dtype: 4bit; there are None, .*'8bit', and dicts"),
        ({"exp_av": torch.bfloat16}, "it names 'exp_av', and the states of this AdamW are 'exp_avg', 'exp_avg_sq'"),
        ({"step": torch.bfloat16}, "it names 'step', and"),
    ],
    ids=str,
)
def test_what_is_refused(form, message):
    with pytest.raises(ValueError, match=message):
        fused_opt.AdamW([torch.nn.Parameter(torch.ones(3))], state_dtype=form)


def test_parameters_alike_whose_states_are_not(every_kernel):
    """Each keeps its own dtype, and every digit of it."""
    runs = []
    for forms in ([torch.bfloat16, torch.float32], [torch.float32]):
        parameters = [torch.nn.Parameter(torch.linspace(0.1, 1, 7).bfloat16()) for _ in forms]
        optimizer = fused_opt.SGD(parameters, lr=0.1, momentum=0.9, backend=every_kernel)
        for step in range(3):
            for p, form in zip(parameters, forms):
                p.grad = torch.full_like(p, 0.3 + step)
                if step == 1:
                    state = optimizer.state[p]
                    state["momentum_buffer"] = state["momentum_buffer"].to(form)
            optimizer.step()
        runs.append(optimizer.state[parameters[-1]]["momentum_buffer"])
    assert runs[0].dtype == torch.float32
    assert torch.equal(*runs)


def test_a_state_of_another_shape_changes_nothing(backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_opt.AdamW([p], state_dtype=torch.bfloat16, backend=backend)
    p.grad = torch.ones(3)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"] = {0: {**saved["state"][0], "exp_avg": torch.ones(4, dtype=torch.bfloat16)}}
    with unchanged(optimizer), pytest.raises(ValueError, match="state 'exp_avg' of parameter 0 of group 0 has shape"):
        optimizer.load_state_dict(saved)
