"""Random sequences of what users do: beside torch.optim, and, with the extras, the backends beside the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.actions import ACTIONS, OFTEN, Run
from support.compare import assert_close

import fused_opt
from fused_opt import backends

OF_TORCH = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.2}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.05, "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.05, "eps": 1e-3, "amsgrad": True}),
    ("AdamW", {"lr": 0.05, "eps": 1e-3}),
]
ALL = [
    *OF_TORCH,
    ("Lion", {"lr": 0.05}),
    ("LARS", {"lr": 0.5, "coefficient": 0.1}),
    ("CLARS", {"lr": 0.5}),
    ("LAMB", {"lr": 0.05, "eps": 1e-3}),
]
SEQUENCES = st.lists(st.tuples(st.sampled_from([*OFTEN, *ACTIONS]), st.integers(0, 59)), min_size=12, max_size=40)


def assert_alike(ours, theirs):
    """To rounding errors of values around 1: those of float32, and of noise, which is a float32 number, stay."""
    dtypes = {p.dtype for p in theirs.parameters()}
    noisy = theirs.extras and any(group["noise"] is not None for group in theirs.optimizer.param_groups)
    coarse = 5e-2 if torch.bfloat16 in dtypes else 2e-5 if noisy or torch.float32 in dtypes else 0.0
    ours.bound = max(ours.bound, coarse)
    assert len(ours.log) == len(theirs.log)
    for seen, expected in zip(ours.log, theirs.log):
        if isinstance(expected, float) or (isinstance(expected, list) and all(isinstance(x, float) for x in expected)):
            assert seen == pytest.approx(expected, rel=ours.bound, nan_ok=True)
        else:
            assert_close(seen, expected, ours.bound, 1.0)
    assert_close(ours.parameters(), theirs.parameters(), ours.bound, 1.0)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(ours.optimizer.state.get(p, {}), theirs.optimizer.state.get(q, {}), ours.bound, 1.0)
        assert p.stride() == q.stride()
    if theirs.fused:
        for a, b in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups):
            assert {**a, "params": None} == {**b, "params": None}
    ours.log.clear()
    theirs.log.clear()


def run_both(ours, theirs, sequence):
    for action, index in sequence:
        for run in (ours, theirs):
            run.do(action, index)
        assert_alike(ours, theirs)


def named(backend):
    """The reference by name; others beside what steps the parameters that they do not."""
    return backend if backend == "reference" else "auto"


def test_beside_torch(backend):
    @given(st.sampled_from(OF_TORCH), SEQUENCES)
    def check(rule, sequence):
        name, options = rule
        ours = Run(getattr(fused_opt, name), False, backend=named(backend), **options)
        theirs = Run(getattr(torch.optim, name), False, foreach=False, **options)
        run_both(ours, theirs, sequence)

    check()


@pytest.mark.skipif(backends.get("native").unavailable() is not None, reason="the reference is all there is")
def test_with_extras_beside_the_reference(backend):
    if backend == "reference":
        pytest.skip("it is the oracle")

    @given(st.sampled_from(ALL), SEQUENCES)
    def check(rule, sequence):
        name, options = rule
        ours = Run(getattr(fused_opt, name), True, backend=named(backend), **options)
        theirs = Run(getattr(fused_opt, name), True, backend="reference", **options)
        run_both(ours, theirs, sequence)

    check()
