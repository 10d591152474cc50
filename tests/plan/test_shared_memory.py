"""Parameters that share memory are stepped one after the other, in their order, as torch.optim steps them."""

import pytest
import torch
from rules import both_kinds, every_rule_of_torch
from support.compare import assert_close, unchanged
from support.threads import threads as threads_set_to

import fused_opt
from fused_opt.plan import _turns


def parameters_of(layout):
    """Parameters of which some lie in the same memory."""
    memory = torch.linspace(-1, 1, 40_000)
    make = {
        "tied": lambda: [memory[:16_384], memory[:16_384], memory[20_000:36_384], memory[20_000:36_384]],
        "halves that overlap": lambda: [memory[:20_000], memory[10_000:30_000], memory[25_000:]],
        "a transposed view": lambda: [memory[:40_000].view(200, 200), memory[:40_000].view(200, 200).t()],
        "columns beside each other": lambda: [memory.view(200, 200)[:, :100], memory.view(200, 200)[:, 100:]],
    }[layout]
    return [torch.nn.Parameter(view) for view in make()]


LAYOUTS = ["tied", "halves that overlap", "a transposed view", "columns beside each other"]


@both_kinds
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_to_torch_with_any_number_of_threads(layout, name, options, backend):
    for threads in (1, 2):
        with threads_set_to(threads):
            ours, theirs = parameters_of(layout), parameters_of(layout)
            optimizer = getattr(fused_opt, name)(ours, backend=backend, **options)
            oracle = getattr(torch.optim, name)(theirs, foreach=False, **options)
            for step in range(20):
                for p, q in zip(ours, theirs):
                    p.grad, q.grad = torch.ones_like(p) * (step + 1), torch.ones_like(q) * (step + 1)
                optimizer.step()
                oracle.step()
            for p, q in zip(ours, theirs):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_a_ratio_is_that_of_the_weights_as_they_are(backend):
    """Two layers in one memory: each moves the other's weights, and no norm may be carried."""
    p = torch.nn.Parameter(torch.full((4, 4), 2.0))
    q = torch.nn.Parameter(p.data)
    optimizer = fused_opt.LARS(
        [("p", p), ("q", q)], lr=1.0, coefficient=0.1, momentum=0.0, weight_decay=0.0, backend=backend
    )
    for _ in range(3):
        before = p.detach().norm().item()
        p.grad, q.grad = torch.full((4, 4), 0.5), torch.full((4, 4), 0.5)
        optimizer.step()
        ratios = optimizer.trust_ratios()
        assert ratios["p"] == pytest.approx(0.1 * before / 2, rel=1e-6)
        assert ratios["q"] == pytest.approx(0.1 * (before - 4 * ratios["p"] * 0.5) / 2, rel=1e-6)


def test_turns():
    a = torch.zeros(10)
    assert _turns([[a], [torch.zeros(3)]]) == ([None, None], set())
    assert _turns([[a], [torch.zeros(3)], [a[5:]], [a[:5]], [a[4:6]]]) == ([0, None, 1, 1, 2], set())
    assert _turns([[a[:5]], [a[5:]]]) == ([None, None], set())
    assert _turns([[torch.zeros(0)], [torch.zeros(2, device="meta")]]) == ([None, None], set())


def test_a_parameter_whose_elements_share_memory_is_refused(backend):
    for view in (torch.ones(1).expand(3), torch.ones(4).as_strided((3, 2), (1, 1))):
        p = torch.nn.Parameter(view)
        p.grad = torch.ones(p.shape)
        with pytest.raises(RuntimeError, match="elements that share memory"):
            fused_opt.SGD([p], lr=0.1, backend=backend).step()


@every_rule_of_torch
def test_a_parameter_twice_in_a_group_is_stepped_twice_as_torch_does(name, options, backend):
    p, q = (torch.nn.Parameter(torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)) for _ in range(2))
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        ours = getattr(fused_opt, name)([p, p], backend=backend, **options)
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        theirs = getattr(torch.optim, name)([q, q], foreach=False, **options)
    for step in range(3):
        for parameter, optimizer in ((p, ours), (q, theirs)):
            parameter.grad = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * (step + 1)
            optimizer.step()
    assert_close(p, q)
    assert_close(dict(ours.state[p]), dict(theirs.state[q]))


SHARED = {
    "the weights": lambda p, other: p.data,
    "some of the weights": lambda p, other: p.data.as_strided((5,), (1,), 3),
    "their bytes": lambda p, other: p.data.view(torch.bfloat16)[1:6],
    "another state": lambda p, other: other.detach(),
}


@pytest.mark.parametrize("shared", SHARED)
def test_states_in_memory_that_the_step_writes_otherwise_are_refused(shared, every_kernel):
    """A kernel's result would depend on the order of its stores."""
    good, p = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(9)[:5])
    optimizer = fused_opt.Adam([good, p], backend=every_kernel)
    for step in range(2):
        good.grad, p.grad = torch.ones(3), torch.ones(5)
        if step == 0:
            optimizer.step()
    optimizer.state[p]["exp_avg"] = SHARED[shared](p, optimizer.state[p]["exp_avg_sq"])
    with unchanged(optimizer), pytest.raises(RuntimeError, match="1 of group 0 and its states share memory, or two"):
        optimizer.step()
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].to(torch.float32, copy=True)
    optimizer.step()


def test_a_state_between_the_weights_is_its_own(backend):
    memory = torch.zeros(2, 9)
    p = torch.nn.Parameter(memory.t().flatten()[::2])
    optimizer = fused_opt.SGD([p], lr=0.5, momentum=0.5, backend=backend)
    for _ in range(2):
        p.grad = torch.ones(9)
        optimizer.step()
        between = p.data.as_strided((9,), (2,), 1)
        optimizer.state[p]["momentum_buffer"] = between.copy_(optimizer.state[p]["momentum_buffer"])
    assert p.tolist() == [-1.25] * 9
    assert between.tolist() == [1.5] * 9
