"""The Trainer of transformers, the real one, on a small language model of text that ships with Python."""

import json
import math
from pathlib import Path

import pytest
import torch
from support.compare import assert_close
from support.processes import run_ranks

import fused_opt

transformers = pytest.importorskip("transformers", exc_type=ImportError)
from support import trainer_ranks  # noqa: E402
from support.trainer_ranks import EXAMPLES, SCHEDULE, Text, arguments, trainer_of  # noqa: E402

from fused_opt.integrations.transformers import (  # noqa: E402
    AveragedEvaluation,
    CyclicalBatches,
    SaveAverages,
    SnapshotsCallback,
    TempBalanceCallback,
)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_as_with_torch(name, bf16, tmp_path):
    """With accumulation, clipping, mixed precision and a schedule; an epoch's last update has fewer micro-batches."""
    options = (
        {"lr": 0.5, "momentum": 0.9} if name == "SGD" else {"lr": 0.01, "eps": 1e-3}
    )  # some gradients are nothing but rounding
    args = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "bf16": bf16, "num_train_epochs": 2}
    trained = []
    for library in (fused_opt, torch.optim):
        trainer = trainer_of((getattr(library, name), dict(options)), arguments(tmp_path, **args))
        trainer.train()
        assert trainer.state.global_step == 8
        trained.append(trainer)
    ours, theirs = trained
    assert isinstance(ours.optimizer.optimizer, getattr(fused_opt, name))
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in trained]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3 if bf16 else 1e-5)
    assert losses[0][-1] < losses[0][0] - 0.3
    assert_close(weights(ours), weights(theirs), 2e-2 if bf16 else 1e-4)


def test_our_clipping_is_theirs(tmp_path):
    """The norm that the step clips with is what accelerate's clipping returns, and so is the result."""
    trained = []
    for theirs in (True, False):
        optimizer = (fused_opt.SGD, {"lr": 0.5, "max_grad_norm": None if theirs else 0.2})
        args = arguments(tmp_path, max_grad_norm=0.2 if theirs else 0.0, gradient_accumulation_steps=2, max_steps=4)
        trained.append(trainer_of(optimizer, args))
        trained[-1].train()
    (theirs, ours), norm = trained, trained[1].optimizer.optimizer.grad_norm
    logged = [[log["grad_norm"] for log in each.state.log_history if "grad_norm" in log] for each in trained]
    assert min(logged[0]) > 0.4
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
    assert norm == pytest.approx(logged[1][-1], rel=1e-6)
    assert_close(weights(ours), weights(theirs), 1e-5)


FEATURES = {
    "lr": 0.01,
    "noise": fused_opt.WeightNoise(1e-3, schedule="cycle", period=4),
    "averaging": fused_opt.PSWA(4, probability=0.8),
    "trust_ratio": fused_opt.TrustRatio("lamb", cap=3.0),
    "max_grad_norm": 0.5,
    "nonfinite": "skip",
}


@pytest.mark.parametrize("at", [5, 7, 10], ids="after update {}".format)
def test_a_resumed_run_is_the_uninterrupted_one(at, tmp_path):
    """Every feature and every callback, bit for bit; from the middle of an epoch and from its end (five updates each)."""

    class Trainer(AveragedEvaluation, transformers.Trainer):
        pass

    def run(folder, **resume):
        args = arguments(
            folder, gradient_accumulation_steps=2, bf16=True, num_train_epochs=3, eval_strategy="steps", eval_steps=3,
            save_strategy="steps", save_steps=at, max_grad_norm=1.0,
        )  # fmt: skip
        callbacks = [
            TempBalanceCallback(min_eigenvalues=8, include=(transformers.pytorch_utils.Conv1D,)),
            SnapshotsCallback(fused_opt.CyclicalBatchSize(8, levels=1, width=1), folder / "snapshots"),
        ]
        trainer = trainer_of(
            (fused_opt.AdamW, dict(FEATURES)), args, Trainer, callbacks=callbacks, eval_dataset=Text(90, 8)
        )
        trainer.train(**resume)
        return trainer, *callbacks

    straight, balance, snapshots = run(tmp_path)
    resumed, balance_again, snapshots_again = run(tmp_path, resume_from_checkpoint=tmp_path / f"checkpoint-{at}")
    assert resumed.state.global_step == 15
    assert_close(weights(resumed), weights(straight), bound=0)
    assert_close(resumed.optimizer.state_dict(), straight.optimizer.state_dict(), bound=0)
    assert balance_again.state_dict() == balance.state_dict()
    assert len(balance.balance.history) == 3
    assert len(set(balance.balance.multipliers.values())) > 2
    assert balance_again.balance.multipliers == balance.balance.multipliers
    assert [path.name for path in snapshots.snapshots.paths] == ["snapshot-1.pt", "snapshot-2.pt", "snapshot-3.pt"]
    assert snapshots_again.snapshots.paths == snapshots.snapshots.paths
    losses = [
        {log["step"]: log["eval_loss"] for log in each.state.log_history if "eval_loss" in log}
        for each in (straight, resumed)
    ]
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == [3, 6, 9, 12, 15]


class Averaged(AveragedEvaluation, transformers.Trainer):
    pass


def loss_of(model, data):
    model.eval()
    batch = {key: torch.stack([data[i][key] for i in range(len(data))]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        return model(**batch).loss.item()


def test_evaluation_sees_the_averages(tmp_path):
    """In training, by hand, and in predict; what is saved are the weights that train."""
    data = Text(90, 8)
    options = {"lr": 0.05, "averaging": fused_opt.EMA(0.9)}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4, max_steps=8)
    trainer = trainer_of((fused_opt.AdamW, options), args, Averaged, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]  # without an optimizer yet
    assert before == pytest.approx(loss_of(trainer.model, data), rel=1e-6)
    trainer.train()
    plain = loss_of(trainer.model, data)
    with trainer.optimizer.optimizer.averaged_weights():
        averaged = loss_of(trainer.model, data)
    assert abs(plain - averaged) > 1e-2
    found = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(found) == 2
    assert found[-1] == pytest.approx(averaged, rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(averaged, rel=1e-6)
    assert trainer.predict(data).metrics["test_loss"] == pytest.approx(averaged, rel=1e-6)
    saved = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-8")
    assert_close(dict(saved.named_parameters()), weights(trainer), bound=0)


def test_weights_come_back_when_evaluation_fails(tmp_path):
    class Broken(Exception):
        pass

    def metrics(_):
        raise Broken

    options = {"lr": 0.05, "averaging": fused_opt.EMA(0.9)}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=4, max_steps=8)
    trainer = trainer_of((fused_opt.AdamW, options), args, Averaged, eval_dataset=Text(90, 8), compute_metrics=metrics)
    with pytest.raises(Broken):
        trainer.train()
    plain = trainer_of((fused_opt.AdamW, options), arguments(tmp_path, max_steps=8))
    plain.add_callback(Stop(4))
    plain.train()
    assert_close(weights(trainer), weights(plain), bound=0)


class Stop(transformers.TrainerCallback):
    """Ends training after an update, as if it had been interrupted."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.at


def best_of(folder, **resume):
    """A run whose best evaluation is not its last: by the largest loss."""
    args = arguments(
        folder, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        max_steps=16, gradient_accumulation_steps=2, save_total_limit=2, greater_is_better=True,
    )  # fmt: skip
    options = {"lr": 0.05, "averaging": fused_opt.EMA(0.9)}
    trainer = trainer_of((fused_opt.AdamW, options), args, Averaged, eval_dataset=Text(90, 8))
    trainer.train(**resume)
    return trainer


def test_the_best_model_is_the_averages_that_were_evaluated(tmp_path):
    """In memory, in evaluations from then on, and in the checkpoint for others to load."""
    trainer = best_of(tmp_path)
    found = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = max(found, key=found.get)
    assert best < 16
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert loss_of(trainer.model, Text(90, 8)) == pytest.approx(found[best], rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found[best], rel=1e-6)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}" / "averages")
    assert_close(dict(loaded.named_parameters()), weights(trainer), bound=0)
    trained = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert abs(loss_of(trained, Text(90, 8)) - found[best]) > 1e-2
    resumed = best_of(tmp_path, resume_from_checkpoint=tmp_path / f"checkpoint-{best}")
    assert_close(weights(resumed), weights(trainer), bound=0)


def test_a_best_checkpoint_without_averages_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(SaveAverages, "on_save", lambda *args, **kwargs: None)
    with pytest.warns(fused_opt.warn.FusedOptWarning, match="has no averages beside its weights"):
        best_of(tmp_path)


def test_averages_are_saved_of_models_that_can_be_loaded(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = fused_opt.SGD(model.parameters(), averaging=fused_opt.EMA(0.9))
    with pytest.raises(ValueError, match="saved as a transformers model, whole, and this one is a Linear"):
        SaveAverages().on_save(arguments(tmp_path), None, None, model=model, optimizer=optimizer)


class Cyclical(CyclicalBatches, transformers.Trainer):
    pass


def test_cyclical_batches(tmp_path):
    """Sizes, updates, the learning rate's end, snapshots and TempBalance at true epochs; and a resume in an epoch."""
    passed = fused_opt.by_update(float, SCHEDULE, EXAMPLES)

    def run(folder, at=None, **resume):
        data = Text()
        callbacks = [
            SnapshotsCallback(SCHEDULE, folder / "snapshots", passed),
            TempBalanceCallback(passed, min_eigenvalues=8, include=(transformers.pytorch_utils.Conv1D,)),
        ]
        args = arguments(
            folder, num_train_epochs=1, save_strategy="steps", save_steps=12, learning_rate=0.01, lr_scheduler_type="linear"
        )  # fmt: skip
        trainer = trainer_of(
            (fused_opt.AdamW, {"lr": 0.01}), args, Cyclical, schedule=SCHEDULE, epochs=4, train_dataset=data,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.train(**resume)
        return trainer, data.seen, callbacks

    trainer, seen, (snapshots, balance) = run(tmp_path)
    assert trainer.state.global_step == SCHEDULE.updates(4, EXAMPLES) == 30
    assert len(seen) == 4 * EXAMPLES
    epochs = [seen[i : i + EXAMPLES] for i in range(0, len(seen), EXAMPLES)]
    assert all(sorted(epoch) == list(range(EXAMPLES)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates[-1] == pytest.approx(0.01 / 30)
    assert [path.name for path in snapshots.snapshots.paths] == ["snapshot-1.pt", "snapshot-2.pt"]
    last = torch.load(snapshots.snapshots.paths[-1], weights_only=True)
    assert_close({name: last[name] for name in weights(trainer)}, weights(trainer), bound=0)
    assert len(balance.balance.history) == 4

    resumed, rest, (_, balance_again) = run(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-12")
    assert_close(weights(resumed), weights(trainer), bound=0)
    assert rest[-EXAMPLES:] == seen[-EXAMPLES:]
    assert balance_again.balance.alphas == balance.balance.alphas


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_cyclical_batches_in_two_processes(tmp_path):
    """Each has half of every epoch's examples, in batches of the schedule, and all else is alike."""
    run_ranks(trainer_ranks.__name__, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    half = EXAMPLES // 2
    for epoch in range(4):
        seen = [found["seen"][epoch * half : (epoch + 1) * half] for found in (first, second)]
        assert sorted(seen[0] + seen[1]) == list(range(EXAMPLES))
    assert first["updates"] == second["updates"] == SCHEDULE.updates(4, half) == 16
    assert all(first[name] == second[name] for name in ("weights", "alphas", "balanced", "losses"))
    assert (first["balanced"], len(first["losses"])) == (4, 4)
    assert (first["snapshots"], second["snapshots"]) == (2, 0)


def test_cyclical_batches_are_the_only_epochs(tmp_path):
    for wrong in ({"num_train_epochs": 3}, {"num_train_epochs": 1, "gradient_accumulation_steps": 2}):
        with pytest.raises(ValueError, match="all 4 epochs of cyclical batches are one to the Trainer"):
            trainer_of((fused_opt.AdamW, {}), arguments(tmp_path, **wrong), Cyclical, schedule=SCHEDULE, epochs=4)


def test_what_the_trainer_saves_is_plain(tmp_path):
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer = trainer_of((fused_opt.AdamW, dict(FEATURES)), args)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    assert_close(saved, trainer.optimizer.state_dict(), bound=0)
    assert math.isfinite(json.loads(Path(folder / "trainer_state.json").read_text())["epoch"])
