"""Cyclical batches where a program counts tokens, passes the wrong thing, forgets an epoch, or is killed."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, TensorDataset

from fused_opt import CyclicalBatchSampler, CyclicalBatchSize, Snapshots, accumulate

DATA = TensorDataset(torch.arange(8.0))
SCHEDULE = CyclicalBatchSize(2, levels=2, width=1)


def tokens(batch):
    return int((batch != 0).sum())


def test_the_schedule_counts_examples_and_the_weights_what_is_given():
    batches = [torch.ones(4, 100) for _ in range(8)]
    batches[1][:, 50:] = 0
    steps = []
    for epoch in range(3):
        parts = list(accumulate(batches, CyclicalBatchSize(4, levels=3, width=1), epoch, count=tokens))
        steps.append(sum(part.step for part in parts))
    assert steps == [8, 4, 2]
    parts = list(accumulate(batches, CyclicalBatchSize(8), count=tokens))
    assert [part.weight for part in parts[:4]] == [400 / 600, 200 / 600, 0.5, 0.5]


def test_examples_are_counted_as_told_and_make_the_weights_where_nothing_else_does():
    packed = [torch.ones(length) for length in (6, 3, 4, 2)]  # as many examples as threes of tokens, rounded up
    parts = list(accumulate(packed, CyclicalBatchSize(3), examples=lambda batch: -(-len(batch) // 3)))
    assert [(part.weight, part.step) for part in parts] == [
        (2 / 3, False),
        (1 / 3, True),
        (2 / 3, False),
        (1 / 3, True),
    ]
    with pytest.raises(TypeError, match="the number of examples in a str: pass examples="):
        next(accumulate(["text"], CyclicalBatchSize(3), count=len))


def test_a_step_in_which_nothing_counts_weighs_nothing():
    parts = list(accumulate([torch.zeros(2, 3)] * 2, CyclicalBatchSize(4), count=tokens))
    assert [(part.weight, part.step) for part in parts] == [(0, False), (0, True)]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((DATA, SCHEDULE), "sampler must give indices of examples, found TensorDataset: pass RandomSampler"),
        ((DataLoader(DATA), SCHEDULE), "indices of examples, found DataLoader"),
        ((BatchSampler(range(8), 2, False), SCHEDULE), "indices of examples, found BatchSampler"),
        ((range(8), 32), r"schedule must be a CyclicalBatchSize, found 32: CyclicalBatchSize\(32\) is one"),
        ((DATA,), "missing 1 required positional argument: 'schedule'"),
    ],
)
def test_what_cannot_be_sampled_is_refused_when_made(arguments, found):
    with pytest.raises(TypeError, match=found):
        CyclicalBatchSampler(*arguments)


@pytest.mark.parametrize("sampler", [DistributedSampler(DATA, 1, 0), SequentialSampler(DATA)], ids=type)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_forgotten_set_epoch_is_said_once(sampler, workers):
    loader = DataLoader(DATA, batch_sampler=CyclicalBatchSampler(sampler, SCHEDULE), num_workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(loader)
        assert [w for w in caught if "set_epoch" in str(w.message)] == []
        for _ in range(3):
            list(loader)
    (said,) = [str(w.message) for w in caught if "set_epoch" in str(w.message)]
    assert said.startswith(
        "a second pass begins and set_epoch was never called: it has the batch sizes of epoch 0 again"
    )
    assert type(sampler).__name__ in said


def test_who_sets_the_epoch_or_resumes_it_hears_nothing():
    batches = CyclicalBatchSampler(range(8), SCHEDULE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches.set_epoch(0)
        sizes = [[len(batch) for batch in batches] for _ in range(2)]
        batches.set_epoch(1)
        sizes.append([len(batch) for batch in batches])
        other = CyclicalBatchSampler(range(8), SCHEDULE)
        other.load_state_dict(batches.state_dict(batches=1))
        sizes += [[len(batch) for batch in other] for _ in range(2)]
    assert sizes == [[2, 2, 2, 2]] * 2 + [[4, 4], [4], [4, 4]]


def test_a_sampler_says_where_it_is():
    batches = CyclicalBatchSampler(range(8), CyclicalBatchSize(2, levels=2, width=0.5))
    passing = iter(batches)
    for _ in range(2):
        next(passing)
    assert repr(batches) == (
        "CyclicalBatchSampler(CyclicalBatchSize(base=2, levels=2, width=0.5, shape='sawtooth', maximum=None): "
        "epoch 0, 4 of 8 examples given, batches of 4 next)"
    )


def test_a_run_that_is_killed_while_it_saves_leaves_the_snapshot_it_had(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    Snapshots(model, SCHEDULE, tmp_path)(2)
    saved = torch.load(tmp_path / "snapshot-1.pt")["weight"].clone()

    def killed(state, path):
        with open(path, "wb") as file:
            file.write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", killed)
        again = Snapshots(model, SCHEDULE, tmp_path)
        model.weight.data += 1
        with pytest.raises(KeyboardInterrupt):
            again(2)
    assert again.paths == []
    assert torch.equal(torch.load(tmp_path / "snapshot-1.pt")["weight"], saved)
    assert again(2) == tmp_path / "snapshot-1.pt"
    assert torch.equal(torch.load(tmp_path / "snapshot-1.pt")["weight"], model.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-1.pt"]


def test_a_snapshot_cut_short_is_left_out_with_a_word(tmp_path):
    model = nn.Linear(2, 2)
    snapshots = Snapshots(model, SCHEDULE, tmp_path)
    for epoch in (2, 4, 6):
        snapshots(epoch)
    cut, empty = tmp_path / "snapshot-2.pt", tmp_path / "snapshot-3.pt"
    cut.write_bytes(cut.read_bytes()[:-100])
    empty.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"left out: \['.*snapshot-2\.pt', '.*snapshot-3\.pt'\]"):
        resumed = Snapshots(model, SCHEDULE, tmp_path, epoch=6)
    assert resumed.paths == [tmp_path / "snapshot-1.pt"]
