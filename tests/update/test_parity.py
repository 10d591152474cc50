"""Every rule on every backend against torch.optim and against the truth in float64."""

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from rules import BY_NAME, CASES, OF_TORCH, each_rule_once, every_rule
from rules import oracle as oracle_of
from support.compare import distance
from support.parameters import clones, layouts, set_gradients
from support.threads import with_threads

import fused_opt


def train(optimizer, parameters, steps=4):
    for step in range(steps):
        set_gradients(parameters, step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BY_NAME)
def test_equals_the_oracle_over_random_hyper_parameters(name, dtype, every_kernel):
    @settings(max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(BY_NAME[name].drawn)
    def check(options):
        ours = layouts(dtype, chunk=300)
        theirs = clones(ours)
        optimizer = getattr(fused_opt, name)(ours, backend=every_kernel, **options)
        oracle = oracle_of(name)(theirs, foreach=False, **options)
        train(optimizer, ours, 3)
        train(oracle, theirs, 3)
        bound = 2e-6 if dtype == torch.float32 else 1e-13
        assert distance(ours, theirs) <= bound
        for slot in oracle.state[theirs[0]]:  # of all tensors together: in a single number a difference may cancel
            a, b = ([state[p][slot] for p in of] for state, of in ((optimizer.state, ours), (oracle.state, theirs)))
            assert [(x.dtype, x.shape) for x in a] == [(y.dtype, y.shape) for y in b]
            assert distance(a, b) <= bound
        assert [list(optimizer.state.get(p, {})) for p in ours] == [list(oracle.state.get(p, {})) for p in theirs]

    check()


def trained(name, options, dtype, of_run, backend):
    """Parameters of the dtype `of_run`, after four steps with gradients that are rounded to `dtype`."""
    parameters = clones(layouts(dtype), of_run)
    if backend == "torch.optim":
        optimizer = oracle_of(name)(parameters, foreach=True, **options)
    else:
        optimizer = getattr(fused_opt, name)(parameters, backend=backend, **options)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            p.grad = torch.empty_like(p).copy_(g)
        optimizer.step()
    return parameters


@cache
def truth_and_error(case, dtype, backend):
    """What float64 gives, and how far from it plain PyTorch in the dtype is."""
    truth = trained(*CASES[case], dtype, torch.float64, "reference")
    return truth, distance(trained(*CASES[case], dtype, dtype, backend), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_rule_once
def test_no_worse_than_pytorch(name, options, dtype, every_kernel):
    """At most 1.1 of plain PyTorch's error plus one ulp."""
    as_torch_rounds = dtype == torch.float32 or (dtype == torch.bfloat16 and "centered" in options)
    torchs_own = every_kernel == "foreach" and name in OF_TORCH and as_torch_rounds
    case = CASES.index((name, options))
    truth, baseline = truth_and_error(case, dtype, "torch.optim" if torchs_own else "reference")
    found = distance(trained(name, options, dtype, dtype, every_kernel), truth)
    assert found <= 1.1 * baseline + torch.finfo(dtype).eps
    assert baseline < (1e-6 if dtype == torch.float32 else 5e-2)


@every_rule
def test_gradient_of_another_layout(name, options, every_kernel):
    """What torch's fused CPU step gets wrong."""
    ours = [
        torch.nn.Parameter(torch.randn(6, 4)),
        torch.nn.Parameter(torch.randn(5)),
        torch.nn.Parameter(torch.ones(3, 7)),
    ]
    theirs = clones(ours)
    optimizer = getattr(fused_opt, name)(ours, backend=every_kernel, **options)
    oracle = oracle_of(name)(theirs, foreach=False, **options)
    for _ in range(3):
        gradients = [torch.randn(4, 6).t(), torch.randn(()).expand(5), torch.randn(9, 9)[::3, 1:8]]
        for parameters in (ours, theirs):
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient
        optimizer.step()
        oracle.step()
        assert distance(ours, theirs) <= 2e-6


def test_expanded_gradient_of_a_sum(every_kernel):
    p = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    p.sum().backward()
    p.grad = torch.ones(()).expand(2, 3)
    fused_opt.SGD([p], lr=0.5, backend=every_kernel).step()
    assert torch.equal(p, torch.arange(6.0).reshape(2, 3) - 0.5)


@every_rule
def test_metamorphic(name, options, every_kernel):
    """Splitting a tensor, permuting parameters, and stepping them one by one change no bit."""
    whole = torch.randn(40000, generator=torch.Generator().manual_seed(0))
    gradients = torch.randn(3, 40000, generator=torch.Generator().manual_seed(1))

    def run(cuts, order=None, together=True):
        parameters = [torch.nn.Parameter(part.clone()) for part in whole.tensor_split(cuts)]
        order = order or range(len(parameters))
        lists = [[parameters[i] for i in order]] if together else [[parameters[i]] for i in order]
        optimizers = [getattr(fused_opt, name)(some, backend=every_kernel, **options) for some in lists]
        for gradient in gradients:
            for p, part in zip(parameters, gradient.tensor_split(cuts)):
                p.grad = part.clone()
            for optimizer in optimizers:
                optimizer.step()
        return torch.cat([p.detach() for p in parameters])

    expected = run([])
    for cuts in ([1, 17, 16384, 30001], [20000], list(range(1, 40000, 4999))):
        assert torch.equal(run(cuts), expected)
    assert torch.equal(run([100, 20000], order=[2, 0, 1]), expected)
    assert torch.equal(run([100, 20000], together=False), expected)


@each_rule_once
def test_same_bits_with_any_number_of_threads(name, options, backend):
    """They are shared before an instruction set is chosen."""

    def run():
        parameters = [torch.nn.Parameter(p.detach()) for p in layouts(seed=3, chunk=60000)]
        train(getattr(fused_opt, name)(parameters, backend=backend, **options), parameters)
        return parameters

    results = with_threads(run, 1, 2, 3)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_non_finite_gradients_stay_in_their_element(every_kernel):
    for bad in (float("nan"), float("inf")):
        p = torch.nn.Parameter(torch.ones(100))
        optimizer = fused_opt.AdamW([p], lr=0.1, backend=every_kernel)
        p.grad = torch.ones(100)
        p.grad[42] = bad
        optimizer.step()
        assert not p[42].isfinite()
        assert p.isfinite().sum() == 99
