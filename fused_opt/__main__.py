"""``python -m fused_opt``: which backends run on this machine, and in words why the others do not.

``python -m fused_opt native`` fails if that backend does not.
"""

import sys

from . import __version__, backends
from .backends import native


def main() -> None:
    """Print one line for every backend and device."""
    import torch

    print(f"fused_opt {__version__}, torch {torch.__version__}")
    for name, reason in backends.available().items():
        print(f"{name:10} {'ready' if reason is None else 'not here: ' + reason}")
        if name == "native" and reason is None:
            threads = torch.get_num_threads()
            print(f"{'':10}   cpu: ready, instruction set {native.instruction_set()}, {threads} threads")
            gpu = native.gpu_unavailable()
            print(f"{'':10}   cuda: {'ready, by name: no GPU has run it yet' if gpu is None else 'not here: ' + gpu}")


if __name__ == "__main__":
    main()
    for name in sys.argv[1:]:
        if reason := backends.get(name).unavailable():
            sys.exit(f"fused_opt: {name} is not ready: {reason}")
