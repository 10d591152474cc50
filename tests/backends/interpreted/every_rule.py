"""Every rule and dtype against the reference.

bfloat16 is left out: Triton's interpreter truncates float32 to bfloat16 where a GPU rounds to the nearest.
"""

import pytest
import torch
from rules import every_rule
from support.interpreted import DTYPES, assert_alike, both, few, tensors, train

from fused_opt.backends import triton as backend

device, kernel, noise, table = backend.device, backend.kernel, backend.noise, backend.table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_rule
def test_every_rule(name, options, dtype):
    runs = both(name, options, tensors if dtype == torch.float32 else few, dtype)  # pieces and edges depend on no dtype
    train(*runs, steps=2)
    # AdEMAMix's schedule is computed on the device, by exp and log whose last bits are others, and 1 - beta3 is near 0.
    assert_alike(*runs, dtype, 1e-12 if name == "AdEMAMix" and dtype == torch.float64 else None)
