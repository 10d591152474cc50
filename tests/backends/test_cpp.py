"""The core's own tests, built by CMake and run by ctest, under sanitizers."""

import shutil
import subprocess

import pytest
from support import ROOT
from support.core import copied

# With no state to three, a scalar beside them, few and many coefficients. The self-check compares the kernels' bits for all.
RULES = ("sgd", "momentum_sgd", "adam", "nadam", "ademamix")


@pytest.mark.parametrize(
    ("sanitizers", "rules", "tests"),
    [
        ("address,undefined", RULES, ["core", "chunks", "cuda", "bucket"]),
        ("thread", RULES[:3], ["core"]),  # a GPU's place has one thread
    ],
)
def test_core(sanitizers, rules, tests, tmp_path):
    x86 = "OFF" if sanitizers == "thread" else "ON"  # threads are shared in step.cpp, whatever the kernel
    options = [
        f"-DFUSED_OPT_X86={x86}",
        "-DFUSED_OPT_PYTHON=OFF",
        "-DFUSED_OPT_TESTS=ON",
        f"-DFUSED_OPT_SANITIZE={sanitizers}",
    ]
    source, build = copied(tmp_path, *rules), tmp_path / "build"
    subprocess.run(["cmake", "-S", source, "-B", build, "-G", "Ninja", *options], check=True, capture_output=True)
    targets = [f"test_{name}" for name in tests]
    built = subprocess.run(["cmake", "--build", build, "--target", *targets], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout
    assert "warning:" not in built.stdout
    command = ["ctest", "--output-on-failure", "--tests-regex", "|".join(f"^{name}$" for name in tests)]
    tested = subprocess.run(command, cwd=build, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout
    assert "100% tests passed" in tested.stdout


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_the_compiler_warns_of_no_rule():
    command = ["c++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-DFUSED_OPT_ISA=baseline", "-DFUSED_OPT_FN=inline"]
    command += ["-S", "-o", "/dev/null", str(ROOT / "csrc" / "cpu" / "kernels.cpp")]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert (compiled.returncode, compiled.stderr) == (0, "")
