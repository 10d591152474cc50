"""The hyper-parameters and errors that PyTorch tests its own optimizers with (torch.testing), none left out."""

import copy
import io
import warnings

import pytest
import torch
from rules import OF_TORCH
from support.compare import assert_close
from torch.testing._internal import common_optimizers as torchs

import fused_opt

INFOS = {info.optim_cls.__name__: info for info in torchs.optim_db if info.optim_cls.__name__ in OF_TORCH}
assert set(INFOS) == set(OF_TORCH)
# foreach, fused and differentiable among them.
INPUTS = [
    pytest.param(name, given.kwargs, id=f"{name}-{given.desc or 'default'}-{place}")
    for name, info in INFOS.items()
    for place, given in enumerate(torchs._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float64, info))
]
ERRORS = [
    pytest.param(name, error, id=f"{name}-{error.optimizer_error_input.desc}")
    for name, info in INFOS.items()
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float64)
]


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_errors(name, error):
    given = error.optimizer_error_input

    def attempt():
        optimizer = getattr(fused_opt, name)(copy.deepcopy(given.params), **given.kwargs)
        if error.error_on == torchs.OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()

    expects = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expects(error.error_type, match=error.error_regex):
        attempt()


def parameters(differentiable):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (3,), ())]
    return [tensor if differentiable else torch.nn.Parameter(tensor) for tensor in tensors]


@pytest.mark.parametrize(("name", "options"), INPUTS)
def test_seven_steps(name, options, backend):
    """As many as PyTorch's own tests make, one of them without gradients; then a checkpoint, a deepcopy and a name."""
    differentiable = options.get("differentiable", False)
    options = {key: value for key, value in options.items() if key != "capturable"}  # torch refuses it on the CPU
    where = "auto" if differentiable else backend
    ours, theirs = parameters(differentiable), parameters(differentiable)
    optimizer = getattr(fused_opt, name)(ours, backend=where, **copy.deepcopy(options))
    oracle = getattr(torch.optim, name)(theirs, **copy.deepcopy(options))
    for step in range(7):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(ours, theirs):
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad, q.grad = (None, None) if step == 3 else (gradient, gradient.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of a gradient of what is no leaf
            optimizer.step()
            oracle.step()
    assert_close(ours, theirs, 1e-6 if differentiable else 1e-12)
    mine, other = optimizer.state_dict(), oracle.state_dict()
    for group, theirs_of_group in zip(mine["param_groups"], other["param_groups"], strict=True):
        assert theirs_of_group.items() <= group.items()
    assert_close(mine["state"], other["state"], 1e-6 if differentiable else 1e-12)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert name in repr(copy.deepcopy(optimizer))
