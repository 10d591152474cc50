"""The pages: examples give what they print, images and links exist, and the site is built without a warning."""

import csv
import doctest
import importlib.util
import os
import re
import subprocess
import sys

import pytest
from support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
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


ROWS = {
    "AdamW, 300 tensors of 8x8": ("adamw", "300 of 8x8", "torch fused", "fused_opt"),
    "AdamW, ResNet-50": ("adamw", "ResNet-50", "torch fused", "fused_opt"),
    "SGD, GPT-2 small: memory alone": ("sgd", "GPT-2 small", "torch fused", "fused_opt"),
    "SGD and clipping, ResNet-50": ("one_pass", "clipping", "clip_grad_norm_ and torch fused", "clipping in the step"),
    "SGD and EMA, ResNet-50": ("one_pass", "EMA", "torch fused and AveragedModel", "EMA in the step"),
    "LARS, ResNet-50": ("one_pass", "CLARS", "foreach LARS", "LARS"),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_first_page_says_what_was_measured(row):
    name, case, *contenders = ROWS[row]
    (line,) = [line for line in PAGES[0].read_text().splitlines() if line.startswith(f"| {row} |")]
    with (ROOT / f"benchmarks/results/{name}.csv").open(newline="") as file:
        figures = {f["contender"]: f for f in csv.DictReader(file) if f["case"] == case}
    theirs, ours = (float(figures[one]["median_us"]) / 1000 for one in contenders)
    said = [float(x) for x in re.findall(r"([\d.]+) ms", line)]
    assert said == [pytest.approx(theirs, rel=0.004), pytest.approx(ours, rel=0.03)]
    assert float(line.split("|")[-2]) == pytest.approx(theirs / ours, rel=0.005)
    assert {f["threads"] for f in figures.values()} == {"2"}


def test_the_site_is_built_without_a_warning(tmp_path):
    """Links, anchors, references to the package and the navigation: mkdocs is strict."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    page = (tmp_path / "api/optimizers.html").read_text()
    assert "nonfinite" in page[page.index("CLARS") :]
    assert page.count("<mtable") >= 11  # one formula a rule
    assert "begin{" not in page
    assert "https://" not in "".join(re.findall(r"<(?:script|link)[^>]*(?:src|href)=[^>]*>", page))
