"""Keywords in signatures and help(), names of parameters in what the optimizers say, and what objects say they are."""

import re
from inspect import Parameter, signature
from pathlib import Path

import pytest
import torch
from typing_extensions import Unpack

import fused_opt
from fused_opt.extras import EXTRAS, Extras

OPTIMIZERS = [
    kind
    for kind in (getattr(fused_opt, name) for name in fused_opt.__all__)
    if isinstance(kind, type) and issubclass(kind, fused_opt.FusedOptimizer) and kind is not fused_opt.FusedOptimizer
]
EACH = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)


def keywords(kind):
    """What a class takes after its parameters, and the defaults."""
    parameters = list(signature(kind).parameters.values())[1:]
    return {one.name: 0.1 if one.default is Parameter.empty else one.default for one in parameters}


@EACH
def test_the_signature_is_what_can_be_passed(kind):
    assert not [one for one in signature(kind).parameters.values() if one.kind is Parameter.VAR_KEYWORD]
    found = keywords(kind)
    lacking = {"trust_ratio"} if issubclass(kind, fused_opt.LARS | fused_opt.LAMB) else set()
    expected = {extra.key: extra.default for extra in EXTRAS if extra.key not in lacking}
    expected |= {"state_dtype": None, "backend": "auto"}
    assert expected == {key: found[key] for key in Extras.__annotations__.keys() - lacking}
    given = kind([torch.nn.Parameter(torch.ones(2))], **found)
    plain = kind([torch.nn.Parameter(torch.ones(2))], lr=found["lr"])
    assert given.defaults == plain.defaults
    for key in (*lacking, "nonsense"):
        with pytest.raises(TypeError, match=key):
            kind([torch.nn.Parameter(torch.ones(2))], **{"lr": 0.1, key: None})


@EACH
def test_help_describes_every_keyword(kind):
    assert "**" not in kind.__doc__.partition("Example:")[0]
    described = {name.strip() for line in kind.__doc__.splitlines() if ": " in line and line[:4].isspace()
                 for name in line.partition(": ")[0].split(",")}  # fmt: skip
    assert signature(kind).parameters.keys() <= described
    for extra in EXTRAS:
        assert (extra.doc.split("\n")[0] in kind.__doc__) == (extra.key in signature(kind).parameters)


SETTINGS = [
    ("averaging", fused_opt.EMA),
    ("averaging", fused_opt.PSWM),
    ("noise", fused_opt.WeightNoise),
    ("trust_ratio", fused_opt.TrustRatio),
    ("cautious", fused_opt.Cautious),
]


@pytest.mark.parametrize(("key", "kind"), SETTINGS)
def test_a_class_in_place_of_a_setting_is_refused_by_names_that_there_are(key, kind):
    with pytest.raises(TypeError) as refused:
        fused_opt.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, **{key: kind})
    (named,) = re.findall(r"fused_opt\.(\w+)", str(refused.value))
    assert issubclass(kind, getattr(fused_opt, named))
    assert str(refused.value).endswith(f"or None, not the class: {kind.__name__}(...)")


def test_what_errors_and_help_name_is_exported():
    """``fused_opt.X`` in the package's own text, and what a setting must be, can be written by a user."""
    text = "".join(file.read_text() for file in Path(fused_opt.__file__).parent.rglob("*.py"))
    named = set(re.findall(r"\bfused_opt\.([A-Z]\w*|[a-z_]+(?=\())", text))
    named |= {kind.__name__ for extra in EXTRAS for kind in extra.settings} | {"Averaging"}
    assert len(named) > 20
    assert sorted(named - set(fused_opt.__all__)) == []


class Halved(fused_opt.SGD):
    def __init__(self, params, lr, half: bool = True, **extras: Unpack[Extras]):
        super().__init__(params, lr / 2 if half else lr, **extras)


class Opaque(fused_opt.SGD):
    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)


class Inherits(fused_opt.SGD):
    pass


def test_subclasses_have_the_keywords_that_they_say_they_pass_on():
    assert list(keywords(Halved)) == ["lr", "half", *(extra.key for extra in EXTRAS), "state_dtype", "backend"]
    assert list(keywords(Opaque)) == ["kwargs"]
    assert keywords(Inherits) == keywords(fused_opt.SGD)


def model_and_optimizer(backend):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    return model, fused_opt.CLARS(model.parameters(), lr=0.1, nonfinite="raise", backend=backend)


def test_parameters_are_called_what_the_model_calls_them(backend):
    model, optimizer = model_and_optimizer(backend)
    parts = optimizer.track_parts("microbatch")
    model(torch.ones(2)).sum().backward()
    assert list(parts.counts()) == [f"{i} of group 0" for i in range(4)]
    optimizer.step()
    optimizer.name_parameters(model)
    optimizer.zero_grad()
    model(torch.ones(2)).sum().backward()
    names = [name for name, _ in model.named_parameters()]
    assert parts.counts() == dict.fromkeys(names, 1)
    optimizer.step()
    assert list(optimizer.trust_ratios()) == names
    model[1].bias.grad = torch.tensor([float("nan")])
    with pytest.raises(RuntimeError, match=r"1\.bias"):
        optimizer.step()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == names


def test_a_model_that_lacks_a_parameter_names_none():
    model, optimizer = model_and_optimizer("auto")
    with pytest.raises(ValueError, match=r"2 of group 0, of shape \(1, 2\), is none of this Linear's"):
        optimizer.name_parameters(model[0])
    assert "param_names" not in optimizer.param_groups[0]
