"""Optimizers on Triton beside the reference's, small: its interpreter is slow."""

import torch

import fused_opt
from fused_opt.backends import triton as backend

from .compare import distance
from .parameters import clones, set_gradients

DTYPES = [torch.float32, torch.float64, torch.float16]


STATES = {"state_dtype": torch.float32}


def tensors(dtype=torch.float32):
    """Around the edges of blocks (256, 1024) and pieces (4096), and wherever storage ends or begins at odd places."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (255,), (257,), (1024,), (1281,), (4095,), (4096,), (4097,), (), (0,), (3, 0, 2), (5, 1, 60)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made.append(torch.randn(6, 40, generator=generator).to(dtype).t())
    made.append(torch.randn(2, 3, 4, 5, generator=generator).to(dtype).to(memory_format=torch.channels_last))
    made.append(torch.randn(1041, generator=generator).to(dtype)[1:])  # breaks the alignment
    return [torch.nn.Parameter(tensor) for tensor in made]


def both(name, options, make=tensors, dtype=torch.float32):
    """An optimizer on Triton alone, and one on the reference, on equal parameters."""
    ours = make(dtype)
    theirs = clones(ours)
    pair = [getattr(fused_opt, name)(p, backend=b, **options) for p, b in ((ours, "triton"), (theirs, "reference"))]
    return (*pair, ours, theirs)


def assert_alike(a, b, ours, theirs, dtype=torch.float32, bound=None):
    bound = bound or 2 * torch.finfo(dtype).eps
    assert distance(ours, theirs) <= bound
    assert a.state_dict()["state"].keys() == b.state_dict()["state"].keys()
    for slot in {slot for p in theirs for slot in b.state.get(p, {})}:
        mine, other = ([o.state[p][slot] for p in ps if slot in o.state[p]] for o, ps in ((a, ours), (b, theirs)))
        assert [(x.dtype, x.shape) for x in mine] == [(x.dtype, x.shape) for x in other]
        assert distance(mine, other) <= bound


def train(a, b, ours, theirs, steps=3, first=0):
    for step in range(first, first + steps):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()


def launches(monkeypatch):
    """Of all launches from now on the kernel's name and its arguments."""
    found, launch = [], backend.device.launch

    def noted(function, device, programs, *arguments):
        found.append((getattr(function, "__name__", None) or function.name, arguments))
        return launch(function, device, programs, *arguments)

    monkeypatch.setattr(backend.device, "launch", noted)
    return found


def contiguous(dtype=torch.float32):
    """Fewer of them: what counts is a piece, a piece and a bit, less than one, none, and one that is not aligned."""
    return [p for p in tensors(dtype) if p.is_contiguous() and p.numel() in (0, 1, 257, 1040, 4097)]


def few(dtype=torch.float32):
    return [p for p in tensors(dtype) if p.numel() < 300]
