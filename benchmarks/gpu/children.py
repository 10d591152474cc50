"""Commands that speak in lines, of which those of JSON are results; ended at their time, and begun again after a crash."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import ROOT, UNUSABLE

Line = dict[str, Any]
QUIET = 75.0  # seconds; who has nothing to say for so long hangs
# A group of its own, so that a child's own children end with it; not a session, which would outlive whoever ends ours.
GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}

RUNNING: set[subprocess.Popen[str]] = set()


def say(**line: Any) -> None:
    """What a child has to report; on a line of its own even behind somebody's dots."""
    print(f"\n{json.dumps(line)}", flush=True)


def run(
    command: Sequence[str],
    deadline: float,
    hear: Callable[[Line], None] = lambda line: None,
    *,
    quiet: float = QUIET,
    environment: Mapping[str, str] | None = None,
    echo: bool = True,
) -> tuple[int | None, str]:
    """Run a command from the project's root.

    Args:
        command: the program and its arguments.
        deadline: when it is ended, on the clock of ``time.monotonic``.
        hear: what takes its lines of JSON; all others are shown, and the last of them kept.
        quiet: seconds without a line after which it is ended.
        environment: what is to be different in its environment.
        echo: whether its other lines are shown.

    Returns:
        Its exit status, or None where it was ended or not found, and the last lines that it said.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    last: deque[str] = deque(maxlen=200)
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}, **GROUP,
        )  # fmt: skip
    except OSError as error:
        return None, str(error)
    RUNNING.add(process)
    assert process.stdout is not None
    said = process.stdout

    def read() -> None:
        for line in said:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    ended = ""
    try:
        while not ended:
            try:
                line = lines.get(timeout=max(0.0, min(quiet, deadline - time.monotonic())))
            except queue.Empty:
                ended = "its time was over" if time.monotonic() >= deadline else f"silent for {quiet:g} seconds"
                break
            if line is None:
                break
            if line.startswith('{"'):
                hear(json.loads(line))
            elif text := line.rstrip():
                last.append(text)
                if echo:
                    print(f"  {text}", flush=True)
        if not ended:
            process.wait(timeout=10)
    finally:
        end(process)
        RUNNING.discard(process)
    if ended:
        last.append(f"(ended: {ended})")
    return None if ended else process.returncode, "\n".join(last)


def end(process: subprocess.Popen[str]) -> None:
    """With its own children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_all(status: int) -> None:
    """Leave at once, and leave nothing running: what was found is in the file already."""
    for process in list(RUNNING):
        end(process)
    os._exit(status)


def run_items(
    command: Callable[[list[str]], Sequence[str]],
    deadline: float,
    hear: Callable[[Line], None],
    **options: Any,
) -> str | None:
    """Run a command over its items, again without those that are done where it crashed, hung, or lost the GPU.

    The command says ``{"begin": item}`` before an item and ``{"id": item, "outcome": ...}`` behind it. What crashes or
    hangs is a failure of the item that had begun.

    Args:
        command: makes it, for a list of items that it is to leave out.
        deadline: as for :func:`run`.
        hear: takes the lines with an outcome.
        **options: for :func:`run`.

    Returns:
        Why it did not get to its end, or None.
    """
    done: list[str] = []
    while True:
        before, begun = len(done), ""

        def listen(line: Line) -> None:
            nonlocal begun
            if "begin" in line:
                begun = line["begin"]
                return
            done.extend([line["id"]] if "id" in line else [])
            hear(line)

        status, last = run(command(done), deadline, listen, **options)
        if status in (0, 1):  # 1: some failed, as they said
            return None if status == 0 or len(done) > before else last
        if time.monotonic() >= deadline:
            return f"not everything was reached: the last to begin was {begun!r}" if begun else last
        if begun and begun not in done:
            how = "did not answer" if status is None else f"ended with status {status}"
            listen({"id": begun, "outcome": "failed", "text": f"the process {how}\n{last}"})
        if len(done) == before:  # nothing would be different the next time
            return last if status != UNUSABLE else f"the GPU answers no more\n{last}"
