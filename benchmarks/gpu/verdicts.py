"""The tests of the GPU, a line of JSON each: ``python -m benchmarks.gpu.verdicts SHARD SHARDS DONE``, DONE a JSON list."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from . import DEVICE, ROOT, UNUSABLE
from .children import say


class Verdicts:
    """Takes every ``of``-th test that is not done, says what became of it, and leaves when the GPU answers no more."""

    def __init__(self, shard: int, of: int, done: list[str]) -> None:
        self.shard, self.of, self.done = shard, of, set(done)
        self.failed = False

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leave the others to the other processes."""
        items[:] = [item for item in items[self.shard :: self.of] if item.nodeid not in self.done]

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported is a failure, once."""
        if report.failed and self.shard == 0 and report.nodeid not in self.done:
            say(id=report.nodeid, outcome="failed", text=str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Announce a test."""
        say(begin=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test has one outcome: its call's, or that of the set-up or tear-down that did not pass."""
        if report.when == "call" or not report.passed:
            self.failed |= report.failed
            skipped = report.skipped and isinstance(report.longrepr, tuple)
            text = report.longrepr[2].removeprefix("Skipped: ") if skipped else report.longreprtext
            say(id=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), text=text[-4000:])

    def pytest_runtest_logfinish(self) -> None:
        """After a failure: an illegal access would fail every test to come."""
        if self.failed and DEVICE == "cuda":
            import torch

            self.failed = False
            try:
                torch.cuda.synchronize()
            except Exception as error:  # torch.AcceleratorError, a RuntimeError in some versions
                pytest.exit(f"the GPU answers no more: {error}", returncode=UNUSABLE)


def main() -> int:
    """Run them."""
    shard, of, done = (json.loads(argument) for argument in sys.argv[1:])
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_gpu_*.py"))
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "-o", "addopts=--strict-markers -q"]
    options.append("--continue-on-collection-errors")
    status = int(pytest.main([*files, *options], plugins=[Verdicts(shard, of, done)]))
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status  # another process has the rest


if __name__ == "__main__":
    sys.exit(main())
