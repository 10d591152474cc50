"""The parts of the gradient: every backward is one, and p.grad is what it is without tracking."""

import math

import pytest
import torch
from support.kernels import INSTRUCTION_SETS
from support.parts import DTYPES, backward, clars, coefficients, norm, norms_of, parameters_of, sums
from support.threads import with_threads

import fused_opt


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_that_of_plain_accumulation_to_the_last_bit(dtype):
    ours, theirs = parameters_of(dtype), parameters_of(dtype)
    optimizer = clars(ours)
    handle = optimizer.track_parts("microbatch")
    for part in coefficients(ours, 4):
        backward(ours, part)
        backward(theirs, part)
        for a, b in zip(ours, theirs):
            assert torch.equal(a.grad, b.grad)
            assert (a.grad.dtype, a.grad.stride(), a.grad.requires_grad) == (b.grad.dtype, b.grad.stride(), False)
    assert list(handle.counts().values()) == [4] * len(ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divide", [False, True])
def test_sum_of_the_norms(divide, dtype, every_kernel):
    """Each contribution as it is added to p.grad, whether the loss is divided or not."""
    parameters = parameters_of(dtype)
    parts = coefficients(parameters, 4)
    if divide:
        parts = [[c / 4 for c in part] for part in parts]
    weights = [p.detach().double().clone() for p in parameters]
    optimizer = clars(parameters, backend=every_kernel, momentum=0.0)
    optimizer.track_parts("microbatch")
    for part in parts:
        backward(parameters, part)
    gradients = [p.grad.double() for p in parameters]
    found = norms_of(optimizer, parameters)
    assert found == pytest.approx(
        sums(parts), rel=1e-6 if dtype == torch.float32 else 1e-3 if dtype.itemsize < 4 else 1e-12
    )
    for p, w, g, a in zip(parameters, weights, gradients, sums(parts)):
        expected = w - 0.5 * 0.1 * norm(w) / a * g
        bound = 4 * torch.finfo(dtype).eps * max(1, w.abs().max().item())
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=bound)


def test_every_step_begins_anew(backend):
    parameters = parameters_of()
    optimizer = clars(parameters, backend=backend)
    handle = optimizer.track_parts("microbatch")
    for step in range(3):
        parts = coefficients(parameters, step + 1, seed=step)
        optimizer.zero_grad(set_to_none=step != 1)
        for part in parts:
            backward(parameters, part)
        assert set(handle.counts().values()) == {step + 1}
        assert norms_of(optimizer, parameters) == pytest.approx(sums(parts), rel=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_the_gradients_forgets_the_parts(set_to_none, backend):
    parameters = parameters_of()
    optimizer = clars(parameters, backend=backend)
    handle = optimizer.track_parts("microbatch")
    first, second = coefficients(parameters, 3), coefficients(parameters, 2, seed=5)
    for part in first:
        backward(parameters, part)
    optimizer.zero_grad(set_to_none=set_to_none)
    for part in second:
        backward(parameters, part)
    assert set(handle.counts().values()) == {2}
    assert norms_of(optimizer, parameters) == pytest.approx(sums(second), rel=1e-12)


@pytest.mark.parametrize("left", [math.nan, math.inf])
def test_zeroing_gradients_that_were_not_finite_forgets_the_parts(left, backend):
    """After a step that was left out nothing of it is in the next ratios."""
    parameters = parameters_of(torch.float64)
    optimizer = clars(parameters, backend=backend, nonfinite="skip")
    handle = optimizer.track_parts("microbatch")
    bad, *parts = coefficients(parameters, 3)
    bad[0].flatten()[0] = left
    backward(parameters, bad)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    optimizer.zero_grad(set_to_none=False)
    for part in parts:
        backward(parameters, part)
    assert set(handle.counts().values()) == {2}
    assert norms_of(optimizer, parameters) == pytest.approx(sums(parts), rel=1e-12)


def test_gradients_kept_over_a_step_are_one_part(backend):
    parameters = parameters_of()
    optimizer = clars(parameters, backend=backend)
    optimizer.track_parts("microbatch")
    first, second, third = coefficients(parameters, 3)
    backward(parameters, first)
    backward(parameters, second)
    optimizer.step()
    backward(parameters, third)
    expected = [norm(a + b) + norm(c) for a, b, c in zip(first, second, third)]
    assert norms_of(optimizer, parameters) == pytest.approx(expected, rel=1e-12)


def test_gradients_left_from_before_are_one_part(backend):
    parameters = parameters_of()
    first, second, third = coefficients(parameters, 3)
    backward(parameters, first)
    backward(parameters, second)
    optimizer = clars(parameters, backend=backend)
    optimizer.track_parts("microbatch")
    backward(parameters, third)
    expected = [norm(a + b) + norm(c) for a, b, c in zip(first, second, third)]
    assert norms_of(optimizer, parameters) == pytest.approx(expected, rel=1e-12)


def test_without_a_backward_the_gradient_is_one_part(backend):
    """Gradients set by hand, and parameters whose requires_grad was off when tracking began."""
    parameters = parameters_of()
    parameters[0].requires_grad_(False)
    optimizer = clars(parameters, backend=backend)
    optimizer.track_parts("microbatch")
    (part,) = coefficients(parameters, 1)
    for p, c in zip(parameters, part):
        p.grad = c.clone()
    assert norms_of(optimizer, parameters) == pytest.approx(sums([part]), rel=1e-12)


def test_a_parameter_unused_in_one_microbatch(backend):
    parameters = parameters_of()
    parts = coefficients(parameters, 3)
    parts[0][1] = parts[1][0] = parts[2][4] = None
    optimizer = clars(parameters, backend=backend)
    handle = optimizer.track_parts("microbatch")
    for part in parts:
        backward(parameters, part)
    assert list(handle.counts().values()) == [2, 2, 3, 3, 2]
    assert norms_of(optimizer, parameters) == pytest.approx(sums(parts), rel=1e-12)


def test_a_parameter_used_twice_in_one_backward_is_one_part(backend):
    parameters = parameters_of()
    a, b, c = coefficients(parameters, 3)
    optimizer = clars(parameters, backend=backend)
    handle = optimizer.track_parts("microbatch")
    sum((p * x).sum() + (p * y).sum() for p, x, y in zip(parameters, a, b)).backward()
    backward(parameters, c)
    assert set(handle.counts().values()) == {2}
    expected = [norm(x + y) + norm(z) for x, y, z in zip(a, b, c)]
    assert norms_of(optimizer, parameters) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("foreach", [True, False])
def test_after_clip_grad_norm(foreach, backend):
    """The parts are scaled as the gradient was; a limit in the step does the same."""
    parameters, inside = parameters_of(), parameters_of()
    parts = coefficients(parameters, 3)
    limit = 0.3
    optimizer, other = clars(parameters, backend=backend), clars(inside, backend=backend, max_grad_norm=limit)
    optimizer.track_parts("microbatch")
    other.track_parts("microbatch")
    for part in parts:
        backward(parameters, part)
        backward(inside, part)
    total = torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=foreach).item()
    factor = limit / (total + 1e-6)
    assert factor < 1
    assert norms_of(optimizer, parameters) == pytest.approx(sums(parts, factor), rel=1e-11)
    assert norms_of(other, inside) == pytest.approx(sums(parts, factor), rel=1e-11)
    assert other.grad_norm == pytest.approx(total, rel=1e-12)
    for a, b in zip(parameters, inside):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_clipping_between_the_parts(backend):
    parameters = parameters_of()
    first, second = coefficients(parameters, 2)
    optimizer = clars(parameters, backend=backend)
    optimizer.track_parts("microbatch")
    backward(parameters, first)
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    factor = 0.5 / (math.hypot(*(norm(c) for c in first)) + 1e-6)
    backward(parameters, second)
    expected = [factor * norm(a) + norm(b) for a, b in zip(first, second)]
    assert norms_of(optimizer, parameters) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("unscale", [True, False])
def test_under_a_grad_scaler(unscale, backend):
    parameters = parameters_of()
    parts = coefficients(parameters, 3)
    weights = [p.detach().clone() for p in parameters]
    optimizer = clars(parameters, backend=backend, momentum=0.0)
    handle = optimizer.track_parts("microbatch")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for part in parts:
        scaler.scale(sum((p * c).sum() for p, c in zip(parameters, part))).backward()
    if unscale:
        scaler.unscale_(optimizer)
        for p, of_p in zip(parameters, zip(*parts)):
            torch.testing.assert_close(p.grad, sum(of_p))
    assert set(handle.counts().values()) == {3}
    scaler.step(optimizer)
    scaler.update()
    for i, (p, w, a) in enumerate(zip(parameters, weights, sums(parts))):
        ratio = 0.1 * norm(w) / a
        assert optimizer.trust_ratios()[f"{i} of group 0"] == pytest.approx(ratio, rel=1e-12)
        torch.testing.assert_close(p.detach(), w - 0.5 * ratio * sum(part[i] for part in parts), rtol=1e-12, atol=1e-12)


def test_an_overflow_under_a_grad_scaler_changes_nothing(backend):
    parameters = parameters_of()
    good, bad, more = coefficients(parameters, 3)
    bad[0][0, 0] = math.inf
    before = [p.detach().clone() for p in parameters]
    optimizer = clars(parameters, backend=backend)
    optimizer.track_parts("microbatch")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for part in (good, bad):
        scaler.scale(sum((p * c).sum() for p, c in zip(parameters, part))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters))
    optimizer.zero_grad()
    backward(parameters, more)
    assert norms_of(optimizer, parameters) == pytest.approx(sums([more]), rel=1e-12)


def test_clipping_knows_the_norm_from_the_accumulation(every_kernel):
    parameters = parameters_of(torch.float32)
    optimizer = clars(parameters, backend=every_kernel, max_grad_norm=0.1)
    optimizer.track_parts("microbatch")
    for part in coefficients(parameters, 3):
        backward(parameters, part)
    expected = math.hypot(*(norm(p.grad) for p in parameters))
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(expected, rel=1e-12)


def test_remove_leaves_nothing_behind(backend):
    parameters = parameters_of()
    optimizer = clars(parameters, backend=backend)
    handle = optimizer.track_parts("microbatch")
    with pytest.raises(ValueError, match="tracked already"):
        optimizer.track_parts("microbatch")
    assert handle.active
    parts = coefficients(parameters, 2)
    backward(parameters, parts[0])
    handle.remove()
    assert not handle.active
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
    backward(parameters, parts[1])
    expected = [norm(a + b) for a, b in zip(*parts)]
    assert norms_of(optimizer, parameters) == pytest.approx(expected, rel=1e-12)
    optimizer.zero_grad()
    optimizer.track_parts("microbatch")
    for part in parts:
        backward(parameters, part)
    assert norms_of(optimizer, parameters) == pytest.approx(sums(parts), rel=1e-12)


def test_invalid_kind():
    with pytest.raises(ValueError, match="Invalid kind of parts: 'rank'"):
        clars(parameters_of()).track_parts("rank")


@pytest.mark.skipif(not INSTRUCTION_SETS, reason="needs the native backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulation_has_the_same_bits_with_any_number_of_threads(dtype):
    generator = torch.Generator().manual_seed(0)
    total, part = (torch.randn(200, 1001, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    expected = total + part

    def run():
        copy = total.clone()
        sums = fused_opt.backends.accumulate(copy, part)
        assert torch.equal(copy, expected)
        return sums

    results = with_threads(run, 1, 2)
    assert results[0] == results[1]
    assert results[0] == pytest.approx((norm(part) ** 2, norm(expected) ** 2), rel=1e-12)
    assert fused_opt.backends.accumulate(None, part) == (results[0][0], results[0][0])
