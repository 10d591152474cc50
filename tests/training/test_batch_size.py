import re
import runpy
from pathlib import Path

import pytest
import torch
from support import ROOT
from torch.utils.data import DataLoader, TensorDataset

from fused_opt.accumulation import accumulate, leading_size
from fused_opt.batch_size import CyclicalBatchSampler, CyclicalBatchSize, by_update

# The schedule


@pytest.mark.parametrize(
    ("shape", "cycle"),
    [
        ("sawtooth", [10, 20, 40, 80]),
        ("triangle", [10, 20, 40, 80, 40, 20]),
        ("cosine", [10, 14, 28, 59]),  # 2 ** (3 (1 - cos(pi t)) / 2) at t = 0, 1/4, 1/2, 3/4
    ],
)
def test_batch_sizes_of_full_cycles(shape, cycle):
    schedule = CyclicalBatchSize(10, levels=4, width=5, shape=shape)
    assert schedule.period == 5 * len(cycle)
    assert [schedule.at(5 * level) for level in range(2 * len(cycle))] == 2 * cycle
    if shape != "cosine":
        assert [schedule.at(epoch) for epoch in range(5 * len(cycle))] == [n for n in cycle for _ in range(5)]


def test_cosine_rises_within_a_level_and_stays_below_the_largest():
    schedule = CyclicalBatchSize(100, levels=4, width=5, shape="cosine")
    sizes = [schedule.at(epoch / 10) for epoch in range(200)]
    assert sizes == sorted(sizes)
    assert (sizes[50], sizes[75], sizes[-1]) == (136, 190, 800)
    assert schedule.multiplier(7.5) == pytest.approx(2 ** (1.5 * (1 - 0.38268343236508984)))


def test_published_rule_at_whole_epochs():
    schedule = CyclicalBatchSize(32)
    assert [schedule.multiplier(epoch) for epoch in range(100)] == [2 ** ((e // 5) % 4) for e in range(100)]


@pytest.mark.parametrize("width", [0.1, 0.3, 1 / 3, 0.7])
def test_float_positions_at_a_level_belong_to_it(width):
    schedule = CyclicalBatchSize(1, levels=4, width=width)
    total = 0.0
    for step in range(400):
        assert schedule.at(step * width) == 2 ** (step % 4)
        assert schedule.at(total) == 2 ** (step % 4)
        total += width


def test_maximum_limits_size_and_multiplier():
    schedule = CyclicalBatchSize(32, levels=4, width=1, maximum=100)
    assert [schedule.at(epoch) for epoch in range(5)] == [32, 64, 100, 100, 32]
    assert schedule.multiplier(3) == 3.125
    assert schedule.largest == 100


def test_noise_scale():
    schedule = CyclicalBatchSize(50, levels=2, width=1)
    assert schedule.noise_scale(0, lr=0.1, dataset_size=1000) == pytest.approx(0.1 * 19)
    assert schedule.noise_scale(1, lr=0.1, dataset_size=1000) == pytest.approx(0.1 * 9)
    assert schedule.noise_scale(1, lr=0.1, dataset_size=1000, momentum=0.9) == pytest.approx(0.1 * 10 / 0.1)
    assert schedule.noise_scale(1, lr=0.1, dataset_size=80) == 0  # the whole data set in a batch


@pytest.mark.parametrize(("shape", "quiet"), [("sawtooth", [8, 16, 24]), ("triangle", [8, 20, 32])])
def test_cycles_count_the_ends_of_largest_batches(shape, quiet):
    schedule = CyclicalBatchSize(1, levels=4, width=2, shape=shape)
    for number, epoch in enumerate(quiet):
        assert schedule.at(epoch - 0.1) == 8 > schedule.at(epoch)
        assert (schedule.cycles(epoch - 0.1), schedule.cycles(epoch)) == (number, number + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": 0}, "base must be a whole number of at least 1, found 0"),
        ({"base": 1.5}, "found 1.5"),
        ({"base": 8, "levels": 0}, "levels must be a whole number"),
        ({"base": 8, "width": 0}, "width must be a number of epochs above 0"),
        ({"base": 8, "width": float("nan")}, "width must be"),
        ({"base": 8, "shape": "square"}, "sawtooth, triangle, cosine, found 'square'"),
        ({"base": 8, "maximum": 4}, "maximum must be at least base, 8, found 4"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        CyclicalBatchSize(**arguments)
    with pytest.raises(ValueError, match="epoch must be a number of at least 0, found -1"):
        CyclicalBatchSize(8).at(-1)


def test_spans_cover_the_epoch_from_where_they_start():
    schedule = CyclicalBatchSize(4, levels=2, width=0.5)
    assert list(schedule.spans(0, 19)) == [(0, 4), (4, 8), (8, 12), (12, 19)]
    assert list(schedule.spans(0, 19, start=8)) == [(8, 12), (12, 19)]
    assert list(schedule.spans(0, 19, drop_last=True)) == [(0, 4), (4, 8), (8, 12)]
    with pytest.raises(ValueError, match="need 1 examples or more, found 0"):
        next(schedule.spans(0, 0))


# From epochs to updates


@pytest.mark.parametrize("drop_last", [False, True])
def test_updates_are_those_that_the_sampler_makes(drop_last):
    schedule = CyclicalBatchSize(7, levels=3, width=0.5)
    sampler = CyclicalBatchSampler(range(100), schedule, drop_last=drop_last)
    made = [0]
    for epoch in range(6):
        sampler.set_epoch(epoch)
        made.append(made[-1] + len(list(sampler)))
    assert [schedule.updates(epochs, 100, drop_last) for epochs in range(7)] == made
    assert schedule.updates(0.5, 100) == 8  # 7 examples each up to 56: the eighth begins at 49


def test_by_update_drives_a_scheduler_by_the_epoch():
    schedule = CyclicalBatchSize(50, levels=3, width=1)  # 4, 2 and 1 updates for 200 examples
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    decay = by_update(lambda epoch: 1 - epoch / 8, schedule, 200)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    epochs = [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 3.25]
    assert rates == pytest.approx([1 - epoch / 8 for epoch in epochs])
    assert decay(2) == 1 - 0.5 / 8  # any order


# Accumulation


def test_accumulated_gradient_is_the_mean_over_examples():
    torch.manual_seed(0)
    data, target = torch.randn(43, 5, dtype=torch.float64), torch.randn(43, dtype=torch.float64)
    weight = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    schedule = CyclicalBatchSize(4, levels=3, width=0.5)
    loader = DataLoader(TensorDataset(data, target), batch_size=4)  # ten of 4 and one of 3
    starts, begin, end = [], 0, 0
    for epoch in range(3):
        begin = end = 0
        for (x, y), share, step in accumulate(loader, schedule, epoch):
            (share * (x @ weight - y).square().mean()).backward()
            end += len(x)
            if step:
                gradient = torch.autograd.grad((data[begin:end] @ weight - target[begin:end]).square().mean(), weight)
                torch.testing.assert_close(weight.grad, gradient[0], rtol=1e-12, atol=1e-12)
                starts.append((epoch, begin, end - begin))
                weight.grad, begin = None, end
        assert end == 43
    # Micro-batch 6 of 11 is the first of the second half.
    assert starts == [
        *[(0, 4 * i, 4) for i in range(6)], (0, 24, 8), (0, 32, 8), (0, 40, 3),
        (1, 0, 16), (1, 16, 16), (1, 32, 4), (1, 36, 4), (1, 40, 3),
        (2, 0, 8), (2, 8, 8), (2, 16, 8), (2, 24, 16), (2, 40, 3),
    ]  # fmt: skip


def test_accumulation_over_unequal_parts_and_a_count_of_ones_own():
    sizes = [5, 1, 2, 9, 3, 1]
    parts = list(accumulate([torch.zeros(size) for size in sizes], CyclicalBatchSize(6, levels=1)))
    assert [part.step for part in parts] == [False, True, False, True, False, True]
    assert [part.weight for part in parts] == [5 / 6, 1 / 6, 2 / 11, 9 / 11, 3 / 4, 1 / 4]
    tokens = [{"mask": torch.tensor(mask)} for mask in ([1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1])]
    counted = accumulate(tokens, CyclicalBatchSize(8, levels=1), count=lambda batch: batch["mask"].sum())
    assert [(part.weight, part.step) for part in counted] == [(0.75, False), (0.25, True), (1.0, True)]


def test_accumulation_reads_one_step_ahead_and_no_further():
    read = []

    def stream():
        for i in range(8):
            read.append(i)
            yield torch.zeros(2)

    parts = accumulate(stream(), CyclicalBatchSize(4, levels=1), length=8)
    next(parts)
    assert read == [0, 1]
    with pytest.raises(TypeError, match="a generator has no length: pass length="):
        next(accumulate(stream(), CyclicalBatchSize(4)))


def test_resumed_accumulation_goes_on_with_the_size_due():
    batches = [torch.zeros(1)] * 12
    schedule = CyclicalBatchSize(1, levels=2, width=0.5)
    whole = [part.step for part in accumulate(batches, schedule)]
    assert whole == [True] * 6 + [False, True] * 3
    assert [p.step for p in accumulate(batches[8:], schedule, epoch=8 / 12, length=12)] == whole[8:]


def test_leading_size():
    assert leading_size({"a": [torch.zeros(3, 2)]}) == 3
    assert leading_size((torch.zeros(4), torch.zeros(5))) == 4
    for unknown in ("text", [], torch.zeros(()), [1, 2]):
        with pytest.raises(TypeError, match="pass examples="):
            leading_size(unknown)


# The plot


def test_plot_draws_size_and_noise(tmp_path: Path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    schedule = CyclicalBatchSize(10, levels=2, width=1)
    figure = schedule.plot(3, lr=lambda epoch: 1 / (1 + epoch), dataset_size=100)
    above, below = figure.axes
    epochs, sizes = above.lines[0].get_data()
    assert (epochs[0], epochs[-1], len(epochs)) == (0, 2.99, 300)
    assert list(sizes) == [10] * 100 + [20] * 100 + [10] * 100
    assert below.lines[0].get_ydata()[[0, 100, 200]] == pytest.approx([9, 4 / 2, 9 / 3])
    figure.savefig(tmp_path / "schedule.png")
    pyplot.close(figure)


# The example


def test_example_compares_at_equal_numbers_of_examples(tmp_path, monkeypatch, capsys):
    script = ROOT / "examples" / "cyclical_batches.py"
    monkeypatch.setattr("sys.argv", [str(script), "--quick", "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "its figures mean nothing" in printed
    rows = re.findall(r"^(\w+ .*?) +(\d+) +(\d+)   (\d\.\d{4})", printed, re.MULTILINE)
    table = {name: (int(examples), int(updates)) for name, examples, updates, _ in rows}
    assert table["fixed 32"] == (2000, 64)
    assert table["fixed 67"] == (2000, 30)
    assert table["cyclical 32 to 256"] == (2000, 16 + 8 + 4 + 2)
    assert all(float(bits) < 6 for *_, bits in rows)
    assert {path.name for path in tmp_path.iterdir()} == {
        "cyclical_batches.png",
        "cyclical_batches_schedule.png",
    }
