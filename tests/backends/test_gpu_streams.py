"""On a GPU: streams, graphs, several devices; what the host waits for, and what it launches."""

import sys

import pytest
import torch
from support import ROOT
from support.gpus import (
    DEVICE,
    NO_GPU,
    REHEARSAL,
    each_backend,
    everything,
    feed,
    gradients,
    laid_out,
    make,
    needs_gpu,
    same_bits,
    steppable,
    tensors_that_hurt,
    train,
)  # fmt: skip

import fused_opt
from fused_opt import EMA, TrustRatio, WeightNoise

pytestmark = [pytest.mark.gpu, needs_gpu]

A_WHILE = 1_000_000_000  # cycles, half a second
SHAPES = [(64, 3, 7, 7), (64,), (513, 1025), (7,), (33, 3)]


def some(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def clars_of_known_parts(parameters, backend):
    optimizer = fused_opt.CLARS(parameters, lr=0.1, exempt=-1, backend=backend)
    optimizer.track_parts("probe").set(dict.fromkeys(parameters, 2.0))
    return optimizer


STEPS = {
    "SGD": lambda p, b: fused_opt.SGD(p, lr=0.1, momentum=0.9, backend=b),
    "AdamW": lambda p, b: fused_opt.AdamW(p, lr=0.1, backend=b),
    "CLARS, parts known": clars_of_known_parts,
    "LARS": lambda p, b: fused_opt.LARS(p, lr=0.1, exempt=-1, backend=b),
    "LAMB": lambda p, b: fused_opt.LAMB(p, lr=0.1, exempt=-1, backend=b),
    "noise": lambda p, b: fused_opt.SGD(p, lr=0.1, noise=WeightNoise(std=0.01), backend=b),
    "EMA": lambda p, b: fused_opt.AdamW(p, lr=0.1, averaging=EMA(0.9), backend=b),
    "clipping": lambda p, b: fused_opt.SGD(p, lr=0.1, max_grad_norm=1.0, backend=b),
}
KERNELS = {"SGD": 1, "AdamW": 1, "CLARS, parts known": 1, "noise": 1, "EMA": 1, "LARS": 2, "LAMB": 2}


def ready(name, backend):
    """An optimizer that has taken a few steps, with gradients for the next."""
    parameters = [torch.nn.Parameter(laid_out(p)) for p in some()]
    optimizer = STEPS[name](parameters, backend)
    train(optimizer, parameters)
    torch.cuda.synchronize()
    return optimizer, parameters


def check_it_waits_not(optimizer):
    """The stream has half a second of work before the step; whoever waits for it finds the stream idle afterwards."""
    torch.cuda._sleep(A_WHILE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    busy = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert busy, "the step waited for the GPU"


@each_backend
@pytest.mark.parametrize("name", STEPS)
def test_the_host_does_not_wait(name, backend):
    check_it_waits_not(ready(name, backend)[0])


@each_backend
def test_the_host_does_not_wait_for_what_a_scaler_found(backend):
    optimizer, _ = ready("AdamW", backend)
    optimizer.found_inf = torch.zeros((), device=DEVICE)
    optimizer.grad_scale = torch.full((), 2.0, device=DEVICE)
    check_it_waits_not(optimizer)


@each_backend
def test_the_host_does_not_wait_for_a_learning_rate(backend):
    optimizer, _ = ready("AdamW", backend)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device=DEVICE)
    optimizer.step()
    torch.cuda.synchronize()
    check_it_waits_not(optimizer)


@each_backend
@pytest.mark.parametrize("name", KERNELS)
def test_launches(name, backend, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu.clock import launches, profiler_sees

    if not profiler_sees():
        pytest.skip("the profiler does not see a launch that was made")
    optimizer, _ = ready(name, backend)
    found = launches(optimizer.step)
    assert found["kernels"] == KERNELS[name], found["names"]
    assert "benchmarks.gpu.clock" in sys.modules


@each_backend
@pytest.mark.parametrize("name", ["SGD", "AdamW", "LARS"])
def test_steps_on_the_current_stream(name, backend):
    """Gradients appear on it late: a step on another stream would read what was there before."""
    (one, of_one), (other, of_other) = ready(name, backend), ready(name, backend)
    late = gradients(of_one, 99)
    feed(of_one, [torch.zeros_like(g) for g in late])
    on_device = [g.to(DEVICE) for g in late]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_WHILE // 5)
        for p, g in zip(of_one, on_device):
            p.grad.copy_(g)
        one.step()
        first = [p.detach().clone() for p in of_one]  # behind the step, on its stream
    side.synchronize()
    feed(of_other, late)
    other.step()
    assert same_bits([p.cpu() for p in first], [p.detach().cpu() for p in of_other])
    assert same_bits(everything(one, of_one), everything(other, of_other))


@each_backend
@pytest.mark.parametrize("name", ["SGD", "AdamW", "LARS"])
def test_many_steps_may_be_under_way(name, backend):
    """Each with a learning rate and gradients of its own: what was handed over must not be written before it is read."""

    def run(waiting):
        optimizer, parameters = ready(name, backend)
        drawn = [[g.to(DEVICE) for g in gradients(parameters, step)] for step in range(24)]
        torch.cuda.synchronize()
        if not waiting:
            torch.cuda._sleep(A_WHILE // 5)
        for step, values in enumerate(drawn):
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            for p, value in zip(parameters, values):
                p.grad = value  # new addresses
            optimizer.step()
            if waiting:
                torch.cuda.synchronize()
        return everything(optimizer, parameters)

    assert same_bits(run(waiting=False), run(waiting=True))


@each_backend
def test_the_same_bits_on_any_stream(backend):
    source = steppable(backend, tensors_that_hurt())
    options = {"lr": 0.1, "momentum": 0.9, "trust_ratio": TrustRatio("lars", exempt=-1)}
    runs = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            optimizer, parameters = make("SGD", options, backend, source)
            train(optimizer, parameters)
            runs.append(everything(optimizer, parameters))
    assert same_bits(runs[0], runs[1])
    assert same_bits(runs[0], runs[2])


CAPTURED = {
    "SGD": (fused_opt.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": (fused_opt.AdamW, {"capturable": True}),
    "Adam, amsgrad": (fused_opt.Adam, {"capturable": True, "amsgrad": True}),
    "LARS": (fused_opt.LARS, {"exempt": -1}),
    "LAMB": (fused_opt.LAMB, {"capturable": True, "exempt": -1}),
    "clipping": (fused_opt.AdamW, {"capturable": True, "max_grad_norm": 1.0}),
    "noise": (fused_opt.SGD, {"noise": WeightNoise(temperature=1e-4, schedule="decay")}),
    "a write-back": (fused_opt.AdamW, {"capturable": True, "averaging": fused_opt.PSWA(period=4)}),
}


@each_backend
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_step_with_other_learning_rates(name, backend):
    """Replayed, it is the step that would have been made, to the last bit."""
    kind, options = CAPTURED[name]

    def build():
        parameters = [torch.nn.Parameter(laid_out(p)) for p in some()]
        feed(parameters, gradients(parameters, 0))
        lr = torch.tensor(0.1, device=DEVICE)
        return kind(parameters, lr=lr, backend=backend, **options), parameters, lr

    def renew(parameters, step):
        for p, g in zip(parameters, gradients(parameters, step)):
            p.grad.copy_(g)

    (captured, of_captured, rate), (eager, of_eager, eager_rate) = build(), build()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            renew(of_captured, step)
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    for step in range(3):
        renew(of_eager, step)
        eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    torch.cuda.synchronize()
    assert same_bits(everything(captured, of_captured), everything(eager, of_eager))  # a capture steps nothing
    for step, now in enumerate((0.1, 0.02, 0.3), start=3):
        rate.fill_(now)
        renew(of_captured, step)
        graph.replay()
        eager_rate.fill_(now)
        renew(of_eager, step)
        eager.step()
        torch.cuda.synchronize()
        assert same_bits(everything(captured, of_captured), everything(eager, of_eager)), step


@each_backend
@pytest.mark.parametrize("name", ["noise", "EMA", "SGD"])
def test_a_graph_that_would_repeat_itself_is_refused_in_words(name, backend):
    """Captured with this step's numbers in it, every replay would repeat them: refused, or replayed as steps go on."""
    (optimizer, parameters), (eager, of_eager) = ready(name, backend), ready(name, backend)
    before, graph, refused = everything(optimizer, parameters), torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        try:
            optimizer.step()
        except RuntimeError as error:
            refused = str(error)
    torch.cuda.synchronize()
    assert same_bits(everything(optimizer, parameters), before)
    assert refused is None or "captur" in refused
    for _ in range(2):
        optimizer.step() if refused else graph.replay()
        eager.step()
        torch.cuda.synchronize()
        assert same_bits(everything(optimizer, parameters), everything(eager, of_eager))


@each_backend
@pytest.mark.skipif(
    not NO_GPU and not REHEARSAL and torch.cuda.device_count() < 2, reason="one GPU; this takes parameters on two"
)
def test_parameters_on_two_devices(backend):
    def run(devices):
        parameters = [torch.nn.Parameter(p.detach().to(device)) for p, device in zip(some(), devices)]
        optimizer = fused_opt.AdamW(parameters, lr=0.1, backend=backend)
        for step in range(3):
            feed(parameters, gradients(parameters, step))
            optimizer.step()
        torch.cuda.synchronize()
        return everything(optimizer, parameters)

    assert same_bits(run(["cuda:0", "cuda:1"] * 3), run(["cuda:0"] * 6))


@each_backend
def test_another_device_than_the_current_one_is_left_as_it_was(backend):
    before = torch.cuda.current_device()
    ready("LARS", backend)
    assert torch.cuda.current_device() == before
