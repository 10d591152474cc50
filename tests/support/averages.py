"""A few parameters of several layouts."""

import torch


def small(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), (), (0,), (700,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors += [
        tensors[0].t().clone().t(),
        torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
    ]
    return [torch.nn.Parameter(tensor.to(dtype)) for tensor in tensors]
