"""Values of wrong kinds under every key of a state_dict: an error in words with nothing changed, or it loads and steps."""

import copy
import math

import numpy as np
import pytest
import torch
from rules import both_kinds
from support.compare import unchanged
from support.parameters import set_gradients

import fused_opt

WRONG = {
    "None": None,
    "text": "nonsense",
    "bytes": b"\x00",
    "minus one": -1,
    "half": 0.5,
    "nan": math.nan,
    "infinity": math.inf,
    "large": 2**70,
    "complex": 1j,
    "true": True,
    "list": [],
    "tuple": (0.5, 0.5, 0.5),
    "dict": {},
    "object": object(),
    "class": torch.optim.SGD,
    "array": np.ones(3),
    "tensor": torch.tensor(0.5),
    "vector": torch.ones(3),
    "whole": torch.ones(2, 3, dtype=torch.int64),
    "quantized": torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
    "sparse": torch.eye(2, 3).to_sparse(),
    "meta": torch.ones(2, 3, device="meta"),
    "expanded": torch.ones(()).expand(2, 3),
    "negated": torch._neg_view(torch.ones(2, 3)),
    "without memory": torch._efficientzerotensor((2, 3)),
}
EXTRAS = {
    "noise": fused_opt.WeightNoise(std=1e-3),
    "averaging": fused_opt.EMA(0.5),
    "trust_ratio": fused_opt.TrustRatio("lars"),
    "max_grad_norm": 1.0,
    "nonfinite": "skip",
}


def trained(name, options, backend, **extras):
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((2, 3), (4,))]
    optimizer = getattr(fused_opt, name)(parameters, backend=backend, **options, **extras)
    for step in range(2):
        set_gradients(parameters, step)
        optimizer.step()
    return optimizer


def places(saved):
    """Every key of a state_dict, by the path to it."""
    yield from ((key,) for key in saved)
    yield from (("param_groups", 0, key) for key in saved["param_groups"][0])
    yield from (("param_groups", 0, "params", 1), ("param_groups", 0), ("state", 0))
    yield from (("state", 0, slot) for slot in saved["state"][0])


def spoiled(saved, path, value):
    result = copy.deepcopy(saved)
    *parents, last = path
    at = result
    for key in parents:
        at = at[key]
    at[last] = value
    return result


def refused(optimizer, call, about):
    """Whether it raises; then in words, and nothing has changed."""
    look = unchanged(optimizer)
    look.__enter__()
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        look.__exit__(None, None, None)
        assert len(str(error)) > 10, (about, repr(error))  # noqa: PT017
        return True
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "extras"])
@both_kinds
def test_wrong_values_are_refused_or_harmless(name, options, extras, backend):
    saved = trained(name, options, backend, **extras).state_dict()
    plain = trained(name, options, backend)
    failures = []
    for path in places(saved):
        for kind, value in WRONG.items():
            bad = spoiled(saved, path, value)
            try:
                if not refused(plain, lambda: plain.load_state_dict(bad), (path, kind)):  # noqa: B023
                    set_gradients([p for group in plain.param_groups for p in group["params"]], 5)
                    refused(plain, plain.step, (path, kind))
                    plain = trained(name, options, backend)
            except Exception as error:
                failures.append(f"{kind} under {path}: {error!r:.120}")
                plain = trained(name, options, backend)
    assert not failures, "\n".join(failures)
