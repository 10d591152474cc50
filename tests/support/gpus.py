"""What the tests of a GPU share. With FUSED_OPT_REHEARSE=1 those that need no GPU run on the CPU, in small."""

import copy
import math
import os

import pytest
import torch

import fused_opt
from fused_opt import backends

from .parameters import layouts

REHEARSAL = bool(os.environ.get("FUSED_OPT_REHEARSE"))
DEVICE = "cpu" if REHEARSAL else "cuda"
NO_GPU = "" if REHEARSAL or torch.cuda.is_available() else "torch finds no GPU"


def reason(backend):
    """Why a backend does not step tensors of the device, or nothing."""
    module = backends.get(backend)
    return NO_GPU or module.unavailable() or module.unsupported(None, [torch.ones(1, device=DEVICE)]) or ""


def marks(backend):
    return pytest.mark.skipif(bool(reason(backend)), reason=reason(backend))


each_backend = pytest.mark.parametrize("backend", [pytest.param(b, marks=marks(b)) for b in ("native", "triton")])
needs_gpu = pytest.mark.skipif(REHEARSAL, reason="a rehearsal on the CPU has no streams, launches or graphs")
WIDTHS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [torch.float32] if REHEARSAL else WIDTHS  # Triton's interpreter is slow, and truncates to bfloat16
EDGES = (300,) if REHEARSAL else (1024, 4096, 16384, 65536)  # where blocks, pieces and chunks may end


def tensors_that_hurt(dtype=torch.float32):
    """The layouts of every backend's tests, and more sizes around where a GPU's work may be cut."""
    parameters = layouts(dtype, chunk=EDGES[0])
    generator = torch.Generator().manual_seed(1)
    for edge in EDGES[1:]:
        made = [torch.randn(edge + i, generator=generator).to(dtype) for i in (-1, 0, 1)]
        parameters += [torch.nn.Parameter(tensor) for tensor in made]
    return parameters


def laid_out(tensor, dtype=None, device=DEVICE):
    """A copy with the same strides, gaps and offset from an aligned address."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = torch.zeros(elements, dtype=dtype or tensor.dtype, device=device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor.detach())


def steppable(backend, parameters, noisy=False):
    """Those that a backend does not refuse in words, where a gradient has the layout that autograd gives it."""
    found = []
    for p in parameters:
        here = laid_out(p)
        if backends.get(backend).unsupported(None, [here, torch.empty_like(here)], noisy) is None:
            found.append(p)
    assert len(found) >= 2 * len(parameters) // 3
    return found


def gradients(parameters, step, dtype=None):
    """The same for the same step, rounded to a dtype."""
    generator = torch.Generator().manual_seed(step)
    drawn = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    return [g.to(dtype or p.dtype) for g, p in zip(drawn, parameters)]


def feed(parameters, values):
    """Gradients with the layout that autograd gives them."""
    for p, value in zip(parameters, values):
        p.grad = torch.empty_like(p).copy_(value)


def make(name, options, backend, source, dtype=None, device=DEVICE):
    """An optimizer over copies of the parameters."""
    parameters = [torch.nn.Parameter(laid_out(p, dtype, device)) for p in source]
    return getattr(fused_opt, name)(parameters, backend=backend, **copy.deepcopy(options)), parameters


def train(optimizer, parameters, steps=3, first=0, dtype=None):
    """The gradients of so many steps."""
    for step in range(first, first + steps):
        feed(parameters, gradients(parameters, step, dtype))
        optimizer.step()


def everything(optimizer, parameters):
    """Copies of the parameters and their states, on the CPU."""
    found = [p.detach() for p in parameters]
    found += [state for p in parameters for state in optimizer.state.get(p, {}).values()]
    return [tensor.cpu().clone() for tensor in found]


def same_bits(a, b):
    """Whether two of the above are equal to the last bit."""
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))


def gigabytes_free():
    return torch.cuda.mem_get_info()[0] / 1e9 if not REHEARSAL else math.inf
