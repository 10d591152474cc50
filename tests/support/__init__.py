"""What the tests share. Nothing in here is a test; ``pythonpath`` in pyproject.toml makes it importable from every folder."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
