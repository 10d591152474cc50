"""What the constructor and a new group refuse: in the words of torch.optim, or in words that say what would work."""

import pytest
import torch
from support.compare import unchanged

import fused_opt
from fused_opt import warn

BAD_VALUES = [
    ("SGD", {"lr": -1}),
    ("SGD", {"lr": torch.tensor(-1.0)}),
    ("SGD", {"lr": torch.tensor([0.1, 0.2])}),
    ("SGD", {"momentum": -0.5}),
    ("SGD", {"weight_decay": -0.5}),
    ("SGD", {"nesterov": True}),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    ("SGD", {"fused": True, "foreach": True}),
    *(
        (name, options)
        for name in ("Adam", "AdamW")
        for options in (
            {"lr": -1},
            {"lr": float("nan")},
            {"lr": torch.tensor([0.1, 0.2])},
            {"eps": -1e-8},
            {"eps": float("nan")},
            {"betas": (1.0, 0.999)},
            {"betas": (-0.1, 0.999)},
            {"betas": (0.9, 1.0)},
            {"betas": (float("nan"), 0.9)},
            {"betas": (0.9, float("nan"))},
            {"betas": (0.9, torch.tensor(0.999))},
            {"weight_decay": -0.5},
            {"weight_decay": float("nan")},
            {"fused": True, "foreach": True},
        )
    ),
    *(
        (name, {key: -0.5})
        for name, keys in {
            "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum"),
            "Adamax": ("lr", "eps", "weight_decay"),
            "Adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
            "NAdam": ("lr", "eps", "weight_decay", "momentum_decay"),
            "RAdam": ("lr", "eps", "weight_decay"),
        }.items()
        for key in keys
    ),
    *((name, {"betas": betas}) for name in ("Adamax", "NAdam", "RAdam") for betas in ((1.0, 0.9), (0.9, -0.1))),
]


@pytest.mark.parametrize(("name", "options"), BAD_VALUES, ids=str)
def test_values_out_of_range_in_the_words_of_torch(name, options):
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        getattr(torch.optim, name)([p], **options)
    with pytest.raises(theirs.type) as ours:
        getattr(fused_opt, name)([p], **options)
    assert str(ours.value) == str(theirs.value)

    optimizer = getattr(fused_opt, name)([p])
    late = {"params": [torch.nn.Parameter(torch.ones(2))], **options}
    with unchanged(optimizer), pytest.raises(theirs.type) as ours:
        optimizer.add_param_group(late)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": torch.tensor(float("nan"))}, "Invalid learning rate: nan"),
        ({"momentum": float("nan")}, "Invalid momentum value: nan"),
        ({"weight_decay": float("nan")}, "Invalid weight_decay value: nan"),
        ({"dampening": float("nan")}, "Invalid dampening value: nan"),
        (
            {"state_dtype": torch.int8},
            "Invalid state_dtype: torch.int8; there are None, torch.float32, torch.float64, ",
        ),
        ({"backend": "cuda"}, "Invalid backend: 'cuda'; there are 'auto', 'native', 'triton', 'foreach', 'reference'"),
        ({"backend": None}, "Invalid backend: None; there are 'auto'"),
    ],
    ids=str,
)
def test_values_that_torch_takes_or_does_not_know(options, message):
    with pytest.raises(ValueError, match=message):
        fused_opt.SGD([torch.nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 0.999)}, "Invalid betas: .*; they are three, the last that of the slow average"),
        ({"betas": (0.9, 0.999, 1.0)}, "Invalid beta parameter at index 2: 1.0"),
        ({"alpha": -1.0}, "Invalid alpha value: -1.0"),
        ({"alpha_warmup": -1}, "Invalid alpha_warmup: -1"),
        ({"beta3_warmup": float("nan")}, "Invalid beta3_warmup: nan"),
    ],
    ids=str,
)
def test_values_of_ademamix(options, message):
    with pytest.raises(ValueError, match=message):
        fused_opt.AdEMAMix([torch.nn.Parameter(torch.ones(3))], **options)


def test_parameters_that_are_none_in_the_words_of_torch():
    p = torch.nn.Parameter(torch.ones(3))
    for params in (
        [],
        [p, 3],
        p,
        [{"params": {p}}],
        [p * 2],
        [{"params": [p]}, {"params": [p]}],
        [{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": [p]}, {"params": [p]}],
        [("a", p), torch.nn.Parameter(torch.ones(2))],
    ):
        with pytest.raises((TypeError, ValueError)) as theirs:
            torch.optim.SGD(params)
        with pytest.raises(theirs.type) as ours:
            fused_opt.SGD(params)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [("SGD", "momentun", "momentum"), ("LARS", "averagin", "averaging"), ("AdamW", "state_type", "state_dtype")],
)
def test_a_misspelled_keyword_names_the_nearest(name, given, meant):
    p = torch.nn.Parameter(torch.ones(3))
    words = rf"{name}\(\) got an unexpected keyword argument '{given}'. Did you mean '{meant}'\?"
    with pytest.raises(TypeError, match=words):
        getattr(fused_opt, name)([p], lr=0.1, **{given: None})


def test_a_misspelled_key_of_a_group_is_noticed(monkeypatch):
    monkeypatch.setattr(warn, "_said", set())
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "weightdecay": 0.1, "lr_scale": 2.0, "name": "encoder"}]
    with pytest.warns(warn.FusedOptWarning) as caught:
        fused_opt.SGD(groups, lr=0.1)
    assert ["'weightdecay'" in str(w.message) and "'weight_decay'" in str(w.message) for w in caught] == [True]
