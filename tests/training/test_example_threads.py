"""Every example sets its threads before it does anything: on a busy machine torch's own make it tens of times slower."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


class Begun(Exception):
    """Raised where an example would go on."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("arguments", "threads"), [([], None), (["--threads", "3"], 3)])
def test_threads_are_set_before_anything_else(path, arguments, threads, monkeypatch):
    library = path.stem.removeprefix("trainer_")
    if library != path.stem:
        pytest.importorskip(library, exc_type=ImportError)
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)
    monkeypatch.syspath_prepend(path.parent)
    spec.loader.exec_module(example)
    asked = []

    def set_num_threads(count):
        asked.append(count)
        raise Begun

    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    monkeypatch.setattr(sys, "argv", [path.name, *arguments])
    with pytest.raises(Begun):
        example.main()
    of_real_size = path.stem in ("trainer_lightning", "trainer_transformers")
    assert asked == [threads or (2 if of_real_size else 1)]
