"""One command for a machine with a GPU: build, test, look for wild accesses, time. ``python -m benchmarks.gpu``."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
REHEARSAL = "FUSED_OPT_REHEARSE"  # in the environment of every child: steps tensors on the CPU in place of the GPU's
DEVICE = "cpu" if os.environ.get(REHEARSAL) else "cuda"
ON_CPU = DEVICE == "cpu"
BACKENDS = ("native", "triton")
UNUSABLE = 75  # exit status of a child whose GPU answers no more: what is left is for a new process
