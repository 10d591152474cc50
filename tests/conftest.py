"""Fixtures and the order of tests, and nothing else; what tests import lies in tests/support."""

import gc
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

# What takes longest begins first, or one process would still be at it when the others have nothing left. And each process
# that runs a check of `distributed/` starts all of them.
FIRST = re.compile("tests/(distributed|fuzz)/|/test_(architecture|cpp|gpu_command|self_check|triton)\\.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not FIRST.search(item.nodeid))


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
