"""The pages: examples give what they print, images and links exist, and the site is built without a warning."""

import doctest
import importlib.util
import os
import re
import subprocess
import sys

import pytest
from support import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LIBRARIES = ("apex", "bitsandbytes", "matplotlib", "timm")


def examples():
    """Every section of a page that has an example, by its heading: names are shared within a section."""
    for page in PAGES:
        for section in re.split(r"(?m)^(?=##? )", page.read_text()):
            if ">>> " in section:
                yield pytest.param(section, id=f"{page.stem}: {section.splitlines()[0].lstrip('# ')}")


@pytest.mark.parametrize("section", list(examples()))
def test_an_example_gives_what_it_prints(section):
    for library in LIBRARIES:
        if re.search(rf"(import|from) {library}\b", section) and importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    code = "".join(re.findall(r"(?ms)^```pycon\n(.*?)^```", section))
    test = doctest.DocTestParser().get_doctest(code, {}, "example", None, 0)
    assert len(test.examples) > 1
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_site_is_built_without_a_warning(tmp_path):
    """Links, anchors, references to the package and the navigation: mkdocs is strict."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    page = (tmp_path / "api/optimizers.html").read_text()
    assert "nonfinite" in page[page.index("CLARS") :]
    assert page.count("<math") > 0 or "$" not in page
    assert "https://" not in "".join(re.findall(r"<(?:script|link)[^>]*(?:src|href)=[^>]*>", page))
