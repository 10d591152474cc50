"""The studies' protocol, on trainings that are formulas; and that each study runs, in small."""

import csv
import gzip
import hashlib
import math
import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import ROOT

from studies import __main__ as program
from studies import cyclical, data, gradinit, harness, report
from studies.data import Data, MissingData, Split
from studies.harness import TEST, VALIDATION, Arm, Study, grid, pending, rate, run_study
from studies.training import accuracy, loss_of
from studies.transformer import Transformer

PARTS = {"train": 0, VALIDATION: 1, TEST: 2}


class Formula:
    """A training whose score is -(log10(lr) - best)^2 with another best on test data; its process can be killed in one."""

    def __init__(self, stop_after=math.inf):
        self.seen, self.stop_after = [], stop_after

    def __call__(self, options, lr, seed, train, held_out, classes):
        if len(self.seen) >= self.stop_after:
            os.kill(os.getpid(), signal.SIGKILL)
        part = int(held_out.inputs[0])
        self.seen.append((lr, seed, part))
        best = options["best"] + (1.0 if part == PARTS[TEST] else 0.0)
        score = -((math.log10(lr) - best) ** 2) + seed / 1000
        return {"score": score, "examples": options.get("examples", 64), "updates": 8}


def one_number(part):
    return Split(torch.tensor([PARTS[part]]), torch.tensor([0]))


def made(train, arms=None, **options):
    arms = arms or [
        Arm("set", "plain", (-4, -3, -2), {"best": -1.5}),
        Arm("set", "other", (-4, -3, -2), {"best": -0.5}, ("plain",), same_rate=True),
    ]
    everything = Data(one_number("train"), one_number(VALIDATION), one_number(TEST), 10)
    seeds = {"tuning_seeds": (101, 102, 103), "seeds": (1, 2, 3, 4, 5), **options}
    return Study("formula", "A formula", arms, "score", True, lambda given: everything, train, **seeds)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    path, whole = tmp_path / "killed.csv", Formula()
    expected = run_study(made(whole), tmp_path / "whole.csv", None)
    child = multiprocessing.get_context("fork").Process(
        target=run_study, args=(made(Formula(stop_after=7)), path, None)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(rows_of(path)) == 7
    with path.open("a") as file:
        file.write("set,plain,valid")  # what a kill in the middle of a write leaves
    second = Formula()
    rows = run_study(made(second), path, None)
    assert second.seen == whole.seen[7:]
    keys = [(row["arm"], row["split"], row["lr"], row["seed"]) for row in rows_of(path)]
    assert len(set(keys)) == len(keys) == len(rows) == len(whole.seen)
    assert report.page(made(whole), rows) == report.page(made(whole), expected)
    assert run_study(made(Formula(stop_after=0)), path, None) == rows  # nothing is left to run


def test_rates_are_chosen_by_validation_data_alone(tmp_path):
    training = Formula()
    study = made(training)
    rows = run_study(study, tmp_path / "rows.csv", None)
    plain, other = study.arms
    # best at -1.5 within the grid; at -0.5 beyond its end, until a point beyond the best shows that it was
    assert grid(study, plain, rows) == ([-4, -3, -2], 0.032)
    assert grid(study, other, rows) == ([-4, -3, -2, -1, 0], 0.32)
    of_tuning = {(seed, part) for _, seed, part in training.seen if seed > 100}
    of_test = {(seed, part) for _, seed, part in training.seen if seed < 100}
    assert of_tuning == {(seed, PARTS[VALIDATION]) for seed in (101, 102, 103)}
    assert of_test == {(seed, PARTS[TEST]) for seed in (1, 2, 3, 4, 5)}
    # on test data other rates would have been better; the chosen one is run, and the other arm's for same_rate
    tested = {(row["arm"], row["lr"]) for row in rows if row["split"] == TEST}
    assert tested == {("plain", 0.032), ("other", 0.32), ("other", 0.032)}


def test_no_test_is_run_before_its_rate_is_chosen():
    study = made(Formula())
    runs = pending(study, [])
    assert {run.split for run in runs} == {VALIDATION}
    assert [(run.arm.name, run.lr, run.seed) for run in runs[:4]] == [
        ("plain", 0.01, 101),
        ("plain", 0.01, 102),
        ("plain", 0.01, 103),
        ("plain", 0.032, 101),
    ]


def test_a_grid_grows_at_either_end_and_no_further_than_it_may(tmp_path):
    arms = [Arm("set", "low", (0, 1), {"best": -0.9}), Arm("set", "high", (0, 1), {"best": 9.0})]
    study = made(Formula(), arms, reach=3)
    rows = run_study(study, tmp_path / "rows.csv", None)
    assert grid(study, arms[0], rows) == ([-3, -2, -1, 0, 1], 0.1)
    assert grid(study, arms[1], rows) == ([0, 1, 2, 3, 4], 100.0)
    assert [rate(k) for k in range(-4, 2)] == [0.01, 0.032, 0.1, 0.32, 1.0, 3.2]


def test_worse_is_higher_where_less_is_better(tmp_path):
    arms = [Arm("set", "errors", (-4, -3, -2), {"best": -1.5})]
    study = replace(made(Formula(), arms, reach=0), higher=False)
    assert grid(study, arms[0], run_study(study, tmp_path / "rows.csv", None))[1] in (0.01, 0.1)


def test_an_interval_by_hand():
    """Differences 1, 2 and 3: mean 2, deviation 1, and 4.303 / sqrt(3) on either side; seeds that one lacks do not count."""
    ours, theirs = {1: 11.0, 2: 22.0, 3: 33.0, 4: 0.0}, {3: 30.0, 1: 10.0, 2: 20.0}
    assert report.interval(ours, theirs) == pytest.approx((2, 2 - 2.484338, 2 + 2.484338), abs=1e-6)
    assert report.difference(ours, theirs, 1) == "+2.0 (-0.5 to +4.5)"
    assert report.difference({1: 1.0, 2: 1.1}, {1: 2.0, 2: 2.1}, 1) == "**-1.0 (-1.0 to -1.0)**"


def test_t_is_students():
    stats = pytest.importorskip("scipy.stats")
    for n, t in enumerate(report.T, start=1):
        assert t == pytest.approx(stats.t.ppf(0.975, n), abs=5e-4)


def test_other_budgets_are_an_error(tmp_path):
    arms = [Arm("set", "plain", (0,), {"best": 0}), Arm("set", "more", (0,), {"best": 0, "examples": 65})]
    with pytest.raises(RuntimeError, match=r"formula, set: .* \{64: 'plain', 65: 'more'\}"):
        run_study(made(Formula(), arms, reach=0), tmp_path / "rows.csv", None)


def test_a_file_of_another_study_is_not_gone_on_with(tmp_path):
    path = tmp_path / "rows.csv"
    run_study(made(Formula()), path, None)
    with pytest.raises(ValueError, match=r"rows.csv has other columns than this study"):
        run_study(replace(made(Formula()), extras=("wobble",)), path, None)


@pytest.mark.filterwarnings("ignore:gradinit lowered the gradient norm and nothing else")  # in so few iterations
@pytest.mark.parametrize("name", program.STUDIES)
def test_a_study_runs_in_small(name, tmp_path, capsys):
    assert program.main([name, "--quick", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Its figures mean nothing" in shown
    assert "Its figures mean nothing" in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(tmp_path / f"{name}.csv")
    assert {row["split"] for row in rows} == {VALIDATION, TEST}
    assert all(math.isfinite(float(row["score"])) for row in rows)
    for setting in {row["setting"] for row in rows}:
        of_setting = [row for row in rows if row["setting"] == setting]
        assert len({row["arm"] for row in of_setting}) > 1
        assert len({row["examples"] for row in of_setting}) == 1


def test_two_runs_and_two_processes_give_the_same_table(tmp_path):
    study = replace(program.study_of("averaging", quick=True), tuning_seeds=(101,), seeds=(1, 2), reach=0)
    one, two = (run_study(study, tmp_path / f"{jobs}.csv", None, jobs) for jobs in (1, 2))
    assert report.page(study, one) == report.page(study, sorted(two, key=lambda row: row["seconds"]))


@pytest.mark.parametrize("name", sorted(path.stem for path in program.RESULTS.glob("*.csv")))
def test_the_published_page_is_that_of_the_rows(name):
    study = program.study_of(name)
    rows = harness.read(study, program.RESULTS / f"{name}.csv")
    assert not pending(study, rows)
    harness.check_budgets(study, rows)
    assert (program.RESULTS / f"{name}.md").read_text() == report.page(study, rows)


@pytest.mark.parametrize("name", program.STUDIES)
def test_a_colour_has_one_meaning_in_all_settings(name):
    study = program.study_of(name)
    style = report.styles(study)
    assert style.keys() == {arm.name for arm in study.arms}
    assert len(set(style.values())) == len(style)
    for one, (color, _) in style.items():
        assert {other for other in style if style[other][0] == color} == {
            other for other in style if other.partition(",")[0] == one.partition(",")[0]
        }


def figures(text):
    """Means with their spread."""
    return set(re.findall(r"\d+\.\d+ ± \d+\.\d+", " ".join(text.split())))


def test_figures_in_words_are_in_the_tables_of_the_studies_that_are_named():
    def tables(name):
        return figures((program.RESULTS / f"{name}.md").read_text().partition("## Figures")[2])

    for path in report.PAGES.glob("*.md"):
        assert figures(path.read_text()) <= tables(path.stem)
    seen = set()
    for section in (ROOT / "docs" / "methods.md").read_text().split("\n## "):
        named = set(re.findall(r"studies/results/(\w+)\.md", section))
        seen |= (found := figures(section))
        assert found <= set().union(*map(tables, named)), section.partition("\n")[0]
    assert len(seen) > 10


def test_missing_data_says_where_to_get_it(tmp_path, capsys):
    with pytest.raises(MissingData, match=r"(?s)Bible .* not found in .*apt-get download sword-text-kjv .*dpkg -x"):
        data._find("The King James Bible", "sword-text-kjv", [tmp_path], ("ot.bzs",), "")
    with pytest.raises(SystemExit):
        program.main(["nothing"])
    assert "there is no study nothing" in capsys.readouterr().err


def test_wrong_labels_are_of_other_classes_and_in_training_alone():
    right = Data(*(Split(torch.zeros(50), torch.arange(50) % 10) for _ in range(3)), 10)
    found, again = data.with_wrong_labels(right, 0.4), data.with_wrong_labels(right, 0.4)
    assert (found.train.targets != right.train.targets).sum() == 20
    assert found.train.targets.min() == 0
    assert found.train.targets.max() == 9
    assert torch.equal(found.train.targets, again.train.targets)
    assert torch.equal(right.train.targets, torch.arange(50) % 10)
    assert found[1:] == right[1:]


def test_an_ensemble_is_of_the_weights_at_the_ends_of_cycles(monkeypatch):
    kept = []

    def judged(model, split, classes):
        kept.append(model)
        return 0.0

    monkeypatch.setattr(cyclical, "bits", judged)
    split = Split(torch.arange(80).view(16, 5) % 7, torch.arange(1, 81).view(16, 5) % 7)
    for epochs in (4, 8, 11):
        torch.manual_seed(0)
        options = {"schedule": "constant", "batch": "cyclical 16 to 128", "epochs": epochs, "ensemble": epochs == 11}
        cyclical.train(options, 0.5, 1, split, split, 7)
    four, eight, ensemble = kept
    assert isinstance(ensemble, cyclical.Ensemble)
    assert len(ensemble.states) == 2
    for model, state in zip((four, eight), ensemble.states):
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    expected = (four(split.inputs).softmax(-1) + eight(split.inputs).softmax(-1)) / 2
    assert torch.allclose(ensemble(split.inputs).exp(), expected)


def test_the_post_ln_transformer_is_normalized_last_and_scored_by_places():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 32)
    for pre in (False, True):
        seen = Transformer(7, 32, 2, pre=pre).blocks(x + 1)
        assert torch.allclose(seen.mean(-1), torch.zeros(()), atol=1e-5) == (not pre)
    split = Split(torch.randint(7, (8, 32)), torch.randint(7, (8, 32)))
    options = {"task": gradinit.POST_LN, "init": "PyTorch", "gradinit": 2, "warmup": 0.0}
    found = gradinit.train(options, 0.01, 1, Split(*(part.repeat(8, 1) for part in split)), split, 7)
    assert (found["examples"], found["updates"]) == (64, 4)
    assert all(math.isfinite(found[name]) for name in gradinit.EXTRAS)

    class Echo(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(x, 7).float()

    half = torch.where(torch.arange(32) < 16, split.inputs, (split.inputs + 1) % 7)
    assert accuracy(Echo(), Split(split.inputs, half)) == 50
    assert loss_of(Echo()(split.inputs), half) == pytest.approx(math.log(6 + math.e) - 0.5)


def test_glyphs_are_of_other_families_in_every_part(tmp_path, monkeypatch):
    fonts = Path(pytest.importorskip("matplotlib").get_data_path()) / "fonts/ttf"
    copies = {"DejaVuSans": "1015sn", "DejaVuSerif": "b", "STIXGeneral": "c", "cmr10": "d"}  # two are of one family
    for name, copied in copies.items():
        shutil.copy(fonts / f"{name}.ttf", tmp_path / f"{copied}.ttf")
    with pytest.raises(MissingData, match="another file than the studies are about"):
        data.glyphs(tmp_path, 1, 1)
    content = b"".join(path.read_bytes() for path in sorted(tmp_path.glob("*.ttf")))
    monkeypatch.setattr(data, "FONTS", hashlib.sha256(content).hexdigest())
    found = data.glyphs(tmp_path, 1, 1)
    assert found.classes == 62
    assert [split.inputs.shape for split in found[:3]] == [(62, 1, 16, 16)] * 3
    assert len({tuple(split.inputs.flatten().tolist()) for split in found[:3]}) == 3
    assert found.train.targets.tolist() == list(range(62))
    assert found.train.inputs.mean().abs() < 1e-5
    with pytest.raises(ValueError, match="there are 3 families of typefaces, and 4 are asked for"):
        data.glyphs(tmp_path, 2, 1)


def test_images_are_checked_and_found_in_either_layout(tmp_path, monkeypatch):
    files = {
        "train-images-idx3-ubyte": bytes(16) + bytes(range(200)) * (6 * 784 // 200 + 1),
        "train-labels-idx1-ubyte": bytes(8) + bytes([3, 1, 4, 1, 5, 9]),
        "t10k-images-idx3-ubyte": bytes(16) + bytes(2 * 784),
        "t10k-labels-idx1-ubyte": bytes(8) + bytes([2, 6]),
    }
    files["train-images-idx3-ubyte"] = files["train-images-idx3-ubyte"][: 16 + 6 * 784]
    monkeypatch.setattr(data, "IDX", {name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    torchvisions, debians = tmp_path / "a/FashionMNIST/raw", tmp_path / "b/usr/share/datasets/fashion-mnist"
    for folder in (torchvisions, debians):
        folder.mkdir(parents=True)
    for name, content in files.items():
        (torchvisions / name).write_bytes(content)
        (debians / f"{name}.gz").write_bytes(gzip.compress(content))
    found = [data.fashion_mnist(tmp_path / place, 4, 2) for place in "ab"]
    for one, other in zip(*(part[:3] for part in found)):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
    assert found[0].train.inputs.shape == (4, 1, 14, 14)
    assert sorted([*found[0].train.targets.tolist(), *found[0].validation.targets.tolist()]) == [1, 1, 3, 4, 5, 9]
    (torchvisions / "t10k-labels-idx1-ubyte").write_bytes(bytes(8) + bytes([2, 7]))
    with pytest.raises(MissingData, match=r"t10k-labels-idx1-ubyte is another file .* SHA-256 [0-9a-f]{64}, expected"):
        data.fashion_mnist(tmp_path / "a", 4, 2)
