"""Before a backend steps anything on a GPU, it proves itself there; here the host is the GPU."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import rules as all_rules
import torch
from support.compare import unchanged
from support.core import built, copied
from support.kernels import GPU, run_with
from support.parameters import parameters_of, set_gradients

import fused_opt
from fused_opt import warn
from fused_opt.backends import native, self_check
from fused_opt.backends.self_check import EXTRAS, Variant

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
CPU = torch.device("cpu")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """And nothing was checked yet, or said."""
    run_with(GPU, monkeypatch)
    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setattr(self_check, "_failed", {})
    monkeypatch.setattr(warn, "_said", set())


@pytest.fixture
def checks(monkeypatch):
    """The variants that were checked."""
    made, run = [], self_check.run
    monkeypatch.setattr(self_check, "run", lambda *arguments: (made.append(arguments[-1]), run(*arguments))[1])
    return made


def stepped(backend="auto", kind="AdamW", dtype=F32, **options):
    """An optimizer that has made a step."""
    optimizer = getattr(fused_opt, kind)(
        [torch.nn.Parameter(torch.ones(3, 4, dtype=dtype))], backend=backend, **options
    )
    set_gradients(parameters_of(optimizer), 0)
    optimizer.step()
    return optimizer


def backend_of(optimizer):
    return type(optimizer._last.buckets[0]).__module__.removeprefix("fused_opt.backends.")


def found(rule, dtypes, core=None):
    """What the self-check of all extras says."""
    with pytest.MonkeyPatch.context() as patch:
        if core is not None:
            patch.setattr(native, "_native", core)
        return self_check.run(native, native.standard(torch.empty(0)), CPU, Variant(rule, dtypes, EXTRAS))


def wrong(monkeypatch):
    """Have the kernels for GPUs step a little further than they should."""
    run = native.GPUBucket.run

    def further(bucket, args, *scalars):
        run(bucket, [row._replace(lr=row.lr * 1.001) for row in args], *scalars)

    monkeypatch.setattr(native.GPUBucket, "run", further)


@pytest.mark.parametrize("rule", all_rules.kernels().values(), ids=all_rules.kernels())
def test_every_rule_passes_in_every_dtype(rule):
    mixed = rule.name in ("momentum_sgd", "ademamix")  # with one state and with three: what is converted is no rule's
    for parameter in (F32, F64, BF16, F16):
        others = ((parameter, F32), (F16, parameter), (F32, F64)) if mixed else ()
        for gradient, states in ((parameter, parameter), *others):
            assert found(rule, (parameter, gradient, *(states for _ in rule.states))) is None


@pytest.mark.parametrize("part", [F32, F64, BF16, F16], ids=str)
def test_accumulating_passes(part):
    for dtypes in ((part,), (part, part), (F64, part), (F32, part)):
        assert found(None, dtypes) is None


def test_auto_takes_what_has_proved_itself_and_asks_once(checks):
    assert [backend_of(stepped()) for _ in range(3)] == ["native"] * 3
    assert [variant.rule.name for variant in checks] == ["adam"]
    backend_of(stepped(kind="SGD", momentum=0.9))
    stepped(dtype=BF16, state_dtype=F32)
    optimizer = stepped(dtype=BF16)
    assert [(variant.rule.name, *variant.dtypes) for variant in checks[1:]] == [
        ("momentum_sgd", F32, F32, F32),
        ("adam", BF16, BF16, F32, F32),
        ("adam", BF16, BF16, BF16, BF16),
    ]
    optimizer.step()
    optimizer.scale_layers()  # the plan is made again
    optimizer.step()
    stepped(kind="SGD", momentum=0.9, noise=fused_opt.WeightNoise(0.1))  # the kernel has all extras
    assert len(checks) == 4


def test_parts_are_added_up_after_a_check(checks):
    optimizer = fused_opt.CLARS([torch.nn.Parameter(torch.ones(3, 4))], lr=0.1)
    optimizer.track_parts()
    for _ in range(3):
        parameters_of(optimizer)[0].square().sum().backward()
    assert checks == [Variant(None, (F32,), EXTRAS), Variant(None, (F32, F32), EXTRAS)]


def test_on_the_cpu_nothing_is_checked(checks, monkeypatch):
    run_with(None, monkeypatch)
    assert backend_of(stepped()) == "native"
    assert not checks


def test_auto_warns_once_and_goes_on_without_a_backend_that_is_wrong(monkeypatch):
    wrong(monkeypatch)
    with pytest.warns(fused_opt.warn.FusedOptWarning) as caught:
        optimizer = stepped()
    assert backend_of(optimizer) == "foreach"
    (text,) = (str(warning.message) for warning in caught)
    assert re.match(
        r"fused_opt does not use its native backend: its self-check on cpu failed: rule 'adam' in float32: after step 1 "
        r"\d+ of \d+ numbers differ in the parameter; the first one, of a tensor with vectors and a tail and .* is "
        r"-?\d\.\d+ and not -?\d\.\d+; the foreach backend steps in its place$",
        text,
    )
    assert backend_of(stepped(kind="SGD")) == "foreach"  # without another check, or another word


def test_what_passed_is_not_used_beside_what_is_wrong(monkeypatch):
    assert backend_of(stepped(kind="SGD")) == "native"
    wrong(monkeypatch)
    with pytest.warns(fused_opt.warn.FusedOptWarning):
        stepped()
    assert backend_of(stepped(kind="SGD")) == "foreach"


def test_a_named_backend_that_is_wrong_is_refused(monkeypatch):
    wrong(monkeypatch)
    optimizer = fused_opt.AdamW([torch.nn.Parameter(torch.ones(3, 4))], backend="native")
    set_gradients(parameters_of(optimizer), 0)
    refused = (
        r"backend 'native' cannot step parameter 0 of group 0: its self-check on cpu failed: .* backend='auto' takes"
    )
    with unchanged(optimizer), pytest.raises(RuntimeError, match=refused):
        optimizer.step()
    monkeypatch.setattr(self_check, "ENABLED", False)
    optimizer.step()
    assert backend_of(optimizer) == "native"


def test_a_backend_that_raises_is_wrong(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA could not launch a kernel")

    monkeypatch.setattr(native.GPUBucket, "run", fail)
    with pytest.warns(
        fused_opt.warn.FusedOptWarning, match="RuntimeError: CUDA could not launch a kernel; the foreach"
    ):
        assert backend_of(stepped()) == "foreach"


def test_want_of_memory_is_no_verdict(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(native.GPUBucket, "run", fail)
        with pytest.raises(torch.OutOfMemoryError):
            stepped()
    assert backend_of(stepped()) == "native"


def test_the_caller_notices_nothing():
    before = torch.random.get_rng_state()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    try:
        with torch.device("meta"), torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (
                self_check.failure("native", native, p, lambda: Variant(all_rules.kernels()["adam"], (F32,) * 4))
                is None
            )
            assert torch.is_inference_mode_enabled()
            assert torch.ones(1).device.type == "meta"
    finally:
        torch.set_default_dtype(dtype)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert self_check._passed


def test_nothing_is_found_out_within_the_capture_of_a_graph(checks, monkeypatch):
    p, standard = SimpleNamespace(is_cuda=True, device=CPU), native.standard(torch.empty(0))
    backend = SimpleNamespace(
        standard=lambda p: standard, **{k: getattr(native, k) for k in ("bucket", "unsupported", "steps_on_device")}
    )
    variant = Variant(all_rules.kernels()["sgd"], (F32, F32))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert re.search(
        "while a CUDA graph is captured; step once before", self_check.failure("x", backend, p, lambda: variant)
    )
    assert not checks
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert self_check.failure("x", backend, p, lambda: variant) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert self_check.failure("x", backend, p, lambda: variant) is None
    assert len(checks) == 1


def in_another_process(*arguments, **environment):
    command, environment = [sys.executable, *arguments], {**os.environ, "FUSED_OPT_EMULATE_GPU": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_the_report_has_the_verdicts():
    report = in_another_process("-m", "fused_opt")
    count = 4 * len(all_rules.kernels())
    assert re.search(rf"\n {{10,}}cpu \(emulated GPU\): passed its self-check, {count} variants in \d+ ms\n", report)


def test_a_variable_leaves_it_out():
    program = "from fused_opt.backends import self_check; print(self_check.ENABLED)"
    assert in_another_process("-c", program, FUSED_OPT_SELF_CHECK="0") == "False\n"


# ---- kernels that are broken on purpose, in the source for GPUs alone

MUTATIONS = {
    "the scale of the gradients is forgotten where it is on the device": (
        "cuda/body.h",
        "  return grad_scale * scale;",
        "  return grad_scale;",
    ),
    "half of the threads' sums are lost": (
        "cuda/body.h",
        "for (int width = kThreads / 2; width; width /= 2)",
        "for (int width = kThreads / 4; width; width /= 2)",
    ),
    "the norm of the new weights is not kept": (
        "cuda/body.h",
        "launch.norms[t].weight2 = shared.lanes[0].weight2;",
        "",
    ),
    "the last element is left out": (
        "cuda/body.h",
        "k < s.first + n - s.last; k += kThreads)",
        "k < s.first + n - s.last - (s.last < n); k += kThreads)",
    ),
    "the gradient's strides are the parameter's": (
        "cuda/memory.h",
        "at[1] += k * x.g.strides[d];",
        "at[1] += k * x.p.strides[d];",
    ),
    "the last vector reaches beyond the end": (
        "cuda/table.h",
        "return {head, head + (n - head) /",
        "return {head, head + (n - head + kTwo - 1) /",
    ),
    "LARS forgets the multiplier of the decay": (
        "pass.h",
        "(args.coupled_decay + args.decoupled_decay) * layer.decay_scale * weight",
        "(args.coupled_decay + args.decoupled_decay) * weight",
    ),
    "an average keeps all that it had": ("pass.h", "v[k] += add * (p[k] - share * v[k])", "v[k] += add * p[k]"),
    "decoupled decay is coupled": ("pass.h", "+ by.decoupled_decay * p;", "+ by.coupled_decay * p;"),
    "noise has the upper word of the key wrong": ("noise.h", "key1 += kPhiloxW1;", "key1 += kPhiloxW0;"),
    "the mean of samples is the last one": (
        "schedule.h",
        "args.add = 1 / static_cast<double>(counts.samples + 1);",
        "args.add = 1;",
    ),
    "noise does not fall in its cycle": (
        "schedule.h",
        "if (s.cycle) args.sigma *= 1 -",
        "if (s.cycle) args.sigma *= 1 + 0 *",
    ),
    "noise has fewer digits": ("noise.h", "ln = ln * f + 0.500026762f;", "ln = ln * f + 0.50002f;"),
}


IN_SHORT = (
    "the norm of the new weights is not kept",
    "decoupled decay is coupled",
    "noise has the upper word of the key wrong",
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds the core with one line of the GPU kernels' sources changed; those of the CPU's kernels stay as they are."""
    folder = copied(tmp_path_factory.mktemp("core"), "adam")
    shutil.copytree(folder / "csrc", folder / "gpu")
    cmake = folder / "CMakeLists.txt"
    # Inlined, or the linker would take one of two functions of the same name: the unchanged one, for both.
    inlined = cmake.read_text().replace(' OR CMAKE_BUILD_TYPE STREQUAL "Debug"', "")
    cmake.write_text(inlined.replace("csrc/cuda/", "gpu/cuda/"))

    def with_change(path, line, changed):
        before = (folder / "gpu" / path).read_text()
        assert before.count(line) == 1
        (folder / "gpu" / path).write_text(before.replace(line, changed))
        try:
            return built(folder, f"broken_{sum(1 for _ in folder.iterdir())}")
        finally:
            (folder / "gpu" / path).write_text(before)

    return with_change


@pytest.mark.parametrize("name", [pytest.param(m, marks=() if m in IN_SHORT else pytest.mark.long) for m in MUTATIONS])
def test_a_broken_kernel_is_found_out(name, build):
    core = build(*MUTATIONS[name])
    adam = all_rules.kernels()["adam"]
    verdicts = [found(adam, (dtype,) * 4, core) for dtype in (F32, F64)]
    print(f"{name}: {verdicts[0]}")
    assert all(verdicts)
    assert "numbers differ" in verdicts[0] or "ratio" in verdicts[0]
