"""A kept plan asks as much of a tensor as the first step did."""

import pytest
import torch
from support.compare import assert_close
from support.kernels import as_on_a_gpu

import fused_opt


def optimizer_of(p, backend, **options):
    optimizer = fused_opt.SGD([p], lr=0.5, backend=backend, **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_a_parameter_that_moves_to_the_next_group_has_its_rate(backend):
    first, second = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    groups = [{"params": [first, second], "lr": 1.0}, {"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 10.0}]
    optimizer = fused_opt.SGD(groups, lr=0.1, backend=backend)
    for step in range(2):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones(3)
        if step:
            optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
        optimizer.step()
    assert [p[0].item() for p in (first, second)] == [-2.0, -11.0]


def named(backend):
    """The reference by name; others beside what steps the gradients that they do not."""
    return backend if backend == "reference" else "auto"


def kinds_of(optimizer):
    return {f"{type(bucket).__module__}.{type(bucket).__name__}" for bucket in optimizer._last.buckets}


def compiled():
    return f"fused_opt.backends.native.{'GPU' if as_on_a_gpu() else 'CPU'}Bucket"


def test_a_gradient_of_zeros_without_memory(backend):
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = optimizer_of(p, named(backend))
    before = p.detach().clone()
    optimizer.zero_grad()
    p.grad = torch._efficientzerotensor((3,))
    optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    ("name", "options"), [("SGD", {}), ("SGD", {"momentum": 0.9, "nesterov": True}), ("Adam", {})], ids=str
)
def test_one_of_zeros_without_dimensions(name, options, backend):
    """Torch makes it float64 when it is multiplied with a number, and does not write it."""
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.tensor(1.0))
    optimizer = getattr(fused_opt, name)(
        [p, q], lr=0.5, backend="reference" if backend == "reference" else "auto", **options
    )
    p.grad, q.grad = torch.ones(2), torch._efficientzerotensor(())
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.05 if options else 0.5))
    assert q.item() == 1.0


class Wrapped(torch.Tensor):
    """A tensor whose data pointer is its own business."""


def test_a_gradient_that_becomes_a_subclass(backend):
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = optimizer_of(p, named(backend))
    assert backend == "reference" or kinds_of(optimizer) == {compiled()}
    p.grad = torch.ones(3).as_subclass(Wrapped)
    optimizer.step()
    assert backend == "reference" or kinds_of(optimizer) == {"fused_opt.backends.foreach.Bucket"}
    assert_close(p, torch.full((3,), -1.0))


ODD = {
    "sparse": lambda g: g.to_sparse(),
    "subclass": lambda g: g.as_subclass(Wrapped),
    "zeros": lambda g: torch._efficientzerotensor(g.shape),
    "negated": lambda g: torch._neg_view(-g),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_gradient_that_only_the_reference_steps_is_of_one_step_only(odd, backend):
    """Or a run that is resumed later would give other bits."""
    if backend == "reference":
        pytest.skip("it steps all of them")
    p, q = torch.nn.Parameter(torch.zeros(4, 2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = fused_opt.SGD([p, q], lr=0.5, momentum=0.9)
    both = {"fused_opt.backends.foreach.Bucket", compiled()}
    for gradient, kinds in ((ODD[odd](torch.ones(4, 2)), both), (torch.ones(4, 2), {compiled()})):
        p.grad, q.grad = gradient, torch.ones(2)
        optimizer.step()
        assert kinds_of(optimizer) == kinds
        p.grad = None
    expected = -0.5 if odd == "zeros" else -0.5 * (1 + 1.9)
    assert_close(p, torch.full((4, 2), expected), 1e-6)


def test_rows_of_a_sparse_gradient_alone_are_stepped():
    table = torch.nn.Embedding(1000, 4, sparse=True)
    torch.nn.init.ones_(table.weight)  # so that two subtractions round as one
    before = table.weight.detach().clone()
    optimizer, calls = fused_opt.SGD(table.parameters(), lr=0.5), []
    table(torch.tensor([3, 3, 7])).sum().backward()
    to_dense, torch.Tensor.to_dense = torch.Tensor.to_dense, lambda *args, **kwargs: calls.append(args)
    try:
        optimizer.step()
    finally:
        torch.Tensor.to_dense = to_dense
    assert not calls
    before[3] -= 1.0
    before[7] -= 0.5
    assert_close(table.weight, before, 0)


def test_parameters_without_elements_wait_for_them(backend):
    lazy, plain = torch.nn.LazyLinear(2, bias=False), torch.nn.Parameter(torch.zeros(2))
    sparse = torch.nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
    optimizer = fused_opt.SGD([lazy.weight, plain, sparse], lr=0.5, backend=backend)
    plain.grad = torch.ones(2)
    optimizer.step()
    assert plain.tolist() == [-0.5, -0.5]
    lazy(torch.ones(1, 3)).sum().backward()
    before = lazy.weight.detach().clone()
    optimizer.step()
    assert torch.equal(lazy.weight, before - 0.5)


@pytest.mark.parametrize("noise", [None, fused_opt.WeightNoise(std=1e-3)])
def test_only_noise_asks_for_row_major_order(noise, backend):
    """Of another group's noise a channels_last weight knows nothing; with noise or without, it is walked as it lies."""
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    other = torch.nn.Parameter(torch.zeros(4))
    noises = [noise, fused_opt.WeightNoise(std=1e-3)]
    groups = [{"params": [p], "noise": of_p} for p, of_p in zip((weight, other), noises)]
    optimizer = fused_opt.SGD(groups, lr=0.1, backend=backend)
    weight.grad, other.grad = torch.ones_like(weight), torch.ones(4)
    optimizer.step()
    (bucket,) = optimizer._last.buckets
    assert [member.noisy for member in bucket.members] == [noise is not None, True]
    assert backend == "reference" or bucket.core.strided() == []


STATES = {
    "sparse": torch.Tensor.to_sparse,
    "compressed": torch.Tensor.to_sparse_csr,
    "of inference": torch.inference_mode()(torch.Tensor.clone),
}


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_states_that_cannot_be_written_as_they_are(kind, name, every_kernel):
    """They are replaced by plain ones, by the reference in the place of a backend that steps plain ones only."""
    runs, backend = [], every_kernel if every_kernel in ("reference", "foreach") else "auto"
    options = {"momentum": 0.9} if name == "SGD" else {}
    for change in (lambda state: state, STATES[kind]):
        first, p = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.linspace(0, 1, 6).view(3, 2))
        optimizer = getattr(fused_opt, name)([first, p], lr=0.5, backend=backend, **options)
        for step in range(3):
            first.grad, p.grad = torch.ones(2), torch.full((3, 2), 1.0 + step)
            if step == 1:
                optimizer.state[p].update({k: change(v) for k, v in optimizer.state[p].items() if k != "step"})
            optimizer.step()
        runs.append((first, p, optimizer.state[p]))
        assert not any(state.is_inference() for state in optimizer.state[p].values())
    assert_close(*runs, bound=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.5}, {"momentum": 0.5, "averaging": fused_opt.EMA(0.5)}], ids=str
)
def test_what_a_step_writes_becomes_lazily_negated(options, every_kernel):
    """A weight and its momentum that hold the negatives of what lies in their memory."""
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    backend = every_kernel if every_kernel in ("reference", "foreach") else "auto"
    optimizer = fused_opt.SGD([p, q], lr=1.0, backend=backend, **options)
    for step in range(3):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        if step == 1:
            p.data = torch._neg_view(torch.full((3,), -2.0))
            for slot in optimizer.state[p].keys() - {"average"}:
                optimizer.state[p][slot] = torch._neg_view(torch.full((3,), -4.0))
        optimizer.step()
    assert_close([p, q], [torch.full((3,), -3.5 if options else 0.0), torch.full((3,), -4.25 if options else -3.0)])


@pytest.mark.parametrize("n", [4, 1])
def test_a_gradient_that_becomes_lazily_negated(n, backend):
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer = fused_opt.SGD([p], lr=1.0, backend=named(backend))
    z = torch.complex(torch.zeros(n), torch.ones(n))
    for gradient, value in ((z.imag, -1.0), (z.conj().imag, 0.0), (z.imag, -1.0)):
        p.grad = gradient
        optimizer.step()
        assert_close(p, torch.full((n,), value))


def _swap_weights(optimizer, p):
    p.data = torch.linspace(1, 2, 6, dtype=torch.float64).view(3, 2)
    p.grad = p.grad.double()


def _swap_state(optimizer, p):
    optimizer.state[p]["exp_avg"].data = torch.linspace(1, 2, 6, dtype=torch.bfloat16).view(3, 2)


CHANGES = {
    "nothing": lambda optimizer, p: None,
    "gradient of other strides": lambda optimizer, p: setattr(p, "grad", torch.arange(6.0).to(p.dtype).view(2, 3).t()),
    "gradient of zeros": lambda optimizer, p: setattr(p, "grad", torch._efficientzerotensor((3, 2), dtype=p.dtype)),
    "gradient negated": lambda optimizer, p: setattr(p, "grad", torch._neg_view(torch.ones_like(p))),
    "no gradient": lambda optimizer, p: setattr(p, "grad", None),
    "gradient of two": lambda optimizer, p: setattr(p, "grad", optimizer.param_groups[0]["params"][0].grad),
    "weights": _swap_weights,
    "state": _swap_state,
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_after_many_steps(change, guarded, dtype, bound, monkeypatch):
    """Steps of many tensors look at them by a guard of torch, where it has one; another torch may not."""
    if not guarded:
        monkeypatch.setattr("fused_opt.backends.foreach._guard", lambda tensors: None)
    runs = []
    for backend in ("foreach", "reference"):
        first, p = (torch.nn.Parameter(x.view(3, 2).to(dtype)) for x in (torch.zeros(6), torch.linspace(0, 1, 6)))
        optimizer = fused_opt.Adam([first, p], lr=0.5, weight_decay=0.1, backend=backend)
        for step in range(7):
            first.grad, p.grad = torch.ones_like(first), torch.arange(6.0).add(step).view(3, 2).to(p.dtype)
            if step == 4:
                CHANGES[change](optimizer, p)
            optimizer.step()
            if step == 3 and backend == "foreach":
                (bucket,) = optimizer._last.buckets
                assert (bucket.alike.guard is not None) == (bucket.alike_grads.guard is not None) == guarded
        runs.append([first, p, optimizer.state[p]["exp_avg"]])
    assert_close(*runs, bound=bound)
    assert runs[0][1].dtype == runs[1][1].dtype


def test_gradients_that_come_in_turns(every_kernel):
    """Every time as many, of other parameters."""
    runs = []
    for backend in (every_kernel, "reference"):
        parameters = [torch.nn.Parameter(torch.linspace(0, 1, n)) for n in (4, 4, 6)]
        optimizer = fused_opt.Adam(parameters, lr=0.5, backend=backend)
        for step in range(9):
            for i, p in enumerate(parameters):
                p.grad = torch.ones_like(p) if step < 2 or i == step % 3 else None
            optimizer.step()
        runs.append(parameters)
    assert_close(*runs, bound=1e-6)
