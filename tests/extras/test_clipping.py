"""Clipping and non-finite gradients in the step, against torch.nn.utils.clip_grad_norm_ before torch.optim's."""

import math

import pytest
import torch
from support.compare import unchanged
from support.parameters import clones, layouts, parameters_of, set_gradients
from support.threads import with_threads

import fused_opt
from fused_opt import CLARS, LARS, SGD

RECIPES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "amsgrad": True}),
]


def norm(tensors):
    """Of all tensors together."""
    flat = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    return math.sqrt(math.fsum(x * x for t in flat for x in t.detach().double().flatten().tolist()))


def groups_of(parameters):
    return [{"params": parameters[:3]}, {"params": parameters[3:7], "lr": 0.02}, {"params": parameters[7:]}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "options"), RECIPES, ids=str)
def test_equals_clip_grad_norm_before_the_step(name, options, dtype, every_kernel):
    """Over three groups; a gradient that is None counts nothing, and every other step is below the limit."""
    ours = layouts(dtype, chunk=300)
    theirs = clones(ours)
    optimizer = getattr(fused_opt, name)(groups_of(ours), **options, max_grad_norm=1.0, backend=every_kernel)
    oracle = getattr(torch.optim, name)(groups_of(theirs), **options, foreach=False)
    for step in range(4):
        for parameters in (ours, theirs):
            set_gradients(parameters, 100 + step)
            parameters[1].grad = parameters[4].grad = None
            for p in parameters if step % 2 else ():
                p.grad = None if p.grad is None else p.grad * 1e-3
        kept = [None if p.grad is None else (p.grad, p.grad.clone(), p.grad._version) for p in ours]
        total = torch.nn.utils.clip_grad_norm_(theirs, 1.0).item()
        assert (total > 1) == (step % 2 == 0)
        optimizer.step()
        oracle.step()
        assert optimizer.grad_norm == pytest.approx(norm([k[1] for k in kept if k]), rel=1e-12)
        assert optimizer.grad_norm == pytest.approx(total, rel=1e-5)
        for p, k in zip(ours, kept):
            assert (p.grad is None) == (k is None)
            assert k is None or (p.grad is k[0] and torch.equal(p.grad, k[1]) and p.grad._version == k[2])
        bound = 1e-12 if dtype == torch.float64 else 3e-6
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=0, atol=bound * max(1.0, *b.detach().abs().flatten().tolist(), 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_writing_the_gradients(dtype, every_kernel):
    """Their clipped gradient is rounded to the storage, ours is not."""

    def run(cls, parameters, **options):
        optimizer = cls(parameters, lr=0.5, **options)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in parameters:
                g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
                p.grad = torch.empty_like(p).copy_(g)
            if cls is torch.optim.SGD:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return torch.cat([p.detach().double().flatten() for p in parameters])

    truth = run(torch.optim.SGD, clones(layouts(dtype, chunk=300), torch.float64), foreach=False)
    theirs = run(torch.optim.SGD, layouts(dtype, chunk=300), foreach=False)
    ours = run(SGD, layouts(dtype, chunk=300), max_grad_norm=1.0, backend=every_kernel)
    assert (ours - truth).abs().max() <= 1.1 * (theirs - truth).abs().max() + torch.finfo(dtype).eps


def test_over_both_backends_at_once():
    """A complex parameter is stepped by the reference, and so is one with a sparse gradient; the norm is of all."""

    def make():
        generator = torch.Generator().manual_seed(0)
        real = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        table = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        return [torch.nn.Parameter(p) for p in (real, torch.complex(real + 1, real - 1), table)]

    ours, theirs = make(), make()
    optimizer = SGD([{"params": ours[:1]}, {"params": ours[1:], "lr": 0.2}], lr=0.1, max_grad_norm=0.5)
    oracle = torch.optim.SGD([{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.2}], lr=0.1, foreach=False)
    for parameters in (ours, theirs):
        parameters[0].grad = parameters[0].detach() * 0.5
        parameters[1].grad = parameters[1].detach() * (1 - 2j)
        rows = torch.nn.functional.embedding(torch.tensor([1, 4, 4]), parameters[2], sparse=True)
        (rows * torch.arange(3.0)).sum().backward()
    values = [ours[0].grad, ours[1].grad, ours[2].grad.to_dense()]
    total, factor = norm(values), 0.5 / (norm(values) + 1e-6)
    for p, g in zip(theirs, values):
        p.grad = g * factor
    optimizer.step()
    oracle.step()
    assert len(optimizer._last.buckets) == 2
    assert optimizer.grad_norm == pytest.approx(total, rel=1e-13)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("cls", [LARS, CLARS])
def test_trust_ratios_are_those_of_the_clipped_gradient(cls, backend):
    ours, theirs = layouts(torch.float64, chunk=300), layouts(torch.float64, chunk=300)
    options = {"lr": 0.5, "coefficient": 0.01, "eps": 1e-3, "weight_decay": 0.1, "backend": backend}
    optimizer, oracle = cls(ours, max_grad_norm=0.7, **options), cls(theirs, **options)
    for step in range(3):
        set_gradients(ours, 100 + step)
        set_gradients(theirs, 100 + step)
        torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        optimizer.step()
        oracle.step()
        assert optimizer.trust_ratios() == pytest.approx(oracle.trust_ratios(), rel=1e-12)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_the_norm_is_that_of_the_unscaled_gradient(backend):
    """Under a GradScaler the limit is about what the gradients mean."""
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = SGD([p], lr=1.0, max_grad_norm=1.0, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(3 * p.sum()).backward()
    scaler.step(optimizer)
    assert optimizer.grad_norm == pytest.approx(6.0, rel=1e-12)
    torch.testing.assert_close(p.detach(), torch.full_like(p, -3 / (6 + 1e-6)), rtol=1e-12, atol=0)


def test_a_scheduler_may_move_the_limit(backend):
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = SGD([p], lr=1.0, max_grad_norm=1.0, backend=backend)
    expected = 0.0
    for limit in (1.0, 0.25, None, 100.0):
        optimizer.param_groups[0]["max_grad_norm"] = limit
        p.grad = torch.full_like(p, 2.0)
        optimizer.step()
        expected -= 2.0 * min(1.0, (limit or math.inf) / (4.0 + 1e-6))
        assert p[0].item() == pytest.approx(expected, rel=1e-13)


def test_same_norm_with_any_number_of_threads(every_kernel):
    def run():
        parameters = layouts(chunk=60000)
        optimizer = SGD(parameters, lr=1.0, max_grad_norm=1.0, backend=every_kernel)
        set_gradients(parameters, 5)
        optimizer.step()
        return optimizer.grad_norm, parameters

    results = with_threads(run, 1, 2, 3)
    assert results[0][0] == pytest.approx(norm([p.grad for p in results[0][1]]), rel=1e-13)
    for found, parameters in results[1:]:
        assert found == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][1]))


# ------------------------------------------------------------------------------------------- non-finite gradients

EVERYTHING = {
    "trust_ratio": fused_opt.TrustRatio("lars", coefficient=0.1),
    "noise": fused_opt.WeightNoise(std=0.1),
    "averaging": fused_opt.PSWA(period=2),
}


def make(name, backend, everything, **options):
    parameters = layouts(chunk=300)
    extras = EVERYTHING if everything else {}
    return getattr(fused_opt, name)(groups_of(parameters), **options, **extras, backend=backend)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "options"), RECIPES[1:3], ids=str)
def test_skip_changes_nothing_and_counts(name, options, bad, everything, every_kernel):
    """Neither on the very first step, nor later, nor with a limit; what follows is as if the step had not been asked for."""
    optimizer = make(name, every_kernel, everything, **options, nonfinite="skip")
    oracle = make(name, every_kernel, everything, **options)
    parameters = parameters_of(optimizer)
    for step, good in enumerate((False, False, True, False, True, True, False)):
        set_gradients(parameters, 100 + step)
        if good:
            set_gradients(parameters_of(oracle), 100 + step)
            optimizer.step()
            oracle.step()
        else:
            parameters[3 + step].grad.flatten()[-1:].fill_(bad)
            parameters[3].grad[2] = bad
            with unchanged(optimizer):
                optimizer.step()
                for group in optimizer.param_groups:
                    group["skipped_steps"] -= 1  # the one thing that changes
            for group in optimizer.param_groups:
                group["skipped_steps"] += 1
            assert not math.isfinite(optimizer.grad_norm)
    assert optimizer.skipped_steps == 4
    assert optimizer.state_dict()["param_groups"][0]["skipped_steps"] == 4
    for a, b in zip(parameters, parameters_of(oracle), strict=True):
        assert torch.equal(a, b)
        mine, other = optimizer.state[a], oracle.state[b]
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[slot], other[slot]) for slot in mine)
    for a, b in zip(optimizer.param_groups, oracle.param_groups):
        assert [a[key] for key in ("steps", "samples", "periods")] == [
            b[key] for key in ("steps", "samples", "periods")
        ]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("first", [True, False])
def test_raise_names_the_parameters_and_changes_nothing(first, everything, backend):
    a, b, c = (torch.nn.Parameter(torch.full((2, 3), float(i))) for i in (1, 2, 3))
    extras = EVERYTHING if everything else {}
    named = [("weight", a), ("bias", b), ("scale", c)]
    optimizer = fused_opt.AdamW(named, lr=0.1, nonfinite="raise", max_grad_norm=1.0, **extras, backend=backend)
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    if not first:
        optimizer.step()
    b.grad = torch.tensor([[0.0, 1.0, math.nan], [0.0, 0.0, 0.0]])
    c.grad = None
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"parameter bias is not finite.*nonfinite='skip'"):
        optimizer.step()
    a.grad[0, 0] = -math.inf
    with unchanged(optimizer), pytest.raises(RuntimeError, match="parameter weight, bias is not finite"):
        optimizer.step()
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (a, b)] == [1.0 if first else 2.0] * 2
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_pass_does_what_torch_does(bad, backend):
    """Without a limit the element alone; with one, a NaN norm spoils everything and an infinite one clips to zero."""
    for limit in (None, 1.0):
        ours = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
        theirs = clones(ours)
        optimizer = SGD(ours, lr=0.1, max_grad_norm=limit, nonfinite="pass", backend=backend)
        oracle = torch.optim.SGD(theirs, lr=0.1, foreach=False)
        for parameters in (ours, theirs):
            parameters[0].grad, parameters[1].grad = torch.tensor([1.0, bad, 2.0]), torch.ones(2)
        if limit:
            torch.nn.utils.clip_grad_norm_(theirs, limit)
        optimizer.step()
        oracle.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_a_step_that_is_left_out_has_no_trust_ratios(backend):
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = LARS([p], lr=0.5, coefficient=0.1, nonfinite="skip", backend=backend)
    for value in (1.0, 1.0, math.nan, 1.0, 1.0):
        p.grad = torch.full_like(p, value)
        optimizer.step()
        found = optimizer.trust_ratios()
        assert list(found) == ([] if math.isnan(value) else ["0 of group 0"])


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_huge_finite_gradients_are_finite(nonfinite, every_kernel):
    """Their sum of squares overflows float32, and in float64 that of float64 gradients; they are clipped all the same."""
    for dtype, huge in ((torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float64, 1e150)):
        p = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
        p.grad = torch.full_like(p, huge)
        optimizer = SGD([p], lr=1.0, max_grad_norm=1.0, nonfinite=nonfinite, backend=every_kernel)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full_like(p, -0.5))
        assert optimizer.skipped_steps == 0


def test_both_backends_skip_together():
    """A NaN in the complex parameter, which the reference steps, keeps the native backend from stepping the other."""
    real = torch.nn.Parameter(torch.ones(3))
    imaginary = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = SGD([real, imaginary], lr=0.1, momentum=0.9, nonfinite="skip")
    real.grad, imaginary.grad = torch.ones(3), torch.tensor([1, complex(0, math.nan), 1])
    optimizer.step()
    assert torch.equal(real, torch.ones(3))
    assert torch.equal(imaginary, torch.ones(3, dtype=torch.complex64))
    assert not optimizer.state
    assert optimizer.skipped_steps == 1


def test_skips_are_counted_after_a_resume(backend):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = SGD([p], lr=0.1, nonfinite="skip", backend=backend)
    p.grad = torch.full((2,), math.nan)
    optimizer.step()
    optimizer.step()
    other = SGD([p], lr=0.1, nonfinite="skip", backend=backend)
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert other.skipped_steps == 3


@pytest.mark.parametrize("setting", [{"max_grad_norm": 2.0}, {"nonfinite": "skip"}], ids=str)
def test_groups_that_disagree_are_refused_and_nothing_changes(setting, backend):
    """Clipping is about all gradients together."""
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    a.grad, b.grad = torch.ones(2), torch.ones(3)
    groups = [{"params": [a], **setting}, {"params": [b]}]
    optimizer = fused_opt.AdamW(groups, lr=0.1, max_grad_norm=1.0, nonfinite="raise", backend=backend)
    with unchanged(optimizer), pytest.raises(ValueError, match="set them alike in every group"):
        optimizer.step()


def test_invalid_settings():
    p = torch.nn.Parameter(torch.ones(2))
    for limit in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="Invalid max_grad_norm"):
            SGD([p], lr=0.1, max_grad_norm=limit)
    with pytest.raises(ValueError, match="Invalid nonfinite: 'ignore'"):
        SGD([p], lr=0.1, nonfinite="ignore")


def test_what_a_step_summed_that_was_not_made_is_forgotten(backend):
    """Its trust ratio would be that of the gradients that were not finite."""
    p, q = (torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64)) for _ in range(2))
    optimizer = LARS([p], lr=0.1, coefficient=0.5, nonfinite="raise", backend=backend)
    oracle = LARS([q], lr=0.1, coefficient=0.5, backend="reference")
    for step in range(3):
        p.grad, q.grad = torch.full_like(p, 2.0 + step), torch.full_like(q, 2.0 + step)
        if step == 1:
            p.grad[0, 0] = math.inf
            with pytest.raises(RuntimeError, match="is not finite"):
                optimizer.step()
            optimizer.param_groups[0]["nonfinite"] = "pass"
            continue
        optimizer.step()
        oracle.step()
    assert optimizer.trust_ratios() == pytest.approx(oracle.trust_ratios(), rel=1e-12)
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
