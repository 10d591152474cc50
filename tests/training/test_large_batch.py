"""The example of large batches, in little."""

import importlib.util
import math
import sys

import pytest
from support import ROOT

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
EXAMPLE = ROOT / "examples" / "large_batch.py"


@pytest.fixture
def example(monkeypatch):
    specification = importlib.util.spec_from_file_location("large_batch", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "large_batch", module)  # dataclasses look for their module
    specification.loader.exec_module(module)
    return module


def test_it_runs_and_draws(example, tmp_path, capsys):
    results = example.main(["--quick", "--out", str(tmp_path)])
    assert list(results) == ["SGD", "LARS", "LARS, warmup", "CLARS"]
    for result in results.values():
        assert result.lr in (0.1, 0.3)
        assert [len(run.losses) for run in result.runs] == [4, 4]
        assert all(math.isfinite(loss) for run in result.runs for loss in run.losses)
    first = {tuple(run.losses[0] for run in result.runs) for result in results.values()}
    assert len(first) == 1  # the same weights and batches for all
    assert (tmp_path / "large_batch.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "batches of 1024 as 16 micro-batches" in printed
    assert "CLARS" in printed
    assert "its figures mean nothing" in printed


def test_learning_rates(example):
    rate = example.rate
    assert [rate(2.0, step, 4, 0.0) for step in range(4)] == pytest.approx([2.0, 1.125, 0.5, 0.125])
    assert [rate(2.0, step, 4, 0.5) for step in range(4)] == pytest.approx([1.0, 1.125, 0.5, 0.125])
