"""Under DistributedDataParallel: parts of all processes, and the same bits in all of them; in real processes."""

import contextlib
import copy
import math

import pytest
import torch
from support.processes import in_processes, same_everywhere
from torch.nn.parallel import DistributedDataParallel

import fused_opt


class Model(torch.nn.Module):
    """With a branch that a process may leave out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(6, 13)
        self.norm = torch.nn.LayerNorm(13)
        self.branch = torch.nn.Linear(13, 13)
        self.last = torch.nn.Linear(13, 3)
        self.double()

    def forward(self, x, branch=True):
        x = self.norm(torch.tanh(self.first(x)))
        return self.last(self.branch(x) if branch else x)


def batch(*seed):
    return torch.randn(
        8, 6, generator=torch.Generator().manual_seed(sum(s * 1000**i for i, s in enumerate(seed))), dtype=torch.float64
    )


def loss_of(model, x, **options):
    return model(x, **options).square().mean()


def clars(model, **options):
    options = {"coefficient": 0.1, "cap": math.inf, "eps": 0.0, "exempt": 0, "weight_decay": 0.0, **options}
    return fused_opt.CLARS(model.named_parameters(), lr=0.1, **options)


def norms_by_hand(model, step, world, micro_batches, **options):
    """Sum over processes and micro-batches of the norms of what each adds to the mean gradient, by parameter."""
    sums = dict.fromkeys(dict(model.named_parameters()), 0.0)
    for rank in range(world):
        for micro in range(micro_batches):
            loss = loss_of(model, batch(step, rank, micro), **{key: value[rank] for key, value in options.items()})
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            for name, g in zip(sums, gradients):
                sums[name] += 0.0 if g is None else torch.linalg.vector_norm(g).item() / world
    return sums


def ratios_by_hand(model, sums):
    weights = {name: torch.linalg.vector_norm(p.detach()).item() for name, p in model.named_parameters()}
    return {name: 0.1 * weights[name] / norm if norm > 0 and weights[name] > 0 else 1.0 for name, norm in sums.items()}


def train(
    rank,
    world,
    *,
    micro_batches=1,
    steps=3,
    synchronize="last",
    set_to_none=True,
    branch=None,
    between=None,
    **wrapping,
):
    """Ranks' parts against those by hand, and gradients against those of an untracked model, bit by bit."""
    branch = branch or [True] * world
    model, other = Model(), Model()
    ddp, untracked = (DistributedDataParallel(each, **wrapping) for each in (model, other))
    optimizer = clars(model)
    parts = optimizer.track_parts("microbatch", model=ddp)
    for step in range(steps):
        expected = norms_by_hand(copy.deepcopy(model), step, world, micro_batches, branch=branch)
        for net in (ddp, untracked):
            for micro in range(micro_batches):
                lonely = synchronize == "last" and micro < micro_batches - 1
                with net.no_sync() if lonely else contextlib.nullcontext():
                    loss_of(net, batch(step, rank, micro), branch=branch[rank]).backward()
        for p, q in zip(model.parameters(), other.parameters()):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)
        if between is not None:
            factor = between(model)
            expected = {name: norm * factor for name, norm in expected.items()}
        stepped = {name for name, p in model.named_parameters() if p.grad is not None}
        by_hand = {name: ratio for name, ratio in ratios_by_hand(model, expected).items() if name in stepped}
        optimizer.step()
        found = optimizer.trust_ratios()
        assert found == pytest.approx(by_hand, rel=1e-9)
        assert same_everywhere([torch.tensor(list(found.values())), *model.parameters()], rank, world)
        with torch.no_grad():
            for p, q in zip(model.parameters(), other.parameters()):
                q.copy_(p)
        for each in (model, other):
            each.zero_grad(set_to_none)
    parts.remove()
    loss_of(ddp, batch(0, rank)).backward()
    assert not parts.counts()


def check_parts_are_those_of_all_processes(rank, world):
    for view in (False, True):
        for set_to_none in (False, True):
            train(rank, world, gradient_as_bucket_view=view, set_to_none=set_to_none)


def check_micro_batches_of_all_processes(rank, world):
    """With and without no_sync: either way a micro-batch of a process is a part."""
    for view in (False, True):
        train(rank, world, micro_batches=3, gradient_as_bucket_view=view)
        train(rank, world, micro_batches=3, gradient_as_bucket_view=view, synchronize="always")
        train(rank, world, micro_batches=2, gradient_as_bucket_view=view, set_to_none=False)


def check_static_graph(rank, world):
    train(rank, world, static_graph=True)
    # without no_sync, with which torch's own reducer fails in the first backward of a static graph
    train(rank, world, static_graph=True, micro_batches=2, gradient_as_bucket_view=True, synchronize="always")


def check_small_buckets(rank, world):
    train(rank, world, bucket_cap_mb=1e-5)


def check_unused_parameters(rank, world):
    """In one process only, and in all of them."""
    train(rank, world, find_unused_parameters=True, branch=[r == 0 for r in range(world)])
    train(rank, world, find_unused_parameters=True, branch=[False] * world, gradient_as_bucket_view=True)
    train(rank, world, find_unused_parameters=True, branch=[r > 0 for r in range(world)], micro_batches=2)


def check_clipping_and_unscaling_scale_the_parts(rank, world):
    def clip(model):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01).item()
        assert norm > 0.01
        return 0.01 / (norm + 1e-6)

    train(rank, world, between=clip)
    train(rank, world, between=clip, micro_batches=2, gradient_as_bucket_view=True)
    # a GradScaler unscales without a trace
    model = Model()
    ddp = DistributedDataParallel(model)
    optimizer, scaler = clars(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.track_parts("microbatch", model=ddp)
    for explicit in (True, False):
        expected = ratios_by_hand(model, norms_by_hand(copy.deepcopy(model), 0, world, 1))
        optimizer.zero_grad()
        scaler.scale(loss_of(ddp, batch(0, rank, 0))).backward()
        if explicit:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.trust_ratios() == pytest.approx(expected, rel=1e-9)


def check_a_second_step_on_the_same_gradients(rank, world):
    model = Model()
    ddp = DistributedDataParallel(model)
    optimizer = clars(model, nonfinite="skip")
    optimizer.track_parts("microbatch", model=ddp)
    loss_of(ddp, batch(0, rank, 0)).backward()
    expected = norms_by_hand(copy.deepcopy(model), 0, world, 1)
    kept = model.first.weight.grad.clone()
    model.first.weight.grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    model.first.weight.grad.copy_(kept)
    by_hand = ratios_by_hand(model, expected)
    optimizer.step()
    del by_hand["first.weight"]  # whose gradient was written, and by what factor nobody can tell
    assert {name: ratio for name, ratio in optimizer.trust_ratios().items() if name in by_hand} == pytest.approx(
        by_hand
    )


def check_samples_of_all_processes(rank, world):
    model = Model()
    ddp = DistributedDataParallel(model)
    optimizer = clars(model)
    optimizer.track_parts("sample", model=ddp)
    sums = dict.fromkeys(dict(model.named_parameters()), 0.0)
    for r in range(world):
        for x in batch(0, r, 0):
            for name, g in zip(sums, torch.autograd.grad(loss_of(model, x[None]), list(model.parameters()))):
                sums[name] += torch.linalg.vector_norm(g).item() / 8 / world
    expected = ratios_by_hand(model, sums)
    loss_of(ddp, batch(0, rank, 0)).backward()
    optimizer.step()
    assert optimizer.trust_ratios() == pytest.approx(expected, rel=1e-9)


def check_probes_of_all_processes(rank, world):
    model = Model()
    ddp = DistributedDataParallel(model)
    optimizer = clars(model)
    parts = optimizer.track_parts("probe", model=ddp)
    parts.set({p: float(rank + i) for i, p in enumerate(model.parameters())})
    mean = (world - 1) / 2
    expected = ratios_by_hand(model, {name: mean + i for i, (name, _) in enumerate(model.named_parameters())})
    loss_of(ddp, batch(0, rank, 0)).backward()
    optimizer.step()
    assert optimizer.trust_ratios() == pytest.approx(expected, rel=1e-12)


def check_all_processes_keep_the_same_bits_with_everything_on(rank, world):
    model = Model().float()
    ddp = DistributedDataParallel(model)
    optimizer = fused_opt.CLARS(
        model.parameters(),
        lr=0.1,
        noise=fused_opt.WeightNoise(std=0.01, relative=True),
        averaging=fused_opt.PSWA(period=4, probability=0.7),
        max_grad_norm=1.0,
        nonfinite="skip",
    )
    optimizer.track_parts("microbatch", model=ddp)
    start = copy.deepcopy(model)
    for step in range(12):
        loss_of(ddp, batch(step, rank, 0).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        averages = [of_p["average"] for of_p in optimizer.state.values()]
        assert same_everywhere([*model.parameters(), *averages], rank, world)
    assert optimizer.param_groups[0]["periods"] == 3
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters()))


def check_what_is_not_finite_in_one_process_stops_all(rank, world):
    for nonfinite in ("skip", "raise"):
        model = Model()
        ddp = DistributedDataParallel(model)
        optimizer = fused_opt.AdamW(model.named_parameters(), lr=0.1, nonfinite=nonfinite)
        before = copy.deepcopy(model)
        x = batch(0, rank)
        if rank == world - 1:
            x[0, 0] = math.nan
        loss_of(ddp, x).backward()
        if nonfinite == "raise":
            with pytest.raises(RuntimeError, match=r"of parameter first\.weight, first\.bias"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
        assert not optimizer.state
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))


def check_one_all_reduce_of_a_number_per_parameter(rank, world):
    """Beside those of the gradients, which DistributedDataParallel makes from C++."""
    model = Model()
    ddp = DistributedDataParallel(model)
    optimizer = clars(model)
    optimizer.track_parts("microbatch", model=ddp)
    sent, all_reduce = [], torch.distributed.all_reduce

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counting
    try:
        for step in range(3):
            for micro in range(2):
                with ddp.no_sync() if micro == 0 else contextlib.nullcontext():
                    loss_of(ddp, batch(step, rank, micro)).backward()
            assert sent == [8] * (step + 1)  # it is on its way before the step
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.distributed.all_reduce = all_reduce
    assert sent == [8] * 3


def check_refusals(rank, world):
    model = Model()
    optimizer = clars(model)
    for kind in ("microbatch", "probe"):
        with pytest.raises(ValueError, match="give track_parts the model= that the backward runs through"):
            optimizer.track_parts(kind)
    parts = torch.nn.ModuleList([DistributedDataParallel(model.first), DistributedDataParallel(model.last)])
    with pytest.raises(ValueError, match="2 modules under DistributedDataParallel"):
        optimizer.track_parts("microbatch", model=parts)
    ddp = DistributedDataParallel(model)
    tracked = optimizer.track_parts("microbatch", model=ddp)
    with ddp.join(), pytest.raises(RuntimeError, match=r"under join\(\) some have no more batches"):
        ddp(batch(0, rank))
    tracked.remove()
    optimizer.track_parts("microbatch", model=model).remove()  # each alone
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


test_in_processes = in_processes(globals(), 2, 4)
