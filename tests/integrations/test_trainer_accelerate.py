"""Accelerate, the real one, on handwritten digits; it has no callbacks, and the loop is the test's."""

import pytest
import torch
from sklearn.datasets import load_digits
from support.compare import assert_close
from torch import nn

import fused_opt
from fused_opt.integrations.loop import averaged

library = pytest.importorskip("accelerate", exc_type=ImportError)

EXAMPLES = 100  # in seven batches, which make four updates of two
FEATURES = {
    "noise": fused_opt.WeightNoise(1e-3, schedule="cycle", period=4),
    "averaging": fused_opt.PSWA(5, probability=0.8),
    "trust_ratio": fused_opt.TrustRatio("clars", coefficient=0.05, cap=3.0),
    "max_grad_norm": 0.5,
    "nonfinite": "skip",
}


@pytest.fixture(autouse=True)
def forget():
    """Accelerate keeps its state in singletons."""
    yield
    library.state.AcceleratorState._reset_state(reset_partial_state=True)
    library.state.GradientState._reset_state()


def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.utils.data.TensorDataset(
        torch.tensor(images[:EXAMPLES], dtype=torch.float32) / 16, torch.tensor(labels[:EXAMPLES])
    )


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


class Run:
    """A training as Accelerate's documentation writes it."""

    def __init__(self, make, clip=None, **options):
        library.state.AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
        self.accelerator = library.Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        self.clip = clip
        model = model_of()
        self.raw = make(model.parameters())
        loader = torch.utils.data.DataLoader(digits(), batch_size=16, shuffle=True)
        scheduler = torch.optim.lr_scheduler.StepLR(self.raw, 4, 0.5)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, self.raw, loader, scheduler
        )

    def epoch(self):
        for images, labels in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.cross_entropy(self.model(images), labels)
                self.accelerator.backward(loss)
                if self.clip and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_as_with_torch(name, precision):
    """With accumulation, clipping and a schedule."""
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.01, "eps": 1e-3}
    found = []
    for of in (fused_opt, torch.optim):
        run = Run(lambda p, of=of: getattr(of, name)(p, **options), clip=0.2, mixed_precision=precision)
        for _ in range(2):
            run.epoch()
        found.append(run.weights())
    assert_close(found[0], found[1], 1e-2 if precision == "bf16" else 1e-5)
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(found[0], model_of().parameters()))


def test_our_clipping_is_theirs():
    found = []
    for theirs, ours in ((0.2, None), (None, 0.2)):
        run = Run(lambda p, ours=ours: fused_opt.SGD(p, lr=0.1, max_grad_norm=ours), clip=theirs)
        run.epoch()
        found.append(run.weights())
    assert run.raw.grad_norm > 0.2
    assert_close(found[0], found[1], 1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Every feature and TempBalance, bit for bit: what has a state_dict is registered with Accelerate."""

    def start():
        run = Run(lambda p: fused_opt.SGD(p, lr=0.1, momentum=0.9, **FEATURES), clip=1.0, mixed_precision="bf16")
        run.balance = fused_opt.TempBalance(run.model, run.raw, min_eigenvalues=8, skip_first=False, skip_last=False)
        run.accelerator.register_for_checkpointing(run.balance)
        return run

    def go_on(run):
        for _ in range(2):
            run.balance.step()
            run.epoch()
        with averaged([run.optimizer]):
            seen = run.weights()
        return [run.weights(), seen, run.raw.state_dict(), run.balance.state_dict(), run.balance.multipliers]

    run = start()
    run.balance.step()
    run.epoch()
    run.accelerator.save_state(str(tmp_path / "here"))
    expected = go_on(run)
    assert run.raw.param_groups[0]["steps"] == 12
    assert (expected[0][0] - expected[1][0]).abs().max() > 1e-4
    resumed = start()
    torch.manual_seed(99)
    resumed.accelerator.load_state(str(tmp_path / "here"))
    assert_close(go_on(resumed), expected, bound=0)


def test_cyclical_batches():
    """A prepared loader passes the epoch on to the sampler."""
    schedule = fused_opt.CyclicalBatchSize(10, levels=2, width=1)
    sampler = fused_opt.CyclicalBatchSampler(torch.utils.data.RandomSampler(digits()), schedule)
    accelerator = library.Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(digits(), batch_sampler=sampler))
    sizes = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        sizes.append([len(images) for images, _ in loader])
    assert sizes == [[10] * 10, [20] * 5, [10] * 10]


def test_temp_balance_asks_for_what_is_wrapped():
    run = Run(lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(
        TypeError, match="found AcceleratedOptimizer; where it wraps another one, pass the inner optimizer"
    ):
        fused_opt.TempBalance(run.model, run.optimizer)
    assert not run.raw._optimizer_step_pre_hooks
