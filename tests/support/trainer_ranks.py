"""What runs in the processes of tests/test_trainer_transformers.py: cyclical batches, and what each process saw of them."""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from test_trainer_transformers import EXAMPLES, SCHEDULE, Text, arguments, trainer_of

import fused_opt
from fused_opt.integrations.transformers import (
    AveragedEvaluation,
    CyclicalBatches,
    SnapshotsCallback,
    TempBalanceCallback,
)


class Trainer(AveragedEvaluation, CyclicalBatches, transformers.Trainer):
    """Both."""


def main(folder):
    torch.set_num_threads(1)
    passed = fused_opt.by_update(float, SCHEDULE, EXAMPLES // 2)
    balance = TempBalanceCallback(passed, min_eigenvalues=8, include=(transformers.pytorch_utils.Conv1D,))
    snapshots = SnapshotsCallback(SCHEDULE, folder / "snapshots", passed)
    args = arguments(folder, num_train_epochs=1, eval_strategy="steps", eval_steps=5, ddp_backend="gloo")
    trainer = trainer_of(
        (fused_opt.AdamW, {"lr": 0.01, "averaging": fused_opt.EMA(0.9)}), args, Trainer, schedule=SCHEDULE, epochs=4,
        train_dataset=Text(), eval_dataset=Text(90, 8), callbacks=[balance, snapshots],
    )  # fmt: skip
    trainer.train()
    found = {
        "updates": trainer.state.global_step,
        "seen": trainer.train_dataset.seen,
        "weights": [p.flatten().tolist() for p in trainer.model.parameters()],
        "alphas": balance.balance.alphas,
        "balanced": len(balance.balance.history),
        "snapshots": len(snapshots.snapshots.paths),
        "losses": [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log],
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # gloo's threads may outlive the interpreter
