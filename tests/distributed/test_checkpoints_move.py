"""Checkpoints that are saved on four ranks and resumed on one, two and four, and that torch.optim wrote or reads."""

import copy
from functools import cache

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import checkpoint_ranks
from support.checkpoint_ranks import CASES, FORMS, NORMED
from support.compare import assert_close, unchanged
from support.processes import run_ranks
from torch.distributed.checkpoint import state_dict as dsd

import fused_opt

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # loading in one process
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of checkpoints from four ranks, and of what became of them on four and on two."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(checkpoint_ranks.__name__, 4, folder, "save")
    run_ranks(checkpoint_ranks.__name__, 2, folder, "resume")
    return folder


def read(path):
    return torch.load(path, weights_only=True)


@cache
def alone(case):
    """The weights of a run that was never on shards."""
    model, optimizer = checkpoint_ranks.made(case)
    checkpoint_ranks.train(model, optimizer, 0, checkpoint_ranks.STEPS)
    return {name: p.detach() for name, p in model.named_parameters()}


def apart(weights, others):
    return max((weights[name] - others[name]).abs().max().item() for name in others)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [*CASES, *NORMED])
@pytest.mark.parametrize("world", [4, 2, 1])
def test_a_resumed_run_is_the_uninterrupted_one(world, case, form, saved):
    """Weights, states, counters and averages; on one rank the model is not sharded at all."""
    expected = read(saved / case / "uninterrupted.pt")
    other = case in NORMED and world != 4  # a norm is a sum over shards
    if other:
        assert apart(expected["weights"], alone(case)) <= 1e-5
    if world == 1:
        found = checkpoint_ranks.resumed(case, saved / case, form)
    else:
        found = read(saved / case / f"resumed-{form}-{world}.pt")
    assert_close(found, expected, bound=1e-5 if other else 0)


# ------------------------------------------------------------------------------------------------- one process


def model_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def train(model, optimizer, first, last):
    for step in range(first, last):
        batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


FEATURES = {
    "noise": fused_opt.WeightNoise(0.01, schedule="cycle", period=3),
    "averaging": fused_opt.PSWM(4, beta=0.5, probability=0.6),
    "trust_ratio": fused_opt.TrustRatio("lars", cap=2.0),
    "max_grad_norm": 0.2,
}


def moved(found, model, optimizer, form, folder, **planner):
    """The optimizer's part of a checkpoint through files into another optimizer."""
    # With full_state_dict in one process torch raises a KeyError for keys of groups that only the checkpoint has.
    options = checkpoint_ranks.options_of("sharded" if form == "full" else form)
    if form == "full":
        torch.save(found, folder / "full.pt")
        found = torch.load(folder / "full.pt", weights_only=True)
    else:
        dcp.save({"optimizer": found}, checkpoint_id=folder / form, no_dist=True)
        found = dsd.get_optimizer_state_dict(model, optimizer, options=options)
        dcp.load({"optimizer": found}, checkpoint_id=folder / form, no_dist=True, **planner)
    dsd.set_optimizer_state_dict(model, optimizer, found, options=options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("same", [True, False], ids=["same settings", "none"])
def test_every_feature_goes_on_where_it_was(same, form, backend, tmp_path):
    """Noise, averages, ratios and clipping at once; an optimizer made without them gets them from the checkpoint."""
    model = model_of()
    optimizer = fused_opt.SGD(model.parameters(), lr=0.1, momentum=0.9, backend=backend, **FEATURES)
    train(model, optimizer, 0, 5)
    found = dsd.get_optimizer_state_dict(model, optimizer, options=checkpoint_ranks.options_of(form))
    other_model = copy.deepcopy(model)
    settings = FEATURES if same else {"averaging": FEATURES["averaging"]}  # which makes the slot that dcp.load fills
    other = fused_opt.SGD(other_model.parameters(), lr=1.0, momentum=0.5, backend=backend, **settings)
    moved(found, other_model, other, form, tmp_path)
    for each, of in ((model, optimizer), (other_model, other)):
        train(each, of, 5, 10)
    group = other.param_groups[0]
    assert {name: group[name] for name in FEATURES} == FEATURES
    assert (group["lr"], group["momentum"], group["steps"]) == (0.1, 0.9, 10)
    assert_close(list(other_model.parameters()), list(model.parameters()), bound=0)
    assert_close(other.state_dict(), optimizer.state_dict(), bound=0)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_saving_before_the_first_step_changes_nothing(name, backend):
    """The step that makes the states takes no sample, noise, random number or count, and decays nothing."""
    options = {"lr": 0.1, "weight_decay": 0.5, **({"momentum": 0.9} if name == "SGD" else {})}
    found = []
    for saves in (False, True):
        model = model_of()
        optimizer = getattr(fused_opt, name)(model.parameters(), **options, **FEATURES, backend=backend)
        if saves:
            before, generator = copy.deepcopy([model.state_dict(), optimizer.param_groups]), torch.get_rng_state()
            dsd.get_optimizer_state_dict(model, optimizer)
            assert_close([model.state_dict(), optimizer.param_groups], before, bound=0)
            assert torch.equal(torch.get_rng_state(), generator)
            assert all(state["average"].shape == p.shape for p, state in optimizer.state.items())
        train(model, optimizer, 0, 5)
        found.append([list(model.parameters()), optimizer.state_dict()])
    assert_close(found[1], found[0], bound=0)


@pytest.mark.parametrize("warm", [True, False], ids=["a gradient", "a gradient of zero for one parameter"])
def test_a_first_step_of_a_warmup_counts(warm, backend):
    """A learning rate that begins at 0: the momentum and the count of steps take the gradient, as in torch.optim."""
    model, oracle_model = model_of(), model_of()
    optimizer = fused_opt.AdamW(model.parameters(), lr=0.0, backend=backend)
    oracle = torch.optim.AdamW(oracle_model.parameters(), lr=0.0)
    for each, of in ((model, optimizer), (oracle_model, oracle)):
        each(torch.ones(2, 5)).sum().backward()
        if not warm:
            each[0].weight.grad.zero_()
        of.step()
        for group in of.param_groups:
            group["lr"] = 0.1
        train(each, of, 0, 3)
    assert_close(list(model.parameters()), list(oracle_model.parameters()), 1e-5)
    assert {of_p["step"].item() for of_p in optimizer.state.values()} == {4.0}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_from_torch_in_the_middle_of_training(name, form, backend, tmp_path):
    """What torch.optim does not know stays as it was asked for, group by group, in an optimizer with an average."""
    options = {"lr": 0.01, "weight_decay": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    model = model_of()
    oracle = getattr(torch.optim, name)(model.parameters(), **options)
    train(model, oracle, 0, 3)
    found = dsd.get_optimizer_state_dict(model, oracle, options=checkpoint_ranks.options_of(form))
    other_model = copy.deepcopy(model)
    average = fused_opt.EMA(0.5)
    group = {"params": other_model.parameters(), "averaging": average}
    other = getattr(fused_opt, name)([group], **{**options, "lr": 1.0}, backend=backend)
    partial = dcp.DefaultLoadPlanner(allow_partial_load=True)
    moved(found, other_model, other, form, tmp_path, planner=partial)
    group = other.param_groups[0]
    assert (group["averaging"], group["steps"], group["lr"]) == (average, 0, 0.01)
    train(model, oracle, 3, 6)
    train(other_model, other, 3, 6)
    assert_close(list(other_model.parameters()), list(model.parameters()), 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_to_torch_in_the_middle_of_training(name, form, backend, tmp_path):
    options = {"lr": 0.01, "weight_decay": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    model = model_of()
    optimizer = getattr(fused_opt, name)(
        model.parameters(), **options, averaging=fused_opt.EMA(0.9), noise=fused_opt.WeightNoise(0.0), backend=backend
    )
    train(model, optimizer, 0, 3)
    found = dsd.get_optimizer_state_dict(model, optimizer, options=checkpoint_ranks.options_of(form))
    other_model = copy.deepcopy(model)
    other = getattr(torch.optim, name)(other_model.parameters(), **{**options, "lr": 1.0})
    moved(found, other_model, other, form, tmp_path)
    train(model, optimizer, 3, 6)
    train(other_model, other, 3, 6)
    assert_close(list(other_model.parameters()), list(model.parameters()), 1e-6)


def test_a_flattened_dict_of_torch_without_files(backend):
    """torch looks for every key of the group that it loads into; the optimizer's own dict has those that are missing."""
    model = model_of()
    oracle = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, oracle, 0, 3)
    options = checkpoint_ranks.options_of("flattened")
    found = copy.deepcopy(dsd.get_optimizer_state_dict(model, oracle, options=options))
    other_model = copy.deepcopy(model)
    other = fused_opt.AdamW(other_model.parameters(), averaging=fused_opt.EMA(0.5), backend=backend)
    settings = dsd.get_optimizer_state_dict(other_model, other, options=options)
    settings = {key: value for key, value in settings.items() if key.startswith("param_groups.")}
    dsd.set_optimizer_state_dict(other_model, other, settings | found, options=options)
    assert "average" not in other.state[other_model[0].weight]  # where torch has put an empty dict
    train(model, oracle, 3, 6)
    train(other_model, other, 3, 6)
    assert_close(list(other_model.parameters()), list(model.parameters()), 1e-6)


def test_settings_of_a_group_survive_a_checkpoint_of_torch(backend):
    """torch.optim's knows nothing of them; the counts begin anew all the same."""
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    oracle = torch.optim.SGD([{"params": [weight]}, {"params": [bias]}], lr=0.1, momentum=0.9)
    own = fused_opt.WeightNoise(0.5)
    groups = [{"params": [weight]}, {"params": [bias], "noise": own}]
    optimizer = fused_opt.SGD(groups, lr=0.2, noise=fused_opt.WeightNoise(0.1), backend=backend)
    weight.grad, bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    optimizer.load_state_dict(oracle.state_dict())
    assert [group["noise"].std for group in optimizer.param_groups] == [0.1, 0.5]
    assert [(group["steps"], group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(0, 0.1, 0.9)] * 2


def test_a_checkpoint_just_after_states_were_zeroed(backend):
    """They are made anew in the next step, and until then missing, also from a flattened checkpoint."""
    averaging = fused_opt.PSWA(2, on_write_back="zero")
    model, options = model_of(), checkpoint_ranks.options_of("flattened")
    optimizer = fused_opt.SGD(model.parameters(), lr=0.1, momentum=0.9, averaging=averaging, backend=backend)
    train(model, optimizer, 0, 2)
    found = copy.deepcopy(dsd.get_optimizer_state_dict(model, optimizer, options=options))
    assert not [key for key in found if key.endswith("momentum_buffer")]
    other_model = copy.deepcopy(model)
    other = fused_opt.SGD(other_model.parameters(), lr=0.1, momentum=0.9, averaging=averaging, backend=backend)
    dsd.set_optimizer_state_dict(other_model, other, found, options=options)
    for each, of in ((model, optimizer), (other_model, other)):
        train(each, of, 2, 5)
    assert_close(other.state_dict(), optimizer.state_dict(), bound=0)
    assert_close(list(other_model.parameters()), list(model.parameters()), bound=0)


def test_whole_states_do_not_go_into_shards(process_group):
    """Nor shards into whole parameters: said at once, not in the step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, sharded = model_of(), model_of()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    optimizers = [fused_opt.AdamW(each.parameters()) for each in (model, sharded)]
    for each, optimizer in zip((model, sharded), optimizers):
        train(each, optimizer, 0, 1)
    for into, of, words in (
        (*reversed(optimizers), "a plain tensor in the loaded state_dict, and the parameter a DTensor"),
        (*optimizers, "a DTensor in the loaded state_dict, and the parameter a plain tensor"),
    ):
        with unchanged(optimizers[0]), pytest.raises(ValueError, match=words):
            into.load_state_dict(of.state_dict())
    assert [of_p["step"] for of_p in optimizers[1].state.values()] == [1] * 4


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
