"""Trust ratios against the formulas, written out in float64; and the weights' norms that are carried from step to step."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kernels import as_on_a_gpu
from support.parameters import layouts, set_gradients
from support.ratios import BOUND, clars, close, gradients, lars, norm, randn, ratios_of

import fused_opt
from fused_opt import CLARS, LAMB, LARS, SGD, Adam, AdamW, TrustRatio, warn


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", ["lars", "clars"])
def test_momentum_sgd_by_the_formula(kind, dtype, every_kernel):
    """Neither the ratio nor the learning rate is inside the buffer; both change here from step to step."""
    wd, mu = 0.01, 0.9
    options = {"coefficient": 0.02, "cap": 0.07, "eps": 1e-3}
    parameters = layouts(dtype, chunk=300)
    weights = [p.detach().double() for p in parameters]
    buffers = [torch.zeros_like(w) for w in weights]
    ratio = TrustRatio(kind, **options)
    optimizer = SGD(parameters, lr=1.0, momentum=mu, weight_decay=wd, trust_ratio=ratio, backend=every_kernel)
    for step, lr in enumerate((1.0, 3.0, 0.5)):
        optimizer.param_groups[0]["lr"] = lr
        expected = []
        for i, g in enumerate(gradients(parameters, 100 + step)):
            w, s = weights[i], 1.0
            if w.ndim > 1:
                s = lars(w, g, wd, **options) if kind == "lars" else clars(w, [g], **options)
            buffers[i] = mu * buffers[i] + g + wd * w
            weights[i] = w - lr * s * buffers[i]
            expected.append(s)
        optimizer.step()
        close(parameters, weights, BOUND[dtype])
        for p, found, s in zip(parameters, ratios_of(optimizer), expected, strict=True):
            if p.numel():
                assert found == pytest.approx(s, rel=BOUND[dtype])
        for p, w in zip(parameters, weights):  # the formula goes on from what was stored
            w.copy_(p)
    assert 0.0 < min(expected) < 0.07  # both sides of the cap were seen
    assert 0.07 in expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_lamb_by_the_formula(cls, dtype, every_kernel):
    wd, beta1, beta2, eps, lr = 0.1, 0.8, 0.95, 1e-6, 0.02
    parameters = layouts(dtype, chunk=300)
    weights = [p.detach().double() for p in parameters]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    options = {"betas": (beta1, beta2), "eps": eps, "weight_decay": wd, "trust_ratio": TrustRatio("lamb")}
    optimizer = cls(parameters, lr, backend=every_kernel, **options)
    for t in (1, 2, 3):
        for i, g in enumerate(gradients(parameters, t)):
            w = weights[i]
            g = g if cls is AdamW else g + wd * w
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            u = m[i] / (1 - beta1**t) / ((v[i] / (1 - beta2**t)).sqrt() + eps)
            if cls is AdamW:
                u = u + wd * w
            s = norm(w) / norm(u) if w.ndim > 1 and norm(w) and norm(u) else 1.0
            weights[i] = w - lr * s * u
            if w.numel() and t == 1:
                expected = s
        optimizer.step()
        if t == 1:
            assert ratios_of(optimizer)[-1] == pytest.approx(expected, rel=BOUND[dtype])
    close(parameters, weights, 10 * BOUND[dtype])


def test_lamb_is_adamw_with_the_ratio(every_kernel):
    ours, theirs = (layouts(chunk=300) for _ in range(2))
    optimizer = LAMB(
        ours, 0.01, coefficient=0.5, cap=2.0, ratio_eps=1e-3, exempt=0, weight_decay=0.1, backend=every_kernel
    )
    ratio = TrustRatio("lamb", coefficient=0.5, cap=2.0, eps=1e-3, exempt=0)
    oracle = AdamW(theirs, 0.01, eps=1e-6, weight_decay=0.1, trust_ratio=ratio, backend=every_kernel)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        oracle.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_published_defaults(backend):
    """CLARS: coefficient 0.01, cap 0.1, eps 1e-6, momentum 0.9, decay 2e-4 on every tensor, no ratio on vectors."""
    weight, bias = torch.nn.Parameter(torch.full((2, 2), 3.0).double()), torch.nn.Parameter(torch.ones(2).double())
    optimizer = CLARS([("weight", weight), ("bias", bias)], lr=0.5, backend=backend)
    w, b, mw, mb = 3.0, 1.0, 0.0, 0.0
    for g in (1e-2, 2.0):
        weight.grad, bias.grad = torch.full_like(weight, g), torch.full_like(bias, g)
        s = min(0.1, 0.01 * 2 * w / (2 * g + 1e-6))
        mw, mb = 0.9 * mw + g + 2e-4 * w, 0.9 * mb + g + 2e-4 * b
        w, b = w - 0.5 * s * mw, b - 0.5 * mb
        optimizer.step()
        assert optimizer.trust_ratios() == {"weight": pytest.approx(s, rel=1e-12), "bias": 1.0}
        assert weight[1, 0].item() == pytest.approx(w, rel=1e-12)
        assert bias[1].item() == pytest.approx(b, rel=1e-12)
    assert s < 0.1
    lamb = TrustRatio("lamb")
    assert (lamb.coefficient, lamb.cap, lamb.eps, lamb.exempt) == (1.0, math.inf, 0.0, 1)
    first, second = LARS([weight], lr=1.0).param_groups[0], TrustRatio("lars")
    assert first["trust_ratio"] == second == TrustRatio("lars", coefficient=0.001, cap=math.inf, eps=0.0, exempt=1)
    assert (first["momentum"], first["weight_decay"], first["dampening"], first["nesterov"]) == (0.9, 5e-4, 0, False)


def linear(p, coefficients):
    """A loss whose gradient is the coefficients."""
    (p * coefficients).sum().backward()


def one_step(cls, weight, parts, backend, **options):
    p = torch.nn.Parameter(weight.clone())
    options = {"lr": 1.0, "coefficient": 0.3, "cap": math.inf, "eps": 0.0, "weight_decay": 0.0, **options}
    optimizer = cls([("p", p)], backend=backend, **options)
    handle = optimizer.track_parts("microbatch") if cls is CLARS else None
    for part in parts:
        linear(p, part)
    optimizer.step()
    if handle is not None:
        handle.remove()
    return optimizer.trust_ratios()["p"], p.detach()


def test_one_part_is_lars_with_the_decay_outside_the_norm(backend):
    weight, g = randn(5, 7), randn(5, 7, seed=1)
    ratio, p = one_step(CLARS, weight, [g], backend, weight_decay=0.2)
    lars_ratio, lars_p = one_step(LARS, weight, [g], backend, weight_decay=0.0)
    assert ratio == lars_ratio
    assert ratio == pytest.approx(0.3 * norm(weight) / norm(g), rel=1e-14)
    torch.testing.assert_close(lars_p, weight - ratio * g, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(p, weight - ratio * (g + 0.2 * weight), rtol=1e-14, atol=1e-14)
    within, _ = one_step(LARS, weight, [g], backend, weight_decay=0.2)
    assert within == pytest.approx(0.3 * norm(weight) / (norm(g) + 0.2 * norm(weight)), rel=1e-14)


def test_identical_parts_are_lars(backend):
    weight, g = randn(5, 7), randn(5, 7, seed=1)
    ratio, p = one_step(CLARS, weight, [g / 8] * 8, backend)
    assert ratio == pytest.approx(one_step(LARS, weight, [g], backend)[0], rel=1e-14)
    torch.testing.assert_close(p, weight - ratio * g, rtol=1e-13, atol=1e-13)


def test_scaling_the_parts_scales_their_norms(backend):
    weight, parts = randn(4, 6), [randn(4, 6, seed=seed) for seed in range(1, 6)]
    ratio, p = one_step(CLARS, weight, parts, backend)
    assert ratio == pytest.approx(0.3 * norm(weight) / sum(map(norm, parts)), rel=1e-14)
    half, halved = one_step(CLARS, weight, [part / 4 for part in parts], backend)
    assert half == 4 * ratio
    torch.testing.assert_close(halved, p, rtol=1e-14, atol=1e-14)  # hence the loss may be divided or not


def test_orthogonal_parts_of_equal_norm(backend):
    """Mean convention: A = r while the gradient has norm r / sqrt(M)."""
    weight, count, r = randn(4, 4), 16, 2.5
    parts = [
        torch.zeros(16, dtype=torch.float64).index_fill_(0, torch.tensor(i), r / count).view(4, 4) for i in range(16)
    ]
    ratio, p = one_step(CLARS, weight, parts, backend)
    assert ratio == pytest.approx(0.3 * norm(weight) / r, rel=1e-14)
    assert norm(p - weight) == pytest.approx(ratio * r / math.sqrt(count), rel=1e-13)
    assert one_step(LARS, weight, parts, backend)[0] == pytest.approx(ratio * math.sqrt(count), rel=1e-13)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), min_size=1, max_size=5))
def test_never_a_larger_step_than_lars(parts):
    """The triangle inequality."""
    parts = [torch.tensor(part, dtype=torch.float64).view(2, 2) for part in parts]
    weight = torch.ones(2, 2, dtype=torch.float64)
    total = sum(parts)
    if norm(total) > 1e-9:
        ratio = one_step(CLARS, weight, parts, "auto")[0]
        assert ratio <= 0.3 * 2 / norm(total) * (1 + 1e-12)
        assert ratio == pytest.approx(0.3 * 2 / sum(map(norm, parts)), rel=1e-12)


@pytest.mark.filterwarnings("ignore:the norms of parameter p are not finite")
@pytest.mark.parametrize(("cap", "expected"), [(math.inf, 1.0), (0.1, 0.1)])
@pytest.mark.parametrize("kind", ["lars", "clars", "lamb"])
def test_degenerate_norms_give_ratio_one_before_the_cap(kind, cap, expected, every_kernel):
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    for weight, gradient in (
        (zero, one),
        (one, zero),
        (zero, zero),
        (one, one / 0),
        (one, one * math.nan),
        (one / 0, one),
    ):
        p = torch.nn.Parameter(weight.clone())
        p.grad = gradient.clone()
        optimizer = SGD([("p", p)], lr=0.25, trust_ratio=TrustRatio(kind, cap=cap), backend=every_kernel)
        optimizer.step()
        assert optimizer.trust_ratios() == {"p": expected}
        if weight.isfinite().all():
            torch.testing.assert_close(p.detach(), weight - 0.25 * expected * gradient, equal_nan=True)


def test_empty_tensors_have_the_same_ratio_everywhere(backend):
    p = torch.nn.Parameter(torch.zeros(0, 3))
    p.grad = torch.zeros(0, 3)
    optimizer = CLARS([("p", p)], lr=0.1, backend=backend)
    optimizer.step()
    assert optimizer.trust_ratios() == {"p": 0.1}


def test_exempt(backend):
    for exempt in (-1, 0, 1, 2, 4):
        parameters = [torch.nn.Parameter(torch.full((2,) * ndim, 2.0)) for ndim in range(5)]
        for p in parameters:
            p.grad = torch.full_like(p, 1.0)
        optimizer = LARS(parameters, lr=1.0, coefficient=0.125, weight_decay=0.0, exempt=exempt, backend=backend)
        optimizer.step()
        expected = [0.25 if ndim > exempt else 1.0 for ndim in range(5)]
        assert ratios_of(optimizer) == expected
        assert [p.flatten()[0].item() for p in parameters] == [2 - s for s in expected]


def test_ratios_are_read_by_name(backend):
    parameters = [torch.nn.Parameter(torch.full((1, 4), float(i))) for i in (1, 2, 3)]
    optimizer = LARS(
        [
            {"params": [("a", parameters[0])]},
            {"params": [("b", parameters[1]), ("c", parameters[2])], "weight_decay": 1.0},
        ],
        lr=0.1,
        coefficient=0.5,
        weight_decay=0.0,
        backend=backend,
    )
    assert optimizer.trust_ratios() == {}
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    expected = {"a": 0.5 * 2 / 2, "b": 0.5 * 4 / (2 + 4), "c": 0.5 * 6 / (2 + 6)}
    assert optimizer.trust_ratios() == pytest.approx(expected, rel=1e-7)
    unnamed = LARS([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1, backend=backend)
    unnamed.step()
    assert set(unnamed.trust_ratios()) == {"0 of group 0", "0 of group 1", "1 of group 1"}


def test_what_a_step_left_alone_has_no_ratio_in_it(every_kernel):
    p, q = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([("p", p), ("q", q)], lr=0.1, weight_decay=0.0, coefficient=0.5, backend=every_kernel)
    for with_gradient in ([p], [p, q], [q], [], [p, q]):
        p.grad = q.grad = None
        for r in with_gradient:
            r.grad = torch.full_like(r, r.square().sum().sqrt().item())
        optimizer.step()
        expected = {name: 0.25 for name, r in (("p", p), ("q", q)) if any(r is one for one in with_gradient)}
        optimizer.zero_grad()
        assert optimizer.trust_ratios() == pytest.approx(expected, rel=1e-6)


def test_multipliers_enter_like_the_groups_own(backend):
    """The decay's in LARS' denominator, the learning rate's beside the ratio."""
    p = torch.nn.Parameter(torch.full((2, 2), 2.0).double())
    optimizer = LARS([("p", p)], lr=0.5, coefficient=0.1, weight_decay=0.25, backend=backend)
    optimizer.scale_layers(lr={p: 3.0}, weight_decay={p: 2.0})
    p.grad = torch.ones_like(p)
    optimizer.step()
    s = 0.1 * 4 / (2 + 0.25 * 2 * 4)
    assert optimizer.trust_ratios()["p"] == pytest.approx(s, rel=1e-14)
    assert p[0, 0].item() == pytest.approx(2 - 0.5 * 3 * s * (1 + 0.5 * 2), rel=1e-14)


def test_maximize_and_a_learning_rate_of_zero(backend):
    p = torch.nn.Parameter(torch.full((2, 2), 2.0).double())
    optimizer = LARS([("p", p)], lr=0.5, coefficient=0.1, weight_decay=0.0, maximize=True, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p[0, 0].item() == pytest.approx(2 + 0.5 * 0.2, rel=1e-14)
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(p, before)


def test_complex_parameters_beside_real_ones():
    """The native backend steps the real one, the reference the complex one, in one step."""
    real = torch.nn.Parameter(randn(3, 4))
    imaginary = torch.nn.Parameter(torch.complex(randn(3, 4, seed=1), randn(3, 4, seed=2)))
    g, h = randn(3, 4, seed=3), torch.complex(randn(3, 4, seed=4), randn(3, 4, seed=5))
    real.grad, imaginary.grad = g.clone(), h.clone()
    weights = real.detach().clone(), imaginary.detach().clone()
    optimizer = LARS([("r", real), ("i", imaginary)], lr=1.0, coefficient=0.1, weight_decay=0.3)
    optimizer.step()
    for p, w, d, name in ((real, weights[0], g, "r"), (imaginary, weights[1], h, "i")):
        length = [norm(torch.view_as_real(x)) if x.is_complex() else norm(x) for x in (w, d)]
        s = 0.1 * length[0] / (length[1] + 0.3 * length[0])
        assert optimizer.trust_ratios()[name] == pytest.approx(s, rel=1e-13)
        torch.testing.assert_close(p.detach(), w - s * (d + 0.3 * w), rtol=1e-13, atol=1e-13)


def test_settings_travel_in_the_state_dict(backend):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    ratio = TrustRatio("clars", coefficient=0.5, cap=3.0, eps=0.25, exempt=0)
    saved = SGD([weight], lr=0.1, trust_ratio=ratio, backend=backend).state_dict()
    fields = '{"kind": "clars", "coefficient": 0.5, "cap": 3.0, "eps": 0.25, "exempt": 0}'
    assert saved["param_groups"][0]["trust_ratio"] == f"TrustRatio {fields}"
    other = SGD([weight], lr=0.1, backend=backend)
    other.load_state_dict(saved)
    assert other.param_groups[0]["trust_ratio"] == ratio


# ------------------------------------------------------------------------------------------------- carried norms


def test_a_norm_that_is_not_finite_is_said_once(backend, monkeypatch, recwarn):
    if as_on_a_gpu():
        pytest.skip("to know it, the host would have to wait")
    monkeypatch.setattr(warn, "_said", set())
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = fused_opt.LARS([p], lr=0.1, backend=backend)
    p.grad = torch.tensor([[1.0, math.inf], [1.0, 1.0]])
    with pytest.warns(UserWarning, match="the norms of parameter 0 of group 0 are not finite: its trust ratio is 1"):
        optimizer.step()
    optimizer.step()
    assert optimizer.trust_ratios() == {"0 of group 0": 1.0}
    assert not recwarn.list


@pytest.mark.parametrize(
    ("scale", "words"), [(1e-3, "CLARS's cap of 0.1 binds on 2 of 3 tensors in step 20"), (1.0, None)]
)
def test_a_cap_that_binds_on_most_tensors_is_said_once(scale, words, backend, monkeypatch, recwarn):
    """Vectors are exempt and do not count; one matrix has a gradient that is long enough."""
    monkeypatch.setattr(warn, "_said", {message for message in warn._said if "cap" not in message})
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 4), (5,), (2, 8), (4, 4), (6,))]
    optimizer = SGD(parameters, lr=1e-9, trust_ratio=TrustRatio("clars"), backend=backend)
    optimizer.track_parts("microbatch")
    for step in range(1, 42):
        optimizer.zero_grad()
        sum(p.sum() * (1.0 if i == 0 else scale) for i, p in enumerate(parameters)).backward()
        optimizer.step()
        said = [str(one.message) for one in recwarn.list if "cap" in str(one.message)]
        assert len(said) == (words is not None and step >= 20)
    assert words is None or said[0].startswith(words)


def test_a_cap_that_binds_is_seen_where_the_backward_steps(backend, monkeypatch, recwarn):
    monkeypatch.setattr(warn, "_said", {message for message in warn._said if "cap" not in message})
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    optimizer = SGD(model.parameters(), lr=1e-9, trust_ratio=TrustRatio("clars"), backend=backend)
    optimizer.step_in_backward(model)
    for _ in range(20):
        (1e-4 * model(torch.ones(4)).sum()).backward()
        optimizer.step()
    assert [str(one.message)[:50] for one in recwarn.list if "cap" in str(one.message)] == [
        "CLARS's cap of 0.1 binds on 2 of 2 tensors in step"
    ]
