"""What the command found, in one file of JSON that is complete after every line: a run that is killed leaves what it had."""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from ..targets import judge
from .children import Line


class Report:
    """Collects lines; thread-safe. Writes nothing until it has a ``path``.

    Args:
        instead: why no target counts as measured, whatever the figures; empty: they count.
    """

    def __init__(self, instead: str = "") -> None:
        self.path: Path | None = None
        self.instead = instead
        self.lock = threading.RLock()
        self.reasons: dict[str, str] = {}
        self.skipped: Counter[str] = Counter()
        self.data: dict[str, Any] = {
            "finished": False,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": {},
            "backends": {},
            "stages": {},
            "failures": [],
            "not_run": [],
            "targets": [],
            "figures": [],
        }

    def save(self) -> None:
        """Write everything; a reader sees the old file or the new one."""
        with self.lock:
            self.data["skipped"] = [{"reason": reason, "items": n} for reason, n in self.skipped.most_common()]
            self.data["targets"] = judge(self.data["figures"], self.reasons, self.instead)
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                part = self.path.with_suffix(".part")
                part.write_text(json.dumps(self.data, indent=1) + "\n")
                os.replace(part, self.path)

    def stage(self, name: str, **fields: Any) -> dict[str, Any]:
        """Fields of a stage."""
        with self.lock:
            stage = self.data["stages"].setdefault(name, {"outcome": "passed", "passed": 0, "failed": 0, "skipped": 0})
            stage.update(fields)
            self.save()
            return stage

    def fail(self, stage: str, item: str, text: str) -> None:
        """A failure with its text; the stage has failed with it."""
        with self.lock:
            self.data["failures"].append({"stage": stage, "item": item, "text": text})
            self.stage(stage, outcome="failed")
            print(f"FAILED {stage}: {item}\n  {text.strip()[-1500:]}", flush=True)

    def not_run(self, sentence: str) -> None:
        """What nobody has seen because of this machine or its time."""
        with self.lock:
            self.data["not_run"].append(sentence)
            self.save()
            print(f"not run: {sentence}", flush=True)

    def hear(self, stage: str, line: Line) -> None:
        """A line from a child."""
        with self.lock:
            outcome = line.pop("outcome", None)
            if outcome is None:  # of the machine, or a note
                for name, fields in line.items():
                    self.data.setdefault(name, {}).update(fields)
            else:
                kind = "passed" if outcome == "measured" else outcome
                self.stage(stage)[kind] += 1
                if outcome == "failed":
                    self.reasons[line["id"]] = line.get("text", "")
                    self.fail(stage, line["id"], line.get("text", ""))
                elif outcome == "skipped":
                    self.reasons[line["id"]] = line["text"]
                    self.skipped[line.get("text", "")] += 1
                elif outcome == "measured":
                    self.data["figures"].append({name: value for name, value in line.items() if name != "id"})
            self.save()
