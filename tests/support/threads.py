"""torch's number of threads, which is the process's: set for a block, and put back."""

from contextlib import contextmanager

import torch


@contextmanager
def threads(count):
    """So many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_threads(run, *counts):
    """The results of ``run()`` with each number of threads."""
    results = []
    for count in counts:
        with threads(count):
            results.append(run())
    return results
