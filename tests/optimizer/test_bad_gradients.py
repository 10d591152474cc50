"""Gradients that break optimizers elsewhere: the right answer, or words that leave everything as it was."""

import copy

import pytest
import torch
from rules import KINDS, OF_TORCH, both_kinds
from support.compare import assert_close, assert_same, unchanged
from support.parameters import pair, parameters_of, set_gradients, train_both
from support.refusals import refuses, whenever

import fused_opt

LAYOUTS = {
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "strided": lambda g: torch.stack([g, torch.full_like(g, 1e6)], -1)[..., 0],
    "expanded": lambda g: g[:1, :1, :1, :1].expand_as(g),
    "offset": lambda g: torch.cat([torch.full((1,), 1e6), g.flatten()])[1:].view_as(g),
    "negated": lambda g: torch.complex(torch.zeros_like(g), -g).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@both_kinds
def test_gradients_of_another_layout(name, options, layout, backend):
    if layout == "negated" and backend == "native":
        pytest.skip("the native backend leaves lazy negations to the reference")
    optimizer, oracle = pair(name, options, backend, shapes=[(4, 3, 2, 5)], dtype=torch.float32)
    for step in range(3):
        gradient = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(step))
        for each in (optimizer, oracle):
            (p,) = parameters_of(each)
            p.grad = LAYOUTS[layout](gradient)
            if layout != "expanded":
                assert torch.equal(p.grad, gradient)
            each.step()
    assert_same(optimizer, oracle, bound=2e-6)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
@pytest.mark.filterwarnings("ignore:.*Sparse:UserWarning")
def test_sparse_gradients_of_sgd(options):
    """Uncoalesced and mixed with dense ones; torch keeps a sparse buffer for them, which loads here."""
    for backend in ("auto", "reference"):
        optimizer, oracle = pair("SGD", {"lr": 0.1, **options}, backend, shapes=[(4, 3), (2,)])
        for step in range(5):
            values = torch.randn(3, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            for each in (optimizer, oracle):
                p, q = parameters_of(each)
                set_gradients([q], step)
                p.grad = torch.sparse_coo_tensor([[3, 1, 3]], values, (4, 3))
                each.step()
            assert_close(parameters_of(optimizer), parameters_of(oracle))
            if step == 2:
                optimizer.load_state_dict(copy.deepcopy(oracle.state_dict()))
        for each in (optimizer, oracle):
            set_gradients(parameters_of(each), 7)  # now dense
        if not options:
            oracle.step()
            optimizer.step()
            assert_close(parameters_of(optimizer), parameters_of(oracle))


@whenever
@pytest.mark.parametrize("name", OF_TORCH)
def test_sparse_gradients_are_stepped_or_refused_in_the_words_of_torch(name, steps_before, backend):
    optimizer, oracle = pair(name, {}, backend)
    train_both(optimizer, oracle, steps_before)
    for each in (optimizer, oracle):
        set_gradients(parameters_of(each), 0)
        parameters_of(each)[1].grad = torch.ones(5, dtype=torch.float64).to_sparse()
    try:
        oracle.step()
    except RuntimeError as error:
        refuses(optimizer, str(error))
    else:
        optimizer.backend, optimizer._plan = "auto", None
        optimizer.step()
        assert_same(optimizer, oracle)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [*KINDS, ("SGD", {"lr": 0.1, "weight_decay": 0.1}), ("Adam", {"amsgrad": True, "maximize": True})],
    ids=str,
)
def test_complex_parameters(name, options, dtype):
    """Lazily conjugated ones too, on which torch.optim.Adam fails: torch keeps the conjugation as a bit."""
    bound = 2e-6 if dtype == torch.complex64 else 1e-12
    values = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    data = torch.complex(values, values.flip(0)).to(dtype)
    runs = []
    for module, extra in ((fused_opt, {}), (torch.optim, {"foreach": False})):
        resolve = torch.resolve_conj if module is torch.optim else lambda tensor: tensor
        parameters = [torch.nn.Parameter(data.clone()), torch.nn.Parameter(resolve(data.t().clone().t().conj()))]
        assert parameters[1].is_conj() == (module is fused_opt)
        optimizer = getattr(module, name)(parameters, **options, **extra)
        for step in range(3):
            for p in parameters:
                p.grad = resolve((data * (step - 0.5)).conj())
            optimizer.step()
        runs.append(optimizer)
    assert_close(parameters_of(runs[0]), parameters_of(runs[1]), bound)
    assert_close(runs[0].state_dict()["state"], runs[1].state_dict()["state"], bound)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@both_kinds
def test_a_non_finite_gradient_stays_in_its_element(name, options, bad, backend):
    optimizer, oracle = pair(name, options, backend, shapes=[(40,), (3,)])
    train_both(optimizer, oracle, 2)
    for step in range(2):
        for each in (optimizer, oracle):
            set_gradients(parameters_of(each), step)
            if step == 0:
                parameters_of(each)[0].grad[17] = bad
            each.step()
    p, q = parameters_of(optimizer)
    finite = p.isfinite()
    assert not finite[17]
    assert finite.sum() == 39
    assert_close([p[finite], q], [parameters_of(oracle)[0][finite], parameters_of(oracle)[1]])


@both_kinds
def test_a_first_gradient_after_some_steps(name, options, backend):
    """torch's fused step raises a TypeError here."""
    optimizer, oracle = pair(name, options, backend)
    for step in range(4):
        for each in (optimizer, oracle):
            first, *others = parameters_of(each)
            set_gradients(others if step < 2 else [first, *others], step)
            each.step()
        assert_same(optimizer, oracle)


@both_kinds
def test_an_overflow_at_the_first_step(name, options, backend):
    """torch's fused SGD keeps an uninitialized momentum buffer."""
    optimizer, oracle = pair(name, options, backend)
    set_gradients(parameters_of(optimizer), 0)
    parameters_of(optimizer)[0].grad.fill_(float("inf"))
    optimizer.found_inf = torch.tensor(1.0)
    with unchanged(optimizer):
        optimizer.step()
    assert not optimizer.state
    optimizer.found_inf = None
    train_both(optimizer, oracle)
    assert_same(optimizer, oracle)


class GradientElsewhere(torch.nn.Parameter):
    """Its gradient is on another device, as after ``p.data = p.data.cuda()`` on a machine that has one."""

    grad = property(lambda self: torch.ones(3, device="meta"))


def test_a_gradient_on_another_device(backend):
    good = torch.nn.Parameter(torch.ones(2))
    optimizer = fused_opt.AdamW([("good", good), ("odd", GradientElsewhere(torch.ones(3)))], backend=backend)
    good.grad = torch.ones(2)
    with pytest.raises(
        RuntimeError, match=r"parameter '?odd'? is on cpu and its gradient on meta; they must be on the"
    ):
        optimizer.step()
    assert torch.equal(good, torch.ones(2))
    assert not optimizer.state


@whenever
@both_kinds
def test_a_gradient_of_another_shape(name, options, steps_before, backend):
    """What remains when a parameter is resized in place."""
    optimizer, oracle = pair(name, options, backend)
    train_both(optimizer, oracle, steps_before)
    set_gradients(parameters_of(optimizer), 0)
    parameters_of(optimizer)[1].data = torch.ones(7, dtype=torch.float64)
    refuses(optimizer, r"parameter 1 of group 0 has shape \(7,\) and its gradient \(5,\); they must be equal")
