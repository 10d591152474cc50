"""The example and the benchmark run from the command line and write what they say."""

import csv
import importlib
import runpy
import sys

import pytest
from support import ROOT


def run(monkeypatch, program, *arguments):
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    runpy.run_path(str(ROOT / program), run_name="__main__")


def test_example(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn")
    run(monkeypatch, "examples/temp_balance.py", "--quick", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert "SGD, cosine, TempBalance" in printed
    assert "multiplier 0.500" in printed
    assert "its figures mean nothing" in printed
    assert (tmp_path / "temp_balance.png").read_bytes().startswith(b"\x89PNG")


def test_benchmark(monkeypatch, tmp_path, capsys):
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(str(ROOT))
    importlib.import_module("benchmarks.spectra").main(["--quick", "--repeats", "1", "--out", str(tmp_path)])
    assert "All exponents of a model" in capsys.readouterr().out
    with (tmp_path / "spectra.csv").open() as file:
        rows = list(csv.DictReader(file))
    (error,) = (float(row["value"]) for row in rows if row["quantity"] == "error of alpha")
    assert error < 1e-4
