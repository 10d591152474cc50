"""The backends that run here, and what the native one is told to run a step with."""

from fused_opt import backends
from fused_opt.backends import native, triton

GPU = "gpu"  # the kernels for GPUs, run by the host
INSTRUCTION_SETS = native._native.instruction_sets() if native.unavailable() is None else []
INTERPRETED = (
    "cpu" in triton.DEVICES
)  # Triton's interpreter takes milliseconds for each program: nothing else runs then

_native = ["native", f"native-{GPU}"] if INSTRUCTION_SETS else []
BACKENDS = ["triton"] if INTERPRETED else ["reference", *_native]
# Once more with every instruction set of this processor. Plain "native" is the first of them.
EVERY_KERNEL = (
    ["triton"] if INTERPRETED else ["reference", "foreach", *(f"native-{s}" for s in INSTRUCTION_SETS), *_native[1:]]
)


def run_with(kernels, monkeypatch):
    """Have the native backend use an instruction set, GPU, or what it would take by itself: here alone is said how."""
    monkeypatch.setattr(native, "EMULATE_GPU", kernels == GPU)
    monkeypatch.setattr(native, "INSTRUCTION_SET", None if kernels == GPU else kernels)


def choose(name, monkeypatch):
    """The ``backend=`` of one of the above, with what it takes to have it."""
    backend, _, kernels = name.partition("-")
    if backend == "triton":  # beside the reference, which steps what it leaves alone
        monkeypatch.setattr(backends, "BACKENDS", ("triton", "reference"))
        return "auto"
    if kernels:
        run_with(kernels, monkeypatch)
    return backend


def as_on_a_gpu():
    """Whether the native backend does what it does on a GPU: the host waits for nothing, and does not know all."""
    return native.EMULATE_GPU
