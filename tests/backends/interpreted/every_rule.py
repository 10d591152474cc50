"""Every rule and dtype against the reference.

bfloat16 is left out: Triton's interpreter truncates float32 to bfloat16 where a GPU rounds to the nearest.
"""

import pytest
from rules import every_rule
from support.interpreted import DTYPES, assert_alike, both, train

from fused_opt.backends import triton as backend

kernel, rules, table = backend.kernel, backend.rules, backend.table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_rule
def test_every_rule(name, options, dtype):
    runs = both(name, options, dtype=dtype)
    train(*runs, steps=2)
    assert_alike(*runs, dtype)
