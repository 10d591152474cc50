"""Tensors of unusual layouts and kinds: a step is torch.optim's, or an error in words after which nothing has changed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rules import both_kinds
from support.compare import assert_close, unchanged

import fused_opt


@st.composite
def strided(draw, overlapping=False):
    """Sizes, strides and offset of a tensor whose dimensions lie in any order, with gaps; or also over one another."""
    sizes = draw(st.lists(st.integers(0, 5), max_size=4))
    if draw(st.integers(0, 9)) == 0:
        sizes = [min(size, 2) for size in sizes for _ in (0, 1)]
        sizes += [1] * (draw(st.sampled_from([52, 60, 62])) - len(sizes))  # torch compares 64 at most
    strides, reach = [0] * len(sizes), 1
    for d in draw(st.permutations(range(len(sizes)))):
        strides[d] = draw(st.integers(0, 3)) if overlapping else reach * draw(st.sampled_from([1, 1, 1, 2, 3]))
        if sizes[d] > 1:  # or sixty strides of dimensions of one element would grow beyond int64
            reach = max(reach, strides[d] * sizes[d])
    return sizes, strides, draw(st.integers(0, 5))


def laid_out(values, strides, offset):
    """The values in memory of that layout, and NaN in the gaps."""
    reach = sum(stride * (size - 1) for stride, size in zip(strides, values.shape)) if values.numel() else 0
    memory = torch.full((offset + reach + 1,), torch.nan, dtype=values.dtype)
    result = memory.as_strided(values.shape, strides, offset)
    return result.copy_(values) if values.numel() else result


@both_kinds
def test_parameters_gradients_and_states_of_any_layout(name, options, backend):
    @given(strided(), st.data())
    def check(layout, data):
        sizes, strides, offset = layout
        values = torch.linspace(-1, 1, int(np.prod(sizes)), dtype=torch.float64).reshape(sizes)
        runs = []
        others = [data.draw(strided().filter(lambda other: len(other[0]) == len(sizes))) for _ in range(2)]
        for module, extra in ((fused_opt, {"backend": named(backend)}), (torch.optim, {"foreach": False})):
            p = torch.nn.Parameter(laid_out(values, strides, offset))
            optimizer = getattr(module, name)([p], **options, **extra)
            for step in range(3):
                gradient = values.flip(0).sin() + step if sizes else values + step
                p.grad = laid_out(gradient, strides_for(others[0], sizes), others[0][2])
                for slot, state in optimizer.state.get(p, {}).items():
                    if slot != "step" and step == 2:
                        optimizer.state[p][slot] = laid_out(state, strides_for(others[1], sizes), others[1][2])
                optimizer.step()
            runs.append((p, optimizer.state[p]))
        assert_close(*runs, least=1.0)

    check()


def strides_for(layout, sizes):
    """The order of its dimensions, for other sizes."""
    strides, reach = [0] * len(sizes), 1
    for d in sorted(range(len(sizes)), key=lambda d: (layout[1][d], d)):
        strides[d] = reach
        if sizes[d] > 1:
            reach *= sizes[d] + layout[0][d]
    return strides


def named(backend):
    """The reference by name; others beside what steps the parameters that they do not."""
    return backend if backend == "reference" else "auto"


@both_kinds
def test_parameters_that_may_overlap_are_stepped_or_refused(name, options, backend):
    @given(strided(overlapping=True))
    def check(layout):
        sizes, strides, offset = layout
        reach = sum(stride * max(size - 1, 0) for stride, size in zip(strides, sizes))
        memory = torch.zeros(offset + reach + 1, dtype=torch.float64)
        p = torch.nn.Parameter(memory.as_strided(sizes, strides, offset))
        optimizer = getattr(fused_opt, name)([p], backend=named(backend), **options)
        p.grad = torch.ones(sizes, dtype=torch.float64)
        look = unchanged(optimizer)
        look.__enter__()
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "share memory" in str(error)  # noqa: PT017
            look.__exit__(None, None, None)
        else:
            values = p.flatten()  # torch compares at most 64 dimensions
            assert (values == values[:1].sum()).all()  # no element was stepped twice
            assert not values.numel() or values[0].item() != 0.0

    check()


def read_only():
    array = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    array.flags.writeable = False
    return torch.from_numpy(array)


ODD = {
    "70 dimensions": lambda: torch.linspace(-1, 1, 12).as_strided([3, 4, *[1] * 68], [4, 1, *[1] * 68]),
    "negated": lambda: torch._neg_view(torch.linspace(-1, 1, 12).view(3, 4)),
    "conjugated": lambda: torch.complex(torch.linspace(-1, 1, 12), torch.ones(12)).view(3, 4).conj(),
    "in shared memory": lambda: torch.linspace(-1, 1, 12).view(3, 4).share_memory_(),
    "of another program": lambda: torch.utils.dlpack.from_dlpack(torch.linspace(-1, 1, 12).view(3, 4)),
    "inference": torch.inference_mode()(lambda: torch.linspace(-1, 1, 12).view(3, 4)),
    "read-only": read_only,
    "zeros": lambda: torch._efficientzerotensor((3, 4)),
    "meta": lambda: torch.ones(3, 4, device="meta"),
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("what", ODD)
@both_kinds
def test_odd_gradients(name, options, what, backend):
    """Beside a plain one; clipped, so that they are read twice; a kept plan must ask as much as the first step did."""
    runs = []
    clip = {} if what == "meta" else {"max_grad_norm": 1e9}  # of what has no values there is no norm
    for module, extra in ((fused_opt, {"backend": named(backend), **clip}), (torch.optim, {"foreach": False})):
        shape, like = ODD[what]().shape, ODD[what]()
        data = torch.ones(shape, dtype=like.dtype, device=like.device)
        p, q = torch.nn.Parameter(data), torch.nn.Parameter(torch.ones(5))
        optimizer = getattr(module, name)([p, q], **options, **extra)
        # To what becomes negated after a plain gradient another test belongs.
        for _ in range(3):
            p.grad, q.grad = ODD[what](), torch.ones(5)
            if module is torch.optim:
                p.grad = p.grad.resolve_conj()
            optimizer.step()
        runs.append([q] if what == "meta" else [p.flatten(), q])  # torch compares at most 64 dimensions
    assert_close(*runs, bound=2e-6, least=1.0)


@pytest.mark.parametrize("what", ["70 dimensions", "in shared memory", "of another program", "conjugated"])
@both_kinds
def test_odd_parameters(name, options, what, backend):
    runs = []
    for module, extra in ((fused_opt, {"backend": named(backend)}), (torch.optim, {"foreach": False})):
        data = ODD[what]() if module is fused_opt else ODD[what]().resolve_conj()
        p = torch.nn.Parameter(data)
        optimizer = getattr(module, name)([p], **options, **extra)
        for step in range(3):
            p.grad = torch.full_like(data, step - 0.5)
            optimizer.step()
        assert p.data_ptr() == data.data_ptr()
        runs.append(p.detach().resolve_conj().flatten())
    assert_close(*runs, bound=2e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8])
@both_kinds
def test_parameters_of_whole_numbers_are_refused(name, options, dtype, backend):
    good, p = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
    optimizer = getattr(fused_opt, name)([good, p], backend=named(backend), **options)
    good.grad, p.grad = torch.ones(3), torch.ones(3, dtype=dtype)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"parameter 1 .* its gradient .* do not go"):
        optimizer.step()


def test_a_quantized_parameter_without_a_gradient_is_left_alone(backend):
    good = torch.nn.Parameter(torch.ones(3))
    quantized = torch.nn.Parameter(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), requires_grad=False)
    optimizer = fused_opt.SGD([quantized, good], lr=0.5, backend=named(backend))
    good.grad = torch.ones(3)
    optimizer.step()
    assert good.tolist() == [0.5] * 3
    assert quantized.dequantize().tolist() == pytest.approx([1.0] * 3)


@both_kinds
def test_a_gradient_that_is_its_parameter(name, options, backend):
    runs = []
    for module, extra in ((fused_opt, {"backend": named(backend)}), (torch.optim, {"foreach": False})):
        p = torch.nn.Parameter(torch.linspace(0.5, 1, 70000, dtype=torch.float64))
        optimizer = getattr(module, name)([p], **options, **extra)
        for _ in range(3):
            p.grad = p.data
            optimizer.step()
        runs.append(p)
    assert_close(*runs)


@both_kinds
def test_parameters_with_one_gradient(name, options, backend):
    runs = []
    for module, extra in ((fused_opt, {"backend": named(backend)}), (torch.optim, {"foreach": False})):
        p, q = (torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (9, 4))
        optimizer = getattr(module, name)([p, q], **options, **extra)
        for step in range(3):
            p.grad = torch.linspace(step, 2, 9, dtype=torch.float64)
            q.grad = p.grad[3:7]
            optimizer.step()
        runs.append([p, q])
    assert_close(*runs)
