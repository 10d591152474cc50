"""``python -m benchmarks``: every figure that the project quotes, measured; ``python -m benchmarks.gpu``: on a GPU."""
