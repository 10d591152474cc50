"""TempBalance goes on with the layers and parameters that are there, and says where there are none."""

import os
import re
import warnings

import pytest
import torch
from support.models import multiplied, plain
from torch import nn

import fused_opt
from fused_opt.balance import PRESETS, TempBalance
from fused_opt.balance.groups import layer_table
from fused_opt.balance.layers import find_layers

OPTIMIZERS = [fused_opt.SGD, torch.optim.SGD]


def ones_step(model, optimizer):
    """How far a step with gradients of one moves each layer's first weight, over the learning rate."""
    before = [layer.weight[0, 0].item() for layer in model]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return [(old - layer.weight[0, 0].item()) / 0.1 for old, layer in zip(before, model, strict=True)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_replaced_parameters_take_their_layers_multiplier_at_the_next_call(kind):
    model = plain()
    optimizer = kind(model.parameters(), lr=0.1)
    balance = TempBalance(model, optimizer, every=100)
    balance.step()
    expected = [balance.multipliers[f"{i}.weight"] for i in range(6)]
    assert len(set(expected)) == 5
    for i in (1, 2):
        model[i].weight = nn.Parameter(model[i].weight.detach().clone())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    balance.step()
    assert [balance.multipliers[f"{i}.weight"] for i in range(6)] == expected
    assert ones_step(model, optimizer) == pytest.approx(expected, abs=1e-4)
    balance.step(force=True)
    newest = [balance.multipliers[f"{i}.weight"] for i in range(6)]
    assert ones_step(model, optimizer) == pytest.approx(newest, abs=1e-4)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_parameters_that_leave_the_groups_are_left_and_those_that_come_back_multiplied(kind):
    model = plain()
    optimizer = kind(model.parameters(), lr=0.1)
    balance = TempBalance(model, optimizer)
    balance.step()
    before = balance.multipliers
    alone = set(model[2].parameters())
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p not in alone]
    balance.step(force=True)
    assert list(balance.alphas) == ["1", "3", "4"]
    assert ones_step(model, optimizer)[2] == 0
    optimizer.param_groups[0]["params"] = list(model.parameters())
    balance.step(force=True)
    assert list(balance.alphas) == ["1", "2", "3", "4"]
    assert len({balance.multipliers[f"{i}.weight"] for i in (1, 2, 3, 4)}) == 4
    assert before.keys() == balance.multipliers.keys()
    assert ones_step(model, optimizer) == pytest.approx(
        [balance.multipliers[f"{i}.weight"] for i in range(6)], abs=1e-4
    )


def test_a_replaced_module_is_a_layer_and_one_that_is_gone_is_none():
    model = plain(count=7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balance = TempBalance(model, optimizer, budget=1e-9)
    balance.step()  # the first of five layers
    model[2] = nn.Linear(60, 60)
    del model[6]
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for _ in range(5):
        balance.step()
    assert list(balance.alphas) == ["1", "2", "3", "4"]
    assert balance.alphas["2"] == multiplied(model).alphas["2"]
    del model[3]  # it has a multiplier
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for _ in range(4):
        balance.step()
    assert list(balance.alphas) == ["1", "2", "3"]


def test_frozen_weights_are_not_balanced_until_they_train():
    model = plain()
    model[2].weight.requires_grad_(False)
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1))
    balance.step()
    assert list(balance.alphas) == ["1", "3", "4"]
    model[2].weight.requires_grad_()
    balance.step()
    assert list(balance.alphas) == ["1", "2", "3", "4"]


def test_a_table_keeps_no_parameter_alive():
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    table = layer_table(optimizer)
    table.scale_layers(lr={w: 0.5})
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(2))]
    assert len(table._multipliers["lr"]) == 1
    del w
    assert len(table._multipliers["lr"]) == 0


class Adapter(nn.Module):
    """A frozen layer and the two small matrices that are trained, as in LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(60, 8, bias=False), nn.Linear(8, 60, bias=False)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(60, 60))


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(*(nn.utils.weight_norm(layer) for layer in plain()))


SILENT = {
    "weight norm": (old_weight_norm, r"6 Linear \('0', \.\.\.\): the weight is made of weight_g, weight_v before each"),
    "small": (lambda: plain(width=40), r"4 Linear \('1', \.\.\.\): fewer than 50 eigenvalues \(min_eigenvalues=\)"),
    "adapters": (
        lambda: nn.Sequential(*map(Adapter, plain())),
        r"6 Linear \('0\.base', \.\.\.\): .*11 Linear \('0\.down', \.\.\.\): fewer than 50|not trained by this SGD",
    ),
    "other types": (lambda: nn.Sequential(Bare(), Bare()), r"2 Bare \('0', \.\.\.\): its type is not among include="),
    "one": (lambda: plain(count=3), r"2 Linear .*first or the last.*; 1 Linear \('1'\): the only one"),
    "none": (lambda: nn.Sequential(nn.LayerNorm(4)), "no module has a matrix for a weight"),
}


@pytest.mark.parametrize("kind", SILENT)
def test_nothing_to_balance_is_said_once_with_the_reasons(kind):
    make, reason = SILENT[kind]
    model = make()
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match=f"compares layers and has fewer than two: .*(?:{reason})") as caught:
        balance.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balance.step(force=True)
    assert set(balance.multipliers.values()) == {1}


def test_the_optimizer_of_another_model_is_said():
    model, other = plain(), plain()
    balance = TempBalance(model, torch.optim.Adam(other.parameters()))
    with pytest.warns(UserWarning, match=r"4 Linear \('1', \.\.\.\): not trained by this Adam"):
        balance.step()


def test_conv1d_of_transformers_is_a_layer_stored_the_other_way_round():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", exc_type=ImportError)
    torch.manual_seed(0)
    conv1d = nn.Sequential(*(pytorch_utils.Conv1D(90, 60) for _ in range(4)))
    linear = nn.Sequential(*(nn.Linear(60, 90) for _ in range(4)))
    for left, right in zip(conv1d, linear, strict=True):
        right.weight.data.copy_(left.weight.data.T)
    windows = {"windows": (50, 30, 3), "min_eigenvalues": 5}
    for settings in ({}, windows):
        assert multiplied(conv1d, **settings).alphas == pytest.approx(multiplied(linear, **settings).alphas, rel=1e-6)
    layers, _, _ = find_layers(conv1d, (nn.Linear,), "none")
    assert layers[0].shape() == (90, 60)
    with pytest.warns(UserWarning, match="4 Conv1D .*: its type is not among include="):
        assert multiplied(conv1d, include=(nn.Conv2d,)).alphas == {}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_by_name_are_their_settings(name):
    extra = {"total_steps": 100} if name == "llr" else {}
    named, spread = multiplied(plain(), preset=name, **extra), multiplied(plain(), **PRESETS[name], **extra)
    assert (named.alphas, named.multipliers, named.target) == (spread.alphas, spread.multipliers, spread.target)


def test_what_a_call_names_goes_before_the_preset():
    chosen = multiplied(plain(), preset="temp_balance_lm", limits=(0.5, 1.5))
    assert sorted(chosen.multipliers.values())[0] == 0.5
    assert multiplied(plain(), preset="temp_balance_lm").assignment[1] == (1.0, 2.0)
    with pytest.raises(ValueError, match=f"preset='farm' is not known; choose from {', '.join(PRESETS)}"):
        multiplied(plain(), preset="farm")


def test_a_balance_says_what_it_does():
    model = plain()
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), budget=0.5)
    assert repr(balance) == ("TempBalance(4 of 6 layers, 0 calls, 0 recomputations: alpha none yet, lr times none yet)")
    balance.step()
    assert repr(balance).startswith("TempBalance(4 of 6 layers, 1 calls, 0 recomputations and one begun: ")
    balance.step()
    least, most = min(balance.alphas.values()), max(balance.alphas.values())
    assert repr(balance) == (
        f"TempBalance(4 of 6 layers, 2 calls, 1 recomputations: alpha {least:.3g} .. {most:.3g}, lr times 0.5 .. 1.5)"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_what_its_parents_thread_had_begun():
    model = plain()
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), background=True, every=100)
    balance.step()
    model[1].weight.data.zero_()  # the copy is what counts
    balance._sweep._job.future.result()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        balance._sweep._job.future._state = "RUNNING"  # as it is where the thread had not come to its end
        os.write(write, repr(balance.state_dict()["sweep"]["found"]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    assert {name: float(alpha) for name, alpha in re.findall(r"'(\d)': ([\d.]+)", found)} == multiplied(plain()).alphas
