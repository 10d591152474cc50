"""Trust ratio, parts, clipping, skipping, noise and sampling in one step, with every rule; and a run that is resumed."""

import io
import math
from itertools import cycle, product

import pytest
import torch
from rules import BY_NAME, CASE_OF, KINDS
from rules import oracle as oracle_of
from support.compare import unchanged
from support.parameters import clones, layouts
from support.threads import threads as threads_set_to
from support.threads import with_threads

import fused_opt
from fused_opt import PSWM, SWM, TrustRatio, WeightNoise
from fused_opt.extras.noise import normal
from fused_opt.parts.tracker import wants_parts

SETTINGS = {
    "SGD": {"lr": 0.5, "weight_decay": 0.1},
    "SGD momentum": {"lr": 0.5, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1},
    "SGD nesterov": {"lr": 0.5, "momentum": 0.9, "nesterov": True, "maximize": True},
    "Adam": {"lr": 0.05, "weight_decay": 0.1},
    "Adam amsgrad": {"lr": 0.05, "amsgrad": True},
    "AdamW": {"lr": 0.05, "weight_decay": 0.1},
    "AdamW amsgrad": {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True},
}
PRESETS = {
    "LARS": {"lr": 0.5, "coefficient": 0.05},
    "CLARS": {"lr": 0.5, "coefficient": 0.05},
    "LAMB": {"lr": 0.05},
}
LIMIT = 0.8


def some(dtype=torch.float32, chunk=300):
    """Every kind of shape and layout once."""
    return [layouts(dtype, chunk=chunk)[k] for k in (1, 2, 5, 7, 9, 10, 11, 12)]


def extras(kind, **more):
    return {
        **({} if kind is None else {"trust_ratio": TrustRatio(kind, coefficient=0.05, cap=3.0, eps=1e-4)}),
        "noise": WeightNoise(std=0.02, schedule="cycle", period=3, relative=True, seed=7),
        "averaging": PSWM(period=4, beta=0.6, fraction=0.75, probability=0.8, on_write_back="zero", seed=5),
        "max_grad_norm": LIMIT,
        "nonfinite": "skip",
        **more,
    }


def parts_of(parameters, step, count=3):
    generator = torch.Generator().manual_seed(1000 + step)
    for _ in range(count):
        yield [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in parameters]


def backward(parameters, step, spoil=False):
    """Three micro-batches; the gradients come out as given."""
    for part in parts_of(parameters, step):
        sum((p * c).sum() for p, c in zip(parameters, part)).backward()
    if spoil:
        parameters[2].grad[3] = math.nan


def norm(tensor):
    return torch.linalg.vector_norm(tensor.double()).item()


class Oracle:
    """Every definition in float64, one after the other; the rule's own oracle gives the direction."""

    def __init__(self, name, options, parameters, ratio, beta=0.6):
        self.name, self.options, self.ratio = name, dict(options), ratio
        self.weights = [p.detach().double().clone() for p in parameters]
        self.cls = oracle_of(name)
        self.restart()
        self.t, self.v, self.taken = 0, None, []
        self.sampling = PSWM(period=4, beta=beta, fraction=0.75, probability=0.8, seed=5)

    def restart(self):
        """New states."""
        self.shadow = [torch.nn.Parameter(w.clone()) for w in self.weights]
        self.inner = self.cls(self.shadow, **{**self.options, "lr": 1.0}, foreach=False)

    def direction(self, i_grad):
        """How far the rule alone would go with a learning rate of one, state and decay included."""
        for q, w, g in zip(self.shadow, self.weights, i_grad):
            q.data.copy_(w)
            q.grad = g.clone()
        self.inner.step()
        return [w - q.detach() for q, w in zip(self.shadow, self.weights)]

    def step(self, gradients, parts):
        total = math.sqrt(sum(norm(g) ** 2 for g in gradients))
        clip = min(1.0, LIMIT / (total + 1e-6))
        directions = self.direction([clip * g for g in gradients])
        ratios = []
        for i, (w, g, u) in enumerate(zip(self.weights, gradients, directions)):
            s = 1.0
            if self.ratio is not None and w.ndim > 1:
                decay = self.options.get("weight_decay", 0.0 if self.name != "AdamW" else 1e-2)
                below = {
                    "lars": clip * norm(g) + decay * norm(w) + 1e-4,
                    "clars": clip * sum(norm(part[i]) for part in parts) + 1e-4,
                    "lamb": norm(u) + 1e-4,
                }[self.ratio]
                s = min(3.0, 0.05 * norm(w) / below if norm(w) and norm(g) else 1.0)
            ratios.append(s)
            sigma = 0.02 * (1 - self.t % 3 / 3) * (norm(w) / math.sqrt(w.numel()) if w.numel() else 0.0)
            z = normal(7, i, self.t, w.numel()).view(w.shape)
            self.weights[i] = w - self.options["lr"] * s * u + sigma * z
        self.t += 1
        if self.sampling.sampled(self.t):
            self.taken.append([w.clone() for w in self.weights])
        if self.t % 4 == 0 and self.taken:
            means = [sum(samples) / len(samples) for samples in zip(*self.taken)]
            self.v = means if self.v is None else [0.6 * v + 0.4 * mean for v, mean in zip(self.v, means)]
            self.weights, self.taken = [v.clone() for v in self.v], []
            self.restart()
        return total, ratios


RATIOS = ["lars", "clars", "lamb"]
ONCE = [case for case in CASE_OF.values() if not BY_NAME[case[0]].normed]


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [(*case, kind) for case, kind in [*zip(ONCE, cycle(RATIOS)), *product(KINDS, RATIOS)]],
    ids=str,
)
def test_every_rule_with_everything_on(name, options, kind, every_kernel):
    """Clip, direction, ratio, noise, sample, in this order; a skipped step in between leaves no trace."""
    parameters = some(torch.float64)
    oracle = Oracle(name, options, parameters, kind)
    optimizer = getattr(fused_opt, name)(parameters, **options, **extras(kind), backend=every_kernel)
    if kind == "clars":
        optimizer.track_parts("microbatch")
    for step in range(10):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        backward(parameters, step, spoil=step in (0, 5))
        if step in (0, 5):
            before = [p.detach().clone() for p in parameters]
            optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(before, parameters))
            continue
        total, ratios = oracle.step([p.grad.double() for p in parameters], list(parts_of(parameters, step)))
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(total, rel=1e-11)
        for i, (p, w, s) in enumerate(zip(parameters, oracle.weights, ratios)):
            # The noise is a float32 number; Adam turns its rounding into directions of any sign where v is tiny.
            scale = max(1.0, w.abs().max().item()) if w.numel() else 1.0
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=2e-6 * scale)
            if p.numel():
                assert optimizer.trust_ratios()[f"{i} of group 0"] == pytest.approx(s, rel=1e-5)
            w.copy_(p)  # go on from the same weights, float32's rounding of the noise included
    assert optimizer.skipped_steps == 2
    assert oracle.v is not None


def make(name, parameters, backend, **more):
    preset = name in PRESETS
    options = PRESETS[name] if preset else SETTINGS[name]
    cls = getattr(fused_opt, name.split()[0])
    return cls(parameters, **options, **extras(None if preset else "clars", **more), backend=backend)


def train(optimizer, parameters, steps, parts=True):
    handle = optimizer.track_parts("microbatch") if parts and wants_parts(optimizer.param_groups) else None
    for step in steps:
        optimizer.zero_grad()
        backward(parameters, step, spoil=step == 4)
        optimizer.step()
    if handle is not None:
        handle.remove()


def through_a_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("name", "threads"),
    [
        *((name, 1) for name in ("SGD", "SGD nesterov", "Adam amsgrad", "AdamW", "CLARS", "LAMB")),
        ("AdamW", 2),
        ("CLARS", 2),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(name, threads, backend):
    """To the last bit, from the middle of a period, through torch.save and torch.load(weights_only=True)."""
    with threads_set_to(threads):
        dtype = torch.bfloat16 if name == "AdamW" else torch.float32
        straight = some(dtype, chunk=70000 if threads > 1 and backend == "native" else 300)
        optimizer = make(name, straight, backend)
        train(optimizer, straight, range(3))
        saved, weights = through_a_file((optimizer.state_dict(), [p.detach() for p in straight]))
        train(optimizer, straight, range(3, 9))

        resumed = clones(straight)
        for p, w in zip(resumed, weights):
            p.data.copy_(w)
        asked = {"coefficient": 0.05} if name == "CLARS" else {}  # its class asks for a ratio of its own
        other = getattr(fused_opt, name.split()[0])(resumed, lr=9.0, backend=backend, **asked)
        other.load_state_dict(saved)
        train(other, resumed, range(3, 9))
    for a, b in zip(resumed, straight):
        assert torch.equal(a, b)
        assert other.state[a].keys() == optimizer.state[b].keys()
        for slot, value in optimizer.state[b].items():
            assert torch.equal(other.state[a][slot], value)
            assert other.state[a][slot].dtype == value.dtype
    assert other.trust_ratios() == optimizer.trust_ratios()
    assert other.grad_norm == optimizer.grad_norm
    assert other.skipped_steps == optimizer.skipped_steps == 1
    for a, b in zip(other.state_dict()["param_groups"], optimizer.state_dict()["param_groups"]):
        assert a == b
    assert optimizer.param_groups[0]["periods"] == 2


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "CLARS"])
def test_one_thread_and_two_give_the_same_bits(name, every_kernel):
    def run():
        parameters = [*some(), *clones([torch.nn.Parameter(torch.linspace(-1, 1, 140000).view(400, 350))])]
        train(make(name, parameters, every_kernel), parameters, range(5), parts=False)
        return parameters

    results = with_threads(run, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW amsgrad", "CLARS", "LAMB"])
def test_steps_with_a_learning_rate_of_zero_and_no_gradient_change_nothing(name, backend):
    """As torch.distributed.checkpoint makes them: weights, counts and averages stay; what comes after is not affected."""
    parameters, others = some(), some()
    optimizer, oracle = make(name, parameters, backend), make(name, others, backend)
    lrs = [group["lr"] for group in optimizer.param_groups]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0) if "Adam" in name else 0.0
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters))
    group = optimizer.param_groups[0]
    assert [group[count] for count in ("steps", "samples", "periods", "skipped_steps")] == [0, 0, 0, 0]
    assert all("average" in optimizer.state[p] for p in parameters)
    optimizer.load_state_dict({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})
    optimizer.param_groups[0]["lr"] = lrs[0]
    train(optimizer, parameters, range(6))
    train(oracle, others, range(6))
    assert all(torch.equal(a, b) for a, b in zip(parameters, others))


@pytest.mark.parametrize("name", ["SGD", "LARS"])
def test_a_learning_rate_of_zero_leaves_a_run_under_way_alone(name, backend):
    """With a rule that has no state of its own."""
    parameters, others = some(), some()
    more = {"momentum": 0.0} if name == "LARS" else {}
    optimizer, oracle = make(name, parameters, backend, **more), make(name, others, backend, **more)
    for step in range(7):
        train(optimizer, parameters, [step])
        train(oracle, others, [step])
        lr, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0
        optimizer.zero_grad()
        backward(parameters, 50 + step)
        with unchanged(optimizer):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = lr
    assert all(torch.equal(a, b) for a, b in zip(parameters, others))


def test_everything_off_is_the_plain_rule(backend):
    """Settings that say nothing cost no bit."""
    ours, theirs = some(), some()
    idle = {
        "trust_ratio": TrustRatio("lars", exempt=9),
        "noise": WeightNoise(std=0.0),
        "averaging": SWM(period=10**6, beta=0.5, start=10**6),
        "max_grad_norm": 1e9,
        "nonfinite": "raise",
    }
    optimizer = fused_opt.AdamW(ours, lr=0.1, **idle, backend=backend)
    oracle = fused_opt.AdamW(theirs, lr=0.1, backend=backend)
    for step in range(3):
        for parameters, of_them in ((ours, optimizer), (theirs, oracle)):
            of_them.zero_grad()
            backward(parameters, step)
            of_them.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
