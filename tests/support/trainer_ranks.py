"""A small language model for transformers' Trainer, of text that ships with Python.

As a program, one of the processes of tests/integrations/test_trainer_transformers.py: cyclical batches, and what each
process saw of them.
"""

import json
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers

import fused_opt
from fused_opt.integrations.transformers import (
    AveragedEvaluation,
    CyclicalBatches,
    SnapshotsCallback,
    TempBalanceCallback,
)

LENGTH, EXAMPLES = 16, 40
SCHEDULE = fused_opt.CyclicalBatchSize(4, levels=2, width=1)


class Text(torch.utils.data.Dataset):
    """Bytes of Python's manual."""

    def __init__(self, first=0, examples=EXAMPLES):
        self.tokens = torch.frombuffer(bytearray(topics["assignment"], "ascii", "replace"), dtype=torch.uint8).long()
        self.first, self.examples, self.seen = first, examples, []

    def __len__(self):
        return self.examples

    def __getitem__(self, index):
        self.seen.append(index)
        at = (self.first + index) * LENGTH
        tokens = self.tokens[at : at + LENGTH]
        labels = tokens.clone()
        labels[0] = -100  # nothing comes before it; the Trainer divides by the labels that there are
        return {"input_ids": tokens, "labels": labels}


def model_of(dropout=0.1, width=16):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=LENGTH, n_embd=width, n_layer=2, n_head=2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def arguments(folder, **options):
    return transformers.TrainingArguments(
        str(folder),
        **{
            "use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 4,
            "save_strategy": "no", "logging_steps": 1, "weight_decay": 0.1, "seed": 1, **options,
        },
    )  # fmt: skip


def trainer_of(optimizer, args, cls=transformers.Trainer, model=None, **options):
    options.setdefault("train_dataset", Text())
    return cls(model or model_of(), args, optimizer_cls_and_kwargs=optimizer, **options)


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
