"""TempBalance: against the published procedure written out in numpy, and through a training run."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from support.models import Fused, ResidualNetwork, multiplied, plain, train_step
from torch import nn

from fused_opt.balance import PRESETS, TempBalance


def published(model):
    """What the authors' procedure gives for this network, from names, numpy and loops only."""
    weights = {
        name[: -len(".weight")]: p.detach().double().numpy()
        for name, p in model.named_parameters()
        if name.endswith("weight") and p.ndim > 1
    }
    order = [
        "stem",
        "layer1.conv1",
        "layer1.conv2",
        "layer1.shortcut.0",
        "layer2.conv1",
        "layer2.conv2",
        "layer2.shortcut.0",
        "hidden",
        "head",
        "embed",
    ]
    alphas = {}
    for name in order[1:-1]:  # without the first and the last
        w = weights[name]
        eigs = []
        if w.ndim == 2:
            eigs.extend(s**2 for s in np.linalg.svd(w, compute_uv=False))
        else:
            for i in range(w.shape[2]):
                for j in range(w.shape[3]):
                    eigs.extend(s**2 for s in np.linalg.svd(math.sqrt(0.5) * w[:, :, i, j], compute_uv=False))
        eigs.sort()
        if len(eigs) < 50:
            continue
        i = int(len(eigs) / 2)
        n = len(eigs) - i
        alphas[name] = 1 + n / (sum(math.log(e) for e in eigs[i:]) - n * math.log(eigs[i]))
    multipliers = {}
    for name in dict(model.named_parameters()):
        owner = name.rsplit(".", 1)[0].replace("bn", "conv")
        if owner in alphas:
            low, high = min(alphas.values()), max(alphas.values())
            multipliers[name] = 0.5 + (alphas[owner] - low) / (high - low)
        else:
            multipliers[name] = 1.0
    return alphas, multipliers


def test_multipliers_are_those_of_the_published_procedure():
    model = ResidualNetwork()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    balance = TempBalance(model, optimizer)
    for epoch in range(3):
        balance.step()
        alphas, multipliers = published(model)
        assert list(alphas) == ["layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2"]
        assert balance.alphas == pytest.approx(alphas, rel=1e-5)
        assert balance.multipliers == pytest.approx(multipliers, rel=1e-4)
        assert {0.5, 1.5} <= set(balance.multipliers.values())
        for step in range(4):
            train_step(model, optimizer, 10 * epoch + step)


def test_training_is_that_of_a_group_for_each_layer_under_a_scheduler():
    model = ResidualNetwork()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    balance = TempBalance(model, optimizer)
    hand = torch.optim.SGD([{"params": [p]} for p in twin.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-3)
    for epoch in range(3):
        balance.step()
        _, multipliers = published(twin)
        for group, multiplier in zip(hand.param_groups, multipliers.values(), strict=True):
            group["lr"] = 0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2 * multiplier
        for step in range(3):
            train_step(model, optimizer, 10 * epoch + step)
            train_step(twin, hand, 10 * epoch + step)
        scheduler.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["lr", "weight_decay"])
def test_a_layer_table_is_written_without_groups(target):
    model = plain()
    twin = copy.deepcopy(model)
    optimizer, other = (
        Fused(model.parameters(), 0.1),
        torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.1),
    )
    balance, reference = (
        TempBalance(m, o, target=target, limits=(0.5, 3.0)) for m, o in ((model, optimizer), (twin, other))
    )
    for step in range(4):
        balance.step()
        reference.step()
        train_step(model, optimizer, step)
        train_step(twin, other, step)
    assert len(optimizer.param_groups) == 1
    written = optimizer.table[target]
    assert balance.multipliers == {name: written.get(p, 1.0) for name, p in model.named_parameters()}
    assert not optimizer.table[{"lr": "weight_decay", "weight_decay": "lr"}[target]]
    assert {balance.multipliers[f"{i}.weight"] for i in range(1, 5)} >= {0.5, 3.0}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_two_balances_share_an_optimizer():
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    rates, decays = (
        TempBalance(model, optimizer),
        TempBalance(model, optimizer, target="weight_decay", limits=(0.1, 9.0)),
    )
    rates.step()
    decays.step()
    seen = {}
    optimizer.register_step_pre_hook(
        lambda o, a, k: seen.update({p: (g["lr"], g["weight_decay"]) for g in o.param_groups for p in g["params"]})
    )
    train_step(model, optimizer, 0)
    for name, p in model.named_parameters():
        assert seen[p] == (0.1 * rates.multipliers[name], 0.1 * decays.multipliers[name])
    assert len(optimizer.param_groups) == 1


# the family


def test_blocks_share_their_mean():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.layer = nn.ModuleList(plain(count=4, seed=s) for s in range(3))

    model = Encoder()
    model.last, model.layer = model.layer, model.last  # blocks in the middle
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "h": model.last, "zz": nn.Linear(4, 4)})
    balance = multiplied(model, **PRESETS["model_balancing"])
    means = [np.mean([balance.alphas[f"h.{block}.{i}"] for i in range(4)]) for block in range(3)]
    for block, mean in enumerate(means):
        expected = 10 ** (1 / (1 + math.exp(-10 * (mean - np.mean(means)))) - 0.5)
        assert [balance.multipliers[f"h.{block}.{i}.weight"] for i in range(4)] == pytest.approx([expected] * 4)


def test_presets_are_settings():
    for name, preset in PRESETS.items():
        model = plain()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        balance = TempBalance(model, optimizer, **({"total_steps": 100} if name == "llr" else {}) | preset)
        for _ in range(60):
            balance.step()
        found = [balance.multipliers[f"{i}.weight"] for i in range(6)]
        low, high = preset.get("limits", (0.5, 1.5))
        if name == "model_balancing":
            low, high = 10**-0.5, 10**0.5
            assert low < min(found[1:5]) < 1 < max(found[1:5]) < high
        else:
            assert (min(found[1:5]), max(found[1:5])) == pytest.approx((low, high))
        assert found[0] == found[5] == preset.get("skipped", 1.0)


def test_new_multipliers_are_reached_linearly_and_frozen_after_a_share_of_the_run():
    model = plain()
    optimizer = Fused(model.parameters(), 0.1)
    balance = TempBalance(model, optimizer, every=10, ramp=4, active=0.5, total_steps=40, limits=(1.0, 3.0))
    path, ratios = [], []
    for _ in range(40):
        balance.step()
        path.append(balance.multipliers["4.weight"])
        ratios.append(len(balance.history))
        model[4].weight.data *= torch.linspace(1, 1.2, 60)
    goal = path[4]
    assert path[:6] == pytest.approx([1 + (goal - 1) * share for share in (0.25, 0.5, 0.75, 1, 1, 1)])
    assert path[10] == pytest.approx(goal + (path[13] - goal) / 4)
    assert path[13] != pytest.approx(goal)
    assert path[13:] == [path[13]] * 27, "calls 20 and 30 are past the active half"
    assert ratios == [1] * 10 + [2] * 30
    assert optimizer.calls == 8, "the table is written while multipliers move, and only then"


# layers without a tail


SPOILED = {
    "zero": lambda w: torch.zeros_like(w),
    "rank 9 of 60": lambda w: w[:, :9] @ w[:9],
    "orthogonal": lambda w: nn.init.orthogonal_(torch.empty_like(w)),
    "NaN": lambda w: w.masked_fill(torch.eye(60, dtype=torch.bool), math.nan),
    "infinite": lambda w: w.masked_fill(torch.eye(60, dtype=torch.bool), math.inf),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_layer_without_a_tail_keeps_one_with_one_warning(kind):
    model = plain()
    model[2].weight.data = SPOILED[kind](model[2].weight.data)
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match=r"no tail to fit, multiplier 1: 2 \(alpha") as caught:
        [balance.step(force=True) for _ in range(2)]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert balance.multipliers["2.weight"] == balance.multipliers["2.bias"] == 1.0
    assert sorted(balance.multipliers[f"{i}.weight"] for i in (1, 3, 4))[::2] == [0.5, 1.5]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_tiny_and_huge_layers_are_balanced(scale):
    model = plain()
    expected = multiplied(plain()).multipliers
    model[2].weight.data *= scale
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert multiplied(model).multipliers == pytest.approx(expected, rel=1e-4)


def test_equal_layers_and_models_without_layers_keep_one():
    model = plain(count=5)
    for layer in model:
        layer.weight.data = model[0].weight.data.clone()
    assert set(multiplied(model).multipliers.values()) == {1.0}
    assert set(multiplied(nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9))).multipliers.values()) == {1.0}
    assert multiplied(nn.LayerNorm(9)).alphas == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype(dtype):
    expected = multiplied(plain().to(dtype).float()).alphas
    assert multiplied(plain().to(dtype)).alphas == pytest.approx(expected, rel=1e-5)


# seen


def test_log_is_a_flat_dictionary_and_goes_to_a_writer():
    class Writer:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, tag, value, step):
            self.scalars.append((tag, value, step))

    balance, writer = multiplied(plain()), Writer()
    scalars = balance.log()
    assert scalars["temp_balance/alpha/3"] == balance.alphas["3"]
    assert scalars["temp_balance/lr/3"] == balance.multipliers["3.weight"]
    assert scalars["temp_balance/lr/0"] == 1.0
    assert balance.log(writer, step=7) == scalars
    assert writer.scalars == [(tag, value, 7) for tag, value in scalars.items()]
    with pytest.raises(TypeError, match="has no add_scalar"):
        balance.log(print)


def test_plot_shows_exponents_over_time_and_spectra_with_their_tails():
    model = plain()
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="call step"):
        balance.plot()
    balance.step()
    model[2].weight.data *= torch.linspace(1, 2, 60)
    balance.step()
    over_time, tails = balance.plot(["2"]).axes
    lines = {line.get_label(): line.get_ydata() for line in over_time.lines}
    assert list(lines["2"]) == [balance.history[0][1]["2"], balance.alphas["2"]]
    points, tail = tails.lines
    np.testing.assert_allclose(
        points.get_xdata(), np.linalg.svd(model[2].weight.detach(), compute_uv=False)[::-1] ** 2, rtol=1e-4
    )
    slope = np.diff(np.log(tail.get_ydata())) / np.diff(np.log(tail.get_xdata()))
    np.testing.assert_allclose(slope, 1 - balance.alphas["2"], rtol=1e-4)
    assert (tails.get_xscale(), tails.get_yscale()) == ("log", "log")
    assert len(balance.plot().axes[1].lines) == 6
    with pytest.raises(ValueError, match=r"no layers \['9'\]"):
        balance.plot(["9"])


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"target": "momentum"}, "target='momentum' is not known; choose from lr, weight_decay"),
        ({"norms": "layer"}, "norms='layer' is not known"),
        ({"windows": (10, 10)}, r"windows=\(10, 10\) needs three sizes"),
        ({"skipped": -1.0}, "skipped=-1.0 must be"),
        ({"min_eigenvalues": 1}, "min_eigenvalues=1 must be 2 or more"),
        ({"every": 0}, "every=0 must be 1 or more"),
        ({"ramp": -1}, "ramp=-1 0 or more"),
        ({"budget": 0.0}, "budget=0.0 must be"),
        ({"active": 0.2}, "active=0.2 needs total_steps"),
        ({"active": 1.2}, "active=1.2 must be"),
        ({"fit": "mean"}, "fit='mean' is not known"),
        ({"assignment": "cubic"}, "assignment='cubic' is not known"),
    ],
)
def test_bad_settings_say_what_would_work(settings, found):
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=found):
        TempBalance(model, optimizer, **settings)
    assert not optimizer._optimizer_step_pre_hooks, "nothing is left behind"


def test_a_target_that_the_optimizer_lacks_is_refused():
    model = plain()
    with pytest.raises(ValueError, match=r"target='weight_decay', but the optimizer's groups \[0\] have no such entry"):
        TempBalance(model, torch.optim.Rprop(model.parameters()), target="weight_decay")
