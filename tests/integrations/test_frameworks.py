"""The optimizers inside the libraries that wrap them: the real ones, not imitations."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from rules import KINDS, both_kinds
from support.compare import assert_close, assert_same

import fused_opt
from fused_opt import backends
from fused_opt.backends import native


@pytest.fixture(params=[name for name, reason in backends.available().items() if reason is None])
def backend(request):
    """Once each: to a framework all instruction sets are one."""
    return request.param


def model_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count * 8, 4, generator=generator)
    return torch.utils.data.TensorDataset(inputs, inputs[:, :1].long() % 3)


def loss_of(model, inputs, labels):
    return torch.nn.functional.cross_entropy(model(inputs), labels.flatten() % 3)


def optimizers(name, options, backend):
    """How to make ours and torch's."""
    return (
        lambda parameters: getattr(fused_opt, name)(parameters, backend=backend, **options),
        lambda parameters: getattr(torch.optim, name)(parameters, foreach=False, **options),
    )


@both_kinds
def test_lightning(name, options, backend, tmp_path):
    """It passes a closure that runs forward and backward; with accumulation, clipping and a scheduler around it."""
    lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)

    class Module(lightning.LightningModule):
        def __init__(self, make):
            super().__init__()
            self.model, self.make = model_of(), make

        def training_step(self, batch, index):
            return loss_of(self.model, *batch)

        def configure_optimizers(self):
            optimizer = self.make(self.parameters())
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]

    trained = []
    for make in optimizers(name, options, backend):
        module = Module(make)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=8))
        assert trainer.global_step == 6
        trained.append(trainer)
    ours, theirs = (trainer.optimizers[0] for trainer in trained)
    assert isinstance(ours, getattr(fused_opt, name))
    assert_close([p.detach() for p in ours.param_groups[0]["params"]], list(theirs.param_groups[0]["params"]), 1e-5)
    before = model_of().state_dict()["0.weight"]
    assert (ours.param_groups[0]["params"][0] - before).abs().max() > 1e-3
    path = tmp_path / "checkpoint.ckpt"
    trained[0].save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]
    assert_close(saved, ours.state_dict(), bound=0)


@pytest.fixture
def accelerate(monkeypatch):
    """Accelerate keeps its state in singletons, and transformers' trainer leaves its precision in the environment."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    library = pytest.importorskip("accelerate", exc_type=ImportError)
    yield library
    library.state.AcceleratorState._reset_state(reset_partial_state=True)
    library.state.GradientState._reset_state()


@both_kinds
def test_accelerate(name, options, backend, accelerate, tmp_path):
    """Its prepare() loads the state of a fresh optimizer into itself, save_state and load_state that of a trained one."""
    make, make_theirs = optimizers(name, options, backend)
    plain = model_of()
    oracle = make_theirs(plain.parameters())
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = model_of()
    raw = make(model.parameters())
    model, optimizer, loader = accelerator.prepare(
        model, raw, torch.utils.data.DataLoader(batches(), batch_size=8, shuffle=False)
    )
    assert_close(list(model.parameters()), list(model_of().parameters()), bound=0)
    assert optimizer.optimizer is raw

    def train():
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, inputs, labels))
                optimizer.step()
                optimizer.zero_grad()

    train()
    for index, (inputs, labels) in enumerate(loader):
        (loss_of(plain, inputs, labels) / 2).backward()
        if index % 2:
            oracle.step()
            oracle.zero_grad()
    assert_close(list(model.parameters()), list(plain.parameters()), 1e-5)

    accelerator.save_state(str(tmp_path / "here"))
    train()
    straight = copy.deepcopy([list(model.parameters()), raw.state_dict()])
    accelerator.load_state(str(tmp_path / "here"))
    assert_close(list(model.parameters()), list(plain.parameters()), 1e-5)
    train()
    assert_close([list(model.parameters()), raw.state_dict()], straight, bound=0)


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
def test_torch_compile_of_a_training_step(hooked, backend):
    """Longer than dynamo's patience: a learning rate or a count of steps in a graph would show, as values or as time."""
    torch.compiler.reset()
    model, oracle_model = model_of(), model_of()
    make, make_theirs = optimizers(*KINDS[1], backend)
    optimizer, oracle = make(model.parameters()), make_theirs(oracle_model.parameters())
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (optimizer, oracle)]
    calls = []
    if hooked:
        optimizer.register_step_post_hook(lambda *_: calls.append(1))

    @torch.compile(backend="aot_eager" if hooked else "eager")
    def train(inputs, labels):
        loss = loss_of(model, inputs, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    frames = []
    for step in range(12):
        inputs, labels = batches()[step : step + 8]
        ours = train(inputs, labels)
        theirs = loss_of(oracle_model, inputs, labels)
        torch.testing.assert_close(ours, theirs)
        theirs.backward()
        oracle.step()
        oracle.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert_close(list(model.parameters()), list(oracle_model.parameters()), 1e-5)
    assert [of_p["step"] for of_p in optimizer.state.values()] == [12] * 4
    assert len(calls) == (12 if hooked else 0)
    assert frames[3:] == [frames[3]] * 9, "a step was compiled again and again"


@both_kinds
def test_the_empty_step_of_distributed_checkpoint(name, options, backend):
    """It steps with a learning rate and gradients of zero to make the state; that must not touch the weights."""
    from torch.distributed.checkpoint import state_dict as dcp

    undampened = {"dampening": 0} if name == "SGD" else {}  # the first gradient after it would be: docs/numerics.md
    make, make_theirs = optimizers(name, {**options, "weight_decay": 0.5, **undampened}, backend)
    model, oracle_model = model_of(), model_of()
    optimizer, oracle = make(model.parameters()), make_theirs(oracle_model.parameters())
    before = copy.deepcopy([list(model.parameters()), optimizer.param_groups])
    found = dcp.get_optimizer_state_dict(model, optimizer)
    assert_close([list(model.parameters()), optimizer.param_groups], before, bound=0)
    assert all(p.grad is None for p in model.parameters())
    other_model = model_of()
    expected = dcp.get_optimizer_state_dict(other_model, make_theirs(other_model.parameters()))
    for fqn, of_p in expected["state"].items():  # the same states; torch's have taken a step of decay already
        assert_close(found["state"][fqn], {slot: torch.zeros_like(value) for slot, value in of_p.items()}, bound=0)

    def train(model, optimizer):
        for step in range(3):
            loss_of(model, *batches()[step : step + 8]).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(model, optimizer)
    train(oracle_model, oracle)  # which was not saved before its first step
    assert_close(list(model.parameters()), list(oracle_model.parameters()), 1e-5)
    model, oracle_model = model_of(), model_of()
    optimizer, oracle = make(model.parameters()), make_theirs(oracle_model.parameters())
    train(model, optimizer)
    train(oracle_model, oracle)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    weights = copy.deepcopy(model.state_dict())
    assert "0.weight" in saved["state"]
    other_model = copy.deepcopy(model)
    other = make(other_model.parameters())
    dcp.set_optimizer_state_dict(other_model, other, copy.deepcopy(saved))
    assert_close(list(other_model.parameters()), list(model.parameters()), bound=0)
    assert_same(other, optimizer, bound=0)
    train(other_model, other)
    train(model, optimizer)
    assert_same(other, optimizer, bound=0)
    # ours into torch's, in the middle of training
    oracle_model.load_state_dict(weights)
    dcp.set_optimizer_state_dict(oracle_model, oracle, saved)
    train(oracle_model, oracle)
    assert_close(list(oracle_model.parameters()), list(model.parameters()), 1e-5)


def test_parameters_moved_into_shared_memory(backend):
    """What multiprocessing does to a model: the same values at another address."""
    model, oracle_model = model_of(), model_of()
    make, make_theirs = optimizers("AdamW", {}, backend)
    optimizer, oracle = make(model.parameters()), make_theirs(oracle_model.parameters())
    for step in range(3):
        if step == 1:
            model.share_memory()
        for each, of in ((model, optimizer), (oracle_model, oracle)):
            loss_of(each, *batches()[step : step + 8]).backward()
            of.step()
    assert_close(list(model.parameters()), list(oracle_model.parameters()), 1e-5)


FORK = """
    import hashlib, torch, fused_opt

    torch.set_num_threads(3)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300_000, generator=generator)

    def trained(optimizer, p, steps):
        for _ in range(steps):
            optimizer.step()
        return hashlib.sha256(p.detach().numpy()).hexdigest()  # torch's own copy of so much would hang in a child

    def made():
        p = torch.nn.Parameter(values.clone())
        optimizer = fused_opt.AdamW([p], lr=0.1, backend="native")
        p.grad = torch.cos(values)
        optimizer.step()
        return optimizer, p

    class Worker(torch.utils.data.Dataset):
        def __init__(self):
            self.optimizer, self.p = made()  # in the parent: its threads have run, and do not exist in the child

        def __len__(self):
            return 2

        def __getitem__(self, index):
            torch.set_num_threads(3)
            return trained(self.optimizer, self.p, 3)

    expected = trained(*made(), 3)
    loader = torch.utils.data.DataLoader(
        Worker(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=30
    )
    found = list(loader)
    assert len(found) == 2 and set(found) == {expected}
    assert trained(*made(), 3) == expected  # and the parent goes on with all its threads
    print("done")
"""


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_step_in_a_forked_worker_does_not_hang():
    """In a process of its own: this one must not fork, and must not wait for one that hangs."""
    code = textwrap.dedent(FORK)
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert finished.stdout == "done\n", finished.stderr
