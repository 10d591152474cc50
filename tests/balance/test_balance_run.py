"""When and how much TempBalance computes, and that a resumed run is the same run."""

import pytest
import torch
from support.models import Fused, ResidualNetwork, multiplied, plain, train_step
from torch import nn

from fused_opt.balance import TempBalance, sweep


@pytest.fixture
def computed(monkeypatch):
    counts = []
    estimate = sweep.layer_alphas
    monkeypatch.setattr(
        sweep, "layer_alphas", lambda weights, **k: counts.append(len(weights)) or estimate(weights, **k)
    )
    return counts


def test_a_budget_spreads_the_layers_and_writes_when_all_are_done(computed):
    model = plain(count=7)
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), budget=0.4, every=4)
    written = []
    for _ in range(6):
        balance.step()
        written.append(len(set(balance.multipliers.values())) > 1)
    assert computed[:3] == [2, 2, 1], "equal layers, two of which fit in 40 %"
    assert written == [False, False, True, True, True, True]
    assert balance.multipliers == multiplied(plain(count=7)).multipliers


def test_a_layer_above_the_budget_has_a_call_of_its_own(computed):
    model = nn.Sequential(
        nn.Linear(50, 50), nn.Linear(50, 50), nn.Linear(50, 200), nn.Linear(200, 50), nn.Linear(50, 50)
    )
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), budget=1e-9)
    for _ in range(3):
        balance.step()
    assert computed == [1, 1, 1]
    assert len(balance.history) == 1


def test_unchanged_layers_are_not_recomputed(computed):
    model = plain()
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1))
    balance.step()
    alphas = dict(balance.alphas)
    balance.step()
    with torch.no_grad():
        model[2].weight.mul_(torch.linspace(1, 2, 60))
    balance.step()
    model[3].weight.data.mul_(torch.linspace(1, 2, 60))  # bumps no version
    balance.step()
    model[1].weight.data = model[1].weight.data * torch.linspace(1, 2, 60)
    balance.step()
    with torch.no_grad():
        model[2].weight[0, 1] += 1  # not among the sampled elements
    balance.step()
    balance.step(force=True)
    assert computed == [4, 0, 1, 1, 1, 1, 4]
    assert [name for name in alphas if alphas[name] != balance.alphas[name]] == ["1", "2", "3"]
    assert balance.alphas == multiplied(model).alphas


def test_the_background_gives_the_same_at_a_later_step():
    model = plain()
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), background=True, every=100)
    expected = multiplied(plain())
    balance.step()
    model[1].weight.data.zero_()  # the copy is what counts
    for _ in range(2000):
        if balance.alphas:
            break
        balance._sweep._job.future.result()
        balance.step()
    assert balance.alphas == expected.alphas
    assert balance.multipliers == expected.multipliers


def test_an_error_ends_the_recomputation_and_the_next_starts_over(monkeypatch):
    model = plain()
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), budget=0.3)
    with monkeypatch.context() as broken:
        broken.setattr(sweep, "layer_alphas", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            balance.step()
    for _ in range(4):
        assert balance.alphas == {}
        balance.step()
    assert balance.alphas == multiplied(plain()).alphas


def test_an_error_in_the_background_surfaces_once(monkeypatch):
    model = plain()
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), background=True)
    with monkeypatch.context() as broken:
        broken.setattr(sweep, "layer_alphas", lambda *a, **k: 1 / 0)
        balance.step()
        with pytest.raises(ZeroDivisionError):
            balance.state_dict()
    balance.step()
    balance.state_dict()
    balance.step()
    assert balance.alphas == multiplied(plain()).alphas


def test_the_background_is_refused_where_processes_would_disagree(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="at different steps in different processes; use budget"):
        multiplied(plain(), background=True)
    assert multiplied(plain()).alphas


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_sharded_weights_are_gathered_and_always_recomputed(tmp_path, computed):
    from torch.distributed.fsdp import fully_shard

    expected = multiplied(plain())
    computed.clear()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(plain(), mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        balance = multiplied(model)
        balance.step()
    finally:
        torch.distributed.destroy_process_group()
    assert balance.alphas == expected.alphas
    assert balance.multipliers == expected.multipliers
    assert computed == [4, 4]


def run(model, optimizer, scheduler, balance, steps):
    for step in steps:
        balance.step()
        train_step(model, optimizer, step)
        scheduler.step()


def build(seed, **settings):
    model = plain(seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return model, optimizer, scheduler, TempBalance(model, optimizer, **settings)


@pytest.mark.parametrize("stop", [1, 4, 6, 7, 11])
def test_a_resumed_run_equals_an_uninterrupted_one(stop, tmp_path):
    settings = {"every": 3, "ramp": 3, "budget": 0.3, "active": 0.6, "total_steps": 20}
    whole = build(0, **settings)
    run(*whole, range(14))
    first = build(0, **settings)
    run(*first, range(stop))
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    second = build(1, **settings)
    for part, state in zip(second, torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*second, range(stop, 14))
    assert second[3].state_dict() == whole[3].state_dict()
    assert second[3].multipliers == whole[3].multipliers
    assert all(torch.equal(p, q) for p, q in zip(second[0].parameters(), whole[0].parameters(), strict=True))


def test_a_state_is_a_copy_and_loading_an_empty_one_resets():
    model = plain()
    optimizer = Fused(model.parameters(), lr=0.1)
    balance = TempBalance(model, optimizer)
    fresh = balance.state_dict()
    balance.step()
    saved = balance.state_dict()
    saved["alphas"].clear()
    assert balance.alphas
    balance.load_state_dict(fresh)
    assert balance.alphas == {}
    assert set(balance.multipliers.values()) == set(optimizer.table["lr"].values()) == {1.0}


def test_the_state_of_another_model_is_refused():
    balance, other = multiplied(plain()), multiplied(ResidualNetwork())
    before = balance.state_dict()
    with pytest.raises(ValueError, match=r"the state has layers \['embed', .*this model only \['0', '1'"):
        balance.load_state_dict(other.state_dict())
    assert balance.state_dict() == before


def test_a_state_waits_for_the_background():
    model = plain()
    balance = TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1), background=True)
    balance.step()
    assert balance.state_dict()["sweep"]["found"] == multiplied(plain()).alphas
