"""The compiled core of a copy of the sources in which something was changed."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pybind11
import pytest
import torch

from fused_opt.backends import interface

from . import ROOT


def copied(folder, *rules):
    """A folder with what the core is built from, with these rules alone: each takes the compiler as long as all else."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    keep_rules(folder, *rules)
    return folder


def keep_rules(folder, *rules):
    """Take all others from the core's list, wherever a copy of the sources lies."""
    path = folder / "csrc" / "rules.h"
    kept, count = re.subn(
        r'^  RULE\("(\w+)", \w+\) *(\\?)$',
        lambda line: line[0] if line[1] in rules else line[2],
        path.read_text(),
        flags=re.MULTILINE,
    )
    assert count >= len(rules) == sum(f'  RULE("{rule}", ' in kept for rule in rules)
    path.write_text(kept)


def built(folder, name):
    """The module of that name; a second time only what has changed is compiled."""
    options = {
        "FUSED_OPT_CUDA": "OFF",
        "FUSED_OPT_X86": "OFF",
        "CMAKE_BUILD_TYPE": "Debug",  # soon built rather than fast
        "CMAKE_CXX_FLAGS_DEBUG": "",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder / "built",
    }
    command = ["cmake", "-S", folder, "-B", folder / "build", "-G", "Ninja"]
    subprocess.run([*command, *(f"-D{key}={value}" for key, value in options.items())], check=True, capture_output=True)
    run = subprocess.run(["cmake", "--build", folder / "build"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    (path,) = (folder / "built").glob("_native*")
    (folder / name).mkdir()
    spec = importlib.util.spec_from_file_location(f"{name}._native", shutil.copy(path, folder / name))
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    core.connect(torch.Tensor, interface)
    return core
