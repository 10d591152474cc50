"""Weight sampling against an oracle that keeps every sample in a list."""

import io
import math

import pytest
import torch
from support.averages import small
from support.parameters import layouts, set_gradients

import fused_opt
from fused_opt import EMA, PSWA, PSWM, PWALKS, SGD, SWM, AdamW
from fused_opt.extras.noise import uniform


class Oracle:
    """The definitions, with all samples of a period in a list; of one weight tensor in float64."""

    def __init__(
        self,
        kind,
        period=math.inf,
        start=0,
        fraction=1.0,
        probability=1.0,
        interval=1,
        beta=None,
        samples=None,
        warmup=False,
    ):
        self.kind, self.period, self.start, self.beta, self.last = kind, period, start, beta, samples
        self.fraction, self.probability, self.interval = fraction, probability, interval
        self.taken, self.v, self.average, self.warmup = [], None, None, warmup

    def due(self, t):
        """In the last fraction of the period, on the grid that ends with it, and drawn."""
        if t <= self.start or (self.probability < 1 and uniform(0, t) >= self.probability):
            return False
        if self.kind == "EMA":
            return (t - self.start) % self.interval == 0
        place = (t - self.start - 1) % self.period + 1  # 1 .. period
        in_the_end = place > self.period - round(self.fraction * self.period, 9)
        on_the_grid = (self.period - place) % self.interval == 0
        among_the_last = self.last is None or (self.period - place) // self.interval < self.last
        return in_the_end and on_the_grid and among_the_last

    def after(self, t, w):
        """The weights after step t, written back where that is due; whether they were, and whether they were sampled."""
        sampled = self.due(t)
        if sampled:
            self.taken.append(w.clone())
            if self.kind in ("SWM", "EMA"):
                n = len(self.taken) - 1
                beta = min(self.beta, (1 + n) / (10 + n)) if self.warmup else self.beta
                self.v = w.clone() if self.v is None else beta * self.v + (1 - beta) * w
                self.average = self.v
            else:
                mean = sum(self.taken) / len(self.taken)
                self.average = mean
                if self.kind == "PSWM":
                    self.average = mean if self.v is None else self.partial(mean, t)
        ends = self.kind != "EMA" and t > self.start and (t - self.start) % self.period == 0 and bool(self.taken)
        if ends:
            if self.kind == "PSWM":
                mean = sum(self.taken) / len(self.taken)
                self.v = mean if self.v is None else self.beta * self.v + (1 - self.beta) * mean
                self.average = self.v
            w, self.taken = self.average.clone(), []
        return w, ends, sampled

    def partial(self, mean, t):
        """In the middle of a period: v with as much of the new mean as has been sampled, weights summing to one."""
        first = t - (t - self.start - 1) % self.period
        part = len(self.taken) / sum(self.due(s) for s in range(first, first + self.period))
        old, new = self.beta, (1 - self.beta) * part
        return (old * self.v + new * mean) / (old + new)


VARIANTS = {
    "PSWA": (PSWA, {"period": 4}),
    "PSWA of one": (PSWA, {"period": 1}),
    "PSWA late": (PSWA, {"period": 3, "start": 4}),
    "PSWA last half": (PSWA, {"period": 6, "fraction": 0.5}),
    "PSWA last third": (PSWA, {"period": 5, "fraction": 0.3}),
    "PSWA every other": (PSWA, {"period": 7, "interval": 2}),
    "PSWA by chance": (PSWA, {"period": 4, "probability": 0.4}),
    "PSWA rarely": (PSWA, {"period": 2, "probability": 0.15}),
    "PSWA altogether": (PSWA, {"period": 7, "start": 2, "fraction": 0.8, "interval": 2, "probability": 0.7}),
    "PWALKS": (PWALKS, {"period": 6, "samples": 3}),
    "PWALKS every other": (PWALKS, {"period": 7, "samples": 2, "interval": 2}),
    "PWALKS more than there are": (PWALKS, {"period": 3, "samples": 9}),
    "PWALKS by chance": (PWALKS, {"period": 7, "samples": 4, "start": 1, "probability": 0.6}),
    "PSWM": (PSWM, {"period": 4, "beta": 0.7}),
    "PSWM without memory": (PSWM, {"period": 3, "beta": 0.0}),
    "PSWM by chance": (PSWM, {"period": 5, "beta": 0.6, "probability": 0.5, "start": 1}),
    "PSWM rarely": (PSWM, {"period": 2, "beta": 0.6, "probability": 0.2}),
    "PSWM last part": (PSWM, {"period": 7, "beta": 0.5, "fraction": 0.6, "interval": 2}),
    "SWM": (SWM, {"period": 4, "beta": 0.7}),
    "SWM by chance": (SWM, {"period": 5, "beta": 0.6, "probability": 0.5, "start": 2}),
    "SWM last part": (SWM, {"period": 6, "beta": 0.8, "fraction": 0.5, "interval": 2}),
    "EMA": (EMA, {"beta": 0.8}),
    "EMA late and every third": (EMA, {"beta": 0.8, "start": 4, "interval": 3}),
    "EMA that warms up": (EMA, {"beta": 0.5, "warmup": True, "start": 1}),
    "EMA by chance": (EMA, {"beta": 0.5, "probability": 0.5}),
}


@pytest.mark.parametrize(
    ("name", "zero"), [*((name, False) for name in VARIANTS), ("PSWA", True), ("PSWM", True), ("SWM by chance", True)]
)
def test_every_variant_by_its_definition(name, zero, every_kernel):
    """Momentum SGD; the average is looked at after every step, sampled or not, and costs nothing where it is not."""
    cls, options = VARIANTS[name]
    averaging = cls(**options, on_write_back="zero" if zero else "keep")
    parameters = small()
    weights = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(w) for w in weights]
    oracles = [Oracle(cls.__name__, **options) for _ in weights]
    optimizer = SGD(parameters, lr=0.3, momentum=0.9, averaging=averaging, backend=every_kernel)
    ends = False
    for t in range(1, 19):
        set_gradients(parameters, 100 + t)
        before = [optimizer.state.get(p, {}).get("average") for p in parameters]
        kept = [None if v is None else (v.clone(), v._version) for v in before]
        if ends and zero:
            assert not any("momentum_buffer" in optimizer.state[p] for p in parameters)
            buffers = [torch.zeros_like(w) for w in weights]
        optimizer.step()
        for i, p in enumerate(parameters):
            buffers[i] = 0.9 * buffers[i] + p.grad
            weights[i], ends, sampled = oracles[i].after(t, weights[i] - 0.3 * buffers[i])
            torch.testing.assert_close(p.detach(), weights[i], rtol=1e-12, atol=1e-12)
            if before[i] is not None:
                assert optimizer.state[p]["average"] is before[i]
                if not sampled:
                    assert torch.equal(before[i], kept[i][0])
        with optimizer.averaged_weights():
            for p, w, oracle in zip(parameters, weights, oracles):
                shown = w if oracle.average is None else oracle.average
                torch.testing.assert_close(p.detach(), shown, rtol=1e-11, atol=1e-12)
        for p, w in zip(parameters, weights):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
    assert oracles[0].average is not None


def test_the_number_of_samples_is_the_fraction_of_the_period():
    """0.07 * 100 is a little more than 7 in binary."""
    for percent in range(1, 101):
        averaging = PSWA(period=100, fraction=percent / 100)
        assert sum(averaging.sampled(t) for t in range(101, 201)) == percent
        averaging = PWALKS(period=100, samples=200, fraction=percent / 100)
        assert sum(averaging.sampled(t) for t in range(101, 201)) == percent


def test_draws_come_as_often_as_asked_for():
    n = 400
    for probability in (0.1, 0.5, 0.9):
        averaging = PSWA(period=1, probability=probability, seed=3)
        found = sum(averaging.sampled(t) for t in range(1, n + 1)) / n
        assert abs(found - probability) < 5 * math.sqrt(probability * (1 - probability) / n)
    one, other = (PSWA(period=1, probability=0.5, seed=seed) for seed in (1, 2))
    assert 50 < sum(one.sampled(t) == other.sampled(t) for t in range(1, 201)) < 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_average_in_float32_of_what_was_stored(cls, dtype, every_kernel):
    """Half precision: the mean of the stored weights, far more exact than the storage; restored to the last bit."""
    parameters = layouts(dtype, chunk=300)
    optimizer = cls(parameters, lr=0.1, averaging=PSWA(period=5), backend=every_kernel)
    taken = []
    for t in range(4):
        set_gradients(parameters, 100 + t)
        optimizer.step()
        taken.append([p.detach().double().clone() for p in parameters])
    kept = [p.detach().clone() for p in parameters]
    means = [sum(samples) / 4 for samples in zip(*taken)]
    for p, mean in zip(parameters, means):
        assert optimizer.state[p]["average"].dtype == torch.float32
        torch.testing.assert_close(optimizer.state[p]["average"].double(), mean, rtol=5e-7, atol=1e-6)
    with optimizer.averaged_weights():
        for p in parameters:
            assert torch.equal(p.detach(), optimizer.state[p]["average"].to(dtype))
    assert all(torch.equal(p, k) for p, k in zip(parameters, kept))
    set_gradients(parameters, 200)
    optimizer.step()  # the period's end
    for p in parameters:
        assert torch.equal(p.detach(), optimizer.state[p]["average"].to(dtype))


LATE = ["PSWA", "PWALKS", "PSWM", "SWM", "EMA"]


@pytest.mark.parametrize("name", LATE)
def test_a_parameter_whose_first_gradient_comes_late(name, backend):
    """It was sampled as it was: the mean is over what it has been, not over zeros."""
    cls, options = VARIANTS[name]
    first, late = (torch.nn.Parameter(torch.full((4,), 3.0, dtype=torch.float64)) for _ in range(2))
    optimizer = SGD([first, late], lr=0.1, averaging=cls(**options), backend=backend)
    oracle, w = Oracle(cls.__name__, **options), late.detach().clone()
    for t in range(1, 12):
        first.grad = torch.ones_like(first)
        if t >= 3:
            late.grad = torch.ones_like(late)
            w = w - 0.1
        w, _, _ = oracle.after(t, w)
        optimizer.step()
        if t >= 3:
            torch.testing.assert_close(late.detach(), w, rtol=1e-12, atol=1e-12)
            with optimizer.averaged_weights():
                shown = w if oracle.average is None else oracle.average
                torch.testing.assert_close(late.detach(), shown, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LATE)
def test_a_parameter_without_a_gradient_now_and_then(name, backend):
    """A sample is of all weights, whether the step moved them or not; so is the write-back."""
    cls, options = VARIANTS[name]
    always, sometimes = (torch.nn.Parameter(torch.full((4,), 3.0, dtype=torch.float64)) for _ in range(2))
    optimizer = SGD([always, sometimes], lr=0.1, averaging=cls(**options), backend=backend)
    oracle, w = Oracle(cls.__name__, **options), sometimes.detach().clone()
    for t in range(1, 16):
        always.grad = torch.ones_like(always)
        sometimes.grad = None
        if t % 5 not in (0, 3, 4):
            sometimes.grad = torch.ones_like(sometimes)
            w = w - 0.1
        w, _, _ = oracle.after(t, w)
        optimizer.step()
        torch.testing.assert_close(sometimes.detach(), w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LATE)
def test_a_group_that_joins_in_the_middle_of_a_period(name, backend):
    cls, options = VARIANTS[name]
    first, late = (torch.nn.Parameter(torch.full((4,), 3.0, dtype=torch.float64)) for _ in range(2))
    optimizer = SGD([first], lr=0.1, averaging=cls(**options), backend=backend)
    for t in range(1, 10):
        if t == 3:
            optimizer.add_param_group({"params": [late]})
        for p in (first, late):
            p.grad = torch.ones_like(p)
        optimizer.step()
        if t >= 3:  # whatever the period has had of it, weights and average lie among what it can have been
            lowest = 3.0 - 0.1 * (t - 2) - 1e-12
            assert lowest <= late[0].item() <= 3.0
            with optimizer.averaged_weights():
                assert lowest <= late[0].item() <= 3.0


def test_skipped_steps_and_a_learning_rate_of_zero_do_not_count(backend):
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = SGD([p], lr=1.0, averaging=PSWA(period=3), nonfinite="skip", backend=backend)
    for gradient, lr in ((-1, 1.0), (math.nan, 1.0), (-5, 0.0), (-1, 1.0), (math.inf, 1.0), (-1, 1.0)):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
    assert torch.equal(p.detach(), torch.full_like(p, (1 + 2 + 3) / 3))


def test_writing_back_keeps_or_zeroes_the_states(backend):
    """Zero: the next step is a new optimizer's first, Adam's bias correction and SGD's dampening included."""
    for cls, options in ((AdamW, {"lr": 0.1}), (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5})):
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = cls([p], **options, averaging=PSWA(period=3, on_write_back="zero"), backend=backend)
        for t in range(3):
            p.grad = torch.full_like(p, 1.0 + t)
            optimizer.step()
        assert set(optimizer.state[p]) == {"average"}
        q = torch.nn.Parameter(p.detach().clone())
        fresh = cls([q], **options, backend=backend)
        for _ in range(2):
            p.grad, q.grad = torch.full_like(p, -0.3), torch.full_like(p, -0.3)
            optimizer.step()
            fresh.step()
        assert torch.equal(p, q)


def test_complex_parameters(backend):
    if backend == "native":
        backend = "auto"  # the reference takes them
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    optimizer = SGD([p], lr=1.0, averaging=PSWA(period=2), backend=backend)
    for _ in range(2):
        p.grad = torch.full_like(p, complex(-1, 2))
        optimizer.step()
    assert torch.equal(p.detach(), torch.full_like(p, complex(1.5, -3)))


def test_groups_have_averages_of_their_own(backend):
    a, b, c = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    groups = [
        {"params": [a], "averaging": PSWA(period=2)},
        {"params": [b]},
        {"params": [c], "averaging": EMA(beta=0.75)},
    ]
    optimizer = SGD(groups, lr=1.0, backend=backend)
    for _ in range(2):
        for p in (a, b, c):
            p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    assert [p[0].item() for p in (a, b, c)] == [1.5, 2.0, 2.0]
    with optimizer.averaged_weights():
        assert [p[0].item() for p in (a, b, c)] == [1.5, 2.0, 1.25]
    assert [p[0].item() for p in (a, b, c)] == [1.5, 2.0, 2.0]
    assert "average" not in optimizer.state.get(b, {})


@pytest.mark.parametrize("name", ["PSWA altogether", "PWALKS", "PSWM by chance", "SWM", "EMA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_samples_on(name, dtype, backend):
    """From every step of a period, through a file, to the last bit."""
    cls, options = VARIANTS[name]

    def make():
        parameters = small(dtype)
        return parameters, SGD(parameters, lr=0.3, momentum=0.9, averaging=cls(**options), backend=backend)

    def run(parameters, optimizer, steps):
        for t in steps:
            set_gradients(parameters, 100 + t)
            optimizer.step()

    expected, straight = make()
    run(expected, straight, range(1, 13))
    going, optimizer = make()
    for t in range(1, 13):
        run(going, optimizer, [t])
        file = io.BytesIO()
        torch.save((optimizer.state_dict(), [p.detach() for p in going]), file)
        file.seek(0)
        saved, weights = torch.load(file, weights_only=True)
        going = [torch.nn.Parameter(w) for w in weights]
        optimizer = SGD(going, lr=7.0, backend=backend)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["averaging"] == cls(**options)
    for a, b in zip(going, expected):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["average"], straight.state[b]["average"])


def test_invalid_settings():
    for make, words in (
        (lambda: PSWA(period=0), "Invalid period: 0"),
        (lambda: PWALKS(period=3, samples=0), "Invalid samples: 0"),
        (lambda: PSWM(period=3, beta=1.0), "Invalid beta: 1.0"),
        (lambda: EMA(beta=-0.1), "Invalid beta: -0.1"),
        (lambda: EMA(0.9, warmup=100), "Invalid warmup: 100; it must be True or False"),
        (lambda: PSWA(period=3, fraction=0.0), "Invalid fraction: 0.0"),
        (lambda: PSWA(period=3, probability=1.5), "Invalid probability: 1.5"),
        (lambda: PSWA(period=3, interval=0), "Invalid interval: 0"),
        (lambda: PSWA(period=3, start=-1), "Invalid start: -1"),
        (lambda: PSWA(period=3, on_write_back="clear"), "Invalid on_write_back: 'clear'"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(TypeError, match=r"averaging takes a fused_opt\.Averaging or None, not 3"):
        fused_opt.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, averaging=3)
