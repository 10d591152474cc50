"""What a backend asks of its tensors in a step: where the gradients are, that something has moved, or was written."""

from array import array

import pytest
import torch
from torch.autograd.graph import increment_version

from fused_opt.backends import native
from fused_opt.backends.triton import looks as in_python

CORE = [native._native] if native.unavailable() is None else []
each = pytest.mark.parametrize("module", [*CORE, in_python], ids=lambda module: module.__name__)

CHANGES = {
    "a parameter that moved": lambda p, m: setattr(p, "data", torch.ones(4, 3)),
    "a parameter laid out otherwise": lambda p, m: setattr(p, "data", p.data.view(2, 6)),
    "a gradient with other strides": lambda p, m: setattr(p, "grad", torch.ones(3, 4).t()),
    "a sparse gradient": lambda p, m: setattr(p, "grad", torch.ones(4, 3).to_sparse()),
}


def looked_at(module):
    p, m = torch.nn.Parameter(torch.ones(4, 3)), torch.zeros(4, 3)
    p.grad = torch.ones(4, 3)
    return p, m, module.Looks([p], [m])


def addresses(found):
    return array("q", found).tolist()


@each
def test_addresses_of_gradients(module):
    p, _, looks = looked_at(module)
    before = looks.gradients(True)
    assert addresses(before) == [p.grad.data_ptr()]
    assert looks.here() is None
    assert looks.gradients(False) is before
    held, p.grad = p.grad, torch.zeros(4, 3)
    assert addresses(looks.gradients(True)) == [p.grad.data_ptr()] != addresses(before)
    p.grad = None
    assert addresses(looks.gradients(True)) == [-1]
    assert looks.here() == [False]
    p.grad = held
    assert looks.gradients(True) == before
    assert looks.here() is None


@each
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(module, change):
    p, m, looks = looked_at(module)
    looks.gradients(False)
    change(p, m)
    assert looks.gradients(False) is None


@each
def test_others_are_looked_at_where_they_may_have_moved(module):
    _, m, looks = looked_at(module)
    m.data = torch.ones(4, 3)
    assert looks.gradients(False) is not None
    assert looks.gradients(True) is None


@each
def test_writes_are_noticed(module):
    a, b, c = parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for p in parameters:
        p.grad = torch.ones(2)
    looks = module.Looks(parameters, [])
    looks.remember([True, False, True])
    assert looks.written() == []
    with torch.no_grad():
        b.add_(1)
        c.add_(1)
    assert looks.written() == [2]
    looks.remember([True, True, True])
    with torch.no_grad():
        a.add_(1)
    assert looks.written() == [0]


@each
def test_writes_beside_those_of_steps_are_noticed(module):
    """Also where parameters that are views of one buffer share a count."""
    buffer = torch.ones(4)
    a, b, c = parameters = [torch.nn.Parameter(p) for p in (buffer[:2], buffer[2:], torch.ones(2))]
    for p in parameters:
        p.grad = torch.ones(2)
    looks = module.Looks(parameters, [])

    def written_after_a_step_of(*stepped):
        increment_version(stepped)
        looks.remember([any(p is one for one in stepped) for p in parameters])
        return looks.written()

    assert [written_after_a_step_of(a, b, c) for _ in range(4)] == [[]] * 4
    with torch.no_grad():
        c.add_(1)
    assert looks.written() == [2]
    with torch.no_grad():
        a.add_(1)
    assert looks.written() == [0, 1, 2]
    assert [written_after_a_step_of(a, b, c) for _ in range(3)] == [[]] * 3
    assert [written_after_a_step_of(a, c) for _ in range(3)] == [[]] * 3
    assert written_after_a_step_of(b) == []
    assert [written_after_a_step_of(a, b, c) for _ in range(3)] == [[]] * 3


@each
def test_what_is_replaced_is_noticed(module):
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    groups, state = [{"params": [p]}, {"params": [q]}], {p: {"m": torch.ones(2)}}
    seen = module.Seen(groups, state)
    assert seen.unchanged(groups, state)
    state[p]["m"] = torch.ones(2)
    assert not seen.unchanged(groups, state)
    assert seen.unchanged(groups, None)
    for other in (
        [{"params": [p, q]}, *groups[1:]],
        groups[:1],
        [*groups, {"params": []}],
        [groups[0], {"params": [q]}],
    ):
        assert not seen.unchanged(other, None)
