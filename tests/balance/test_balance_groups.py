"""Multipliers for optimizers of torch.optim: against parameter groups made by hand."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from fused_opt.balance.groups import layer_table


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(5, generator=generator)) for _ in range(3)]


def train(optimizer, params, steps=6, scheduler=None):
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.sin(p.detach() * (i + 1) + step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "adam_tensor_lr": (torch.optim.Adam, {"lr": torch.tensor(0.1), "weight_decay": 0.1, "foreach": False}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.5}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_groups_made_by_hand(name):
    kind, settings = OPTIMIZERS[name]
    by_hand, mine = parameters(), parameters()
    lr, decay = settings["lr"], settings["weight_decay"]
    hand = kind(
        [
            {"params": by_hand[:1], "lr": 0.5 * lr},
            {"params": by_hand[1:2], "weight_decay": 3 * decay},
            {"params": by_hand[2:]},
        ],
        **settings,
    )
    optimizer = kind(mine, **settings)
    layer_table(optimizer).scale_layers(lr={mine[0]: 0.5})
    layer_table(optimizer).scale_layers(weight_decay={mine[1]: 3.0})
    train(hand, by_hand)
    train(optimizer, mine)
    assert all(torch.equal(a, b) for a, b in zip(by_hand, mine, strict=True))


@pytest.mark.parametrize("first", ["scheduler", "table"])
@pytest.mark.parametrize("kind", ["cosine", "onecycle", "lambda"])
def test_schedulers_see_one_group_in_either_order(first, kind):
    schedulers = {
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=10),
        "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    }
    settings = {"lr": 0.1, "momentum": 0.9}
    by_hand, mine = parameters(), parameters()
    hand, optimizer = torch.optim.SGD(by_hand, **settings), torch.optim.SGD(mine, **settings)
    if first == "table":
        table = layer_table(optimizer)
    hand_scheduler, scheduler = schedulers[kind](hand), schedulers[kind](optimizer)
    if first == "scheduler":
        table = layer_table(optimizer)
    multipliers = [0.5, 1.0, 1.5]
    table.scale_layers(lr=dict(zip(mine, multipliers, strict=True)))
    velocity = [torch.zeros(5) for _ in by_hand]
    for step in range(6):
        for i, (p, q) in enumerate(zip(by_hand, mine, strict=True)):
            p.grad = torch.sin(p.detach() * (i + 1) + step)
            q.grad = torch.sin(q.detach() * (i + 1) + step)
        for p, v, multiplier in zip(by_hand, velocity, multipliers, strict=True):
            v.mul_(hand.param_groups[0]["momentum"]).add_(p.grad) if step else v.copy_(p.grad)
            p.data -= multiplier * hand.param_groups[0]["lr"] * v
            p.grad = None
        optimizer.step()
        hand.step()  # without gradients: only for its scheduler, which else warns
        hand_scheduler.step()
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == [hand.param_groups[0]["lr"]]
    for p, q in zip(by_hand, mine, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_checkpoints_are_those_of_the_optimizer_alone():
    mine, plain = parameters(), parameters()
    optimizer, other = (
        torch.optim.SGD(mine, lr=0.1, momentum=0.9),
        torch.optim.SGD(plain, lr=0.1, momentum=0.9),
    )
    layer_table(optimizer).scale_layers(lr={mine[0]: 0.5})
    train(optimizer, mine)
    train(other, plain)
    saved, expected = optimizer.state_dict(), other.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"].keys() == expected["state"].keys()
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in mine]
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert all(torch.equal(m, optimizer.state[p]["momentum_buffer"]) for m, p in zip(momentum, mine, strict=True))


def test_a_step_that_raises_leaves_whole_groups_to_the_checkpoint_and_the_next_step():
    mine, plain = parameters(), parameters()
    optimizer, other = torch.optim.SGD(mine, lr=0.1), torch.optim.SGD(plain, lr=0.1)
    for table, params in ((layer_table(optimizer), mine), (layer_table(other), plain)):
        table.scale_layers(lr={params[0]: 0.5, params[1]: 2.0})

    def fail():
        assert len(optimizer.param_groups) == 3
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fail)
    assert len(optimizer.state_dict()["param_groups"]) == 1
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fail)
    train(optimizer, mine)
    train(other, plain)
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


def test_what_an_optimizer_counts_in_its_groups_is_kept():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            return super().step(closure)  # fires the hooks a second time

    mine, plain = parameters(), parameters()
    optimizer, other = Counting(mine, lr=0.1), torch.optim.SGD(plain, lr=0.1)
    layer_table(optimizer).scale_layers(lr={mine[0]: 0.5})
    layer_table(other).scale_layers(lr={plain[0]: 0.5})
    train(optimizer, mine)
    train(other, plain)
    assert optimizer.param_groups[0]["count"] == 6
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


def test_named_parameters_stay_with_their_names():
    mine = parameters()
    optimizer = torch.optim.SGD([(f"p{i}", p) for i, p in enumerate(mine)], lr=0.1)
    layer_table(optimizer).scale_layers(lr={mine[1]: 0.5})
    seen = {}

    def look(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                seen[name] = p, group["lr"]

    optimizer.register_step_pre_hook(look)
    train(optimizer, mine, steps=1)
    assert {name: lr for name, (_, lr) in seen.items()} == {"p0": 0.1, "p1": 0.05, "p2": 0.1}
    assert all(seen[f"p{i}"][0] is p for i, p in enumerate(mine))
    assert optimizer.param_groups[0]["param_names"] == ["p0", "p1", "p2"]


def test_groups_added_later_are_split_too():
    mine = parameters()
    optimizer = torch.optim.SGD(mine[:2], lr=0.1)
    layer_table(optimizer).scale_layers(lr={mine[2]: 0.5})
    optimizer.add_param_group({"params": mine[2:], "lr": 0.4})
    before = mine[2].detach().clone()
    mine[2].grad = torch.ones(5)
    optimizer.step()
    torch.testing.assert_close(before - mine[2].detach(), torch.full((5,), 0.2))


def test_one_table_an_optimizer_and_none_outlives_it():
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    assert layer_table(optimizer) is layer_table(optimizer)
    gone = weakref.ref(layer_table(optimizer))
    del optimizer
    gc.collect()
    assert gone() is None


def test_an_optimizer_with_a_layer_table_is_its_own():
    class Fused(torch.optim.SGD):
        def scale_layers(self, *, lr=None, weight_decay=None, source="user"): ...

    optimizer = Fused(parameters(), lr=0.1)
    assert layer_table(optimizer) is optimizer


def test_what_cannot_be_scaled_is_refused():
    with pytest.raises(ValueError, match="LBFGS has one learning rate"):
        layer_table(torch.optim.LBFGS(parameters()))
    with pytest.raises(TypeError, match="found object; where it wraps another one, pass the inner optimizer"):
        layer_table(object())
