"""The examples for the trainers, run as a reader would, by what they print."""

import re
import runpy
import sys

import pytest
from support import ROOT

EXAMPLES = ROOT / "examples"


def printed(library, monkeypatch, capsys):
    pytest.importorskip(library, exc_type=ImportError)
    if (accelerate := sys.modules.get("accelerate")) is not None:  # its singletons, as in a process of its own
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
    path = EXAMPLES / f"trainer_{library}.py"
    monkeypatch.setattr("sys.argv", [str(path), "--quick"])
    runpy.run_path(str(path), run_name="__main__")
    return [line for line in capsys.readouterr().out.splitlines() if "seed" in line]


def test_transformers(monkeypatch, capsys):
    theirs, ours = printed("transformers", monkeypatch, capsys)
    for line in (theirs, ours):
        losses = [float(number) for number in re.findall(r"\d\.\d{3}", line)]
        assert len(losses) == 4
        assert losses[-1] < losses[0] - 0.3
    assert "torch.optim.AdamW" in theirs
    assert "averaged and balanced" in ours


def test_lightning(monkeypatch, capsys):
    theirs, ours = printed("lightning", monkeypatch, capsys)
    assert "114 updates" in theirs  # three epochs of 38
    assert "132 updates" in ours  # batches of 16, 32, 64: 75, 38 and 19
    assert "of 1 snapshots" in ours
    assert min(float(number) for line in (theirs, ours) for number in re.findall(r"(\d+\.\d\d) %", line)) > 50


def test_accelerate(monkeypatch, capsys):
    theirs, ours = printed("accelerate", monkeypatch, capsys)
    assert theirs.endswith("resumed from epoch 2: the same bits")
    assert ours.endswith("resumed from epoch 2: the same bits")
