"""The core's own tests, built by CMake and run by ctest, under sanitizers."""

import shutil
import subprocess

import pytest
from support import ROOT


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("sanitizers", "tests"),
    [("address,undefined", ["core", "chunks", "cuda", "bucket"]), ("thread", ["core"])],  # a GPU's place has one thread
)
def test_core(sanitizers, tests, tmp_path):
    x86 = "OFF" if sanitizers == "thread" else "ON"  # threads are shared in step.cpp, whatever the kernel
    options = [
        f"-DFUSED_OPT_X86={x86}",
        "-DFUSED_OPT_PYTHON=OFF",
        "-DFUSED_OPT_TESTS=ON",
        f"-DFUSED_OPT_SANITIZE={sanitizers}",
    ]
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options], check=True, capture_output=True)
    targets = [f"test_{name}" for name in tests]
    built = subprocess.run(["cmake", "--build", tmp_path, "--target", *targets], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout
    assert "warning:" not in built.stdout
    command = ["ctest", "--output-on-failure", "--tests-regex", "|".join(f"^{name}$" for name in tests)]
    tested = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout
    assert "100% tests passed" in tested.stdout
