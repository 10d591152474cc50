"""Kinds of weight decay, and masks of updates and of decay, against the formulas of fused_opt/extras/decay.py written out."""

import pytest
import torch
from rules import both_kinds, each_elementwise_rule_once
from rules import oracle as oracle_of
from support.compare import assert_same, unchanged
from support.kernels import as_on_a_gpu
from support.parameters import checkpoint, clones, layouts, set_gradients
from support.threads import with_threads

import fused_opt
from fused_opt import Cautious, TrustRatio

DECAY = 0.1
SETTINGS = [
    ("coupled", None),
    ("decoupled", None),
    ("independent", None),
    ("coupled", Cautious("update")),
    ("decoupled", Cautious("update", scaled=False)),
    ("decoupled", Cautious("decay")),
    ("independent", Cautious("both")),
]


class Formula:
    """The formulas in float64; the rule's own oracle gives the update of weights of 0, without a decay."""

    def __init__(self, name, options, parameters, decay, cautious):
        self.options, self.decay, self.cautious = {"lr": 1e-3, **options}, decay, cautious
        self.weights = [p.detach().double().clone() for p in parameters]
        self.shadow = [torch.nn.Parameter(torch.zeros_like(w)) for w in self.weights]
        own = {k: v for k, v in options.items() if k not in ("weight_decay", "decoupled_weight_decay", "maximize")}
        self.inner = oracle_of(name)(self.shadow, **{**own, "lr": 1.0, "weight_decay": 0.0}, foreach=False)

    def step(self, gradients, ratio=None):
        """One step; ``ratio(p, g, direction)``: a trust ratio."""
        given = []
        for q, w, g in zip(self.shadow, self.weights, gradients):
            q.data.zero_()
            q.grad = (-g if self.options.get("maximize") else g) + (DECAY * w if self.decay == "coupled" else 0.0)
            given.append(q.grad)
        self.inner.step()
        for i, (q, w, g) in enumerate(zip(self.shadow, self.weights, given)):
            u = -q.detach()
            m, c = self.masks(u, g, w)
            direction = m * u + (DECAY * c * w if self.decay == "decoupled" else 0.0)
            s = 1.0 if ratio is None else ratio(w, gradients[i], direction)
            new = w - self.options["lr"] * s * direction
            self.weights[i] = new - DECAY * c * w if self.decay == "independent" else new

    def masks(self, u, g, w):
        m = c = torch.ones_like(u)
        if self.cautious is not None and self.cautious.what != "decay":
            m = (u * g > 0).double()
            if self.cautious.scaled and m.numel():
                m = m / max(m.mean().item(), 1e-3)
        if self.cautious is not None and self.cautious.what != "update":
            c = (u * w >= 0).double()
        return m, c


def some(dtype=torch.float64):
    return layouts(dtype, chunk=300)


def settings(decay, cautious, **more):
    """Keywords of an optimizer of ours."""
    return {"weight_decay": DECAY, "decay": decay, "cautious": cautious, **more}


def without_a_kind(options):
    return {k: v for k, v in options.items() if k != "decoupled_weight_decay"}


@pytest.mark.parametrize(("decay", "cautious"), SETTINGS, ids=str)
@each_elementwise_rule_once
def test_every_rule_with_every_decay_and_mask(name, options, decay, cautious, every_kernel):
    parameters = some()
    formula = Formula(name, options, parameters, decay, cautious)
    ours = {**without_a_kind(options), **settings(decay, cautious)}
    optimizer = getattr(fused_opt, name)(parameters, **ours, backend=every_kernel)
    for step in range(4):
        set_gradients(parameters, step)
        formula.step([p.grad.double() for p in parameters])
        optimizer.step()
        for p, w in zip(parameters, formula.weights):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-11)


def norm(tensor):
    return torch.linalg.vector_norm(tensor).item()


@pytest.mark.parametrize(("decay", "cautious"), [*SETTINGS, ("decoupled", Cautious("update"))], ids=str)
@pytest.mark.parametrize("kind", ["lars", "clars", "lamb"])
def test_trust_ratios_are_those_of_the_masked_direction(kind, decay, cautious, every_kernel):
    """Decay beside the direction is neither in LARS's denominator nor in LAMB's, and not times the ratio."""
    parameters = some()
    options = {"lr": 0.1, "betas": (0.8, 0.9)}
    formula = Formula("AdamW", options, parameters, decay, cautious)

    def ratio(p, g, direction):
        if p.ndim < 1:
            return 1.0
        weights = 0.0 if decay == "independent" else DECAY * norm(p)
        below = {"lars": norm(g) + weights, "clars": norm(g), "lamb": norm(direction)}[kind]
        return min(2.0, 0.5 * norm(p) / below if below and norm(p) else 1.0)

    trust_ratio = TrustRatio(kind, coefficient=0.5, cap=2.0, eps=0.0, exempt=0)
    optimizer = fused_opt.AdamW(
        parameters, **options, **settings(decay, cautious), trust_ratio=trust_ratio, backend=every_kernel
    )
    for step in range(3):
        set_gradients(parameters, step)
        formula.step([p.grad.double() for p in parameters], ratio)
        optimizer.step()
        for p, w in zip(parameters, formula.weights):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-11)


def one(values, **options):
    """SGD with momentum 0.5 of one parameter, whose first step has left a momentum of ones."""
    p = torch.nn.Parameter(torch.tensor(values))
    optimizer = fused_opt.SGD([p], lr=1.0, momentum=0.5, **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return p, optimizer


@pytest.mark.parametrize(
    ("agreeing", "scaled", "step"), [(1, True, 750.0), (2, True, 750.0), (1, False, 0.75), (2, False, 0.75)]
)
def test_the_share_counts_as_a_thousandth_at_least(agreeing, scaled, step, backend):
    """As the authors have it: 2 of 2,000 are a thousandth, 1 of them is taken for one."""
    p, optimizer = one([0.0] * 2000, cautious=Cautious("update", scaled=scaled), backend=backend)
    before = p.detach().clone()
    p.grad = torch.full_like(p, -0.25)
    p.grad[:agreeing] = 0.25
    optimizer.step()
    assert torch.equal(before[:agreeing] - p[:agreeing], torch.full((agreeing,), step))
    assert torch.equal(before[agreeing:], p[agreeing:])


@pytest.mark.parametrize("scaled", [True, False])
def test_masks_look_at_signs_and_pass_on_what_is_not_a_number(scaled, backend):
    """The product of numbers of 1e-30 is 0 in float32, and their signs agree nevertheless."""
    p = torch.nn.Parameter(torch.tensor([1e-30, -1e-30, 1.0, 1.0]))
    optimizer = fused_opt.SGD(
        [p], lr=1.0, weight_decay=0.5, decay="decoupled", cautious=Cautious("both", scaled), backend=backend
    )
    p.grad = torch.tensor([1e-30, 1e-30, float("nan"), 0.0])
    optimizer.step()
    scale = 2.0 if scaled else 1.0
    assert p[0].item() == pytest.approx(1e-30 * (0.5 - scale), rel=1e-6)
    assert p[1].item() == pytest.approx(-1e-30 * (1.0 + scale), rel=1e-6)  # no decay against the update
    assert p[2].isnan()
    assert p[3].item() == 0.5  # an update of 0 is against nothing


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize(
    ("first", "second"), [(1e19, 1e-35), (1e20, 1e20), (float("inf"), 1.0), (1e4, 1e4)], ids="{0:g}".format
)
def test_an_update_that_rounds_to_zero_is_not_counted(first, second, dtype, every_kernel):
    """Its sign is not the gradient's, whatever that of the average is that it is made of."""
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = fused_opt.Adam(
        [p], betas=(0.0, 0.9), cautious=Cautious("update"), state_dtype=dtype, backend=every_kernel
    )
    for last in (first, second):
        p.grad = torch.tensor([1.0, 1.0, 1.0, last])
        before = p.detach().clone()
        optimizer.step()
    counted = dtype is None and first == 1e4
    torch.testing.assert_close((before - p)[:3], torch.full((3,), 1e-3 if counted else 4e-3 / 3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("decay", ["coupled", "decoupled", "independent"])
@both_kinds
def test_a_decay_in_a_tensor_is_followed_where_it_is(name, options, decay, backend, monkeypatch):
    """Where a device keeps the numbers, the host does not look at it."""
    ours, theirs = some(torch.float32), some(torch.float32)
    tensor = torch.tensor(DECAY, dtype=torch.float64)
    a, b = (
        getattr(fused_opt, name)(p, **options, weight_decay=wd, decay=decay, backend=backend)
        for p, wd in ((ours, tensor), (theirs, DECAY))
    )
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
        if as_on_a_gpu() and step == 0:
            with monkeypatch.context() as within:
                within.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("the host has read a tensor"))
                set_gradients(ours, step)
                a.step()
            set_gradients(theirs, step)
            b.step()
        tensor.mul_(2)
        b.param_groups[0]["weight_decay"] = tensor.item()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        ("SGD", {"decay": "l2"}, "Invalid decay: 'l2'; there are 'coupled', 'decoupled', 'independent'"),
        ("SGD", {"weight_decay": torch.ones(2)}, "Tensor weight_decay must be 1-element"),
        ("SGD", {"cautious": "update"}, "cautious takes a fused_opt.Cautious or None, not 'update'"),
        ("SGD", {"cautious": Cautious("decay")}, "decay='coupled' is in the update"),
        ("AdamW", {"cautious": Cautious("both"), "decay": "coupled"}, "decay='coupled' is in the update"),
        (
            "Adam",
            {"decoupled_weight_decay": True, "decay": "coupled"},
            "decoupled_weight_decay=True and decay='coupled'",
        ),
        ("NAdam", {"decoupled_weight_decay": True, "decay": "independent"}, "and decay='independent' were asked for"),
    ],
)
def test_what_contradicts_itself_is_refused_when_it_is_made_and_when_it_is_changed(cls, options, words, backend):
    p = torch.nn.Parameter(torch.ones(3))
    make = getattr(fused_opt, cls)
    with pytest.raises((TypeError, ValueError), match=words):
        make([p], **options, backend=backend)
    optimizer = make([p], backend=backend)
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises((TypeError, ValueError), match=words):
        optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(2)), **options})
    optimizer.param_groups[0].update(options)
    with unchanged(optimizer), pytest.raises((TypeError, ValueError), match=words):
        optimizer.step()


def test_masks_are_named_in_words():
    with pytest.raises(ValueError, match="Invalid what of Cautious: 'all'; there are 'update', 'decay', 'both'"):
        Cautious("all")
    with pytest.raises(TypeError, match="scaled of Cautious takes True or False, not 1"):
        Cautious("update", 1)


@pytest.mark.parametrize("name", ["Adam", "NAdam", "RAdam"])
def test_the_keyword_of_torch_and_ours_mean_the_same(name, backend):
    runs = []
    for options in (
        {"decoupled_weight_decay": True},
        {"decay": "decoupled"},
        {"decoupled_weight_decay": True, "decay": "decoupled"},
    ):
        parameters = some()
        optimizer = getattr(fused_opt, name)(parameters, lr=0.1, weight_decay=DECAY, **options, backend=backend)
        for step in range(3):
            set_gradients(parameters, step)
            optimizer.step()
        runs.append(parameters)
    for other in runs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(runs[0], other))


def test_a_changed_setting_holds_from_the_next_step_on(backend):
    """Also in one group of two that share kernels."""
    first, second = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = fused_opt.SGD([{"params": [first]}, {"params": [second]}], lr=0.5, weight_decay=0.5, backend=backend)
    for p in (first, second):
        p.grad = torch.zeros(4)
    optimizer.step()
    assert first.tolist() == second.tolist() == [0.75] * 4
    optimizer.param_groups[1]["decay"] = "independent"
    optimizer.step()
    assert (first.tolist(), second.tolist()) == ([0.5625] * 4, [0.375] * 4)
    optimizer.param_groups[1]["cautious"] = Cautious("decay")
    second.grad = torch.tensor([-0.5, 0.5, 0.0, -0.5])
    optimizer.step()
    assert second.tolist() == [0.625, -0.0625, 0.1875, 0.625]


def test_a_learning_rate_of_zero_leaves_weights_alone(backend):
    p, optimizer = one([1.0, 2.0], weight_decay=0.5, decay="independent", backend=backend)
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("fused", [True, None])
def test_under_a_grad_scaler(fused, backend):
    """Scales are powers of two: to the last bit the step without one, and none where it overflows."""
    ours, theirs = some(torch.float32), some(torch.float32)
    more = settings("independent", Cautious("both"), lr=0.1, momentum=0.9, backend=backend)
    a, b = fused_opt.SGD(ours, **more, fused=fused), fused_opt.SGD(theirs, **more)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        scale = scaler.scale(torch.ones(())).item()
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for p in ours:
            p.grad.mul_(scale)
        if step == 1:
            ours[1].grad[0] = float("inf")
        scaler.step(a)
        scaler.update()
        if step != 1:
            b.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))


def everything(**more):
    """Every extra at once."""
    return {
        **settings("independent", Cautious("both")),
        "trust_ratio": TrustRatio("lamb", coefficient=0.5, cap=2.0, exempt=0),
        "noise": fused_opt.WeightNoise(std=0.01, relative=True, seed=3),
        "averaging": fused_opt.PSWM(period=3, beta=0.5),
        "max_grad_norm": 1.0,
        "nonfinite": "skip",
        **more,
    }


def test_with_every_extra_at_once_the_step_is_the_references(every_kernel):
    ours, theirs = some(), some()
    a = fused_opt.AdamW(ours, lr=0.1, **everything(), backend=every_kernel)
    b = fused_opt.AdamW(theirs, lr=0.1, **everything(), backend="reference")
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        if step == 2:
            ours[1].grad[0] = theirs[1].grad[0] = float("nan")
        a.step()
        b.step()
        assert a.skipped_steps == b.skipped_steps == (step >= 2)
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # of noise, normal numbers in float32
            with torch.no_grad():
                q.copy_(p)


def test_one_thread_and_two_give_the_same_bits(every_kernel):
    def run():
        parameters = [*some(torch.float32), torch.nn.Parameter(torch.linspace(-1, 1, 140000).view(400, 350))]
        optimizer = fused_opt.AdamW(parameters, lr=0.1, **everything(), backend=every_kernel)
        for step in range(4):
            set_gradients(parameters, step)
            optimizer.step()
        return parameters

    assert all(torch.equal(p, q) for p, q in zip(*with_threads(run, 1, 2)))


def test_a_resumed_run_is_the_uninterrupted_one(backend):
    """The settings travel as strings and numbers, and torch.optim loads what is its own."""
    straight = some(torch.float32)
    optimizer = fused_opt.AdamW(straight, lr=0.1, **everything(), backend=backend)
    for step in range(2):
        set_gradients(straight, step)
        optimizer.step()
    saved, resumed = checkpoint(optimizer), clones(straight)
    group = saved["param_groups"][0]
    assert (group["decay"], group["cautious"]) == ("independent", 'Cautious {"what": "both", "scaled": true}')
    torch.optim.AdamW(clones(straight)).load_state_dict(saved)
    other = fused_opt.AdamW(resumed, backend=backend)
    other.load_state_dict(saved)
    assert other.param_groups[0]["cautious"] == Cautious("both")
    for step in range(2, 4):
        for parameters, of_them in ((straight, optimizer), (resumed, other)):
            set_gradients(parameters, step)
            of_them.step()
    assert_same(other, optimizer, 0)


def test_a_sparse_gradient_decays_every_row(backend):
    dense, sparse = (torch.nn.Parameter(torch.arange(8.0).view(4, 2)) for _ in range(2))
    for p in (dense, sparse):
        p.grad = torch.zeros(4, 2)
        p.grad[1] = 1.0
        which = "auto" if p is sparse else backend
        optimizer = fused_opt.SGD([p], lr=0.5, weight_decay=0.25, decay="independent", backend=which)
        p.grad = p.grad.to_sparse(1) if p is sparse else p.grad
        optimizer.step()
    assert torch.equal(dense, sparse)
    assert dense[3].tolist() == [4.5, 5.25]
