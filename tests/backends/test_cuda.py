"""The kernels for NVIDIA GPUs without one: as compiled, and the same source run by the host in a GPU's place.

conftest's ``backend`` runs the other tests so, too; here is what is different where the host waits for nothing.
"""

import copy
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from rules import every_rule
from support.compare import assert_close, unchanged
from support.kernels import GPU, run_with
from support.parameters import clones, pair, parameters_of, set_gradients, train_both

import fused_opt
from fused_opt.backends import native

# Updates and sums in two arithmetics for every rule, updates in float32 that round at random, and two that accumulate.
KERNELS = 5 * len(native._native.rules()) + 2 if native.unavailable() is None else 0


@pytest.fixture
def on_gpu(monkeypatch):
    if native.unavailable() is not None:
        pytest.skip(native.unavailable())
    run_with(GPU, monkeypatch)


@contextmanager
def nobody_waits():
    """Fails where the host reads a tensor, which on a GPU waits for it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
            patch.setattr(torch.Tensor, name, lambda self, name=name: pytest.fail(f"{name}() waits for the GPU"))
        yield


@pytest.fixture(scope="module")
def compiled():
    """What NVIDIA's tool, which comes with Triton, prints of the GPU code in the installed module."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    triton = importlib.util.find_spec("triton")
    tool = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not tool or not tool.exists():
        pytest.skip("cuobjdump is not installed")

    def dump(option):
        command = [tool, option, native._native.__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return dump


def test_compiled_kernels_spill_nothing(compiled):
    by_architecture = re.split(r"arch = (sm_\d+)", compiled("-res-usage"))[1:]  # of each file, and of its PTX nothing
    reports = {}
    for architecture, usage in zip(by_architecture[::2], by_architecture[1::2], strict=True):
        found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", usage)
        reports.setdefault(architecture, []).extend(found)
    reports = {architecture: report for architecture, report in reports.items() if report}
    assert reports  # for which architectures says whoever builds: CUDAARCHS
    for architecture, report in reports.items():
        assert len(report) == KERNELS
        for name, registers, frame, local in report:
            short = re.search(r"(update|norms|accumulate)_kernel.*", name)[0]
            print(f"{architecture} {registers:>3} registers  {short}")
            assert (frame, local) == ("0", "0"), short


def test_compiled_kernels_move_16_bytes(compiled):
    kernels = re.split(r"\.entry ", compiled("-ptx"))[1:]
    assert len(kernels) % KERNELS == 0 < len(kernels)  # of each kind of GPU that the machine has
    for kernel in kernels:
        assert "ld.global.cg.v4.u32" in kernel
        writes = "norms_kernel" not in kernel.split("(")[0]
        assert ("st.global.cg.v4.u32" in kernel) == ("cvt.rn.bf16.f32" in kernel) == writes
        assert not re.search(r"\b(atom|red)\.\S*\.f(32|64)", kernel)
        # One thread computes AdEMAMix's schedule, in float64 by the functions of CUDA, which do.
        contracted = "f32" if "AdEMAMix" in kernel.split("(")[0] else "f(32|64)"
        assert not re.search(rf"\bfma\.rn\.{contracted}\b", kernel)


def test_the_report_says_why_there_is_no_gpu():
    if native.gpu_unavailable() is None:
        pytest.skip("there is one")
    report = subprocess.run([sys.executable, "-m", "fused_opt"], capture_output=True, text=True, check=True).stdout
    assert f"cuda: not here: {native.gpu_unavailable()}" in report
    assert re.search("nvcc|driver|GPU|CUDA", native.gpu_unavailable())


def test_whether_a_gpu_can_be_used_is_asked_with_that_gpu_as_torchs_current_one(monkeypatch):
    """CUDA itself would go back to GPU 0, and start a context there in a process that uses another GPU alone."""
    current, asked = [], []

    @contextmanager
    def device(given):
        current.append(given)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(native._native, "unavailable", lambda number: asked.append((number, *current)))
    for number in (3, -1):
        native.gpu_unavailable.__wrapped__(number)
    assert asked == [(3, torch.device("cuda", 3)), (-1,)]


@every_rule
def test_a_step_waits_for_nothing(name, options, on_gpu):
    """Rate, scale and overflow are tensors; the norm is read when asked for, and the next step has another rate."""
    optimizer, oracle = pair(name, options, "native", dtype=torch.float32)
    train_both(optimizer, oracle, 1)  # makes the plan
    plan, lr, scale = optimizer._plan, torch.tensor(0.05), torch.tensor(8.0)
    optimizer.param_groups[0].update(lr=lr, max_grad_norm=0.5)
    optimizer.grad_scale, optimizer.found_inf = scale, torch.tensor(0.0)
    for step in range(1, 4):
        for each, factor in ((optimizer, 8.0), (oracle, 1.0)):
            set_gradients(parameters_of(each), step)
            for p in parameters_of(each):
                p.grad.mul_(factor)
        norm = torch.nn.utils.clip_grad_norm_(parameters_of(oracle), 0.5).item()
        oracle.param_groups[0]["lr"] = lr.item()
        oracle.step()
        with nobody_waits():
            optimizer.step()
        scale.fill_(3.0)  # as a GradScaler does after the step
        assert optimizer.grad_norm == pytest.approx(norm, rel=1e-5)
        scale.fill_(8.0)
        lr.mul_(2.0)
        assert_close(parameters_of(optimizer), parameters_of(oracle), 1e-5)
    assert optimizer._plan is plan


@pytest.mark.parametrize("rates", [(0.5, 2.0), None], ids=["a rate in a tensor", "noise of a count"])
def test_arguments_that_are_given_once_more_are_read_once_more(rates, on_gpu):
    """The same objects: the rate is where its tensor is by then, and the noise that of the count that they say."""
    p, lr, noise = torch.nn.Parameter(torch.zeros(5)), 1.0, fused_opt.WeightNoise(std=1.0)
    if rates is not None:
        lr, rates, noise = torch.tensor(lr), [torch.tensor(rate) for rate in rates], None
    optimizer = fused_opt.SGD([p], lr=lr, noise=noise, backend="native")
    p.grad, moved = torch.ones(5), []
    for _ in range(2):
        optimizer.step()
    (bucket,), (args,) = optimizer._plan.buckets, optimizer._before._made
    for turn in range(2):
        before = p.detach().clone()
        if rates is not None:
            lr.data = rates[turn]
        bucket.collect_gradients(optimizer.param_groups, None)
        bucket.run(args)
        moved.append(p.detach() - before)
    expected = 0.0 if rates is None else (rates[1] - rates[0]).item()
    torch.testing.assert_close(moved[0] - moved[1], torch.full((5,), expected))


def test_clipping_is_of_all_groups_together(on_gpu):
    """Two rules, one of them in two arithmetics, are three launches, and one norm."""

    def groups(parameters):
        return [{"params": parameters[:2], "momentum": 0.9}, {"params": parameters[2:4]}, {"params": parameters[4:]}]

    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (70, 70), (), (6,), (2, 9)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    ours[4:] = [torch.nn.Parameter(p.detach().double()) for p in ours[4:]]
    theirs = clones(ours)
    optimizer = fused_opt.SGD(groups(ours), lr=0.1, max_grad_norm=0.7, backend="native")
    oracle = torch.optim.SGD(groups(theirs), lr=0.1)
    for step in range(3):
        for parameters in (ours, theirs):
            set_gradients(parameters, step)
        norm = torch.linalg.vector_norm(torch.stack([p.grad.double().norm() for p in theirs])).item()
        for p in theirs:
            p.grad.mul_(0.7 / (norm + 1e-6))
        oracle.step()
        if step:
            with nobody_waits():
                optimizer.step()
        else:
            optimizer.step()
        assert optimizer.grad_norm == pytest.approx(norm, rel=1e-12)
        assert_close(ours, theirs, 1e-6)
    assert len(optimizer._plan.buckets) == 3
    for p in ours:
        p.grad = None
    optimizer.step()
    assert optimizer.grad_norm == 0


@every_rule
def test_an_overflow_that_the_host_does_not_see(name, options, on_gpu):
    optimizer, _ = pair(name, options, "native")
    fresh, _ = pair(name, options, "native")
    train_both(optimizer, fresh, 2)
    set_gradients(parameters_of(optimizer), 5)
    optimizer.found_inf = torch.tensor(1.0)
    with nobody_waits():
        optimizer.step()
    del optimizer.found_inf
    assert_close(parameters_of(optimizer), parameters_of(fresh), 0)
    train_both(optimizer, fresh, 2)
    assert_close(optimizer.state_dict()["state"], fresh.state_dict()["state"], 0)
    assert_close(parameters_of(optimizer), parameters_of(fresh), 0)
    assert optimizer.param_groups[0]["steps"] == 5  # counts what was asked for


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [({"grad_scale": 4.0}, 0.75), ({"found_inf": 1.0}, 1.0), ({"found_inf": 0.0}, 0.0)],
    ids=str,
)
def test_numbers_of_a_scaler_in_float64_are_read(numbers, expected, on_gpu):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer, p.grad = fused_opt.SGD([p], lr=1.0, backend="native"), torch.zeros(3)
    optimizer.step()  # makes the plan, by which the host reads nothing
    for name, number in numbers.items():
        setattr(optimizer, name, torch.tensor(number, dtype=torch.float64))
    p.grad.fill_(1.0)
    with nobody_waits():
        optimizer.step()
    assert p.tolist() == [expected] * 3


@pytest.mark.parametrize("extra", [{"noise": fused_opt.WeightNoise(0.1)}, {"averaging": fused_opt.EMA(0.9)}], ids=str)
def test_where_the_host_counts_it_looks_at_the_overflow(extra, on_gpu):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_opt.SGD([p], lr=0.1, backend="native", **extra)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.found_inf = torch.tensor(1.0)
    with unchanged(optimizer):
        optimizer.step()
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert optimizer.param_groups[0]["steps"] == 2


def test_a_plan_made_anew_looks_at_what_was_left_on_the_device(on_gpu):
    optimizer, oracle = pair("SGD", {"lr": 0.1, "momentum": 0.9}, "native")
    train_both(optimizer, oracle, 2)
    optimizer.found_inf, optimizer.param_groups[0]["lr"] = torch.tensor(1.0), torch.tensor(0.1, dtype=torch.float64)
    for overflow in (1.0, 0.0):
        optimizer.found_inf.fill_(overflow)
        for each in (optimizer, oracle):
            p = parameters_of(each)[0]
            p.data = p.detach().clone()
            set_gradients(parameters_of(each), 3)
        with unchanged(optimizer) if overflow else nullcontext():
            loss = optimizer.step(lambda: 17.0)
        assert loss == 17.0
    oracle.step()
    assert_close(parameters_of(optimizer), parameters_of(oracle))


@pytest.mark.parametrize("count", [torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64), 3], ids=str)
def test_counts_of_a_checkpoint_move_to_the_device(count, on_gpu):
    """What torch.optim's plain, capturable and fused steps have saved, and what an old version of them did."""
    optimizer, oracle = pair("AdamW", {}, "native")
    train_both(oracle, oracle, 1)
    state = copy.deepcopy(oracle.state_dict())
    for of_p, of_oracle in zip(state["state"].values(), oracle.state.values()):
        of_p["step"] = count.clone() if isinstance(count, torch.Tensor) else count
        of_oracle["step"] = torch.tensor(3.0)
    optimizer.load_state_dict(state)
    for p, q in zip(parameters_of(optimizer), parameters_of(oracle)):
        p.data.copy_(q)
    train_both(optimizer, oracle, 2)
    assert_close(parameters_of(optimizer), parameters_of(oracle))
    steps = [of_p["step"] for of_p in optimizer.state.values()]
    assert all(step.dtype == torch.float32 and step.item() == 5 for step in steps)


def test_a_checkpoint_from_a_device_loads_on_the_cpu(on_gpu, monkeypatch):
    there, oracle = pair("AdamW", {}, "native")
    train_both(there, oracle, 2)
    run_with(None, monkeypatch)
    here, _ = pair("AdamW", {}, "native")
    here.load_state_dict(there.state_dict())
    for p, q in zip(parameters_of(here), parameters_of(there)):
        p.data.copy_(q)
    train_both(here, oracle, 2)
    assert_close(parameters_of(here), parameters_of(oracle))
    torch.optim.AdamW(parameters_of(there)).load_state_dict(there.state_dict())


def test_parts_are_added_in_whatever_layout(on_gpu):
    for make in (torch.Tensor.contiguous, torch.Tensor.t, lambda t: t[:, ::2], lambda t: t[0, 0].expand(4, 4)):
        total, part = torch.arange(16.0).reshape(4, 4), make(torch.arange(16.0).reshape(4, 4) - 5)
        total = total[: part.shape[0], : part.shape[1]].clone()
        expected = total + part
        sums = native.accumulate(total, part)
        assert torch.equal(total, expected)
        assert sums == pytest.approx([part.square().sum().item(), expected.square().sum().item()])


def test_memory_that_torch_has_kept_is_given_back_for_the_tables(on_gpu, monkeypatch):
    given_back = []
    make = native._native.DeviceBucket

    def full(*arguments):
        if not given_back:
            raise MemoryError
        return make(*arguments)

    monkeypatch.setattr(native._native, "DeviceBucket", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    optimizer, oracle = pair("SGD", {"lr": 0.1}, "native")
    train_both(optimizer, oracle)
    assert given_back == [True]
    assert_close(parameters_of(optimizer), parameters_of(oracle))


def test_tables_are_freed_with_their_gpu_as_torchs_current_one(on_gpu, monkeypatch):
    """On a thread that has used no GPU yet, CUDA would start a context on the first one."""
    current, freed = [], []

    @contextmanager
    def using(device):
        current.append(device)
        yield
        current.pop()

    class Core:
        def __del__(self):
            freed.append(list(current))

    p = torch.nn.Parameter(torch.ones(3))
    monkeypatch.setattr(native, "_current", using)
    bucket = native.GPUBucket(Core(), [native.ParamEntry(p, 0, 0, "p")])
    thread = threading.Thread(target=bucket.__class__.__del__, args=(bucket,))
    thread.start()
    thread.join()
    assert freed == [[p.device]]
    bucket.core = Core()  # what goes once more when the bucket does
    del bucket, thread
    assert freed == [[p.device]] * 2
