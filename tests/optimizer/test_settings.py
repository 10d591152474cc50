"""Settings are checked when they are made, and again when a step finds them changed."""

import copy
import pickle

import numpy as np
import pytest
import torch
from support.compare import unchanged

import fused_opt
from fused_opt.extras import COUNTS, EXTRAS, Extras


def stepped(backend, **options):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_opt.SGD([p], lr=0.1, backend=backend, **options)
    p.grad = torch.ones(3)
    optimizer.step()
    return optimizer


CHANGES = [
    ("max_grad_norm", -1.0, "Invalid max_grad_norm: -1.0"),
    ("max_grad_norm", 0, "Invalid max_grad_norm: 0"),
    ("max_grad_norm", float("nan"), "Invalid max_grad_norm: nan"),
    ("max_grad_norm", "1", "Invalid max_grad_norm: '1'"),
    ("nonfinite", "never", "Invalid nonfinite: 'never'"),
    ("averaging", fused_opt.EMA, r"not the class: EMA\(...\)"),
    ("noise", 0.1, "noise takes a fused_opt.WeightNoise"),
    ("momentum", -0.5, "Invalid momentum value: -0.5"),
    ("weight_decay", "much", "Invalid weight_decay value: much"),
]


@pytest.mark.parametrize(("key", "value", "words"), CHANGES)
def test_a_changed_setting_is_refused_as_the_constructor_refuses_it(key, value, words, backend):
    optimizer = stepped(backend)
    before = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    with unchanged(optimizer), pytest.raises((TypeError, ValueError), match=words):
        optimizer.step()
    optimizer.param_groups[0][key] = before
    optimizer.step()
    with pytest.raises((TypeError, ValueError), match=words):
        fused_opt.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, **{key: value})


def test_numbers_of_numpy_are_numbers():
    averaging = fused_opt.PSWM(period=np.int64(5), beta=np.float32(0.5), start=np.int32(2))
    assert averaging == fused_opt.PSWM(period=5, beta=0.5, start=2)
    assert {type(value) for value in vars(averaging).values()} == {int, float, str}
    noise = fused_opt.WeightNoise(std=np.float64(0.1), schedule="cycle", period=np.int8(3), seed=np.uint64(2**63))
    ratio = fused_opt.TrustRatio("lars", coefficient=np.float32(0.5), exempt=np.int64(0))
    optimizer = stepped("auto", averaging=averaging, noise=noise, trust_ratio=ratio, max_grad_norm=np.float64(1.0))
    saved = optimizer.state_dict()["param_groups"][0]
    assert saved["averaging"].startswith('PSWM {"start": 2')
    other = stepped("auto")
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["averaging"] == averaging


@pytest.mark.parametrize(
    "make",
    [
        lambda: fused_opt.EMA(0.9, start=0.5),
        lambda: fused_opt.PSWM(period=2.5, beta=0.5),
        lambda: fused_opt.PSWA(period=0.07 * 100),
        lambda: fused_opt.PWALKS(period=4, samples=1.5),
        lambda: fused_opt.PSWA(period="4"),
        lambda: fused_opt.WeightNoise(std=0.1, schedule="cycle", period=2.5),
    ],
)
def test_steps_are_whole_numbers(make):
    with pytest.raises(ValueError, match="must be a whole number, at least"):
        make()


def test_strings_of_users_are_theirs(backend):
    """A group may be called as a setting is."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = fused_opt.SGD([{"params": [p], "name": "EMA", "note": 'SWM {"beta": 1}'}], lr=0.1, backend=backend)
    optimizer.load_state_dict(optimizer.state_dict())
    for found in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [found.param_groups[0][key] for key in ("name", "note")] == ["EMA", 'SWM {"beta": 1}']


def test_one_table_of_extras():
    """Keywords, group keys, counts, documentation and type hints say the same."""
    keys = {extra.key for extra in EXTRAS}
    assert Extras.__annotations__.keys() == keys | {"state_dtype", "backend"}
    group = stepped("auto").param_groups[0]
    assert keys | set(COUNTS) <= group.keys()
    for extra in EXTRAS:
        assert group[extra.key] == extra.default


EVERYTHING = {
    "noise": fused_opt.WeightNoise(std=0.1),
    "averaging": fused_opt.EMA(0.5),
    "trust_ratio": fused_opt.TrustRatio("lars"),
    "max_grad_norm": 1.0,
    "nonfinite": "skip",
}


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_no_groups_is_nothing_to_do(options, steps_before, every_kernel):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_opt.SGD([p], lr=0.1, backend=every_kernel, **options)
    p.grad = torch.ones(3)
    for _ in range(steps_before):
        optimizer.step()
    before = p.detach().clone()
    (group,) = optimizer.param_groups
    optimizer.param_groups.clear()
    assert optimizer.step() is None
    assert optimizer.trust_ratios() == {}
    assert torch.equal(p, before)
    optimizer.param_groups.append(group)
    optimizer.step()
    assert group["steps"] == steps_before + 1
    assert not torch.equal(p, before)


def test_a_step_within_averaged_weights_is_refused(backend):
    optimizer = stepped(backend, averaging=fused_opt.EMA(0.5))
    with optimizer.averaged_weights(), unchanged(optimizer), pytest.raises(RuntimeError, match="averaged_weights"):
        optimizer.step()
    optimizer.step()


def test_multipliers_of_two_sources_multiply(backend):
    p, q = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = fused_opt.SGD([p, q], lr=1.0, backend=backend)
    optimizer.scale_layers(lr={p: 0.5})
    optimizer.scale_layers(lr={p: 4.0, q: 3.0}, source="another")
    optimizer.scale_layers(lr={p: 0.25})
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert (p[0].item(), q[0].item()) == (-1.0, -3.0)


def rise(group):
    group["lr"] = 0.5


def rise_in_place(group):
    group["lr"].fill_(0.5)


def decay(group):
    group["weight_decay"] = 0.5


def decay_in_place(group):
    group["weight_decay"].fill_(0.5)


def ascend(group):
    group["maximize"] = True


def forget_in_place(group):
    group["betas"][0].fill_(0.25)


LATE_CHANGES = [
    (rise, "SGD", {"lr": 0.1, "momentum": 0.5}),
    (rise_in_place, "SGD", {"lr": torch.tensor(0.1)}),
    (decay, "AdamW", {"lr": 0.1}),
    (decay_in_place, "SGD", {"lr": 0.1, "weight_decay": torch.tensor(0.1)}),
    (ascend, "SGD", {"lr": 0.1}),
    (forget_in_place, "Adam", {"lr": 0.1, "betas": (torch.tensor(0.9), torch.tensor(0.99))}),
]


@pytest.mark.parametrize(("change", "name", "options"), LATE_CHANGES)
def test_a_change_after_many_steps_that_were_alike(change, name, options, backend):
    def weights(make, **more):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = make([p], **copy.deepcopy(options), **more)
        for step in range(8):
            p.grad = torch.linspace(1, 2, 3) * (step + 1)
            if step == 5:
                change(optimizer.param_groups[0])
            optimizer.step()
        return p.detach()

    expected = weights(getattr(torch.optim, name), foreach=False)
    torch.testing.assert_close(weights(getattr(fused_opt, name), backend=backend), expected)


def jump(group):
    group["steps"] += 100


def forget_a_sample(group):
    group["samples"] -= 1


def average_otherwise(group):
    group["averaging"] = fused_opt.EMA(0.5)


def be_still(group):
    group["noise"] = None


COUNTED = [
    (jump, {"noise": fused_opt.WeightNoise(std=0.1, schedule="decay")}),
    (rise, {"noise": fused_opt.WeightNoise(temperature=0.1)}),
    (be_still, {"noise": fused_opt.WeightNoise(std=0.1), "averaging": fused_opt.EMA(0.9)}),
    (jump, {"averaging": fused_opt.PSWA(period=3)}),
    (forget_a_sample, {"averaging": fused_opt.EMA(0.9, warmup=True)}),
    (average_otherwise, {"averaging": fused_opt.EMA(0.9)}),
    (rise, {"averaging": fused_opt.ScheduleFree(0.5)}),
]


@pytest.mark.parametrize(("change", "options"), COUNTED)
def test_many_steps_are_those_of_an_optimizer_that_is_made_for_each(change, options, backend):
    """What depends on counts is new in every step, whatever the optimizer has kept of the step before."""

    def run(anew):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = fused_opt.SGD([p], lr=0.1, momentum=0.5, backend=backend, **options)
        for step in range(8):
            p.grad = torch.linspace(1, 2, 3) * (step + 1)
            if step == 5:
                change(optimizer.param_groups[0])
            optimizer.step()
            if anew:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = fused_opt.SGD([p], lr=0.1, backend=backend)
                optimizer.load_state_dict(state)
        return [p.detach(), *(value for value in optimizer.state[p].values())], optimizer.param_groups[0]["samples"]

    (kept, samples), (expected, expected_samples) = run(False), run(True)
    assert samples == expected_samples
    assert len(kept) == len(expected)
    assert all(map(torch.equal, kept, expected))


def test_a_rate_that_is_refused_stays_refused(backend):
    optimizer = stepped(backend)
    for _ in range(3):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = -1.0
    for _ in range(3):
        with unchanged(optimizer), pytest.raises(ValueError, match=r"Invalid learning rate: -1\.0"):
            optimizer.step()
