"""Captured steps, replayed without Python, with the interpreter in the GPU's place: as many eager steps, bit for bit."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from rules import every_rule
from support import graphs
from support.compare import unchanged
from support.graphs import assert_same_training

import fused_opt
from fused_opt import EMA, PSWA, PSWM, WeightNoise
from fused_opt.backends import triton as backend

device = backend.device
BEFORE = 2  # eager steps before the capture
EXTRAS = {
    "noise and PSWA": {"noise": WeightNoise(0.01, schedule="decay", seed=2**63), "averaging": PSWA(period=3)},
    "temperature, PSWM": {
        "noise": WeightNoise(temperature=1e-4),
        "averaging": PSWM(period=3, beta=0.5, probability=0.6, start=1),
    },
    "cycle, EMA": {
        "noise": WeightNoise(0.01, schedule="cycle", period=4, relative=True),
        "averaging": EMA(beta=0.9, interval=2, start=1, probability=0.8, warmup=True),
    },
    "rounding": {"rounding": "stochastic", "state_dtype": torch.float16},
    "ratio, clipped": {"trust_ratio": fused_opt.TrustRatio("lamb", exempt=-1), "max_grad_norm": 1.0},
}


class Graph:
    """What a step launches and copies, with the arguments that it had."""

    def __init__(self):
        self.queued = []

    @contextmanager
    def capture(self):
        def queue(function):
            return lambda *arguments: self.queued.append((function, arguments))

        with (
            mock.patch.object(device, "launch", queue(device.launch)),
            mock.patch.object(device, "copy", queue(device.copy)),
            mock.patch.object(device, "capturing", return_value=True),
            mock.patch.object(torch.Tensor, "item", side_effect=AssertionError("waits for the GPU")),
        ):
            yield

    def replay(self):
        for function, arguments in self.queued:
            function(*arguments)


class Training(graphs.Training):
    backend, shapes, recorder = "triton", [(3, 5), (7,)], Graph


@pytest.mark.parametrize("extra", EXTRAS)
def test_replays_are_steps(extra):
    """Each with a draw, a sample and a standard deviation of its own, and with every write-back; eager ones between them."""
    options = EXTRAS[extra]
    training = Training("AdamW", **options).eager(BEFORE).capture().replay(4).eager(1).replay(2)
    assert_same_training(training, Training("AdamW", **options).eager(BEFORE + 7))
    assert training.optimizer.param_groups[0]["steps"] == BEFORE + 7


@every_rule
def test_every_optimizers_graph_takes_its_steps(name, options):
    if name == "Muon":
        return
    options = {key: value for key, value in options.items() if key != "lr"}
    training = Training(name, **options).eager(BEFORE).capture().replay(2)
    assert_same_training(training, Training(name, **options).eager(BEFORE + 2))


def test_a_capture_steps_and_counts_nothing_nor_does_an_overflow():
    runs = []
    for graph in (True, False):
        training = Training("NAdam", **EXTRAS["noise and PSWA"]).eager(BEFORE)
        training.optimizer.found_inf, training.optimizer.grad_scale = torch.tensor(0.0), torch.tensor(2.0)
        if graph:
            with unchanged(training.optimizer):
                training.capture()
        for overflow in (0.0, 1.0, 0.0):
            training.optimizer.found_inf.fill_(overflow)
            training.replay(1) if graph else training.eager(1)
        runs.append(training)
    assert_same_training(*runs)
    assert runs[0].optimizer.param_groups[0]["steps"] == BEFORE + 2


def test_weights_that_something_else_writes_are_noticed_by_the_next_replay():
    training = Training("LARS", exempt=-1, weight_decay=0.0, coefficient=0.1).eager(BEFORE).capture().replay(1)
    p = training.parameters[0]
    for turn in (training.replay, training.eager):
        p.data.mul_(3.0)
        before = p.detach().double().norm()
        turn(1)
        expected = 0.1 * before / p.grad.double().norm()
        assert training.optimizer.trust_ratios()["0 of group 0"] == pytest.approx(expected.item(), rel=1e-9)


class OwnNoise(WeightNoise):
    def sigma(self, t, lr):
        return 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": OwnNoise(1.0)}, "class of your own"),
        ({"averaging": PSWA(period=5)}, "Step once outside"),
        ({"nonfinite": "skip"}, "cannot wait for the GPU"),
    ],
)
def test_what_cannot_be_captured_is_refused_in_words(options, words):
    training = Training("SGD", **options).eager(BEFORE)
    training.optimizer.param_groups[0]["steps"] += words.startswith("Step")
    with unchanged(training.optimizer), pytest.raises(RuntimeError, match=words):
        training.capture()
    training.eager(1)  # outside of a graph it steps
