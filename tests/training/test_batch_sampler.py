import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from fused_opt.batch_size import CyclicalBatchSampler, CyclicalBatchSize


def seeded(size: int, seed: int = 0) -> RandomSampler:
    return RandomSampler(range(size), generator=torch.Generator().manual_seed(seed))


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_every_example_once_in_batches_of_the_schedule(workers):
    sampler = CyclicalBatchSampler(seeded(50), CyclicalBatchSize(8, levels=3, width=1))
    loader = DataLoader(
        TensorDataset(torch.arange(50)),
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    orders = set()
    for epoch, sizes in enumerate([[8] * 6 + [2], [16] * 3 + [2], [32, 18], [8] * 6 + [2]]):
        sampler.set_epoch(epoch)
        assert len(loader) == len(sizes)
        batches = [batch for (batch,) in loader]
        assert [len(batch) for batch in batches] == sizes
        assert sorted(torch.cat(batches).tolist()) == list(range(50))
        orders.add(tuple(torch.cat(batches).tolist()))
    assert len(orders) == 4


def test_batch_changes_within_an_epoch():
    sampler = CyclicalBatchSampler(range(40), CyclicalBatchSize(4, levels=2, width=0.25))
    assert [len(batch) for batch in sampler] == [4, 4, 4, 8, 4, 4, 4, 8]  # begins: 0 4 8 | 12 | 20 24 28 | 32
    sampler = CyclicalBatchSampler(range(40), CyclicalBatchSize(4, levels=2, width=1.5))
    sampler.set_epoch(1)
    assert [len(batch) for batch in sampler] == [4] * 5 + [8, 8, 4]


def test_drop_last_leaves_out_the_short_batch():
    sampler = CyclicalBatchSampler(range(50), CyclicalBatchSize(8, levels=2, width=1), drop_last=True)
    assert [len(batch) for batch in sampler] == [8] * 6
    sampler.set_epoch(1)
    assert [len(batch) for batch in sampler] == [16] * 3
    with pytest.raises(ValueError, match="need 16 examples or more, found 15"):
        CyclicalBatchSampler(range(15), CyclicalBatchSize(8, levels=2), drop_last=True)


def test_distributed_ranks_share_the_data_and_step_together():
    schedule = CyclicalBatchSize(4, levels=2, width=1)
    ranks = [
        CyclicalBatchSampler(DistributedSampler(range(40), num_replicas=2, rank=rank), schedule) for rank in (0, 1)
    ]
    epochs = []
    for epoch, sizes in enumerate([[4] * 5, [8, 8, 4]]):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        batches = [list(sampler) for sampler in ranks]
        assert [[len(batch) for batch in rank] for rank in batches] == [sizes, sizes]
        assert sorted(flat(batches[0] + batches[1])) == list(range(40))
        epochs.append(flat(batches[0]))
    assert set(epochs[0]) != set(epochs[1])  # set_epoch reached the distributed sampler


def test_repeated_epoch_without_set_epoch_starts_from_its_beginning():
    sampler = CyclicalBatchSampler(seeded(20), CyclicalBatchSize(4, levels=1))
    first = next(iter(sampler))
    sampler.load_state_dict(sampler.state_dict(batches=1))
    assert len(sampler) == 4
    assert sorted(first + flat(sampler)) == list(range(20))
    assert sorted(flat(sampler)) == list(range(20))
    assert len(sampler) == 5


KINDS = {
    "random": lambda size, seed: seeded(size, seed),
    "global": lambda size, seed: RandomSampler(range(size)),
    "distributed": lambda size, seed: DistributedSampler(range(2 * size), num_replicas=2, rank=1),
    "indices": lambda size, seed: list(range(size)),
}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    size=st.integers(1, 150),
    base=st.integers(1, 12),
    levels=st.integers(1, 4),
    width=st.sampled_from([0.05, 0.1, 1 / 3, 0.5, 1, 2.5]),
    shape=st.sampled_from(["sawtooth", "triangle", "cosine"]),
    epoch=st.integers(0, 7),
    drop_last=st.booleans(),
    taken=st.lists(st.integers(0, 8), max_size=4),
    ahead=st.integers(0, 5),
)
def test_resuming_loses_and_repeats_no_example(kind, size, base, levels, width, shape, epoch, drop_last, taken, ahead):
    schedule = CyclicalBatchSize(base, levels, width, shape, maximum=max(base, size) if drop_last else None)
    drop_last = drop_last and base <= size
    torch.manual_seed(1)
    sampler = CyclicalBatchSampler(KINDS[kind](size, 0), schedule, drop_last)
    sampler.set_epoch(epoch)
    whole = list(sampler)

    torch.manual_seed(1)
    sampler = CyclicalBatchSampler(KINDS[kind](size, 0), schedule, drop_last)
    sampler.set_epoch(epoch)
    seen = []
    for interruption, batches in enumerate(taken, 1):
        read = list(itertools.islice(sampler, batches + ahead))  # as workers do
        batches = min(batches, len(read))
        seen += read[:batches]
        state = saved_and_loaded(sampler.state_dict(batches=batches))
        sampler = CyclicalBatchSampler(KINDS[kind](size, interruption), schedule, drop_last)
        sampler.load_state_dict(state)
        sampler.set_epoch(sampler.epoch)  # as the training loop does before it goes on
        assert len(sampler) == len(whole) - len(seen)
    assert seen + list(sampler) == whole


@pytest.mark.parametrize("persistent", [False, True])
def test_resuming_with_workers_that_read_ahead(persistent):
    def loader(sampler):
        data = TensorDataset(torch.arange(60))
        return DataLoader(data, batch_sampler=sampler, num_workers=2, persistent_workers=persistent)

    schedule = CyclicalBatchSize(4, levels=2, width=0.5)
    sampler = CyclicalBatchSampler(seeded(60), schedule)
    sampler.set_epoch(3)
    stream = iter(loader(sampler))
    seen = [next(stream)[0] for _ in range(3)]
    state = saved_and_loaded(sampler.state_dict(batches=3))
    assert state["examples"] == 12
    assert sampler.state_dict()["examples"] > 12  # what was handed out is ahead of what was trained on

    resumed = CyclicalBatchSampler(seeded(60, seed=1), schedule)
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    again = loader(resumed)
    assert len(again) == 9
    seen += [batch for (batch,) in again]
    assert [len(batch) for batch in seen] == [4] * 8 + [8] * 3 + [4]
    assert sorted(torch.cat(seen).tolist()) == list(range(60))
    resumed.set_epoch(4)
    assert sorted(torch.cat([batch for (batch,) in again]).tolist()) == list(range(60))


def test_without_workers_the_sampler_knows_the_position():
    sampler = CyclicalBatchSampler(seeded(30), CyclicalBatchSize(4, levels=1))
    stream = iter(DataLoader(torch.arange(30), batch_sampler=sampler))
    seen = next(stream).tolist() + next(stream).tolist()
    resumed = CyclicalBatchSampler(seeded(30, seed=1), CyclicalBatchSize(4, levels=1))
    resumed.load_state_dict(sampler.state_dict())
    assert sorted(seen + flat(resumed)) == list(range(30))


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_resumes(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def loader(seed):
        sampler = CyclicalBatchSampler(seeded(50, seed), CyclicalBatchSize(3, levels=3, width=0.25))
        return stateful.StatefulDataLoader(range(50), batch_sampler=sampler, num_workers=workers, collate_fn=list)

    first = loader(0)
    stream = iter(first)
    seen = [next(stream) for _ in range(3)]
    second = loader(1)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert rest == list(stream)
    assert sorted(flat(seen + rest)) == list(range(50))


def test_order_is_saved_only_where_it_does_not_follow_from_the_epoch():
    schedule = CyclicalBatchSize(4, levels=1)
    for kind, follows in [("random", False), ("distributed", True), ("indices", True)]:
        sampler = CyclicalBatchSampler(KINDS[kind](10, 0), schedule)
        drawn = flat(sampler)
        assert sampler.state_dict(batches=1)["order"] == (None if follows else drawn)


def test_states_that_do_not_fit_are_refused_and_change_nothing():
    schedule = CyclicalBatchSize(4, levels=1)
    sampler = CyclicalBatchSampler(seeded(20), schedule)
    sampler.set_epoch(2)
    next(iter(sampler))
    good = sampler.state_dict(batches=1)
    with pytest.raises(ValueError, match="the state is of 30 examples, the sampler has 20"):
        sampler.load_state_dict({**good, "total": 30, "epoch": 5})
    with pytest.raises(ValueError, match="no order for epoch 5, and RandomSampler would draw another"):
        sampler.load_state_dict({**good, "order": None, "epoch": 5})
    with pytest.raises(ValueError, match="epoch, order missing"):
        sampler.load_state_dict({"examples": 3, "total": 20})
    with pytest.raises(ValueError, match="asked for batches=6, but this pass over epoch 2 has 5"):
        sampler.state_dict(batches=6)
    assert sampler.state_dict(batches=1) == good
    with pytest.raises(TypeError, match="must have a length, found generator"):
        CyclicalBatchSampler((i for i in range(3)), schedule)
