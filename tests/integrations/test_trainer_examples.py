"""The examples for the trainers, run as a reader would, by what they print."""

import gzip
import re
import runpy
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from support import ROOT

EXAMPLES = ROOT / "examples"


def printed(library, monkeypatch, capsys, *options):
    pytest.importorskip(library, exc_type=ImportError)
    if (accelerate := sys.modules.get("accelerate")) is not None:  # its singletons, as in a process of its own
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
    path = EXAMPLES / f"trainer_{library}.py"
    monkeypatch.setattr("sys.argv", [str(path), "--quick", *options])
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


def as_fashion_mnist(folder):
    """Handwritten digits of scikit-learn in files of Fashion-MNIST's format: three times as large, within a margin."""
    images, labels = load_digits(return_X_y=True)
    large = np.kron(images.reshape(-1, 8, 8), np.ones((1, 3, 3))) * 255 / 16
    large = np.pad(large, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    for part, rows in (("train", slice(1200)), ("t10k", slice(1200, None))):
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + large[rows].tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes(8) + labels[rows].astype(np.uint8).tobytes())
    return folder


def test_lightning(monkeypatch, capsys, tmp_path):
    theirs, ours = printed("lightning", monkeypatch, capsys, "--data", str(as_fashion_mnist(tmp_path)))
    assert "57 updates" in theirs  # three epochs of 19
    assert "67 updates" in ours  # batches of 32, 64, 128: 38, 19 and 10
    assert "of 1 snapshots" in ours
    assert min(float(number) for line in (theirs, ours) for number in re.findall(r"(\d+\.\d\d) %", line)) > 50


def test_lightning_says_how_to_get_the_images(monkeypatch, capsys, tmp_path):
    with pytest.raises(
        SystemExit, match=rf"is not in {tmp_path}: apt install dataset-fashion-mnist \(Debian\), or torchvision"
    ):
        printed("lightning", monkeypatch, capsys, "--data", str(tmp_path))


def test_accelerate(monkeypatch, capsys):
    theirs, ours = printed("accelerate", monkeypatch, capsys)
    assert theirs.endswith("resumed from epoch 2: the same bits")
    assert ours.endswith("resumed from epoch 2: the same bits")
