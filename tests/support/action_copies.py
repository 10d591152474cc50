"""Copies and checkpoints among the actions."""

import copy
import io
import pickle

import torch

from .parameters import checkpoint, clones


def through_a_checkpoint(run, index):
    run.forget_strangers()
    saved = checkpoint(run.optimizer)
    run.attempt(lambda: run.optimizer.load_state_dict(saved))


def load_into_another_optimizer(run, index):
    run.forget_strangers()
    run.untrack()
    run.optimizer = run.another_optimizer(run.parameters())


def load_a_bad_state_dict(run, index):
    if not run.fused:
        return
    run.forget_strangers()
    saved = copy.deepcopy(run.optimizer.state_dict())
    key, value = [("lr", -1.0), ("weight_decay", "much"), ("nonfinite", "bogus"), ("steps", None)][index % 4]
    saved["param_groups"][index % len(saved["param_groups"])][key] = value
    before = len(run.log)
    run.attempt(lambda: run.optimizer.load_state_dict(saved))
    assert run.log.pop() is not None, (key, value)
    assert len(run.log) == before


def deepcopy(run, index):
    run.adopt(copy.deepcopy(run.optimizer))
    run.gradients(index)


def pickled(run, index):
    run.adopt(pickle.loads(pickle.dumps(run.optimizer)))
    run.gradients(index)


def saved_whole(run, index):
    file = io.BytesIO()
    torch.save(run.optimizer, file)
    file.seek(0)
    run.adopt(torch.load(file, weights_only=False))
    run.gradients(index)


def step_beside_a_resumed_one(run, index):
    """A run that is resumed from a checkpoint gives the same bits."""
    run.forget_strangers()
    run.gradients(index)
    run.untrack()  # or parts would have been taken in one of the two only
    other = None
    states = [(p, slot, value) for p in run.parameters() for slot, value in run.state(p).items()]
    # Loaded states have the parameter's dtype, as torch's do, and no gaps, on which the last bit of a GPU's norms depends.
    alike = all(
        (value.dtype == p.dtype or slot in ("average", "master")) and value.stride() == torch.empty_like(value).stride()
        for p, slot, value in states
    )
    if run.fused and not run.tied and alike:
        twins = clones(run.parameters())
        other = run.another_optimizer(twins)
        scales = run.optimizer._scales
        twin_of = dict(zip(run.parameters(), twins))
        other._scales = {k: {twin_of[p]: v for p, v in of.items() if p in twin_of} for k, of in scales.items()}
        for p, twin in twin_of.items():
            twin.grad = p.grad.clone()
    before = len(run.log)
    run.step()
    if other is not None and run.log[before] is None:
        other.step()
        for p, twin in twin_of.items():
            assert torch.equal(p, twin)
            (group,) = (group for group in run.optimizer.param_groups if any(p is q for q in group["params"]))
            for slot, value in other.state[twin].items():
                if slot != "average" or group["samples"] or group["periods"]:  # before, nobody reads it
                    assert torch.equal(value, run.optimizer.state[p][slot])
