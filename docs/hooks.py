"""What the pages need beside Markdown: README and others of the root, docstrings as Python has them, formulas as MathML."""

from __future__ import annotations

import html
import inspect
import re
from pathlib import Path
from typing import Any

import griffe
import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import fused_opt

ROOT = Path(__file__).parent.parent
OF_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
STUDIES = "studies/results"
ROLE = re.compile(r":(class|func|meth|attr|mod|data):`(~?)([\w.]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the root as pages, and the pictures of the benchmarks."""
    for name, page in OF_THE_ROOT.items():
        text = re.sub(r"\]\((?:docs/)?([^):]+\))", r"](\1", (ROOT / name).read_text())
        files.append(File.generated(config, page, content=to_pages(text)))
    for path in (ROOT / "benchmarks/results").glob("*.png"):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    for path in (ROOT / STUDIES).glob("*.*"):  # pages, pictures, rows
        files.append(File.generated(config, f"studies/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point to the pages that documents of the root are."""
    return to_pages(re.sub(rf"\]\(\.\./(?={'|'.join(OF_THE_ROOT)})", "](", markdown))


def to_pages(markdown: str) -> str:
    """Names of documents in links as those of their pages."""
    for name, page in OF_THE_ROOT.items():
        markdown = markdown.replace(f"]({name}", f"]({page}")
    return re.sub(rf"\]\((?:\.\./)*(?:docs|{STUDIES})/", _folder, markdown)


def _folder(found: re.Match[str]) -> str:
    """Pages of the studies are in a folder of their own, beside the others."""
    return "](studies/" if STUDIES in found[0] else "](../"


def on_page_content(html_: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""

    def formula(found: re.Match[str]) -> str:
        tex = html.unescape(found[2])
        return latex2mathml.converter.convert(tex, display="block" if found[1] == "[" else "inline")

    return re.sub(
        r"<(?:span|div) class=\"arithmatex\">\\([\[(])(.*?)\\[\])]</(?:span|div)>", formula, html_, flags=re.S
    )


class Reference(griffe.Extension):
    """Docstrings and signatures of the package as they are when it is imported, and as Markdown."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Go through the package."""
        if pkg.path == "fused_opt":
            self.visit(pkg)

    def visit(self, parent: griffe.Module | griffe.Class) -> None:
        """Go through what a module or class has."""
        for member in parent.members.values():
            if isinstance(member, griffe.Class):
                self.complete(member)
            if member.is_alias:
                continue
            if member.docstring is not None:
                member.docstring.value = markdown_of(member.docstring.value)
            if isinstance(member, griffe.Module | griffe.Class):
                self.visit(member)

    def complete(self, of: griffe.Class) -> None:
        """Write the keywords of an optimizer out."""
        cls = getattr(fused_opt, of.name, None)
        if not (isinstance(cls, type) and issubclass(cls, fused_opt.FusedOptimizer)) or of.docstring is None:
            return
        of.docstring.value = inspect.cleandoc(cls.__doc__ or "")
        init = of.members.get("__init__")
        if isinstance(init, griffe.Function):
            known = {one.name: one for one in init.parameters}
            parameters = inspect.signature(cls.__init__).parameters.values()
            init.parameters = griffe.Parameters(*(known.get(one.name) or keyword(one) for one in parameters))


def keyword(one: inspect.Parameter) -> griffe.Parameter:
    """A parameter of Python's as griffe's."""
    annotation = one.annotation if isinstance(one.annotation, str) else inspect.formatannotation(one.annotation)
    annotation = re.sub(r"\b(?:fused_opt|typing|torch)\.(?:[\w]+\.)*(\w+)", r"\1", annotation)
    return griffe.Parameter(
        one.name, annotation=annotation, kind=griffe.ParameterKind.keyword_only, default=repr(one.default)
    )


def markdown_of(docstring: str) -> str:
    """Roles and formulas of reStructuredText as Markdown."""
    text = re.sub(r"(?m)^Example:$", "Examples:", docstring)  # what griffe calls the section
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = ROLE.sub(lambda found: f"`{found[3].rpartition('.')[2] if found[2] else found[3]}`", text)
    return re.sub(r"\.\. math::(.*?)(?=\n\n(?! )|\Z)", _display, text.replace("``", "`"), flags=re.S)


def _display(found: re.Match[str]) -> str:
    lines = inspect.cleandoc(found[1])
    return f"$$\n\\begin{{align*}}\n{lines}\n\\end{{align*}}\n$$"
