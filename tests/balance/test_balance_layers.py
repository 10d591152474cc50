"""Which layers TempBalance balances, and what follows them."""

import pytest
import torch
from support.models import Fused, ResidualNetwork, multiplied, plain
from torch import nn
from torch.nn.utils import parametrizations

from fused_opt.balance import TempBalance
from fused_opt.balance.layers import LAYERS


def test_ends_are_skipped_unless_asked_and_take_their_own_multiplier():
    assert list(multiplied(plain(count=4)).alphas) == ["1", "2"]
    assert list(multiplied(plain(count=4), skip_first=False).alphas) == ["0", "1", "2"]
    assert list(multiplied(plain(count=4), skip_last=False).alphas) == ["1", "2", "3"]
    ends = multiplied(plain(count=4), skipped=5.0, limits=(1.0, 5.0)).multipliers
    assert [ends[f"{i}.bias"] for i in (0, 3)] == [5.0, 5.0]


def test_small_layers_are_left_out():
    assert list(multiplied(ResidualNetwork(), min_eigenvalues=2).alphas)[2] == "layer1.shortcut.0"
    assert list(multiplied(ResidualNetwork(), min_eigenvalues=100).alphas) == ["layer2.conv2"]


@pytest.mark.parametrize(
    ("norms", "following", "alone"),
    [
        ("batch", {"layer1.bn1": "layer1.conv1", "layer2.shortcut.1": "layer2.shortcut.0"}, ["norm"]),
        ("all", {"layer1.bn2": "layer1.conv2", "norm": "hidden"}, []),
        ("none", {}, ["layer1.bn1", "layer2.bn2", "norm", "layer1.shortcut.1"]),
    ],
)
def test_norms_follow_their_layer(norms, following, alone):
    multipliers = multiplied(ResidualNetwork(), norms=norms, min_eigenvalues=8).multipliers
    for norm, layer in following.items():
        assert multipliers[f"{norm}.weight"] == multipliers[f"{norm}.bias"] == multipliers[f"{layer}.weight"] != 1
    assert {multipliers[f"{norm}.weight"] for norm in alone} <= {1.0}


def test_norms_are_found_by_name_first_and_a_second_in_a_row_follows_nothing():
    class PreActivation(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
            self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
            self.last = nn.BatchNorm2d(8)
            self.more = nn.BatchNorm2d(8)

    model = nn.Sequential(nn.Linear(2, 2), *(PreActivation(seed) for seed in range(2)), nn.Linear(2, 2))
    multipliers = multiplied(model).multipliers
    assert len({multipliers[f"{i}.conv{j}.weight"] for i in (1, 2) for j in (1, 2)}) == 4
    for i in (1, 2):
        for norm, conv in (("bn1", "conv1"), ("bn2", "conv2"), ("last", "conv2")):
            assert multipliers[f"{i}.{norm}.weight"] == multipliers[f"{i}.{conv}.weight"]
        assert multipliers[f"{i}.more.weight"] == 1.0


def test_embeddings_are_an_option_and_tied_weights_are_one_layer():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.a, self.b = nn.Embedding(90, 60), nn.Linear(60, 60), nn.Linear(60, 60)
            self.head = nn.Linear(60, 90, bias=True)
            self.head.weight = self.embed.weight

    assert list(multiplied(Language()).alphas) == ["b"], "the tied weight is the head, which is last"
    tied = multiplied(Language(), include=(*LAYERS, nn.Embedding), skipped=4.0)
    assert list(tied.alphas) == ["a", "b"], "the tied weight is both first and last"
    assert tied.multipliers["embed.weight"] == tied.multipliers["head.bias"] == 4.0
    both = multiplied(Language(), include=(*LAYERS, nn.Embedding), skip_first=False, skip_last=False)
    assert list(both.alphas) == ["embed", "a", "b"]
    assert both.multipliers["head.bias"] == both.multipliers["embed.weight"] != 1


def test_parametrized_weights_are_read_as_the_module_uses_them_and_left_as_they_were():
    model = plain()
    parametrizations.weight_norm(model[1])
    model[1].parametrizations.weight.original0.data *= torch.linspace(1, 9, 60)[:, None]
    parametrizations.spectral_norm(model[2])
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    balance = multiplied(model)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert all(module.training for module in model.modules())
    copies = plain()
    copies[1].weight.data, copies[2].weight.data = model[1].weight.detach(), model.eval()[2].weight.detach()
    assert balance.alphas == pytest.approx(multiplied(copies).alphas, rel=1e-5)
    names = [f"1.parametrizations.weight.original{i}" for i in (0, 1)]
    assert balance.multipliers["1.bias"] == balance.multipliers[names[0]] == balance.multipliers[names[1]]


def test_frozen_layers_are_not_balanced_until_they_are_trained():
    model = plain()
    optimizer = Fused([*model[:2].parameters(), *model[3:].parameters()], lr=0.1)
    balance = TempBalance(model, optimizer)
    balance.step()
    assert list(balance.alphas) == ["1", "3", "4"]
    assert set(optimizer.table["lr"]) == set(optimizer.param_groups[0]["params"])
    optimizer.add_param_group({"params": model[2].parameters()})
    balance.step()
    assert list(balance.alphas) == ["1", "2", "3", "4"]
    assert balance.multipliers == pytest.approx(multiplied(plain()).multipliers)
