"""Hands the native build to CMake; everything else is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds an extension that has no sources of its own with CMakeLists.txt; CMAKE_ARGS has further options for cmake."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build in a new directory: the path of an isolated environment is new each time."""
        built = Path(self.get_ext_fullpath(ext.name)).resolve()
        built.unlink(missing_ok=True)  # of an older build: where this one fails, nothing is installed
        try:
            import pybind11

            defines = {
                "Python_EXECUTABLE": sys.executable,
                "pybind11_DIR": pybind11.get_cmake_dir(),
                "CMAKE_LIBRARY_OUTPUT_DIRECTORY": built.parent,
            }
            with tempfile.TemporaryDirectory() as build:
                options = [f"-D{name}={value}" for name, value in defines.items()]
                options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
                subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], check=True)
                subprocess.run(["cmake", "--build", build], check=True)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            # The extension is optional: setuptools says so and goes on, and the reference backend runs without it.
            raise CompileError(f"the native backend was not built: {error}") from error


setup(
    ext_modules=[Extension("fused_opt.backends._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
