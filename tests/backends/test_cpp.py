"""The core's own tests, built by CMake and run by ctest, under sanitizers."""

import shutil
import subprocess

import pytest
from support import ROOT


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_core(sanitizers, tmp_path):
    options = ["-DFUSED_OPT_PYTHON=OFF", "-DFUSED_OPT_TESTS=ON", f"-DFUSED_OPT_SANITIZE={sanitizers}"]
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options], check=True, capture_output=True)
    built = subprocess.run(["cmake", "--build", tmp_path], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout
    assert "warning:" not in built.stdout
    tested = subprocess.run(["ctest", "--output-on-failure"], cwd=tmp_path, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout
    assert "100% tests passed" in tested.stdout
