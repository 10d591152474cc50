"""Captured steps, replayed without Python, with the host in the GPU's place: as many eager steps, bit for bit.

`HostGraph` records what a step launches and copies, with the arguments that it had, as a CUDA graph does.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from rules import every_rule
from support import graphs
from support.compare import unchanged
from support.graphs import assert_same_training
from support.kernels import GPU, run_with

import fused_opt
from fused_opt import EMA, PSWA, PSWM, PWALKS, SWM, WeightNoise
from fused_opt.backends import native

BEFORE = 3  # eager steps before the capture
EXTRAS = {
    "noise": {"noise": WeightNoise(0.01, seed=2**63)},
    "a cycle of noise": {"noise": WeightNoise(0.01, schedule="cycle", period=7)},
    "relative noise that decays": {"noise": WeightNoise(0.01, schedule="decay", relative=True)},
    "temperature": {"noise": WeightNoise(temperature=1e-4)},
    "PSWA": {"averaging": PSWA(period=9, fraction=0.5, probability=0.6, seed=3)},
    "PWALKS": {"averaging": PWALKS(period=9, samples=3, interval=2, start=11)},
    "SWM": {"averaging": SWM(period=5, beta=0.3, start=2)},
    "PSWM": {"averaging": PSWM(period=8, beta=0.5, start=6, interval=3)},
    "PSWM, drawn": {"averaging": PSWM(period=9, beta=0.5, probability=0.6, fraction=0.7)},
    "EMA": {"averaging": EMA(beta=0.9, interval=3, start=1, probability=0.8)},
    "rounding": {"rounding": "stochastic", "state_dtype": torch.bfloat16},
    "rounding and EMA": {"rounding": "stochastic", "state_dtype": torch.float16, "averaging": EMA(beta=0.9)},
    "EMA that warms up": {"averaging": EMA(beta=0.4, warmup=True, interval=2)},
    "both": {"noise": WeightNoise(0.01, schedule="decay"), "averaging": PSWA(period=6)},
}


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    if native.unavailable() is not None:
        pytest.skip(native.unavailable())
    run_with(GPU, monkeypatch)


class Graph:
    """The core's."""

    def __init__(self):
        self.recorded = native._native.HostGraph()
        self.replay = self.recorded.replay

    @contextmanager
    def capture(self):
        self.recorded.begin()
        try:
            yield
        finally:
            self.recorded.end()


class Training(graphs.Training):
    backend, shapes, recorder = "native", [(70, 70), (5,), (3, 1700)], Graph


def both(kind, steps, **options):
    """The same training, replayed and eager."""
    replayed = Training(kind, **options).eager(BEFORE).capture().replay(steps)
    return replayed, Training(kind, **options).eager(BEFORE + steps)


@every_rule
def test_every_optimizers_graph_takes_its_steps(name, options):
    options = {key: value for key, value in options.items() if key != "lr"}
    assert_same_training(*both(name, 20, **options, noise=WeightNoise(0.01), averaging=PSWA(period=4)))


@pytest.mark.parametrize("kind", ["AdamW", "LARS"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_a_hundred_replays_are_a_hundred_steps(extra, kind):
    """Each with a draw, a sample and a standard deviation of its own, and with every write-back."""
    options = {"exempt": -1} if kind == "LARS" else {"max_grad_norm": 1.0}
    replayed, eager = both(kind, 100, **options, **EXTRAS[extra])
    assert_same_training(replayed, eager)
    (group,) = eager.optimizer.param_groups
    assert group["steps"] == 103
    if "averaging" in EXTRAS[extra]:
        assert group["samples"] + group["periods"] > 5


def test_a_capture_steps_and_counts_nothing():
    training = Training("AdamW", **EXTRAS["both"]).eager(BEFORE)
    with unchanged(training.optimizer):
        training.capture()
    assert training.optimizer.param_groups[0]["steps"] == BEFORE


def test_a_capture_after_steps_that_were_alike():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_opt.SGD([p], lr=0.25, backend="native")
    p.grad = torch.ones(3)
    for _ in range(4):
        optimizer.step()
    graph = Graph()
    with graph.capture():
        optimizer.step()
    graph.replay()
    graph.replay()
    optimizer.read_counts()
    assert optimizer.param_groups[0]["steps"] == 6
    assert p.tolist() == [-0.5] * 3


def test_groups_of_their_own_and_of_two_arithmetics():
    def groups(parameters):
        parameters[2].data, parameters[2].grad = parameters[2].data.double(), None
        parameters[2].grad = torch.zeros_like(parameters[2])
        return [
            {"params": parameters[:1], "averaging": PSWA(period=3)},
            {"params": parameters[1:2], "noise": WeightNoise(0.1)},
            {"params": parameters[2:], "averaging": EMA(beta=0.5, interval=2)},
        ]

    replayed, eager = both("SGD", 20, groups=groups, momentum=0.9)
    assert_same_training(replayed, eager)
    assert [group["steps"] for group in replayed.optimizer.param_groups] == [23, 23, 23]
    assert [group["periods"] for group in replayed.optimizer.param_groups] == [7, 0, 0]
    assert [group["samples"] for group in replayed.optimizer.param_groups] == [2, 0, 11]


def test_eager_steps_between_replays_go_on_where_these_have_come():
    training = Training("AdamW", **EXTRAS["both"]).eager(BEFORE).capture().replay(4).eager(5).replay(6).eager(1)
    assert_same_training(training, Training("AdamW", **EXTRAS["both"]).eager(BEFORE + 16))


def test_a_plan_made_anew_goes_on_where_replays_have_come():
    runs = [Training("AdamW", **EXTRAS["both"]).eager(BEFORE) for _ in "ab"]
    runs[0].capture().replay(4)
    runs[1].eager(4)
    for training in runs:
        p = training.parameters[0]
        p.data = p.detach().clone()
        training.eager(3)
    assert_same_training(*runs)


def test_a_second_graph_goes_on_where_the_first_has_come():
    training = Training("AdamW", **EXTRAS["both"]).eager(BEFORE).capture().replay(4)
    first = training.graph
    training.capture().replay(3)
    training.graph = first
    training.replay(2)
    assert_same_training(training, Training("AdamW", **EXTRAS["both"]).eager(BEFORE + 9))


@pytest.mark.parametrize("extra", ["both", "none"])
def test_what_replays_count_is_read_from_the_device(extra):
    """Where it is asked for: in read_counts, state_dict, copies and averaged_weights; once, and not again."""
    options = EXTRAS.get(extra, {})
    training = Training("SGD", momentum=0.9, **options).eager(BEFORE).capture().replay(4)
    (group,) = training.optimizer.param_groups
    assert group["steps"] == BEFORE
    for _ in range(2):
        training.optimizer.read_counts()
        assert group["steps"] == BEFORE + 4
    if options:
        assert (group["samples"], group["periods"]) == (1, 1)
    training.replay(2)
    assert training.optimizer.state_dict()["param_groups"][0]["steps"] == BEFORE + 6
    training.replay(2)
    assert copy.deepcopy(training.optimizer).param_groups[0]["steps"] == BEFORE + 8
    if options:
        training.replay(1)
        with training.optimizer.averaged_weights():
            pass
        assert (group["steps"], group["periods"]) == (12, 2)


def test_an_overflow_in_a_replay_counts_nothing():
    runs = []
    for graph in (True, False):
        training = Training("AdamW", **EXTRAS["both"]).eager(BEFORE)
        training.optimizer.found_inf, training.optimizer.grad_scale = torch.tensor(0.0), torch.tensor(2.0)
        if graph:
            training.capture()
        for overflow in (0.0, 1.0, 0.0, 0.0, 1.0, 0.0):
            training.optimizer.found_inf.fill_(overflow)
            training.replay(1) if graph else training.eager(1)
        runs.append(training)
    assert_same_training(*runs)
    assert runs[0].optimizer.param_groups[0]["steps"] == BEFORE + 4


def test_a_loaded_checkpoint_ends_what_a_graph_counts():
    training = Training("AdamW", **EXTRAS["both"]).eager(BEFORE)
    saved = copy.deepcopy(training.optimizer.state_dict())
    training.capture().replay(4)
    training.optimizer.load_state_dict(saved)
    training.optimizer.step()
    assert training.optimizer.param_groups[0]["steps"] == BEFORE + 1


class OwnNoise(WeightNoise):
    def sigma(self, t, lr):
        return 0.5 if t == 2 else 0.0


class OwnAverage(PSWA):
    def sampled(self, t):
        return t == 2


REFUSED = {
    "own noise": ({"noise": OwnNoise(1.0)}, "class of your own"),
    "own average": ({"averaging": OwnAverage(period=100)}, "class of your own"),
    "begun anew": ({"averaging": PSWA(period=5, on_write_back="zero")}, "'keep' would work"),
    "a parameter without a gradient": ({"averaging": PSWA(period=5)}, "a gradient of zeros would work"),
    "counts that were set": ({"averaging": PSWA(period=5)}, "Step once outside"),
    "averages of buffers": ({"averaging": EMA(0.9)}, "with average_buffers: its replays would take no samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused_in_words(name):
    options, words = REFUSED[name]
    training = Training("SGD", **options).eager(2 if name == "own average" else BEFORE - 1)
    if name == "own average":  # the step that samples
        training.optimizer.param_groups[0]["steps"] = 1
    if name == "a parameter without a gradient":
        training.parameters[1].grad = None
    if name == "averages of buffers":
        training.optimizer.average_buffers(torch.nn.BatchNorm1d(2))
    if name == "counts that were set":
        training.optimizer.param_groups[0]["steps"] = 77
    with unchanged(training.optimizer), pytest.raises(RuntimeError, match=words):
        training.capture()
    training.optimizer.step()  # outside of a graph it steps


def test_a_subclass_decides_for_itself_in_eager_steps():
    """Its numbers are Python's, also where the device would have others."""
    training = Training("SGD", noise=OwnNoise(1.0))
    still = Training("SGD")
    for step, moved in enumerate((False, False, True, True)):
        training.eager(1), still.eager(1)
        assert torch.equal(training.parameters[0], still.parameters[0]) != moved, step


def test_a_temperature_waits_for_no_rate():
    training = Training("SGD", noise=WeightNoise(temperature=1e-4)).eager(2)
    training.renew()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "__float__"):
            patch.setattr(torch.Tensor, name, lambda self: pytest.fail("waits for the GPU"))
        training.optimizer.step()


@pytest.mark.parametrize("t", [0, 1, 2, 1000, 10**6, 2**31, 2**52])
def test_noise_that_decays_is_the_hosts_to_rounding(t):
    """(1 + t)^-0.275 of additions and multiplications alone; float64 shows the last bits."""
    w = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = fused_opt.SGD([w], lr=0.1, noise=WeightNoise(1.0, schedule="decay"), backend="native")
    optimizer.param_groups[0]["steps"] = t
    w.grad = torch.zeros_like(w)
    optimizer.step()
    z = fused_opt.extras.noise.normal(0, 0, t % 2**32, 4)
    assert (w.detach() / z).tolist() == pytest.approx([(1 + t) ** -0.275] * 4, rel=1e-6)
    other = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    constant = fused_opt.SGD([other], lr=0.1, noise=WeightNoise(1.0), backend="native")
    constant.param_groups[0]["steps"] = t
    other.grad = torch.zeros_like(other)
    constant.step()
    assert (w / other).tolist() == pytest.approx([(1 + t) ** -0.275] * 4, rel=1e-15)


def test_a_compiled_training_step_with_graphs_asked_for():
    """torch.compile(mode="reduce-overhead") leaves the step out of what it compiles."""
    runs = []
    for wrap in (lambda f: torch.compile(f, mode="reduce-overhead"), lambda f: f):
        training = Training("AdamW", **EXTRAS["both"])

        def step(training=training):
            training.optimizer.step()

        run = wrap(step)
        for _ in range(7):
            training.renew()
            run()
        runs.append(training)
    assert_same_training(*runs)


def test_replays_notice_weights_that_something_else_writes():
    """After the first one that finds others than those whose norm it was given, all sum them first."""
    training = Training("LARS", exempt=-1, weight_decay=0.0, coefficient=0.1)
    training.eager(BEFORE).capture()
    p, wrong = training.parameters[0], []
    for step in range(5):
        p.data.clamp_(-0.01 * (step + 1), 0.01 * (step + 1))
        training.renew()
        expected = 0.1 * p.detach().double().norm() / p.grad.double().norm()
        training.graph.replay()
        if training.optimizer.trust_ratios()["0 of group 0"] != pytest.approx(expected.item(), rel=1e-9):
            wrong.append(step)
    assert wrong == [0]
