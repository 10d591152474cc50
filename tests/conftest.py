"""What every test shares: the backends of this machine, and tensors that hurt."""

import copy
from contextlib import contextmanager

import pytest
import torch

import fused_opt
from fused_opt import backends
from fused_opt.backends import native, triton

# And the kernels for GPUs, with the host in a GPU's place.
INSTRUCTION_SETS = [*native._native.instruction_sets(), "gpu"] if native.unavailable() is None else []
# What Triton interprets takes milliseconds for each program: tests/test_triton.py runs some files again with nothing else.
EVERYWHERE = ["reference", *(f"native-{name}" for name in INSTRUCTION_SETS)]


@pytest.fixture(params=["triton"] if "cpu" in triton.DEVICES else EVERYWHERE)
def backend(request, monkeypatch):
    """Every backend that runs here, the native one with each instruction set."""
    name, _, instruction_set = request.param.partition("-")
    if name == "triton":  # beside the reference, which steps what it leaves alone
        monkeypatch.setattr(backends, "BACKENDS", ("triton", "reference"))
        monkeypatch.setattr(triton, "UNTESTED", ())
        return "auto"
    if instruction_set:
        use(monkeypatch, instruction_set)
    return name


def use(monkeypatch, kernels):
    """Step with the kernels of an instruction set, or with those for GPUs on the host in a GPU's place."""
    monkeypatch.setattr(native, "EMULATE_GPU", kernels == "gpu")
    monkeypatch.setattr(native, "INSTRUCTION_SET", None if kernels == "gpu" else kernels)


def as_on_a_gpu():
    """Whether this test's native backend does what it does on a GPU: the host waits for nothing, and does not know all."""
    return native.EMULATE_GPU


def layouts(dtype=torch.float32, seed=0, chunk=16384):
    """Parameters of every shape and layout that breaks a kernel which assumes too much."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [randn(n) for n in (0, 1, 7, chunk - 1, chunk, chunk + 1)]
    tensors += [randn(()), randn(3, 0, 2), randn(5, 1, 3)]
    tensors.append(randn(6, 4).t())
    tensors.append(randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    tensors.append(randn(33)[1:])  # breaks the alignment of vector loads
    tensors.append(randn(8, 6)[::2, 1::2])  # not dense
    tensors.append(randn(3, 40, 50).permute(2, 0, 1))
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def set_gradients(parameters, seed, dtype=None):
    """The same gradients for the same seed, whatever dtype or layout they are wanted in."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = torch.empty_like(p).copy_(gradient.to(p.dtype))


def clones(parameters, dtype=None):
    """Parameters of the same values and strides."""
    result = []
    for p in parameters:
        data = torch.empty_strided(p.shape, p.stride(), dtype=dtype or p.dtype)
        result.append(torch.nn.Parameter(data.copy_(p.detach())))
    return result


def pair(name, options, backend, shapes=((3, 4), (5,), ()), arrange=list, dtype=torch.float64):
    """An optimizer of ours and torch's own on parameters of the same values; `arrange` makes groups or names of them."""
    generator = torch.Generator().manual_seed(7)
    options = {"foreach": False, **options}
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    theirs = clones(ours)
    optimizer = getattr(fused_opt, name)(arrange(ours), backend=backend, **copy.deepcopy(options))
    oracle = getattr(torch.optim, name)(arrange(theirs), **copy.deepcopy(options))
    return optimizer, oracle


def parameters_of(optimizer):
    """Its parameters, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_close(ours, theirs, bound=1e-12):
    """Two values alike in structure and dtype, and tensors up to `bound` relative to their largest value."""
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        scale = max(theirs.detach().abs().max().item(), 1e-30) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=bound * scale)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_close(ours[key], theirs[key], bound)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_close(a, b, bound)
    else:
        assert ours == theirs


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
    extras = fused_opt.SGD(p).defaults.keys() - torch.optim.SGD(p).defaults.keys()
    groups = [{k: v for k, v in group.items() if k not in extras} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def train_both(optimizer, oracle, steps=3, seed=0):
    """The same gradients for both, step for step."""
    for step in range(steps):
        set_gradients(parameters_of(optimizer), seed + step)
        set_gradients(parameters_of(oracle), seed + step)
        optimizer.step()
        oracle.step()


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


__all__ = [
    "as_on_a_gpu",
    "assert_close",
    "assert_same",
    "backends",
    "clones",
    "fused_opt",
    "layouts",
    "pair",
    "parameters_of",
    "set_gradients",
    "train_both",
    "unchanged",
    "without_extras",
]
