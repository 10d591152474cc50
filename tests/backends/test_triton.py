"""The Triton backend without a GPU: its values in Triton's interpreter, its code compiled ahead of time."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import rules as all_rules
import torch

import fused_opt
from fused_opt.backends import triton as backend
from fused_opt.backends.interface import Kind, ParamEntry, RatioArgs, StepArgs

triton = pytest.importorskip("triton")
tl = triton.language
kernel, rules = backend.kernel, backend.rules

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
F32, F64, BF16, F16, I16 = tl.float32, tl.float64, tl.bfloat16, tl.float16, tl.int16

# Every rule plain, of p, g and its states; the extras together; the dtypes.
UPDATES = {
    **{name: (name, (F32,) * (2 + len(rule.states))) for name, rule in all_rules.kernels().items()},
    "adam, bfloat16": ("adam", (BF16,) * 4),
    "adam, bfloat16 with float32 states": ("adam", (BF16, BF16, F32, F32)),
    "adam, float64": ("adam", (F64,) * 4),
    "momentum_sgd, trust ratio": ("momentum_sgd", (F32,) * 3, None, False, True),
    "adam, everything": ("adam", (F32,) * 4, F32, True, True),
    "adam, masks": ("adam", (F32,) * 4, None, False, False, True),
    "adam, everything and masks": ("adam", (F32,) * 4, F32, True, True, True),
    "adam, bfloat16 rounded at random": ("adam", (BF16,) * 4, None, False, False, False, True),
    "adam, bfloat16 with remainders": ("adam", (BF16, BF16, F32, F32), None, False, False, False, False, I16),
    "adam, scheduled": ("adam", (F32,) * 4, F32, True, False, False, False, None, True),
    "adam, everything, scheduled shards": ("adam", (F32,) * 4, F32, True, True, False, False, None, True, True),
    "sgd, bfloat16 rounded at random, shards": ("sgd", (BF16,) * 2, None, False, False, False, True, None, False, True),
}
needs_tools = pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="this Triton comes without NVIDIA's tools")
THROUGH_STATES = "plan/test_plan.py::test_autograd_catches_a_backward_through_states_that_a_step_changed"
SUMS = ("carried", "leaving", "gradients", "agreements")
TABLES = {"tensors": "*i64", "layers": "*fp64", "words": "*i64", "numbers": "*fp64", "counts": "*i64"}


def compiled(function, architecture, arguments, **constants):
    """As the launcher would compile it, for a GPU that is not there."""
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants)
    maker = ("cuda", architecture, 32) if isinstance(architecture, int) else ("hip", architecture, 64)
    target = triton.backends.compiler.GPUTarget(*maker)
    return triton.compile(source, target=target, options={"num_warps": 4, **backend.device.OPTIONS})


def update(
    architecture, rule, dtypes, average=None, noisy=False, norms=False, masked=False, stochastic=False, kept=None,
    scheduled=False, cut=False,
):  # fmt: skip
    of_rule = all_rules.kernels()[rule]
    arguments = {**TABLES, **dict.fromkeys((*SUMS, "ratios"), "*fp64"), "count": "i32"}
    return compiled(
        kernel.update, architecture, arguments, RULE=getattr(rules, rule), AT_STEP=backend.table.at_step(of_rule),
        DTYPES=dtypes, AVERAGE_DTYPE=average, T=F64 if dtypes[0] == F64 else F32, COEFFICIENTS=of_rule.coefficient_count,
        COUNTS=of_rule.counts_steps, SCHEDULED=scheduled, CUT=cut, NOISY=noisy, NORMS=norms, MASKED=masked,
        STOCHASTIC=stochastic, KEPT=kept,
    )  # fmt: skip


def usage(binary, tmp_path):
    """Registers, and bytes of the stack and of local memory, where spilled registers go."""
    (tmp_path / "kernel.cubin").write_bytes(binary.asm["cubin"])
    command = [TOOLS / "cuobjdump", "-res-usage", tmp_path / "kernel.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK", "LOCAL")]


def sass(tmp_path):
    """What ``usage`` has looked at, in the GPU's own instructions."""
    command = [TOOLS / "cuobjdump", "-sass", tmp_path / "kernel.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wide(binary, what):
    """How many 128-bit accesses to memory there are."""
    found = Counter(re.findall(rf"{what}\.global\S*\.(v4\.b32|v2\.b64)", binary.asm["ptx"]))
    return sum(found.values())


# An older generation takes the same code but for its encoding: all of it with `make long`.
EVERYWHERE = ("adam", "adam, everything and masks")
GENERATIONS = [pytest.param(name, 80, marks=() if name in EVERYWHERE else pytest.mark.long) for name in UPDATES]


@needs_tools
@pytest.mark.parametrize(("name", "architecture"), [*((name, 90) for name in UPDATES), *GENERATIONS])
def test_compiles_to_wide_accesses_without_spills(name, architecture, tmp_path):
    rule, dtypes, *extras = UPDATES[name]
    binary = update(architecture, rule, dtypes, *extras)
    registers, stack, local = usage(binary, tmp_path)
    # At most two registers wait on the stack, written once and read once: only the end of a program needs them.
    assert local == 0
    assert stack <= 8
    assert len(re.findall(r"\b(?:STL|LDL)\b", sass(tmp_path))) <= stack // 2
    # A thread has 8 elements of a full block: so many 16-byte accesses for each operand, and g is only read.
    beside = [dtype for dtype in (*extras[:1], *extras[5:6]) if dtype]  # averages, and what makes weights exact
    loads = sum(8 * dtype.primitive_bitwidth // 128 for dtype in (*dtypes, *beside))
    assert wide(binary, "ld") == loads
    assert wide(binary, "st") == loads - 8 * dtypes[1].primitive_bitwidth // 128
    # What keeps enough threads on a multiprocessor of 65536 registers to hide the latency of its memory: 512, and 384 in
    # float64 and where masks, or schedules and shards, are beside everything else.
    small = rule in ("sgd", "momentum_sgd") and not extras
    most = dtypes[0] == F64 or (len(extras) in (4, 8) and extras[2])
    assert registers <= (40 if small else 168 if most else 128)
    # Fused to one rounding the bits would be others than the native backend's. Divisions and square roots are made of such
    # instructions, and are rounded as they should be; so are the logarithms that AdEMAMix's half-life is made of.
    assert rule == "ademamix" or not re.search(r"\b(fma|mad)\.\S*f(32|64)", binary.asm["ptx"])
    if not re.search(r"\b(div|sqrt)\.", binary.asm["ptx"]):
        assert not re.search(r"\b[FD]FMA\b", sass(tmp_path))


@needs_tools
@pytest.mark.parametrize(("wanted", "masked"), [(1, False), (2, False), (7, False), (11, True), (4, True)])
def test_norms_compile(wanted, masked, tmp_path):
    arguments = {**TABLES, **dict.fromkeys(("carried", "gradients", "agreements"), "*fp64"), "count": "i32"}
    binary = compiled(
        kernel.norms, 90, arguments, RULE=rules.adam, AT_STEP=rules.adam_at_step, DTYPES=(F32,) * 4, T=F32, COEFFICIENTS=6,
        TOTAL_WANTED=wanted == 2, WANTED=wanted, MASKED=masked, KEPT=None,
    )  # fmt: skip
    assert usage(binary, tmp_path)[1:] == [0, 0]
    assert wide(binary, "ld") >= (2 if wanted < 4 else 8)


@pytest.mark.parametrize("what", ["sum_gradients", "norms"])
def test_norms_are_asked_for_as_the_compiler_takes_them(what, monkeypatch):
    """In a condition it takes plain numbers alone, where the interpreter takes flags, too."""
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    made = backend.table.Table(all_rules.kernels()["sgd"], [ParamEntry(p, 0, 0, "")], [0])
    assert made.collect_gradients({})
    launched = []
    monkeypatch.setattr(backend.device, "launch", lambda function, *arguments: launched.append((function, arguments)))
    if what == "norms":
        ratio = RatioArgs(Kind.LAMB, 1.0, 10.0, 0.0, 1)
        row = backend.arguments.Row(StepArgs(0.1, 1.0, 0.0, 0.0, 0.0, (), ratio))
        made.norms([row], backend.table.Scalars(), True, True, torch.zeros(1, 3, dtype=torch.float64))
    else:
        made.sum_gradients(torch.zeros((), dtype=torch.float64), add=False)
    names = kernel.norms.arg_names
    constants = [dict(zip(names, arguments[2:])) for function, arguments in launched if function is kernel.norms]
    assert [type(given["WANTED"]) for given in constants] == [int]


def test_counts_are_read_by_all_threads_before_one_writes_them():
    """A thread that read what another had written would go another way to the next barrier."""
    text = update(90, *UPDATES["adam, scheduled"]).asm["ttir"]
    *_, behind = re.split(r"\bbarrier\b", text)
    assert behind.count("tt.store") == 4
    assert "tt.load" not in behind


@needs_tools
def test_collect_compiles(tmp_path):
    arguments = {
        "tensors": "*i64",
        "words": "*i64",
        "carried": "*fp64",
        "sums": "*fp64",
        "found": "*fp64",
        "count": "i32",
    }
    assert usage(compiled(kernel.collect, 90, arguments), tmp_path)[1:] == [0, 0]


@needs_tools
@pytest.mark.parametrize("total", [None, F32, BF16], ids=str)
def test_accumulate_compiles(total, tmp_path):
    arguments = {"sums": "*fp64", "total": "i64", "part": "i64", "numel": "i64", "size": "i64"}
    binary = compiled(kernel.accumulate, 90, arguments, TOTAL_DTYPE=total, PART_DTYPE=F32, T=F32)
    assert usage(binary, tmp_path)[1:] == [0, 0]
    assert wide(binary, "ld") == 2 + (0 if total is None else 8 * total.primitive_bitwidth // 128)


@pytest.mark.parametrize("name", ["momentum_sgd", "adam, everything"])
def test_compiles_for_another_maker(name):
    """AMD's CDNA 3, to the assembler's text: nothing in the kernels is NVIDIA's."""
    text = update("gfx942", *UPDATES[name]).asm["amdgcn"]
    assert "global_load_dwordx4" in text
    assert re.findall(r"\.[sv]gpr_spill_count: *(\d+)", text) == ["0", "0"]


INTERPRETED = [("every_rule", "bits", "ratios"), ("plans", "shards", "graphs", THROUGH_STATES)]


@pytest.mark.parametrize("tests", INTERPRETED, ids=lambda tests: tests[0])
def test_values_in_the_interpreter(tests):
    """Triton decides when it is imported whether it interprets, so another process does."""
    here = Path(__file__).parent
    targets = [name if "::" in name else here / "interpreted" / f"{name}.py" for name in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *targets]
    # Without the self-check, or every test would begin with one.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FUSED_OPT_SELF_CHECK": "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d+ passed|\[100%\]", result.stdout)


def test_tables_are_kept_for_every_stream_that_reads_them(monkeypatch):
    """Or torch's allocator would give their memory away when a plan ends, while a step on another stream still runs."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    made = backend.table.Table(all_rules.kernels()["sgd"], [ParamEntry(p, 0, 0, "")], [0])
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append((tensor, stream)))
    for stream in (None, "side", "side", None):
        monkeypatch.setattr(made, "_stream", lambda stream=stream: stream)
        assert made.collect_gradients({})
        made._send(made.step, [0], (), backend.table.Scalars())
    expected = [(table, stream) for stream in ("side", None) for table in made.memory]
    assert [(id(table), stream) for table, stream in recorded] == [(id(table), stream) for table, stream in expected]


def test_what_triton_has_compiled_is_launched_past_its_dispatch(monkeypatch):
    """With the arguments of this step, and only where the function would be compiled to the same."""
    queued = []

    class Kernel:
        """As triton.JITFunction, and as what it compiles."""

        def __init__(self, name, compiles=None):
            self.__name__, self.compiles = name, compiles

        def __getitem__(self, grid):
            def run(*arguments, **options):
                queued.append((self, grid, arguments, options))
                return self.compiles() if self.compiles else None

            return run

    class Compiled(Kernel):
        pass

    update = Kernel("update", lambda: Compiled("compiled"))
    monkeypatch.setattr(backend.device, "CompiledKernel", Compiled)
    monkeypatch.setattr(kernel, "update", update)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    made = backend.table.Table(all_rules.kernels()["sgd"], [ParamEntry(p, 0, 0, "")], [0])
    for masked in (False, False, True, True, False):
        assert made.collect_gradients({})
        row = backend.arguments.Row(StepArgs(0.1, 1.0, 0.0, 0.0, 0.5 * masked, ()))
        assert made.run([row], backend.table.Scalars())
    assert [type(function) for function, *_ in queued] == [Kernel, Compiled, Kernel, Compiled, Compiled]
    assert [len(grid) for _, grid, *_ in queued] == [1, 3, 1, 3, 3]
    assert [arguments[-3] for _, _, arguments, _ in queued] == [False, False, True, True, False]  # MASKED
    assert queued[1][0] is queued[4][0] is not queued[3][0]
    # What one step leaves is what the next one carries.
    assert [id(arguments[5]) for _, _, arguments, _ in queued[1:]] == [
        id(arguments[6]) for _, _, arguments, _ in queued[:-1]
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_it_does_not_run_here():
    assert "torch finds no GPU" in fused_opt.backends.available()["triton"]
    report = subprocess.run([sys.executable, "-m", "fused_opt"], capture_output=True, text=True, check=True).stdout
    assert "triton     not here: torch finds no GPU" in report
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: torch finds no GPU"):
        fused_opt.SGD([torch.nn.Parameter(torch.ones(2))], backend="triton")


def test_the_interpreter_is_announced_for_tests_only():
    report = subprocess.run(
        [sys.executable, "-m", "fused_opt"], capture_output=True, text=True, check=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    ).stdout  # fmt: skip
    assert "triton     ready" in report


def test_without_triton(tmp_path):
    """The package imports, says what is missing, and steps on the CPU without a warning about a backend for GPUs."""
    (tmp_path / "triton.py").write_text("raise ImportError('no triton')")
    program = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, fused_opt\n"
        "p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)); p.grad = torch.ones_like(p)\n"
        "fused_opt.SGD([p], lr=0.5).step()\n"
        "print(p.tolist(), fused_opt.backends.available()['triton'])\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(fused_opt.__file__).parents[1])])
    command = [sys.executable, "-c", program]
    text = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    ).stdout
    assert text.startswith("[(0.5+0j), (0.5+0j)] Triton is not installed (no triton)")
