"""Every figure that ``python -m benchmarks`` measures on this machine.

To add a table, write a module with ``TABLES`` beside this one and name it here.
"""

from . import against_torch, one_pass

TABLES = [*against_torch.TABLES, *one_pass.TABLES]
