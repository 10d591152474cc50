"""Whether values, optimizers and states agree, to a bound or to the last bit; and that nothing was changed."""

from contextlib import contextmanager

import torch

import fused_opt

from .parameters import parameters_of


def assert_close(ours, theirs, bound=1e-12, least=1e-30):
    """Two values alike in structure and dtype, and tensors up to `bound` relative to their largest value, or to `least`."""
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        scale = max(theirs.detach().abs().max().item(), least) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=bound * scale)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_close(number(key, ours[key]), number(key, theirs[key]), bound, least)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_close(a, b, bound, least)
    else:
        assert ours == theirs


def number(key, value):
    """What a value of a state_dict means: a remainder's bits are a whole number."""
    return value.view(torch.int16) if key == "remainder" and value.dtype == torch.bfloat16 else value


def assert_same(ours, theirs, bound=1e-12):
    """Parameters and state_dicts of two optimizers agree; bound=0: to the last bit."""
    assert_close(parameters_of(ours), parameters_of(theirs), bound)
    mine, other = ours.state_dict(), theirs.state_dict()
    if not isinstance(theirs, fused_opt.FusedOptimizer) or not isinstance(ours, fused_opt.FusedOptimizer):
        mine, other = without_extras(mine), without_extras(other)
    assert_close(mine, other, bound)


def without_extras(state_dict):
    """A state_dict without what this package keeps in its groups beyond torch.optim."""
    p = [torch.nn.Parameter(torch.ones(1))]
    extras = fused_opt.SGD(p).defaults.keys() - torch.optim.SGD(p).defaults.keys() | {
        "fused"
    }  # not all of torch have it
    groups = [{k: v for k, v in group.items() if k not in extras} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@contextmanager
def unchanged(optimizer):
    """Fail if the block changes a parameter, a gradient, a state (its identity included) or a group."""

    def look():
        parameters = parameters_of(optimizer)
        state = {p: dict(of_p) for p, of_p in optimizer.state.items()}
        groups = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]
        return parameters, [p.grad for p in parameters], state, groups

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return [value.detach()]
        if isinstance(value, dict):
            value = list(value.values())
        return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []

    before = look()
    kept = [tensor.clone() for tensor in tensors(before[:3])]
    yield
    after = look()
    assert all(a is b for a, b in zip(before[0], after[0], strict=True))
    assert all(a is b for a, b in zip(before[1], after[1], strict=True))
    assert before[2].keys() == after[2].keys()
    for p, of_p in before[2].items():
        assert of_p.keys() == after[2][p].keys()
        assert all(of_p[key] is after[2][p][key] for key in of_p)
    for a, b in zip(before[3], after[3], strict=True):
        assert {**a, "params": None} == {**b, "params": None}
    for a, b in zip(kept, tensors(after[:3]), strict=True):
        assert (a.dtype, a.layout, a.shape) == (b.dtype, b.layout, b.shape)
        if a.device.type != "meta":
            assert torch.equal(a.to_dense().nan_to_num(77), b.to_dense().nan_to_num(77))


def distance(a, b):
    """Largest difference over all tensors, relative to the largest value."""
    scale = max(x.abs().max().item() for x in b if x.numel()) or 1.0
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b) if x.numel()) / scale


def same_bits(ours, other):
    assert_same(ours, other, bound=0)
