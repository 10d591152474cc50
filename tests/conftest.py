"""Fixtures and the order of tests, and nothing else; what tests import lies in tests/support."""

import gc
import itertools
import re

import pytest
from hypothesis import HealthCheck, settings
from support import kernels

# Names that were defined here.
from support.compare import assert_close, assert_same, unchanged, without_extras  # noqa: F401
from support.kernels import INSTRUCTION_SETS, as_on_a_gpu  # noqa: F401
from support.parameters import clones, layouts, pair, parameters_of, set_gradients, train_both  # noqa: F401

# The same few examples in every run; `make fuzz` draws others, by seeds that it prints.
settings.register_profile(
    "few",
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("fuzz", settings.get_profile("few"), max_examples=300, derandomize=False)
settings.load_profile("few")

# What takes longest, the longest first. A line stays together: each process that runs a test of `in_processes` starts all.
LONGEST = [
    re.compile(pattern)
    for pattern in (
        "::test_in_processes", "test_values_in_the_interpreter.*every_rule", "test_values_in_the_interpreter",
        r"test_cpp\.py::test_core\[address", "test_a_rehearsal_runs_every_stage", "test_checkpoints_move",
        "test_a_source_distribution", "test_a_broken_kernel", "test_a_new_rule_owns", r"test_cpp\.py", r"test_triton\.py",
        "test_trainer_examples", "tests/fuzz/", "test_cyclical_batches_in_two_processes", r"test_self_check\.py",
        r"test_benchmarks\.py", "tests/studies", "test_the_site_is_built", "test_wheel_without",
    )
]  # fmt: skip


@pytest.hookimpl(trylast=True)  # of what is left
def pytest_collection_modifyitems(config, items):
    """xdist hands each process a stretch of the items, and one that has none left the end of another's: the longest begin."""
    blocks = {}
    for item in items:
        rank = next((i for i, pattern in enumerate(LONGEST) if pattern.search(item.nodeid)), len(LONGEST))
        blocks.setdefault(rank, []).append(item)
    others = iter(blocks.pop(len(LONGEST), []))
    dealt, ordered = [block for _, block in sorted(blocks.items())], []
    count = getattr(config, "workerinput", {}).get("workercount", 1)
    for worker in range(count):
        long = list(itertools.chain.from_iterable(dealt[worker::count]))
        stretch = (len(items) - len(ordered)) // (count - worker)
        ordered += [*long, *itertools.islice(others, max(0, stretch - len(long)))]
    items[:] = ordered


def pytest_collection_finish():
    gc.freeze()  # 800,000 objects that stay: each gc.collect() in a test would look through them, for a third of a second


@pytest.fixture(params=kernels.BACKENDS)
def backend(request, monkeypatch):
    """The name of every backend that runs here; the native one as users have it, and its source for GPUs run by the host."""
    return kernels.choose(request.param, monkeypatch)


@pytest.fixture(params=kernels.EVERY_KERNEL)
def every_kernel(request, monkeypatch):
    """As ``backend``, with each of the processor's instruction sets: where the arithmetic is what is tested."""
    return kernels.choose(request.param, monkeypatch)
