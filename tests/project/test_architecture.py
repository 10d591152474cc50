"""What keeps the house as it was drawn: import directions, doctests, installation."""

import ast
import doctest
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
import torch
from support import ROOT
from support.core import keep_rules

import fused_opt

# Left to right is the way of the data; nothing imports anything to its left, and no module is missing. A package stands for
# all its modules that are not named.
ORDER = [
    ["fused_opt.__main__"],
    ["fused_opt.__init__"],
    ["fused_opt.integrations"],
    ["fused_opt.snapshots"],
    ["fused_opt.accumulation", "fused_opt.balance", "fused_opt.gradinit", "fused_opt.precision"],
    ["fused_opt.batch_size", "fused_opt.second_derivative"],
    ["fused_opt.rules"],
    ["fused_opt.optimizer"],
    ["fused_opt.checkpoint", "fused_opt.in_backward", "fused_opt.step"],
    ["fused_opt.layers", "fused_opt.shard_norms"],
    ["fused_opt.plan"],
    ["fused_opt.states"],
    ["fused_opt.parts"],
    ["fused_opt.groups", "fused_opt.keywords"],
    ["fused_opt.backends.matrices"],
    ["fused_opt.backends.foreach"],
    ["fused_opt.backends.foreach_updates"],
    ["fused_opt.backends.native", "fused_opt.backends.reference", "fused_opt.backends.triton"],
    ["fused_opt.extras"],
    ["fused_opt.backends.__init__"],
    ["fused_opt.backends.self_check"],
    ["fused_opt.backends.interface", "fused_opt.backends.pointers"],
    ["fused_opt.eight_bits", "fused_opt.exact", "fused_opt.tensors"],
    ["fused_opt.shards"],
    ["fused_opt._version", "fused_opt.checks", "fused_opt.pictures", "fused_opt.rule", "fused_opt.warn"],
]
MODULES = sorted(path for path in (ROOT / "fused_opt").rglob("*.py"))


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def rank(module):
    """How far to the right: the place of the longest name in ORDER that is the module or a package of it."""
    matches = [
        (len(name), place)
        for place, names in enumerate(ORDER)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(matches)[1]


def imports(path):
    """The modules of this package that a module imports, by whatever spelling; not those for type checkers alone."""
    module, known = name_of(path), set(map(name_of, MODULES))
    tree = ast.parse(path.read_text())
    for_types = {node for branch in ast.walk(tree) if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
                 for node in ast.walk(branch)}  # fmt: skip

    def module_of(name):
        return next((found for found in (name, f"{name}.__init__") if found in known), None)

    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {module_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node not in for_types:
            base = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {module_of(f"{base}.{alias.name}") or module_of(base) for alias in node.names}
    return found - {module, None}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_the_right(path):
    for imported in imports(path):
        assert rank(name_of(path)) <= rank(imported), f"{name_of(path)} imports {imported}"


def test_no_import_goes_in_a_circle():
    of = {name_of(path): imports(path) for path in MODULES}
    assert len(of) > 50
    assert "fused_opt.rule" in of["fused_opt.backends.interface"]
    while of:  # take away those that import nothing that is left
        free = [module for module, imported in of.items() if not imported & of.keys()]
        assert free, f"a circle among {sorted(of)}"
        for module in free:
            del of[module]


def test_the_core_knows_no_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu"):
            assert not [line for line in path.read_text().splitlines() if "#include" in line and "torch" in line]


@pytest.mark.parametrize(
    "name",
    [m.name for m in pkgutil.walk_packages(fused_opt.__path__, "fused_opt.") if "_" not in m.name.split(".")[-1][:1]],
)
def test_doctests(name):
    library = name.removeprefix("fused_opt.integrations.")
    if library in ("lightning", "transformers"):
        pytest.importorskip(library, exc_type=ImportError)
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "fused_opt": fused_opt})
    assert failed == 0


def test_no_trainer_is_imported_by_who_does_not_ask():
    libraries = {"accelerate", "lightning", "transformers"}
    code = f"import sys, fused_opt, fused_opt.integrations.loop; print({libraries} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_report_names_every_backend():
    report = subprocess.run([sys.executable, "-m", "fused_opt"], capture_output=True, text=True, check=True).stdout
    for name, reason in fused_opt.backends.available().items():
        assert f"{name:10} {'ready' if reason is None else 'not here: ' + reason}" in report


def test_report_fails_where_a_named_backend_is_not_ready():
    def report(*names):
        command, environment = [sys.executable, "-m", "fused_opt", *names], {**os.environ, "FUSED_OPT_CPU": "abacus"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert report("reference").returncode == 0
    failed = report("reference", "native")
    assert failed.returncode == 1
    assert "fused_opt: native is not ready: " in failed.stderr


def source_of(tmp_path):
    """A copy of the sources: setuptools leaves its own build folder beside them, and reuses it."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "out", "*.so", "*.egg-info"))
    return source


def wheel(tmp_path, source, *options, **environment):
    """A wheel that pip has built, and the names in it."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source), *options]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    (path,) = tmp_path.glob("*.whl")
    return path, zipfile.ZipFile(path).namelist()


def run_from(path, folder, program):
    """What a program prints that has what is in a wheel before what is installed here."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True).stdout


def test_a_source_distribution_builds_the_core_without_torch(tmp_path):
    """In pip's isolated environment, where torch is not installed."""
    source = source_of(tmp_path)
    keep_rules(source, "sgd")
    make = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", make, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed_names = {name.partition("/")[2] for name in packed.getnames()}
    assert {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()} <= packed_names
    # Soon built rather than fast; nvcc has compiled the same files for the module that the tests use.
    path, names = wheel(
        tmp_path, archive, CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug -DFUSED_OPT_X86=OFF -DFUSED_OPT_CUDA=OFF"
    )
    assert [name for name in names if name.startswith("fused_opt/backends/_native")]
    program = "import fused_opt; print(fused_opt.__file__, fused_opt.backends.available()['native'])"
    assert run_from(path, tmp_path / "site", program).split() == [str(tmp_path / "site/fused_opt/__init__.py"), "None"]


def test_wheel_without_a_compiler_runs_on_the_reference(tmp_path):
    source = source_of(tmp_path)
    folder = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/fused_opt/backends"
    stale = source / "build" / folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.parent.mkdir(parents=True)
    stale.write_text("what a build with a compiler left")
    path, names = wheel(tmp_path, source, "--no-build-isolation", CXX="/nonexistent")
    assert not [name for name in names if "_native" in name]
    program = (
        "import warnings, torch, fused_opt\n"
        "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    optimizer = fused_opt.SGD([p], lr=0.5)\n"
        "    optimizer.step(); optimizer.step()\n"
        "print(fused_opt.__file__, p.tolist(), len(caught), caught[0].message)\n"
    )
    printed = run_from(path, tmp_path / "site", program)
    assert str(tmp_path) in printed
    assert "[0.0, 0.0] 1 fused_opt runs without its native backend: its compiled core is not installed" in printed
