"""The plan is kept from step to step: whatever moves in between is noticed, and nothing is written where it used to be.

Every event is done to an optimizer of ours and to torch's own, which looks at everything anew at every step.
"""

import collections
import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.compare import assert_close
from support.plan_events import EVENTS, Run, replace_data

import fused_opt
from fused_opt.backends import native

KINDS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "dampening": 0.2},
    "Adam": {"lr": 0.05, "eps": 1e-3, "weight_decay": 0.1},
}


# -------------------------------------------------------------------------------------------------------------- events


def both(name, backend):
    options = KINDS[name]
    return (
        Run(getattr(fused_opt, name), backend=backend, **options),
        Run(getattr(torch.optim, name), foreach=False, **options),
    )


def step_both(ours, theirs):
    bumped, expected = ours.step()
    theirs.step()
    assert bumped == expected  # what a step writes, autograd knows
    ours.rounded |= any(p.dtype == torch.float32 for p in theirs.parameters())
    bound = 1e-5 if ours.rounded else 1e-11
    assert_close(ours.parameters(), theirs.parameters(), bound)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        states, expected_states = ours.optimizer.state.get(p, {}), theirs.optimizer.state.get(q, {})
        assert_close(states, expected_states, bound)
        assert p.stride() == q.stride()


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("name", KINDS)
def test_an_event_between_two_steps(name, event, index, backend):
    ours, theirs = both(name, backend)
    for step in range(4):
        for run in (ours, theirs):
            run.gradients(step)
            if step >= 2:
                event(run, index + step)
        step_both(ours, theirs)
    step_both(ours, theirs)  # and once more with nothing moved


@pytest.mark.parametrize("name", KINDS)
def test_random_sequences_of_events(name, backend):
    words = st.lists(
        st.tuples(st.sampled_from([*EVENTS, "gradients", "step", "step"]), st.integers(0, 20)), max_size=25
    )

    @settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(words)
    def check(sequence):
        ours, theirs = both(name, backend)
        for word, index in [("gradients", 0), ("step", 0), *sequence, ("step", 0)]:
            if word == "step":
                step_both(ours, theirs)
                continue
            for run in (ours, theirs):
                run.gradients(index) if word == "gradients" else word(run, index)

    check()


def test_a_plan_that_nothing_happened_to_is_kept(backend):
    """Or all of the above would hold of one that is made anew every time, which is what it is there to avoid."""
    if backend != "native":
        pytest.skip("the reference has nothing to keep")
    run, _ = both("Adam", backend)
    run.gradients(0)
    run.step()
    plan = run.optimizer._plan
    for step in range(3):
        run.optimizer.zero_grad()
        run.gradients(step)
        run.optimizer.param_groups[0]["lr"] = 0.1 * step
        run.step()
        assert run.optimizer._plan is plan
    replace_data(run, 0)
    run.step()
    assert run.optimizer._plan is not plan


@pytest.mark.parametrize("stepped", [False, True], ids=["at once", "after a step"])
@pytest.mark.parametrize("zeroed", [False, True], ids=["never zeroed", "zeroed"])
def test_a_backward_through_a_parameter_that_got_another_shape(stepped, zeroed, backend):
    """Autograd keeps the old shape as long as anyone refers to the gradient's place in the graph."""
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    optimizer = fused_opt.SGD([p, q], lr=0.5, momentum=0.9, backend=backend)
    for _ in range(2):
        (p.sum() + q.sum()).backward()
        optimizer.step()
    optimizer.state.pop(p)
    p.grad = None
    p.data = torch.ones(2, 2)
    if stepped:
        q.grad = p.grad = None
        p.grad = torch.zeros(2, 2)
        optimizer.step()
    if zeroed:
        optimizer.zero_grad()
    else:
        p.grad = None
    p.square().sum().backward()
    optimizer.step()
    assert p.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("swaps", [1, 2])
def test_swapped_tensors_go_on(swaps, backend):
    """torch.utils.swap_tensors has every later backward fail through an implementation that others in C++ referred to."""
    p, q = (torch.nn.Parameter(torch.full((3,), value, dtype=torch.float64)) for value in (1.0, 5.0))
    optimizer = fused_opt.SGD([p], lr=0.5, backend=backend)
    for _ in range(2):
        p.grad = None
        p.sum().backward()
        optimizer.step()
    p.data = p.data.float()  # of a cast torch's look at the references knows nothing
    for _ in range(swaps):
        p.grad = None
        torch.utils.swap_tensors(p, q)
    (p.sum() + 2 * q.sum()).backward()
    optimizer.step()
    assert (p[0].item(), q[0].item(), q.grad[0].item()) == ((4.5, 0.0, 2.0) if swaps == 1 else (-0.5, 5.0, 2.0))
    assert p.dtype == (torch.float64 if swaps == 1 else torch.float32)


@pytest.mark.parametrize("name", KINDS)
def test_the_swap_on_conversion_of_modules(name, backend):
    """``module.to()`` by torch.utils.swap_tensors: it refuses to swap what anyone else in C++ refers to."""
    runs = both(name, backend)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for step in range(4):
            for run in runs:
                if step == 2:
                    for p in run.parameters():
                        p.grad = None
                    run.module.float()
                    assert run.parameters()[0].dtype == torch.float32
                    run.optimizer.load_state_dict(run.optimizer.state_dict())
                run.gradients(step)
            step_both(*runs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_autograd_catches_a_backward_through_weights_that_a_step_changed(name, steps_before, backend):
    run, _ = both(name, backend)
    for step in range(steps_before):
        run.gradients(step)
        run.step()
    p, q, *_ = run.parameters()
    lost, kept = (p * p.exp()).sum(), (q * q).sum()
    run.gradients(7)
    q.grad = None  # its backward stays good: the step leaves it alone
    run.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lost.backward()
    kept.backward()
    torch.testing.assert_close(q.grad, 2 * q.detach())


def written_through(states):
    """What must fail when a step has written those states: a backward for each, and one that is good before."""
    factor = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    return {slot: (factor * value).sum() for slot, value in states.items()}


@pytest.mark.parametrize("known", ["by name", "from a state_dict", "copied with it", "given"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam"])
def test_autograd_catches_a_backward_through_states_that_a_step_changed(name, known, every_kernel):
    """Averages and step counts, too, however one came by them."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(fused_opt, name)(parameters, backend=every_kernel, averaging=fused_opt.EMA(0.5), **options)
    for p in parameters:
        p.grad = torch.ones(3)
    optimizer.step()
    if known == "by name":
        states = [optimizer.state[p] for p in parameters]
    elif known == "from a state_dict":
        states = list(optimizer.state_dict()["state"].values())
    elif known == "copied with it":
        optimizer, states = copy.deepcopy((optimizer, list(optimizer.state.values())))
        parameters = optimizer.param_groups[0]["params"]
        for p in parameters:
            p.grad = torch.ones(3)
    else:
        states = [{slot: value.clone() for slot, value in of_p.items()} for of_p in optimizer._states.values()]
        optimizer.state = collections.defaultdict(dict, zip(parameters, map(dict, states)))
    assert {"SGD": 2, "Adam": 4, "NAdam": 5}[name] == len(states[0])
    lost, kept = map(written_through, states)
    parameters[1].grad = None  # of what is left alone the backward stays good
    optimizer.step()
    for slot in lost:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            lost[slot].backward()
        if slot != "average":  # a sample is of all weights
            kept[slot].backward()


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_writes_to_states_that_nobody_has_cost_nothing():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_opt.Adam([p], backend="native")
    p.grad = torch.ones(3)
    for _ in range(3):
        optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(fused_opt.Adam([p]).state_dict()))
    optimizer.step()
    assert not optimizer._states_are_known
    assert optimizer.state[p]["exp_avg"]._version == 0
    optimizer.step()
    assert optimizer.state[p]["exp_avg"]._version == 1


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_the_plan_keeps_alive_what_it_points_at():
    """Stale is wrong; dangling must not be possible."""
    run, _ = both("Adam", "native")
    run.gradients(0)
    run.step()
    optimizer = run.optimizer
    p = run.parameters()[0]
    p.data = torch.zeros_like(p)  # the plan still knows the old address
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64))]
    del run, p
    fillers = [torch.full((n,), 5.0) for n in range(1, 200)]  # takes up memory that was given back
    (only,) = optimizer.param_groups[0]["params"]
    only.grad = torch.ones_like(only)
    optimizer.step()
    assert all(bool((filler == 5.0).all()) for filler in fillers)
    torch.testing.assert_close(only.detach(), torch.full_like(only, 1 - 0.05 / (1.1 + 1e-3) * 1.1))
