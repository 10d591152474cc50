"""On a GPU: what training does to an optimizer besides stepping."""

import copy
import fcntl
import gc
import math
import tempfile
from pathlib import Path

import pytest
import torch
from support.compare import distance
from support.gpus import (
    DEVICE,
    EDGES,
    REHEARSAL,
    each_backend,
    everything,
    feed,
    gigabytes_free,
    gradients,
    make,
    same_bits,
    steppable,
    tensors_that_hurt,
    train,
)  # fmt: skip

import fused_opt
from fused_opt import EMA, PSWA, TrustRatio, WeightNoise

pytestmark = pytest.mark.gpu

LIVELY = {
    "lr": 0.01,
    "trust_ratio": TrustRatio("lars", exempt=-1),
    "noise": WeightNoise(std=0.01, seed=7),
    "averaging": PSWA(3),
    "max_grad_norm": 5.0,
}


@each_backend
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_same_bits_every_time(name, backend):
    options = {**LIVELY, **({"momentum": 0.9} if name == "SGD" else {})}
    source = steppable(backend, tensors_that_hurt(), noisy=True)
    runs, rubbish = [], []
    for _ in range(3):
        rubbish.append(torch.randn(12345, device=DEVICE))  # so that addresses differ
        optimizer, parameters = make(name, options, backend, source)
        train(optimizer, parameters)
        runs.append(everything(optimizer, parameters))
    assert same_bits(runs[0], runs[1])
    assert same_bits(runs[0], runs[2])


@each_backend
@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB"])
def test_a_resumed_run_continues_bit_for_bit(name, backend, tmp_path):
    options = {**LIVELY, **({"momentum": 0.9} if name == "SGD" else {})}
    if name == "LAMB":
        options = {"lr": 0.01, "exempt": -1}
    source = steppable(backend, tensors_that_hurt(), noisy=True)
    straight, of_straight = make(name, options, backend, source)
    train(straight, of_straight, steps=4)
    first, of_first = make(name, options, backend, source)
    train(first, of_first, steps=2)
    torch.save({"optimizer": first.state_dict(), "weights": [p.detach() for p in of_first]}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True, map_location="cpu")
    second, of_second = make(name, options, backend, source)
    with torch.no_grad():
        for p, weights in zip(of_second, saved["weights"]):
            p.copy_(weights)
    second.load_state_dict(saved["optimizer"])
    train(second, of_second, steps=2, first=2)
    assert same_bits(everything(second, of_second), everything(straight, of_straight))


@each_backend
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_goes_on_from_torchs_own_state(name, backend):
    """The fused one's, whose counts of steps are on the GPU; and back."""
    source = [torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n))) for n in (3, 1000)]
    options = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    theirs = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in source]
    oracle = getattr(torch.optim, name)(theirs, fused=True, **options)
    train(oracle, theirs, steps=2)
    ours, parameters = make(name, options, backend, theirs)
    ours.load_state_dict(copy.deepcopy(oracle.state_dict()))
    train(ours, parameters, steps=2, first=2)
    train(oracle, theirs, steps=2, first=2)
    assert distance([p.detach() for p in parameters], [p.detach() for p in theirs]) <= 2e-6
    if name != "SGD":
        assert [float(ours.state[p]["step"]) for p in parameters] == [4.0, 4.0]
    back = getattr(torch.optim, name)(theirs, fused=True, **options)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(back, theirs, steps=1, first=4)
    train(ours, parameters, steps=1, first=4)
    assert distance([p.detach() for p in parameters], [p.detach() for p in theirs]) <= 2e-6


@each_backend
@pytest.mark.parametrize("overflows", [(0,), (0, 1), (2,), (1, 3)], ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "LARS"])
def test_overflows_change_nothing_and_count_for_nothing(name, overflows, backend):
    """By torch.amp.GradScaler, which says so in a tensor on the device."""
    options = {
        "SGD": {"momentum": 0.9, "dampening": 0.5, "fused": True},
        "AdamW": {"fused": True},
        "LARS": {"exempt": -1, "averaging": EMA(0.9)},
    }

    def run(which):
        optimizer, parameters = make(name, {"lr": 0.1, **options[name]}, which, [torch.ones(300), torch.ones(7, 5)])
        scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0, growth_interval=1000)
        scaler.scale(torch.ones((), device=DEVICE))  # makes its scale
        for step in range(4):
            before = everything(optimizer, parameters)
            feed(parameters, [g * scaler.get_scale() for g in gradients(parameters, step)])
            if step in overflows:
                parameters[0].grad[3] = math.inf
            scaler.step(optimizer)
            scaler.update()
            if step in overflows:
                assert same_bits([p.detach().cpu() for p in parameters], before[:2])
        return optimizer, parameters

    ours, mine = run(backend)
    theirs, other = run("reference")
    assert distance([p.detach() for p in mine], [p.detach() for p in other]) <= 2e-6
    for slot in theirs.state[other[0]]:
        assert distance([ours.state[p][slot] for p in mine], [theirs.state[p][slot] for p in other]) <= 2e-6, slot
    if "averaging" in options[name]:  # otherwise nothing asks for this count, and the host need not know
        assert ours.param_groups[0]["steps"] == theirs.param_groups[0]["steps"] == 4 - len(overflows)


@each_backend
def test_gradients_that_come_and_go(backend):
    options = {"lr": 0.01, "trust_ratio": TrustRatio("lars", exempt=-1)}
    runs = [make("AdamW", options, which, [torch.ones(n) for n in (3, 300, 5)]) for which in (backend, "reference")]
    for step in range(4):
        for optimizer, parameters in runs:
            feed(parameters, gradients(parameters, step))
            parameters[step % 3].grad = None
            before = parameters[step % 3].detach().clone()
            optimizer.step()
            assert torch.equal(parameters[step % 3], before)
    (ours, mine), (theirs, other) = runs
    assert distance([p.detach() for p in mine], [p.detach() for p in other]) <= 2e-6
    assert [float(ours.state[p]["step"]) for p in mine] == [float(theirs.state[p]["step"]) for p in other]
    for p in mine:
        p.grad = None
    before = everything(ours, mine)
    ours.step()
    assert same_bits(everything(ours, mine), before)


@each_backend
def test_what_autograd_can_see_of_a_step(backend):
    optimizer, (p, q) = make("SGD", {"lr": 0.1, "momentum": 0.9}, backend, [torch.ones(5), torch.ones(3)])
    loss = (p * p).sum()
    p.grad, version, untouched = torch.ones_like(p), p._version, q._version
    kept, bits = p.grad, p.grad.clone()
    optimizer.step()
    assert p._version > version
    assert q._version == untouched
    assert p.grad is kept
    assert torch.equal(kept, bits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_backend
def test_parts_of_the_gradient(backend):
    """CLARS over two backwards, the second of which is added to the first."""

    def run(which):
        optimizer, parameters = make("CLARS", {"lr": 1.0, "exempt": -1}, which, [torch.ones(40, 30), torch.ones(5)])
        optimizer.track_parts("microbatch")
        for step in range(3):
            optimizer.zero_grad()
            for part in range(2):
                drawn = gradients(parameters, 2 * step + part)
                sum((p * g.to(DEVICE)).sum() for p, g in zip(parameters, drawn)).backward()
            optimizer.step()
        return optimizer, parameters

    ours, mine = run(backend)
    theirs, other = run("reference")
    assert distance([p.detach() for p in mine], [p.detach() for p in other]) <= 2e-6
    for name, ratio in theirs.trust_ratios().items():
        assert ours.trust_ratios()[name] == pytest.approx(ratio, rel=1e-5)


@each_backend
def test_averaged_weights_and_multipliers(backend):
    def run(which):
        optimizer, parameters = make("SGD", {"lr": 0.1, "averaging": EMA(0.5)}, which, [torch.ones(300), torch.ones(4)])
        optimizer.scale_layers(lr={parameters[0]: 0.5})
        train(optimizer, parameters)
        with optimizer.averaged_weights():
            inside = [p.detach().cpu().clone() for p in parameters]
        return inside, [p.detach().cpu() for p in parameters]

    for mine, other in zip(run(backend), run("reference")):
        assert distance(mine, other) <= 1e-6


@each_backend
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_gradients_that_are_not_finite(nonfinite, backend):
    optimizer, (p, q) = make("AdamW", {"lr": 0.1, "nonfinite": nonfinite}, backend, [torch.ones(300), torch.ones(4)])
    feed([p, q], [torch.ones(300), torch.ones(4)])
    q.grad[1] = math.nan
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match="1 of group 0 is not finite"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    assert torch.equal(p, torch.ones_like(p))
    assert not any(optimizer.state.values())
    feed([p, q], [torch.ones(300), torch.ones(4)])
    optimizer.step()
    assert torch.allclose(p, torch.full_like(p, 0.899), atol=1e-6)


LENGTH = 2**31 + 4099 if not REHEARSAL else EDGES[0] + 3
PART = 2**26


@pytest.fixture
def alone():
    """One at a time, whatever other processes test beside this one, and nothing kept: it takes much of the memory."""
    with open(Path(tempfile.gettempdir()) / "fused_opt_much_memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        if not REHEARSAL:
            torch.cuda.empty_cache()


def in_parts():
    """Places, a part at a time, so that what is computed from them does not double the memory."""
    for start in range(0, LENGTH, PART):
        yield start, torch.arange(start, min(start + PART, LENGTH), device=DEVICE)


@each_backend
@pytest.mark.parametrize(
    ("name", "dtype"), [("SGD", torch.float32), ("SGD", torch.bfloat16), ("LARS", torch.bfloat16)], ids=str
)
def test_more_elements_than_31_bits_count(name, dtype, backend, alone):
    """Small whole numbers and halves, which every dtype holds exactly: each of the elements is compared."""
    momentum = 0.5 if dtype == torch.bfloat16 and name == "SGD" else 0.0
    needed = LENGTH * dtype.itemsize * (3 if momentum else 2) / 1e9 + 3
    if gigabytes_free() < needed:
        pytest.skip(f"it takes {needed:.0f} GB, of which {gigabytes_free():.0f} are free")
    p = torch.nn.Parameter(torch.empty(LENGTH, dtype=dtype, device=DEVICE))
    p.grad = torch.empty_like(p)
    with torch.no_grad():
        for start, places in in_parts():
            p[start : start + PART] = places % 17 - 8
            p.grad[start : start + PART] = places % 5 - 2
    if name == "LARS":
        optimizer = fused_opt.LARS(
            [p], lr=0.5, momentum=0, weight_decay=0, coefficient=1.0, cap=2.0**-3, exempt=-1, backend=backend
        )
    else:
        optimizer = fused_opt.SGD([p], lr=0.5, momentum=momentum, backend=backend)
    optimizer.step()
    if momentum:
        optimizer.step()  # p - 0.5 g - 0.5 (0.5 g + g)
    factor = 1.25 if momentum else 0.5 * 2.0**-3 if name == "LARS" else 0.5
    for start, places in in_parts():
        expected = ((places % 17 - 8) - factor * (places % 5 - 2)).to(dtype)
        assert torch.equal(p.detach()[start : start + PART], expected), start


@each_backend
def test_a_norm_over_more_elements_than_31_bits_count(backend, alone):
    """The sum of squares is a whole number, which float64 holds exactly."""
    needed = 2 * LENGTH * 2 / 1e9 + 3
    if gigabytes_free() < needed:
        pytest.skip(f"it takes {needed:.0f} GB, of which {gigabytes_free():.0f} are free")
    p = torch.nn.Parameter(torch.full((LENGTH,), 3.0, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.full_like(p, 2.0)
    optimizer = fused_opt.LARS(
        [p], lr=1e-30, momentum=0, weight_decay=0, coefficient=1.0, exempt=-1, max_grad_norm=1e9, backend=backend
    )
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(2.0 * math.sqrt(LENGTH), rel=1e-14)
    assert optimizer.trust_ratios()["0 of group 0"] == pytest.approx(1.5, rel=1e-14)
