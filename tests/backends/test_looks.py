"""What the compiled core tells another backend of its tensors: where the gradients are, and that something has moved."""

import pytest
import torch

from fused_opt.backends import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiled core")

CHANGES = {
    "a parameter that moved": lambda p, m: setattr(p, "data", torch.ones(4, 3)),
    "a parameter laid out otherwise": lambda p, m: setattr(p, "data", p.data.view(2, 6)),
    "a state that moved": lambda p, m: setattr(m, "data", torch.ones(4, 3)),
    "a gradient with other strides": lambda p, m: setattr(p, "grad", torch.ones(3, 4).t()),
    "a sparse gradient": lambda p, m: setattr(p, "grad", torch.ones(4, 3).to_sparse()),
}


def looked_at():
    p, m = torch.nn.Parameter(torch.ones(4, 3)), torch.zeros(4, 3)
    p.grad = torch.ones(4, 3)
    return p, m, native.looks([p], [m])


def test_addresses_of_gradients():
    p, _, looks = looked_at()
    assert looks.gradients() == [p.grad.data_ptr()]
    p.grad = torch.zeros(4, 3)
    assert looks.gradients() == [p.grad.data_ptr()]
    p.grad = None
    assert looks.gradients() == [None]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(change):
    p, m, looks = looked_at()
    change(p, m)
    assert looks.gradients() is None
