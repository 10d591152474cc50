"""One norm, and whether elements share memory, for tensors of every kind."""

import itertools

import pytest
import torch

from fused_opt.tensors import norm2, overlaps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_squares_are_summed_in_float64(dtype):
    x = torch.tensor([60000.0, -3.0, 0.0]).to(dtype)
    assert norm2(x) == pytest.approx(sum(v * v for v in x.tolist()), rel=1e-12)
    assert norm2(x[:0]) == 0


def test_squares_of_complex64_do_not_overflow():
    x = torch.full((3,), 1e25 + 1e25j, dtype=torch.complex64)
    assert norm2(x) == pytest.approx(6e50, rel=1e-6)


def test_values_of_a_sparse_tensor_are_added_up_first():
    x = torch.sparse_coo_tensor([[1, 1, 3]], [1.0, 2.0, 4.0], (5,))
    assert norm2(x) == 3**2 + 4**2


def test_overlap_is_that_of_counted_offsets():
    found = set()
    for sizes in itertools.product([1, 2, 3], repeat=3):
        for strides in itertools.product([0, 1, 2, 3, 5], repeat=3):
            tensor = torch.empty(64).as_strided(sizes, strides)
            offsets = [sum(i * s for i, s in zip(index, strides)) for index in itertools.product(*map(range, sizes))]
            assert overlaps(tensor) == (len(set(offsets)) < len(offsets)), (sizes, strides)
            found.add((overlaps(tensor), 0 in strides))
    assert found == set(itertools.product([True, False], repeat=2))


def test_layouts_that_are_not_strided_do_not_overlap():
    assert not overlaps(torch.eye(3).to_sparse())
    assert not overlaps(torch.empty(0, 4).expand(0, 4))
    assert overlaps(torch.ones(()).expand(10**12))
    assert overlaps(torch.ones(10**6).expand(10**6, 10**6))
