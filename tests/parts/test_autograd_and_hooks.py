"""Parts beside what else listens to a backward: hooks, retained and created graphs, gradients that others replace."""

import math

import pytest
import torch
from support.parts import backward, clars, coefficients, norm, norms_of, parameters_of, sums


def test_user_hooks_see_what_they_always_see():
    """Of whatever kind, and whether they were there before tracking began or came after it."""
    seen = {}
    for tracked in (False, True):
        (p,) = parameters_of()[:1]
        found = seen.setdefault(tracked, [])

        def look(*args, p=p, found=found):
            found.append(None if p.grad is None else p.grad.clone())

        def look_at_new(gradient, found=found):
            found.append(gradient.clone())

        p.register_hook(look)
        p.register_post_accumulate_grad_hook(look)
        optimizer = clars([p])
        handle = optimizer.track_parts("microbatch") if tracked else None
        p.register_hook(look)
        p.register_hook(look_at_new)
        p.register_post_accumulate_grad_hook(look)
        for part in coefficients([p], 3):
            backward([p], part)
        if handle is not None:
            assert handle.counts() == {"0 of group 0": 3}
    assert len(seen[True]) == len(seen[False]) == 15
    for ours, theirs in zip(seen[True], seen[False]):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def halve(p):
    p.grad.mul_(0.5)


def test_user_hooks_that_change_the_gradient(backend):
    """A tensor hook changes the part; a post-accumulate hook changes the sum, and the parts' norms with it."""
    parameters = parameters_of()
    parts = coefficients(parameters, 2)
    optimizer = clars(parameters, backend=backend)
    optimizer.track_parts("microbatch")
    parameters[0].register_hook(lambda g: 3 * g)
    parameters[1].register_post_accumulate_grad_hook(halve)
    for part in parts:
        backward(parameters, part)
    expected = sums(parts)
    expected[0] *= 3
    expected[1] = 0.25 * norm(parts[0][1]) + 0.5 * norm(parts[1][1])
    torch.testing.assert_close(parameters[0].grad, 3 * (parts[0][0] + parts[1][0]))
    torch.testing.assert_close(parameters[1].grad, 0.25 * parts[0][1] + 0.5 * parts[1][1])
    assert norms_of(optimizer, parameters) == pytest.approx(expected, rel=1e-12)


def test_retain_graph(backend):
    parameters = parameters_of()
    (part,) = coefficients(parameters, 1)
    optimizer = clars(parameters, backend=backend)
    handle = optimizer.track_parts("microbatch")
    loss = sum((p * c).sum() for p, c in zip(parameters, part))
    loss.backward(retain_graph=True)
    loss.backward()
    assert set(handle.counts().values()) == {2}
    assert norms_of(optimizer, parameters) == pytest.approx(sums([part, part]), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_create_graph(backend):
    """The gradient can be differentiated through, with the tracking as without."""
    second = []
    for tracked in (False, True):
        p = parameters_of()[0]
        x, y = (c for (c,) in coefficients([p], 2))
        optimizer = clars([p], backend=backend)
        if tracked:
            optimizer.track_parts("microbatch")
        (p.pow(3) * x).sum().backward(create_graph=True)
        (p.pow(2) * y).sum().backward(create_graph=True)
        gradient = p.grad
        assert gradient.requires_grad
        assert torch.equal(gradient, (3 * p.pow(2) * x + 2 * p * y).detach()) or not tracked
        (by_second,) = torch.autograd.grad(gradient.sum(), p)
        second.append(by_second)
    torch.testing.assert_close(second[1], 6 * p.detach() * x + 2 * y)
    assert torch.equal(second[0], second[1])
    p.grad = gradient.detach()
    expected = norm(3 * p.pow(2) * x) + norm(2 * p * y)
    assert norms_of(optimizer, [p]) == pytest.approx([expected], rel=1e-12)


def test_autograd_grad_touches_no_gradient(backend):
    parameters = parameters_of()
    parts = coefficients(parameters, 2)
    optimizer = clars(parameters, backend=backend)
    optimizer.track_parts("microbatch")
    backward(parameters, parts[0])
    kept = [p.grad for p in parameters]
    torch.autograd.grad(sum(p.square().sum() for p in parameters), parameters)
    assert all(p.grad is g for p, g in zip(parameters, kept))
    backward(parameters, parts[1])
    assert norms_of(optimizer, parameters) == pytest.approx(sums(parts), rel=1e-12)


def test_backward_with_inputs(backend):
    """Only the named parameters accumulate."""
    parameters = parameters_of()
    parts = coefficients(parameters, 2)
    optimizer = clars(parameters, backend=backend)
    handle = optimizer.track_parts("microbatch")
    backward(parameters, parts[0])
    kept = parameters[0].grad.clone()
    backward(parameters, parts[1], inputs=parameters[1:])
    assert torch.equal(parameters[0].grad, kept)
    assert list(handle.counts().values()) == [1, 2, 2, 2, 2]
    parts[1][0] = None
    assert norms_of(optimizer, parameters) == pytest.approx(sums(parts), rel=1e-12)


def test_a_gradient_that_shares_its_memory_is_refused_as_by_torch():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = clars([p])
    optimizer.track_parts("microbatch")
    grad = p.grad = torch.ones(()).expand(3)
    with pytest.raises(RuntimeError, match="single memory location"):
        (p * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert p.grad is grad
    assert grad.tolist() == [1, 1, 1]


def test_expanded_and_sparse_parts():
    """p.sum() hands over one number for all elements; an embedding, rows."""
    weight = torch.nn.Parameter(torch.arange(12.0).view(4, 3) + 1)
    optimizer = clars([weight])
    optimizer.track_parts("microbatch")
    weight.sum().backward()
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 3), 2.0))
    assert norms_of(optimizer, [weight]) == pytest.approx([2 * math.sqrt(12)], rel=1e-6)
    optimizer.zero_grad()
    for rows in ([0, 2, 2], [1]):
        torch.nn.functional.embedding(torch.tensor(rows), weight, sparse=True).sum().backward()
    assert weight.grad.is_sparse
    assert torch.equal(weight.grad.to_dense(), torch.tensor([1.0, 1, 2, 0])[:, None].expand(4, 3))
    assert norms_of(optimizer, [weight]) == pytest.approx([math.sqrt(15) + math.sqrt(3)], rel=1e-6)


def test_a_dead_gradient_that_somebody_fills_is_one_part(backend):
    """Nothing is known of the parts then, and A is never less than the gradient's norm."""
    (p,) = parameters_of()[:1]
    optimizer = clars([p], backend=backend)
    optimizer.track_parts("microbatch")
    backward([p], [torch.zeros_like(p)])
    p.grad.add_(2.0)
    assert norms_of(optimizer, [p]) == pytest.approx([norm(torch.full_like(p, 2.0))], rel=1e-12)


def test_a_replaced_gradient_scales_the_parts(backend):
    """As an all-reduce in another buffer does."""
    parameters = parameters_of()
    parts = coefficients(parameters, 3)
    optimizer = clars(parameters, backend=backend)
    optimizer.track_parts("microbatch")
    for part in parts:
        backward(parameters, part)
    for p in parameters:
        p.grad = p.grad / 7
    assert norms_of(optimizer, parameters) == pytest.approx(sums(parts, 1 / 7), rel=1e-12)
