"""What runs in the processes of tests/distributed/test_checkpoints_move.py: training on shards, saving and resuming."""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_opt

SAVED, STEPS = 5, 10  # steps before the checkpoint and altogether: it falls into the second period of four
PSWM, EMA = fused_opt.PSWM(4, beta=0.5, probability=0.7), fused_opt.EMA(0.9, start=1)
# Optimizers by name; every rank sees the whole batch, so that nothing but the sharding is different.
CASES = {
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "averaging": fused_opt.PSWA(4)}),
    "AdamW": ("AdamW", {"lr": 0.01, "amsgrad": True, "averaging": PSWM}),
    "bfloat16": ("AdamW", {"lr": 0.01, "state_dtype": torch.float32, "averaging": EMA}),
    "states": ("AdamW", {"lr": 0.01, "state_dtype": {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.float64}}),
    "exact": ("AdamW", {"lr": 0.001, "state_dtype": torch.float32, "averaging": EMA, "master_weights": True}),
    "noise": ("SGD", {"lr": 0.1, "momentum": 0.9, "noise": fused_opt.WeightNoise(0.01, schedule="cycle", period=3)}),
}
# With a norm in the step: on other numbers of ranks within rounding.
NORMED = {
    "CLARS": ("CLARS", {"lr": 0.1, "momentum": 0.9, "averaging": fused_opt.SWM(4, beta=0.5)}),
    "LAMB": ("LAMB", {"lr": 0.01, "max_grad_norm": 0.1, "nonfinite": "skip"}),
}
FORMS = ("full", "sharded", "flattened")


def made(case, mesh=None):
    """A small model, on shards if there is a mesh (three rows on four ranks: some are empty), and its optimizer."""
    name, options = {**CASES, **NORMED}[case]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3), torch.nn.Linear(3, 1))
    model.to(torch.bfloat16 if case in ("bfloat16", "exact") else torch.float32)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 0.02}]
    return model, getattr(fused_opt, name)(groups, **options)


def train(model, optimizer, first, last):
    """Steps `first` to `last` of a run whose batches and learning rates follow from the step."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(8, 5, generator=generator).to(next(model.parameters()).dtype)
        model(batch).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.9
        optimizer.step()
        optimizer.zero_grad()


def options_of(form, **more):
    return dsd.StateDictOptions(
        full_state_dict=form == "full", flatten_optimizer_state_dict=form == "flattened", **more
    )


def dicts(model, optimizer, form, **more):
    model_dict, optimizer_dict = dsd.get_state_dict(model, optimizer, options=options_of(form, **more))
    return {"model": model_dict, "optimizer": optimizer_dict}


def save(model, optimizer, folder, form):
    found = dicts(model, optimizer, form, cpu_offload=True)
    if form != "full":
        dcp.save(found, checkpoint_id=folder / form, no_dist=not dist.is_initialized())
    elif not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(found, folder / "full.pt")


def load(model, optimizer, folder, form):
    """As a program does that knows nothing of who saved: on rank 0 alone where the file is whole."""
    alone = not dist.is_initialized()
    if form != "full":
        found = dicts(model, optimizer, form)
        dcp.load(found, checkpoint_id=folder / form, no_dist=alone)
    else:
        found = {"model": {}, "optimizer": {}}
        if alone or dist.get_rank() == 0:
            found = torch.load(folder / "full.pt", weights_only=True)
    # One by one: set_state_dict takes a rank's empty model_state_dict to mean that the model is not to be loaded.
    options = options_of(form, broadcast_from_rank0=form == "full" and not alone)
    dsd.set_model_state_dict(model, found["model"], options=options)
    dsd.set_optimizer_state_dict(model, optimizer, found["optimizer"], options=options)


def result(model, optimizer):
    """Everything that a run leaves, whole, with what evaluation sees."""
    options = dsd.StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = {"weights": dsd.get_model_state_dict(model, options=options)}
    found["optimizer"] = dsd.get_optimizer_state_dict(model, optimizer, options=options)
    if optimizer.param_groups[0]["averaging"] is not None:
        with optimizer.averaged_weights():
            found["averaged"] = copy.deepcopy(dsd.get_model_state_dict(model, options=options))
    return found


def uninterrupted(case, folder, mesh=None):
    """Train, saving on the way in every form."""
    model, optimizer = made(case, mesh)
    train(model, optimizer, 0, SAVED)
    for form in FORMS:
        save(model, optimizer, folder, form)
    train(model, optimizer, SAVED, STEPS)
    return result(model, optimizer)


def resumed(case, folder, form, mesh=None):
    """Go on from a checkpoint, in a new process so to speak: its random generator has moved, and is left alone."""
    model, optimizer = made(case, mesh)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    load(model, optimizer, folder, form)
    assert torch.equal(torch.get_rng_state(), before)
    train(model, optimizer, SAVED, STEPS)
    return result(model, optimizer)


def main(folder, what):
    """Of every case an uninterrupted run, which saves, and resumed ones, as one of the ranks that the environment names."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh, world = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_world_size()
    for case in {**CASES, **NORMED}:
        path = folder / case
        path.mkdir(exist_ok=True)
        found = {"uninterrupted.pt": uninterrupted(case, path, mesh)} if what == "save" else {}
        found |= {f"resumed-{form}-{world}.pt": resumed(case, path, form, mesh) for form in FORMS}
        for name, of_run in found.items() if dist.get_rank() == 0 else ():
            torch.save(of_run, path / name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    os._exit(0)  # gloo's threads may outlive the interpreter
