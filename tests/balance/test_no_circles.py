"""No module of the package imports, however indirectly, who imports it; also for types alone, also by absolute names."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fused_opt"


def name_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(name):
    """The modules that a module names; of a package's ``from . import x``, x where it is a module."""
    path = MODULES[name]
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield from [n for n in (f"{module}.{alias.name}", module) if n in MODULES][:1]


def test_imports_have_no_circle():
    graph = {name: set(imports(name)) for name in MODULES}
    assert {"fused_opt.balance.hill", "fused_opt.balance.layers"} <= graph["fused_opt.balance.plot"]
    TopologicalSorter(graph).prepare()
