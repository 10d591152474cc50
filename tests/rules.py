"""Every rule as data: tests that hold for all rules take them from here, so that a new rule is one row of ``RULES``."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st

import fused_opt

# ------------------------------------------------------------------------- oracles for what torch.optim does not have


def norm(tensor):
    return math.sqrt(math.fsum(x * x for x in tensor.detach().double().flatten().tolist()))


class WrittenOut:
    """A step by a formula, ``formula(p, g, group, state) -> (new p, new states)`` in float64, for a class of torch.optim."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g, state = p.grad.double(), self.state[p]
                new, states = self.formula(p.double(), -g if group["maximize"] else g, group, state)
                for name, value in states.items():
                    dtype = torch.float32 if name == "step" else p.dtype
                    state[name] = torch.empty_like(p, dtype=dtype).copy_(value) if value.ndim else value.to(dtype)
                p.copy_(new)
        return loss

    def ratio(self, p, below, no_step):
        """What TrustRatio says of a tensor: 1 where a norm is zero, at most the cap; exempt ones are not capped."""
        if p.ndim <= self.exempt:
            return 1.0
        return min(self.cap, 1.0 if no_step or not norm(p) else self.coefficient * norm(p) / below)


class LARS(WrittenOut, torch.optim.SGD):
    """You et al., arXiv 1708.03888; the learning rate and the ratio are outside the buffer: fused_opt/rules/lars.py."""

    def __init__(
        self, params, lr=1e-3, momentum=0.9, dampening=0, weight_decay=5e-4, nesterov=False, *,
        coefficient=0.001, cap=math.inf, eps=0.0, exempt=1, **options,
    ):  # fmt: skip
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **options)
        self.coefficient, self.cap, self.eps, self.exempt = coefficient, cap, eps, exempt

    def below(self, p, g, decay):
        return norm(g) + decay * norm(p) + self.eps

    def formula(self, p, g, group, state):
        decay, momentum = group["weight_decay"], group["momentum"]
        s = self.ratio(p, self.below(p, g, decay), not norm(g))
        u, states = g + decay * p, {}
        if momentum:
            m = state.get("momentum_buffer")
            m = u if m is None else momentum * m.double() + (1 - group["dampening"]) * u
            u, states = u + momentum * m if group["nesterov"] else m, {"momentum_buffer": m}
        return p - group["lr"] * s * u, states


class CLARS(LARS):
    """arXiv 2002.01576 with a gradient that is one part: LARS with the decay outside the norm, and a cap."""

    def __init__(
        self, params, lr=1e-3, momentum=0.9, dampening=0, weight_decay=2e-4, nesterov=False, *,
        coefficient=0.01, cap=0.1, eps=1e-6, **options,
    ):  # fmt: skip
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            coefficient=coefficient,
            cap=cap,
            eps=eps,
            **options,
        )

    def below(self, p, g, decay):
        return norm(g) + self.eps


class LAMB(WrittenOut, torch.optim.AdamW):
    """You et al., arXiv 1904.00962, without a ratio for tensors of at most one dimension: fused_opt/rules/lamb.py."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=1e-2, amsgrad=False, *,
        coefficient=1.0, cap=math.inf, ratio_eps=0.0, exempt=1, **options,
    ):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)
        self.coefficient, self.cap, self.ratio_eps, self.exempt = coefficient, cap, ratio_eps, exempt

    def formula(self, p, g, group, state):
        (beta1, beta2), t = group["betas"], state.get("step", torch.tensor(0.0)) + 1
        m, v, highest = (
            state.get(name, torch.zeros_like(p)).double() for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        )
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        states = {"step": t, "exp_avg": m, "exp_avg_sq": v}
        if group["amsgrad"]:
            states["max_exp_avg_sq"] = v = torch.maximum(highest, v)
        t = t.item()
        u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + group["eps"]) + group["weight_decay"] * p
        s = self.ratio(p, norm(u) + self.ratio_eps, not norm(u) or not norm(g))
        return p - group["lr"] * s * u, states


def written_out(step, **defaults):
    """The class of a formula that torch.optim has no class for."""

    def init(self, params, **options):
        switches = {"maximize": False, "foreach": None, "differentiable": False, "fused": None}
        torch.optim.Optimizer.__init__(self, params, {**defaults, **switches, **options})

    return type(step.__name__, (WrittenOut, torch.optim.Optimizer), {"__init__": init, "formula": staticmethod(step)})


def lion(p, g, group, state):
    """Chen et al., arXiv 2302.06675, algorithm 2."""
    (beta1, beta2), m = group["betas"], state.get("exp_avg", torch.zeros_like(p)).double()
    u = (beta1 * m + (1 - beta1) * g).sign()
    return p - group["lr"] * (u + group["weight_decay"] * p), {"exp_avg": beta2 * m + (1 - beta2) * g}


def ademamix(p, g, group, state):
    """Pagliardini, Ablin and Grangier, arXiv 2409.03137, algorithm 1, with the schedules of section 3, by half-lives."""
    (beta1, beta2, beta3), alpha, t = group["betas"], group["alpha"], state.get("step", torch.tensor(0.0)) + 1
    m, slow, v = (
        state.get(name, torch.zeros_like(p)).double() for name in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
    )
    n = t.item()
    if (whole := group["beta3_warmup"]) and n < whole:
        first, last = (math.log(0.5) / math.log(beta) if beta else 0.0 for beta in (beta1, beta3))
        beta3 = min(beta3, 0.5 ** (1 / (first + (last - first) * n / whole)))
    if (whole := group["alpha_warmup"]) and n < whole:
        alpha = alpha * n / whole
    m, slow, v = beta1 * m + (1 - beta1) * g, beta3 * slow + (1 - beta3) * g, beta2 * v + (1 - beta2) * g * g
    u = (m / (1 - beta1**n) + alpha * slow) / ((v / (1 - beta2**n)).sqrt() + group["eps"]) + group["weight_decay"] * p
    states = {"step": t, "exp_avg_fast": m, "exp_avg_slow": slow, "exp_avg_sq": v}
    return p - group["lr"] * u, states


# --------------------------------------------------------------------------------------------------------------- rules


class Rule(NamedTuple):
    """A class of fused_opt and who says what it is to compute."""

    name: str
    options: list[dict[str, Any]]  # every test of all rules runs with each of them
    drawn: st.SearchStrategy  # hyper-parameters for property tests
    oracle: type[torch.optim.Optimizer] | None = None  # None: torch.optim's of the same name
    normed: bool = False  # its step has a norm of whole tensors, so that a sum's order is in its last bits


_RATES, _DECAYS = st.floats(0, 1), st.floats(0, 0.5)
_SGD = st.fixed_dictionaries(
    {"lr": _RATES, "weight_decay": _DECAYS, "maximize": st.booleans()},
    optional={"momentum": st.floats(0, 0.99), "dampening": st.floats(0, 1)},
) | st.fixed_dictionaries({"lr": _RATES, "momentum": st.floats(0.01, 0.99), "nesterov": st.just(True)})
_ADAM = {
    "lr": st.floats(0, 0.1),
    "betas": st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.9999)),
    "eps": st.floats(1e-8, 1e-2),
    "weight_decay": _DECAYS,
    "amsgrad": st.booleans(),
    "maximize": st.booleans(),
}
_DECOUPLING = {**_ADAM, "decoupled_weight_decay": st.booleans()}
del _DECOUPLING["amsgrad"]
_RATIO = {"coefficient": st.floats(1e-3, 1), "cap": st.floats(0.01, 10), "exempt": st.integers(-1, 3)}
_LARS = st.builds(dict.__or__, _SGD, st.fixed_dictionaries({**_RATIO, "eps": st.floats(0, 1e-2)}))

RULES = [
    Rule("SGD", [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ], _SGD),
    Rule("Adam", [
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5, "amsgrad": True},
        {"lr": 0.01, "amsgrad": True, "maximize": True},
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ], st.fixed_dictionaries(_ADAM)),
    Rule("AdamW", [
        {"lr": 0.01, "amsgrad": True},
        {"lr": 0.01, "weight_decay": 0.3},
        {"lr": 0.01, "weight_decay": 0.3, "maximize": True},
    ], st.fixed_dictionaries(_ADAM)),
    Rule("Lion", [
        # 1 - 0.75 is exact, so that an interpolation of 16-bit numbers that is 0 is computed as 0, with and without fma.
        {"lr": 0.01, "betas": (0.75, 0.95), "weight_decay": 0.3, "maximize": True},
    ], st.fixed_dictionaries({"lr": st.floats(0, 0.1), "weight_decay": _DECAYS}),
        written_out(lion, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)),
    Rule("RMSprop", [
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.01, "alpha": 0.9, "centered": True},
        {"lr": 0.01, "momentum": 0.9, "eps": 1e-5},
        {"lr": 0.01, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
    ], st.fixed_dictionaries({
        "lr": st.floats(0, 0.1),
        "alpha": st.floats(0.5, 0.999),
        "eps": st.floats(1e-2, 1e-1),  # less of it multiplies the rounding of a sum of gradient and decay
        "momentum": st.sampled_from([0.0, 0.1, 0.9]),
        "centered": st.booleans(),
        "weight_decay": _DECAYS,
        "maximize": st.booleans(),
    })),
    Rule("Adamax", [
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5},
    ], st.fixed_dictionaries({key: value for key, value in _ADAM.items() if key != "amsgrad"})),
    Rule("Adagrad", [
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-5},
    ], st.fixed_dictionaries({
        "lr": _RATES,
        "lr_decay": st.floats(0, 1),
        "weight_decay": _DECAYS,
        "initial_accumulator_value": st.floats(0.01, 1),  # from less on, see the eps of RMSprop
        "maximize": st.booleans(),
    })),
    Rule("NAdam", [
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.8, 0.95), "momentum_decay": 0.1},
    ], st.fixed_dictionaries({**_DECOUPLING, "momentum_decay": st.floats(0, 1)})),
    Rule("RAdam", [
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},  # not divided in the first five steps
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.8, 0.9), "eps": 1e-5},
        {"lr": 0.01, "betas": (0.5, 0.5)},  # nor in any
    ], st.fixed_dictionaries(_DECOUPLING)),
    Rule("AdEMAMix", [
        {"lr": 0.01, "weight_decay": 0.1, "alpha": 5.0, "beta3_warmup": 3, "alpha_warmup": 5, "maximize": True},
        {"lr": 0.01, "betas": (0.0, 0.9, 0.99), "beta3_warmup": 10, "eps": 1e-5},
    ], st.fixed_dictionaries({
        "lr": st.floats(0, 0.1),
        "betas": st.tuples(st.floats(0.1, 0.9), st.floats(0.5, 0.9999), st.floats(0.9, 0.9999)),
        "alpha": st.floats(0, 10),
        "beta3_warmup": st.sampled_from([None, 1, 2, 10]),
        "alpha_warmup": st.sampled_from([None, 1, 2, 10]),
        "weight_decay": _DECAYS,
    }), written_out(ademamix, lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=2.0, beta3_warmup=None, alpha_warmup=None,
                    eps=1e-8, weight_decay=0.0, capturable=False)),
    Rule("LARS", [
        {"lr": 1.0, "coefficient": 0.1, "cap": 0.5, "weight_decay": 0.1},
    ], _LARS, LARS, normed=True),
    Rule("CLARS", [
        {"lr": 1.0, "coefficient": 0.05, "dampening": 0.3, "maximize": True},
    ], _LARS, CLARS, normed=True),
    Rule("LAMB", [
        {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    ], st.fixed_dictionaries({**_ADAM, **_RATIO, "ratio_eps": st.floats(0, 1e-2)}), LAMB, normed=True),
]  # fmt: skip
BY_NAME = {rule.name: rule for rule in RULES}
CASES = [(rule.name, options) for rule in RULES for options in rule.options]
# Those that users may replace by one word, with torch's arguments, state and defaults.
OF_TORCH = [rule.name for rule in RULES if rule.oracle is None]

every_rule = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
# Those that step an element without looking at the others: whatever is fused into the step goes around any of them.
every_elementwise_rule = pytest.mark.parametrize(
    ("name", "options"), [c for c in CASES if not BY_NAME[c[0]].normed], ids=str
)
every_rule_of_torch = pytest.mark.parametrize(("name", "options"), [c for c in CASES if c[0] in OF_TORCH], ids=str)
# Where the rule is not what is tested: one that keeps no count of steps and one that does.
KINDS = [("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}), ("AdamW", {"lr": 0.01})]
both_kinds = pytest.mark.parametrize(("name", "options"), KINDS, ids=["SGD", "AdamW"])


def oracle(name):
    """The class whose steps an optimizer of ours has to make."""
    return BY_NAME[name].oracle or getattr(torch.optim, name)


def make(name, parameters, **options):
    """Ours."""
    return getattr(fused_opt, name)(parameters, **options)


def _kernel(optimizer):
    return optimizer._rule(optimizer.param_groups[0])


# One case for each of the kernels that backends have of the rules above, and for each rule with norms: for tests to which
# options are no more than other numbers.
CASE_OF = {}
for _name, _options in CASES:
    _of_kernel = _kernel(make(_name, [torch.nn.Parameter(torch.ones(1))], **_options)).name
    CASE_OF.setdefault(_name if BY_NAME[_name].normed else _of_kernel, (_name, _options))
each_rule_once = pytest.mark.parametrize(("name", "options"), CASE_OF.values(), ids=str)
each_elementwise_rule_once = pytest.mark.parametrize(
    ("name", "options"), [c for c in CASE_OF.values() if not BY_NAME[c[0]].normed], ids=str
)


def kernels():
    """What backends know of the rules above: every distinct ``fused_opt.rule.Rule``, by name."""
    optimizers = [make(name, [torch.nn.Parameter(torch.ones(1))], **options) for name, options in CASE_OF.values()]
    optimizers.append(fused_opt.Muon([torch.nn.Parameter(torch.ones(1, 1))]))  # tested in update/test_muon.py
    found = [_kernel(optimizer) for optimizer in optimizers]
    return {rule.name: rule for rule in found}
