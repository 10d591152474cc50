"""What a rule promises, its kernels keep; and a rule that is not Adam counts steps on a device as everywhere else."""

from types import SimpleNamespace

import pytest
import torch
from support.core import built, copied
from support.kernels import GPU, run_with
from support.parameters import layouts, set_gradients

import fused_opt
from fused_opt.backends import interface, native, triton
from fused_opt.rule import Rule
from fused_opt.rules.adam import ADAM_RULE


def variant(**changes):
    """Adam's rule with another promise."""
    members = {name: getattr(ADAM_RULE, name) for name in Rule.__dataclass_fields__}
    return Rule(**{**members, **changes})


BROKEN = {
    "a state less": variant(states=("exp_avg",)),
    "a state more": variant(states=("exp_avg", "exp_avg_sq", "another")),
    "a coefficient less": variant(update=lambda g, m, v, a, b, c, d, e: (g, m, v)),
    "a coefficient more": variant(update=lambda g, m, v, a, b, c, d, e, f, h: (g, m, v)),
}


def optimizer_of(rule, backend):
    class Broken(fused_opt.Adam):
        def _rule(self, group):
            return rule

    return Broken([torch.nn.Parameter(torch.ones(3))], lr=0.1, backend=backend)


@pytest.mark.parametrize(
    "rule",
    [*BROKEN.values(), variant(counts_steps=False), variant(scalar="another", at_step=lambda c, step, scalar: c)],
    ids=[*BROKEN, "it counts no steps", "it keeps a scalar"],
)
@pytest.mark.parametrize("backend", ["native", "auto"])
@pytest.mark.parametrize("kernels", [None, GPU])
def test_a_promise_that_the_kernel_does_not_keep_is_an_error(rule, backend, kernels, monkeypatch):
    run_with(kernels, monkeypatch)
    optimizer = optimizer_of(rule, backend)
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones(3)
    there = f"{len(rule.states)} states and {rule.coefficient_count} coefficients"
    with pytest.raises(RuntimeError, match=f"rule 'adam' has {there}.* 2 states and 6 coefficients, and counts steps"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(p, torch.ones(3))


def test_coefficients_that_were_not_promised():
    """A rule that hands over another number than it says is found out in the step, before anything is written."""
    optimizer = optimizer_of(variant(at_step=lambda coefficients, step: coefficients[:3]), "native")
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="rule 'adam' takes 6 coefficients, and was given 3"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


def test_a_rule_that_only_python_has_is_left_to_the_reference():
    optimizer = optimizer_of(variant(name="mine"), "auto")
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones(3)
    optimizer.step()
    assert type(optimizer._last.buckets[0]).__module__ == "fused_opt.backends.foreach"
    optimizer.backend, optimizer._plan = "native", None
    with pytest.raises(RuntimeError, match="no rule 'mine' in csrc"):
        optimizer.step()


@pytest.mark.parametrize("rule", BROKEN.values(), ids=BROKEN)
def test_triton_finds_out_too(rule):
    if triton._reason is not None:
        pytest.skip(triton._reason)
    with pytest.raises(RuntimeError, match=r"rule 'adam' has .* in Triton it has 2 states and 6 coefficients"):
        triton._unsupported_rule(rule)
    assert triton._unsupported_rule(ADAM_RULE) is None


def test_named_tuples_are_read_as_they_are_named():
    given = {
        name: getattr(interface, name) for name in ("StepArgs", "RatioArgs", "NoiseArgs", "Fold", "Norms", "PartNorms")
    }
    native._native.connect(torch.Tensor, interface)
    swapped = SimpleNamespace(_fields=tuple(reversed(interface.Fold._fields)))
    with pytest.raises(ImportError, match="Fold has other members here"):
        native._native.connect(torch.Tensor, SimpleNamespace(**{**given, "Fold": swapped}, Kind=interface.Kind))


# ---- a rule of the test's own, with the momentum of NAdam (Dozat 2016) at a constant mu


NADAM = """
template <class T>
struct ConstantNAdam {
  static constexpr int kStates = 2, kCoefficients = 6;
  static constexpr bool kCountsSteps = true;
  T beta1, beta2, of_gradient, of_momentum, unbias2, eps;  // before at_step the third and fourth say nothing

  static FUSED_OPT_FN void at_step(double* c, double t) {
    c[2] = (1 - c[0]) / (1 - power(c[0], t));
    c[3] = c[0] / (1 - power(c[0], t + 1));
    c[4] = 1 / square_root(1 - power(c[1], t));
  }
  FUSED_OPT_FN T operator()(T g, T& m, T& v) const {
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    return (of_gradient * g + of_momentum * m) / (unbias2 * square_root(v) + eps);
  }
};

// The name a rule has in Python, and its type.
"""


def at_step(coefficients, step):
    beta1, beta2, *_, eps = coefficients
    unbias2 = 1 / (1 - beta2**step) ** 0.5
    return beta1, beta2, (1 - beta1) / (1 - beta1**step), beta1 / (1 - beta1 ** (step + 1)), unbias2, eps


def update(g, m, v, beta1, beta2, of_gradient, of_momentum, unbias2, eps):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    return (of_gradient * g + of_momentum * m) / (unbias2 * v.sqrt() + eps), m, v


NADAM_RULE = Rule(
    "constant_nadam",
    ("exp_avg", "exp_avg_sq"),
    lambda group: (*group["betas"], 0.0, 0.0, 0.0, group["eps"]),
    update,
    at_step,
    counts_steps=True,
)


class ConstantNAdam(fused_opt.Adam):
    def _rule(self, group):
        return NADAM_RULE


@pytest.fixture(scope="module")
def core_with_nadam(tmp_path_factory):
    """The compiled core of a copy of the sources to which one rule was added, as CONTRIBUTING.md says."""
    folder = copied(tmp_path_factory.mktemp("core"), "sgd")
    rules = folder / "csrc" / "rules.h"
    text = rules.read_text().replace("// The name a rule has in Python, and its type.\n", NADAM)
    assert text.count('RULE("sgd", SGD)') == 1
    rules.write_text(text.replace('RULE("sgd", SGD)', 'RULE("sgd", SGD) RULE("constant_nadam", ConstantNAdam)'))
    return built(folder, "with_nadam")


@pytest.mark.parametrize("kernels", [None, GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_new_rule_owns_its_bias_correction(core_with_nadam, kernels, dtype, monkeypatch):
    monkeypatch.setattr(native, "_native", core_with_nadam)
    native._unsupported_rule.cache_clear()
    run_with(kernels, monkeypatch)
    found = []
    for backend in ("native", "reference"):
        parameters = layouts(dtype, chunk=300)
        optimizer = ConstantNAdam(parameters, lr=0.1, weight_decay=0.1, backend=backend)
        for step in range(5):
            set_gradients(parameters, step)
            optimizer.step()
        found.append(parameters)
    native._unsupported_rule.cache_clear()
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_it_is_another_rule_than_adam():
    """Or the test before would show nothing."""
    steps = []
    for kind in (ConstantNAdam, fused_opt.Adam):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = kind([p], lr=0.1, backend="reference")
        for g in (1.0, -0.5):
            p.grad = torch.full_like(p, g)
            optimizer.step()
        steps.append(p[0].item())
    assert abs(steps[0] - steps[1]) > 1e-3
