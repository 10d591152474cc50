"""What a study found: every arm, paired differences with an interval, the whole grid; as Markdown and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fused_opt import pictures

from .harness import TEST, VALIDATION, Arm, Row, Study, grid, rate, reference, scores

#: Student's t, two-sided 95 %, for 1 to 9 degrees of freedom: two to ten seeds.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


PAGES = Path(__file__).parent / "pages"  # what people have written, above the figures


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def interval(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, float]:
    """Mean difference over the seeds that both have, and its 95 % interval by Student's t; for up to ten seeds."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    middle, n = mean(differences), len(differences)
    if n < 2:
        return middle, -math.inf, math.inf
    half = T[n - 2] * stdev(differences) / math.sqrt(n)
    return middle, middle - half, middle + half


def difference(ours: dict[int, float], theirs: dict[int, float], digits: int) -> str:
    """The interval in words, in bold where it is on one side of zero."""
    if not ours.keys() & theirs.keys():
        return ""
    middle, low, high = interval(ours, theirs)
    words = f"{middle:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{words}**" if low > 0 or high < 0 else words


def settings(study: Study) -> list[str]:
    """In order."""
    return list(dict.fromkeys(arm.setting for arm in study.arms))


def of(study: Study, setting: str) -> list[Arm]:
    """The arms of a setting."""
    return [arm for arm in study.arms if arm.setting == setting]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row has the headings; columns but the first are numbers."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])


def results(study: Study, rows: Sequence[Row], setting: str) -> str:
    """The table of a setting: test scores at the tuned rates, and what they are compared with."""
    arms = of(study, setting)
    same = any(arm.same_rate for arm in arms)
    here = [row for row in rows if row["setting"] == setting]
    extras = [name for name in study.extras if any(row.get(name) not in ("", None) for row in here)]
    heading = ["arm", "rate", study.metric, "difference, each at its rate"]
    heading += ["difference, at the other's rate"] if same else []
    table = [[*heading, "updates", *extras]]
    for arm in arms:
        lr = grid(study, arm, rows)[1]
        if lr is None:
            continue
        found = scores(rows, arm, TEST, lr)
        mine = [row for row in here if (row["arm"], row["split"], row["lr"]) == (arm.name, TEST, lr)]
        if not mine:
            continue
        tuned, equal = [], []
        for name in arm.against:
            other = reference(study, arm, name)
            theirs = grid(study, other, rows)[1] if other else None
            if other is None or theirs is None:
                continue
            tuned.append(f"{difference(found, scores(rows, other, TEST, theirs), study.digits)} to {name}")
            if arm.same_rate and name == arm.against[0]:
                at = scores(rows, arm, TEST, theirs), scores(rows, other, TEST, theirs)
                equal.append(difference(*at, study.digits))
        line = [arm.name, f"{lr:g}", spread(list(found.values()), study.digits), "<br>".join(tuned)]
        line += ["<br>".join(equal)] if same else []
        values = [[row[name] for row in mine if row.get(name) not in ("", None)] for name in extras]
        line += [str(mine[0]["updates"]), *(spread(v, 2) if v else "" for v in values)]
        table.append(line)
    return markdown_table(table)


def whole_grid(study: Study, rows: Sequence[Row], setting: str) -> str:
    """Validation scores of every rate that was tried, the chosen one in bold."""
    arms = of(study, setting)
    columns = sorted({k for arm in arms for k in grid(study, arm, rows)[0]})
    table = [["arm", *(f"{rate(k):g}" for k in columns)]]
    for arm in arms:
        tried, chosen = scores(rows, arm, VALIDATION), grid(study, arm, rows)[1]
        cells = [spread(list(tried[rate(k)].values()), study.digits) if rate(k) in tried else "" for k in columns]
        table.append([arm.name, *(f"**{c}**" if rate(k) == chosen else c for k, c in zip(columns, cells))])
    return markdown_table(table)


def page(study: Study, rows: Sequence[Row], note: str = "") -> str:
    """What was written about the study and everything that was measured, as Markdown."""
    machines = sorted({f"{row['processor']}, torch {row['torch']}" for row in rows})
    tuned = len(study.tuning_seeds)
    seeds = f"{tuned} seed{'s' * (tuned > 1)} to tune and {len(study.seeds)} others to test"
    words = PAGES / f"{study.name}.md"
    text = [
        f"# {study.title}",
        *([note] if note else []),
        *([words.read_text().strip()] if words.exists() else []),
        f"![Test scores of every seed, and validation scores over the rates]({study.name}.png)",
        "## Figures",
        f"Made by `python -m studies {study.name}` from {len(rows)} runs, {seeds}. One thread of: {'; '.join(machines)}. "
        "± is the standard deviation over seeds; differences are seed by seed, with their 95 % interval (Student's t), in "
        "bold where it leaves zero out. There are many: of twenty without any effect, one is bold by chance.",
    ]
    for setting in settings(study):
        text += [f"### {setting[0].upper()}{setting[1:]}", results(study, rows, setting)]
        text += [
            "Validation scores of the whole grid, learning rates in the heading:",
            whole_grid(study, rows, setting),
        ]
    return "\n\n".join(text) + "\n"


def styles(study: Study) -> dict[str, tuple[str, str]]:
    """Colour and line of every arm's name, in all settings: what is before a comma has a colour, what is behind it a line."""
    families: dict[str, list[str]] = {}
    for name in dict.fromkeys(arm.name for arm in study.arms):
        families.setdefault(name.partition(",")[0], []).append(name)
    colors, lines = (*pictures.SERIES, pictures.OURS), ("-", "--", ":", "-.")
    return {name: (color, line) for color, names in zip(colors, families.values()) for line, name in zip(lines, names)}


def draw(study: Study, rows: Sequence[Row], path: Path) -> None:
    """Left every seed's test score and their mean; right what the rate does to validation scores."""
    names = settings(study)
    longest = max(len(of(study, name)) for name in names)
    figure, panels = pictures.figure(len(names), 2, 11, len(names) * (1.6 + 0.28 * longest))
    style = styles(study)
    for (left, right), setting in zip(panels, names):
        arms = of(study, setting)
        for y, arm in enumerate(arms):
            color, line = style[arm.name]
            tried, lr = scores(rows, arm, VALIDATION), grid(study, arm, rows)[1]
            right.plot(
                list(tried), [mean(of_seed.values()) for of_seed in tried.values()], f"o{line}",
                color=color, markersize=3, label=arm.name,
            )  # fmt: skip
            found = list(scores(rows, arm, TEST, lr).values()) if lr is not None else []
            if found:
                left.plot(found, [y] * len(found), "o", color=color, markersize=4, alpha=0.5)
                left.plot([mean(found)], [y], "|", color=color, markersize=16, markeredgewidth=2)
        left.set(title=setting, xlabel=study.metric, yticks=range(len(arms)), yticklabels=[arm.name for arm in arms])
        left.set_ylim(len(arms) - 0.5, -0.5)
        right.set(title="on validation data", xlabel="learning rate", xscale="log")
    pictures.finish(panels.flat, legends=panels[:, 1])
    figure.savefig(path, dpi=120)


def save(study: Study, rows: Sequence[Any], folder: Path, note: str = "") -> None:
    """Write the page and the picture beside the CSV file."""
    (folder / f"{study.name}.md").write_text(page(study, rows, note))
    draw(study, rows, folder / f"{study.name}.png")
