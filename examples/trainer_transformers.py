"""transformers' Trainer on Python's own manual: with torch.optim.AdamW, and with fused_opt's, its averages and balance.

    python examples/trainer_transformers.py [--quick] [--steps N] [--seeds N]

Trains a small GPT-2, made from its configuration, to predict the bytes of the manual's chapters on the language. The lines
that fused_opt changes or adds are marked; without them it is a Trainer's usual program. Printed for both: the loss on held
out text during training, for every seed.
"""

from __future__ import annotations

import argparse
import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers

import fused_opt  # new
from fused_opt.integrations.transformers import AveragedEvaluation, TempBalanceCallback  # new

LENGTH = 64


def text() -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Pieces of 64 bytes to train on, and every tenth for evaluation."""
    whole = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    pieces = torch.frombuffer(bytearray(whole), dtype=torch.uint8).long().split(LENGTH)[:-1]
    examples = [{"input_ids": piece, "labels": piece} for piece in pieces]
    return [piece for i, piece in enumerate(examples) if i % 10], examples[::10][:200]


def model_of(seed: int) -> transformers.PreTrainedModel:
    transformers.set_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=128,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return transformers.GPT2LMHeadModel(config)


class Trainer(AveragedEvaluation, transformers.Trainer):  # new
    """Evaluates the averages."""


def train(ours: bool, seed: int, steps: int) -> list[float]:
    """Losses on the held out text."""
    cls: Any = transformers.Trainer
    optimizer: Any = (torch.optim.AdamW, {"lr": 3e-3})
    callbacks: list[Any] = []
    if ours:
        cls = Trainer  # new
        optimizer = (fused_opt.AdamW, {"lr": 3e-3, "averaging": fused_opt.EMA(0.97)})  # changed
        callbacks = [TempBalanceCallback(include=(transformers.pytorch_utils.Conv1D,))]  # new
    training, held_out = text()
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2, weight_decay=0.1,
            lr_scheduler_type="constant", eval_strategy="steps", eval_steps=steps // 4, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=seed,
        )  # fmt: skip
        trainer = cls(
            model_of(seed), args, train_dataset=training, eval_dataset=held_out, optimizer_cls_and_kwargs=optimizer,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]


def main() -> None:
    """Train both ways and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 40 updates")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="the networks are so small that a second does not pay")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, seeds = (40, 1) if options.quick else (options.steps, options.seeds)
    print(f"loss on held out text after {', '.join(str(steps // 4 * i) for i in (1, 2, 3, 4))} updates")
    for ours in (False, True):
        for seed in range(seeds):
            losses = "  ".join(f"{loss:.3f}" for loss in train(ours, seed, steps))
            print(
                f"  {'fused_opt.AdamW, averaged and balanced' if ours else 'torch.optim.AdamW':40} seed {seed}: {losses}"
            )


if __name__ == "__main__":
    main()
