"""Trust ratios, clipping, and the sums they are made of."""

import math

import pytest
import torch
from support.interpreted import assert_alike, both, contiguous, launches, train
from support.parameters import set_gradients

import fused_opt
from fused_opt import warn
from fused_opt.backends import triton as backend

kernel = backend.kernel


@pytest.mark.parametrize(("name", "noisy"), [("LARS", False), ("CLARS", False), ("LAMB", False), ("LAMB", True)])
def test_trust_ratios_where_norms_come_first_and_where_they_are_carried(name, noisy, monkeypatch):
    """And noise relative to the same norms."""
    noise = fused_opt.WeightNoise(std=0.01, relative=True, seed=5) if noisy else None
    a, b, ours, theirs = both(name, {"lr": 0.1, "exempt": -1, "noise": noise}, make=contiguous)
    launched = launches(monkeypatch)
    train(a, b, ours, theirs, steps=3)
    assert_alike(a, b, ours, theirs, bound=1e-6)
    for mine, other in zip(a.trust_ratios().values(), b.trust_ratios().values(), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    first = kernel.WANT_DIRECTION.value if name == "LAMB" else kernel.WANT_GRAD.value
    sums = [arguments[-3] for name, arguments in launched if name == "norms"]
    assert sums == [kernel.WANT_WEIGHT.value | first] + [first] * 2
    assert len(launched) == 6  # and each step's update


def test_one_launch_where_norms_are_carried_and_the_parts_are_known(monkeypatch):
    parameters = [torch.nn.Parameter(torch.ones(3, 2000)), torch.nn.Parameter(torch.ones(5))]
    optimizer = fused_opt.CLARS(parameters, lr=0.1, backend="triton")
    optimizer.track_parts()
    launched = launches(monkeypatch)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.square().sum() for p in parameters).backward()
        optimizer.step()
    assert [name for name, _ in launched if name != "accumulate"] == ["norms", *["update"] * 3]


def weights_written(p):
    with torch.no_grad():
        p.mul_(2.0)


def weights_replaced(p):
    p.data = p.detach() * 2.0


def stepped_without_ratio(p, optimizer):
    group = optimizer.param_groups[0]
    ratio, group["trust_ratio"] = group["trust_ratio"], None
    optimizer.step()
    group["trust_ratio"] = ratio


def rested(p, optimizer):
    """A step in which this parameter had no gradient, and another hand wrote it."""
    gradient, p.grad = p.grad, None
    optimizer.step()
    p.grad = gradient


@pytest.mark.parametrize("event", [weights_written, weights_replaced, stepped_without_ratio, rested])
def test_a_carried_norm_is_summed_anew_where_the_weights_were_changed(event):
    a, b, ours, theirs = both(
        "LARS", {"lr": 10.0}, make=lambda dtype: [torch.nn.Parameter(torch.ones(3, 20)) for _ in "ab"]
    )
    train(a, b, ours, theirs, steps=2)
    for optimizer, parameters in ((a, ours), (b, theirs)):
        event(parameters[0], *[optimizer] * (event.__code__.co_argcount - 1))
    train(a, b, ours, theirs, steps=2, first=2)
    assert_alike(a, b, ours, theirs)
    for mine, other in zip(a.trust_ratios().values(), b.trust_ratios().values(), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


def test_a_write_that_cannot_be_seen_is_missed_for_one_step():
    """One through p.data."""
    a, b, ours, theirs = both("LARS", {"lr": 0.1}, make=lambda dtype: [torch.nn.Parameter(torch.ones(3, 20))])
    train(a, b, ours, theirs, steps=2)
    ours[0].data.mul_(3.0)
    theirs[0].data.mul_(3.0)
    train(a, b, ours, theirs, steps=1, first=2)
    assert a.trust_ratios()["0 of group 0"] == pytest.approx(b.trust_ratios()["0 of group 0"] / 3, rel=1e-3)
    train(a, b, ours, theirs, steps=1, first=3)
    assert a.trust_ratios()["0 of group 0"] == pytest.approx(b.trust_ratios()["0 of group 0"], rel=1e-2)


def test_lamb_beside_clars_whose_parts_are_known():
    """The norm of its gradient is known, too, and is not the direction's."""
    found = []
    for name in ("triton", "reference"):
        parameters = [torch.nn.Parameter(torch.full((3, 4), 1.0 + k)) for k in range(2)]
        groups = [
            {"params": p, "trust_ratio": fused_opt.TrustRatio(kind)} for p, kind in zip(parameters, ("clars", "lamb"))
        ]
        optimizer = fused_opt.SGD(groups, lr=0.1, weight_decay=0.3, backend=name)
        optimizer.track_parts()
        for _ in range(2):
            sum(p.square().sum() for p in parameters).backward()
        optimizer.step()
        found.append(list(optimizer.trust_ratios().values()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_clipping_serves_the_ratio_with_the_same_sums(monkeypatch):
    launched = launches(monkeypatch)
    a, b, ours, theirs = both("LARS", {"lr": 0.1, "max_grad_norm": 0.5, "exempt": -1}, make=contiguous)
    train(a, b, ours, theirs, steps=2)
    wanted = [arguments[-3] for name, arguments in launched if name == "norms"]
    assert wanted == [2, 1, 2]  # the gradients for the norm, the weights once, the gradients again
    assert_alike(a, b, ours, theirs)


def test_a_nan_stays_in_its_element_and_makes_no_ratio(monkeypatch):
    monkeypatch.setattr(warn, "_said", set())
    a, b, ours, theirs = both("LARS", {"lr": 0.1}, make=lambda dtype: [torch.nn.Parameter(torch.ones(2, 3))])
    for p in (*ours, *theirs):
        p.grad = torch.ones(2, 3)
        p.grad[0, 1] = math.nan
    a.step()  # without a word: to know it, the host would have to wait for the GPU
    with pytest.warns(UserWarning, match="the norms of parameter 0 of group 0 are not finite"):
        b.step()
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    assert ours[0].isnan().sum() == 1
    assert a.trust_ratios() == b.trust_ratios() == {"0 of group 0": 1.0}


def test_rows_of_sums_are_aligned_alike():
    """Or the steps would alternate between two kernels, which add up in other orders perhaps."""
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (3, 4097)]
    optimizer = fused_opt.LARS(parameters, lr=0.1, backend="triton")
    set_gradients(parameters, 0)
    optimizer.step()
    (made,) = optimizer._plan.buckets[0].tables
    assert made.chunks == 3
    assert [row.data_ptr() % 16 for row in made.sums] == [0, 0, 0, 0]


def test_pieces_cover_every_element_once_and_their_sums_are_cheap_to_add():
    for numel in (1, 4096, 2**22, 2**22 + 1, 2_359_296, 10**9, 2**33):
        size = kernel.chunk_size(numel)
        pieces = -(-numel // size)
        assert size % kernel.FULL.value == 0
        assert 8 * pieces <= 2 * size + 8
        assert size == 4096 or pieces > size / 16  # nor larger than that needs


def test_a_tensor_of_several_pieces_and_the_search_for_it():
    a, b, ours, theirs = both("CLARS", {"lr": 0.1}, make=lambda dtype: [
        torch.nn.Parameter(torch.randn(n, 3, generator=torch.Generator().manual_seed(n))) for n in (1, 0, 7000, 3, 1400)
    ])  # fmt: skip
    train(a, b, ours, theirs)
    assert_alike(a, b, ours, theirs)


def test_the_same_bits_every_time_and_whatever_lies_beside():
    def run(order):
        parameters = contiguous()
        optimizer = fused_opt.LAMB([parameters[i] for i in order], lr=0.1, exempt=-1, backend="triton")
        for step in range(2):
            set_gradients(parameters, step)
            optimizer.step()
        return parameters

    count = len(contiguous())
    first = run(range(count))
    for order in (range(count), reversed(range(count))):
        assert all(torch.equal(a, b) for a, b in zip(first, run(order)))
