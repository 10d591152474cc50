"""``make matrix``: does the package work with other versions of Python and torch? One new environment after the other."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
TORCHES = ["2.10.0", "2.13.0", "2.14.0"]
#: What depends on torch's and Python's versions most, and needs no other library.
TESTS = ["tests/optimizer", "tests/plan", "tests/parts"]


def interpreter(version: str) -> str | None:
    """A Python of that version on the PATH or among pyenv's, or None; a path is taken as it is."""
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [version, f"python{version}", *installed.glob(f"{version}.*/bin/python")]
    for candidate in filter(None, map(shutil.which, candidates)):  # pyenv's stand-ins are there and fail
        if not subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True).returncode:
            return candidate
    return None


def run(stage: str, command: list, source: Path) -> str:
    """The last line that a command prints; where it fails, RuntimeError with that line."""
    # Without nvcc, which would take longer than all the rest.
    environment = {**os.environ, "CUDACXX": "/nonexistent"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    last = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1].strip("= ")
    if done.returncode:
        print(done.stdout[-8000:], done.stderr[-4000:], sep="\n")
        raise RuntimeError(f"{stage}: {last}")
    return last


def seen(python: str, torch: str, source: Path, wheel: Path, tests: list[str]) -> str:
    """What the tests say in their last line, where the wheel and that torch are installed."""
    with tempfile.TemporaryDirectory(prefix="fused_opt-venv-") as folder:
        programs = Path(folder, "bin")
        pip = [programs / "python", "-m", "pip", "install"]
        try:
            run("environment", [python, "-m", "venv", folder], source)
            run(f"torch {torch}", [*pip, f"torch=={torch}", "numpy", "pytest", "hypothesis", "expecttest"], source)
            run("installation", [*pip, wheel], source)
            run("compiled core", [programs / "python", "-m", "fused_opt", "native"], source)
            return run("tests", [programs / "pytest", *tests, "--color=no", "--disable-warnings"], source)
        except RuntimeError as error:
            return str(error)


def rows(version: str, torches: list[str], tests: list[str]) -> Iterator[tuple[str, str]]:
    """Every torch, and what was seen with it: one wheel of a Python serves them all."""
    python = interpreter(version)
    if not python:
        yield ", ".join(torches), "not seen: no such interpreter"
        return
    with tempfile.TemporaryDirectory(prefix="fused_opt-source-") as folder:
        source = Path(folder, "source")
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "out", "*.so", "*.egg-info"))
        try:
            run("environment", [python, "-m", "venv", f"{folder}/venv"], source)
            run("wheel", [f"{folder}/venv/bin/pip", "wheel", "--no-deps", "--wheel-dir", folder, "."], source)
        except RuntimeError as error:
            yield ", ".join(torches), str(error)
            return
        shutil.rmtree(source / "fused_opt")  # what is installed is tested
        for torch in torches:
            yield torch, seen(python, torch, source, *Path(folder).glob("*.whl"), tests)


def main() -> None:
    """Print a line for every pair of versions as it is seen, and then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions or paths")
    parser.add_argument("--torch", nargs="+", default=TORCHES, help="versions, as pip takes them")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest is given")
    asked = parser.parse_args()
    began, table, failed = time.monotonic(), ["| Python | torch | seen |", "|---|---|---|"], False
    for version in asked.python:
        for torch, result in rows(version, asked.torch, asked.tests):
            table.append(f"| {version} | {torch} | {result} |")
            failed |= " passed" not in result
            print(f"{time.monotonic() - began:6.0f} s  {table[-1]}", flush=True)
    print("", *table, sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
