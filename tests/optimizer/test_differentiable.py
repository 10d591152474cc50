"""differentiable=True: autograd follows the step, to the weights, the gradients and the hyper-parameters."""

import pytest
import torch
from rules import OF_TORCH, every_elementwise_rule
from support.compare import unchanged

import fused_opt


def outcome(make, start, slope, lr, decay, **options):
    """The weights after three steps from `start`, whose gradients are made of `slope`."""
    weight = start.clone()
    optimizer = make([weight], lr=lr, weight_decay=decay, differentiable=True, **options)
    for step in range(3):
        weight.grad = (slope * (step + 1)).sin()
        optimizer.step()
    return weight


def inputs():
    generator = torch.Generator().manual_seed(0)
    start, slope = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return start.requires_grad_(), slope.requires_grad_()


@every_elementwise_rule
def test_gradients_of_a_step(name, options):
    """Against finite differences; torch.optim's own cannot follow every one of these."""
    options = {key: value for key, value in options.items() if key not in ("lr", "weight_decay")}
    hyper = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.05, 0.02)]
    make = getattr(fused_opt, name)
    assert torch.autograd.gradcheck(lambda *given: outcome(make, *given, **options), (*inputs(), *hyper))


# torch.optim.Adamax raises: it writes its average in place, whose values autograd needs.
@pytest.mark.parametrize("name", [name for name in OF_TORCH if name != "Adamax"])
def test_gradients_as_torch_has_them(name):
    found = []
    for library in (fused_opt, torch.optim):
        given = inputs()
        weight = outcome(getattr(library, name), *given, 0.05, 0.02)
        found.append([weight, *torch.autograd.grad(weight.square().sum(), given)])
    bound = 1e-12 if name == "SGD" else 1e-5  # torch corrects Adam's bias here in float32
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def test_betas_that_require_grad():
    betas = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.8, 0.9)]
    assert torch.autograd.gradcheck(
        lambda *given: outcome(fused_opt.AdamW, *inputs(), 0.05, 0.02, betas=given), tuple(betas)
    )


def test_noise_and_averages_are_followed():
    extras = {"noise": fused_opt.WeightNoise(std=0.1), "averaging": fused_opt.PSWA(2, on_write_back="zero")}
    assert torch.autograd.gradcheck(lambda *given: outcome(fused_opt.SGD, *given, 0.05, 0.02, **extras), inputs())


def test_a_leaf_is_refused_before_anything_is_written():
    parameters = [torch.ones(3), torch.ones(3, requires_grad=True)]
    optimizer = fused_opt.SGD(parameters, lr=0.1, momentum=0.9, differentiable=True)
    optimizer.step()  # without gradients there is nothing to write
    for p in parameters:
        p.grad = torch.ones(3)
    with unchanged(optimizer), pytest.raises(RuntimeError, match="parameter 1 of group 0 is a leaf that requires grad"):
        optimizer.step()


@pytest.mark.parametrize(
    ("extras", "found"),
    [
        ({"trust_ratio": fused_opt.TrustRatio("lars")}, "trust_ratio"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"noise": fused_opt.WeightNoise(std=0.1, relative=True)}, "noise that is relative"),
    ],
    ids=["ratio", "clipping", "relative noise"],
)
def test_norms_are_not_followed_and_refused(extras, found):
    with pytest.raises(ValueError, match=f"differentiable=True, and {found}"):
        fused_opt.SGD([torch.ones(3)], lr=0.1, differentiable=True, **extras)


def test_only_the_reference_is_followed():
    weight = torch.ones(3)
    weight.grad = torch.ones(3)
    optimizer = fused_opt.SGD([weight], lr=0.1, differentiable=True, backend="native")
    with unchanged(optimizer), pytest.raises(RuntimeError, match="autograd cannot follow the step of backend 'native'"):
        optimizer.step()
