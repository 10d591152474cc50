"""Lightning, the real one, on handwritten digits."""

import pytest
import torch
from sklearn.datasets import load_digits
from support.compare import assert_close
from torch import nn

import fused_opt

lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
from fused_opt.integrations.lightning import (  # noqa: E402
    AveragedWeights,
    SnapshotsCallback,
    TempBalanceCallback,
)

EXAMPLES = 96


def digits(first, last):
    images, labels = load_digits(return_X_y=True)
    return torch.utils.data.TensorDataset(
        torch.tensor(images[first:last], dtype=torch.float32) / 16, torch.tensor(labels[first:last])
    )


class Module(lightning.LightningModule):
    """A small network with dropout; in every validation it notes the weights that it sees."""

    def __init__(self, make, batches=None):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        )
        self.make, self.batches = make, batches
        self.validated, self.sizes, self.fail_in = [], [], None

    def train_dataloader(self):
        if self.batches is not None:
            self.batches.set_epoch(self.trainer.current_epoch)
            return torch.utils.data.DataLoader(digits(0, EXAMPLES), batch_sampler=self.batches)
        return torch.utils.data.DataLoader(digits(0, EXAMPLES), batch_size=16)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(digits(EXAMPLES, EXAMPLES + 32), batch_size=16)

    def training_step(self, batch, index):
        if index == 0:  # so that a resumed run's dropout is the uninterrupted one's
            torch.manual_seed(self.current_epoch)
        self.sizes.append(len(batch[0]))
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, index):
        if index == 0:
            self.validated.append(weights(self))
        if self.fail_in == self.current_epoch:
            raise KeyError("validation")
        self.log("loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.make(self.parameters())


def weights(module):
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


def trainer_of(folder, **options):
    return lightning.Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 3, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder, **options,
        }
    )  # fmt: skip


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_bfloat16_as_with_torch(name, tmp_path):
    """With accumulation and clipping, which Lightning refuses in mixed precision to optimizers that say they are fused."""
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.01, "eps": 1e-3}
    found = []
    for library in (fused_opt, torch.optim):
        module = Module(lambda parameters, library=library: getattr(library, name)(parameters, **options))
        trainer = trainer_of(tmp_path, precision="bf16-mixed", accumulate_grad_batches=4, gradient_clip_val=0.5)
        trainer.fit(module)
        assert trainer.global_step == 6  # of six batches the last two make a step
        found.append((weights(module), trainer.callback_metrics["loss"].item()))
    assert_close(found[0][0], found[1][0], 1e-2)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-2)
    before = weights(Module(None))
    assert all((found[0][0][name] - before[name]).abs().max() > 1e-3 for name in before)


def test_our_clipping_is_theirs(tmp_path):
    found = []
    for theirs, ours in ((0.1, None), (None, 0.1)):
        module = Module(lambda parameters, ours=ours: fused_opt.SGD(parameters, lr=0.1, max_grad_norm=ours))
        trainer = trainer_of(tmp_path, gradient_clip_val=theirs, accumulate_grad_batches=2)
        trainer.fit(module)
        found.append(weights(module))
    assert trainer.optimizers[0].grad_norm > 0.1
    assert_close(found[0], found[1], 1e-5)


FEATURES = {
    "noise": fused_opt.WeightNoise(1e-3, schedule="cycle", period=4),
    "averaging": fused_opt.PSWM(4, beta=0.5, probability=0.8),
    "trust_ratio": fused_opt.TrustRatio("lars", coefficient=0.05, cap=3.0),
    "max_grad_norm": 0.5,
    "nonfinite": "skip",
}


@pytest.mark.parametrize("epochs", [1, 2], ids="after epoch {}".format)
def test_a_resumed_run_is_the_uninterrupted_one(epochs, tmp_path):
    """Every feature and every callback, bit for bit, from one of Lightning's own checkpoints."""

    def run(folder, max_epochs, checkpoint=None):
        callbacks = [
            AveragedWeights(),
            TempBalanceCallback(min_eigenvalues=8, skip_first=False, skip_last=False),
            SnapshotsCallback(fused_opt.CyclicalBatchSize(16, levels=1, width=1), folder / "snapshots"),
            lightning.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
        ]
        module = Module(lambda parameters: fused_opt.SGD(parameters, lr=0.1, momentum=0.9, **FEATURES))
        trainer = trainer_of(
            folder, max_epochs=max_epochs, accumulate_grad_batches=2, precision="bf16-mixed", gradient_clip_val=1.0,
            callbacks=callbacks, enable_checkpointing=True,
        )  # fmt: skip
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
        return module, trainer, callbacks

    module, trainer, (_, balance, snapshots, _) = run(tmp_path, 3)
    resumed, again, (_, balance_again, snapshots_again, _) = run(tmp_path, 3, tmp_path / f"epoch={epochs - 1}.ckpt")
    assert again.global_step == 9
    assert_close(weights(resumed), weights(module), bound=0)
    assert_close(again.optimizers[0].state_dict(), trainer.optimizers[0].state_dict(), bound=0)
    assert_close(resumed.validated[-1], module.validated[-1], bound=0)
    assert balance_again.state_dict() == balance.state_dict()
    assert len(balance.balance.history) == 3
    assert balance_again.balance.multipliers == balance.balance.multipliers
    assert len(set(balance.balance.multipliers.values())) > 2
    assert [path.name for path in snapshots.snapshots.paths] == ["snapshot-1.pt", "snapshot-2.pt", "snapshot-3.pt"]
    assert snapshots_again.snapshots.paths == snapshots.snapshots.paths


def averaging(parameters):
    return fused_opt.AdamW(parameters, lr=0.01, averaging=fused_opt.EMA(0.9))


def test_kept_averages_are_the_model_of_checkpoints_and_training_goes_on_from_its_own(tmp_path):
    """As Lightning's WeightAveraging: what was validated is what load_from_checkpoint gives."""

    def run(**resume):
        saves = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        module = Module(averaging)
        trainer = trainer_of(tmp_path, callbacks=[AveragedWeights(keep=True), saves], enable_checkpointing=True)
        trainer.fit(module, **resume)
        return module, trainer

    module, _ = run()
    straight = Module(averaging)
    trainer_of(tmp_path).fit(straight)
    for epoch in range(3):
        loaded = Module.load_from_checkpoint(tmp_path / f"epoch={epoch}.ckpt", make=averaging, weights_only=True)
        assert_close(weights(loaded), module.validated[1 + epoch], bound=0)  # the first is the sanity check
    assert_close(weights(module), module.validated[-1], bound=0)
    kept = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)[AveragedWeights.KEY]
    assert_close({name.removeprefix("model."): value for name, value in kept.items()}, weights(straight), bound=0)
    resumed, _ = run(ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert_close(weights(resumed), weights(module), bound=0)


def test_validation_sees_the_averages(tmp_path):
    """And a checkpoint of the same moment the weights that train; validate() takes the module as it is."""
    module = Module(averaging)
    saved = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="loss", save_last=True)
    trainer = trainer_of(tmp_path, callbacks=[saved, AveragedWeights()], enable_checkpointing=True)
    trainer.fit(module)
    assert len(module.validated) == 4  # one is Lightning's check before training
    with trainer.optimizers[0].averaged_weights():
        averaged = weights(module)
    assert (averaged["0.weight"] - weights(module)["0.weight"]).abs().max() > 1e-2
    assert_close(module.validated[-1], averaged, bound=0)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_close({name: checkpoint[f"model.{name}"] for name in averaged}, weights(module), bound=0)
    trainer.validate(module, verbose=False)
    assert_close(module.validated[-1], weights(module), bound=0)


def test_weights_come_back_when_validation_fails(tmp_path):
    """Before Lightning saves what was there when it happened."""
    module, plain = Module(averaging), Module(averaging)
    module.fail_in = 1
    saved = lightning.callbacks.ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True, every_n_epochs=9)
    trainer = trainer_of(tmp_path, callbacks=[saved, AveragedWeights()], enable_checkpointing=True)
    with pytest.raises(KeyError, match="validation"):
        trainer.fit(module)
    trainer_of(tmp_path, max_epochs=2).fit(plain)
    assert_close(weights(module), weights(plain), bound=0)
    found = torch.load(tmp_path / "failed.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(found["model.0.weight"], weights(plain)["0.weight"])


def sgd(parameters):
    return fused_opt.SGD(parameters, lr=0.1)


def test_cyclical_batches(tmp_path):
    """By the sampler; Lightning asks for it anew in every epoch, and so knows its length."""
    schedule = fused_opt.CyclicalBatchSize(12, levels=2, width=1)
    module = Module(sgd, fused_opt.CyclicalBatchSampler(range(EXAMPLES), schedule))
    snapshots = SnapshotsCallback(schedule, tmp_path / "snapshots")
    trainer = trainer_of(tmp_path, max_epochs=4, reload_dataloaders_every_n_epochs=1, callbacks=[snapshots])
    trainer.fit(module)
    assert module.sizes == [12] * 8 + [24] * 4 + [12] * 8 + [24] * 4
    assert trainer.global_step == 24 == schedule.updates(4, EXAMPLES)
    assert len(module.validated) == 5
    assert [path.name for path in snapshots.snapshots.paths] == ["snapshot-1.pt", "snapshot-2.pt"]


def test_cyclical_accumulation(tmp_path):
    """By Lightning's own scheduler of accumulation."""
    schedule = fused_opt.CyclicalBatchSize(16, levels=2, width=1)
    factors = {epoch: round(schedule.multiplier(epoch)) for epoch in range(4)}
    module = Module(sgd)
    accumulation = lightning.callbacks.GradientAccumulationScheduler(factors)
    trainer = trainer_of(tmp_path, max_epochs=4, callbacks=[accumulation])
    trainer.fit(module)
    assert module.sizes == [16] * 24
    assert trainer.global_step == 18 == schedule.updates(4, EXAMPLES)


def test_snapshots_of_whole_epochs_only(tmp_path):
    with pytest.raises(ValueError, match=r"the batch size changes every 0\.5"):
        SnapshotsCallback(fused_opt.CyclicalBatchSize(8, width=0.5), tmp_path)
