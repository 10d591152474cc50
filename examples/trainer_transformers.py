"""transformers' Trainer on Python's own sources: with torch.optim.AdamW, and with fused_opt's, its averages and balance.

    python examples/trainer_transformers.py [--quick] [--steps N] [--seeds N]

Trains a GPT-2 of 4.8 million parameters, made from its configuration, to predict the bytes of the standard library, of which
every tenth module is held out. The lines that fused_opt changes or adds are marked; without them it is a Trainer's usual
program. Printed for both: the loss on the modules held out during training, for every seed.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import fused_opt  # new
from fused_opt.integrations.transformers import AveragedEvaluation, TempBalanceCallback  # new

LENGTH = 128
SIZE = {"n_embd": 256, "n_layer": 6, "n_head": 8}
QUICK = {"n_embd": 64, "n_layer": 2, "n_head": 4}


def text() -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Pieces of 128 bytes of the modules to train on, and 200 spread over those for evaluation."""
    modules: list[list[bytes]] = [[], []]
    for i, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        modules[i % 10 == 9].append(path.read_text("utf-8").encode("ascii", "replace"))

    def examples(sources: list[bytes]) -> list[dict[str, torch.Tensor]]:
        pieces = torch.frombuffer(bytearray(b"\n".join(sources)), dtype=torch.uint8).long().split(LENGTH)[:-1]
        return [{"input_ids": piece, "labels": piece} for piece in pieces]

    held_out = examples(modules[1])
    return examples(modules[0]), held_out[:: len(held_out) // 200][:200]


def model_of(seed: int, size: dict[str, int]) -> transformers.PreTrainedModel:
    transformers.set_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=LENGTH, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM", **size
    )
    return transformers.GPT2LMHeadModel(config)


class Trainer(AveragedEvaluation, transformers.Trainer):  # new
    """Evaluates the averages."""


def train(ours: bool, seed: int, steps: int, size: dict[str, int], lr: float) -> list[float]:
    """Losses on the held out text."""
    cls: Any = transformers.Trainer
    optimizer: Any = (torch.optim.AdamW, {"lr": lr})
    callbacks: list[Any] = []
    if ours:
        cls = Trainer  # new
        optimizer = (fused_opt.AdamW, {"lr": lr, "averaging": fused_opt.EMA(0.97)})  # changed
        callbacks = [TempBalanceCallback(include=(transformers.pytorch_utils.Conv1D,))]  # new
    training, held_out = text()
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2, weight_decay=0.1,
            lr_scheduler_type="constant", eval_strategy="steps", eval_steps=steps // 4, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=seed,
        )  # fmt: skip
        trainer = cls(
            model_of(seed, size), args, train_dataset=training, eval_dataset=held_out, optimizer_cls_and_kwargs=optimizer,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]


def main() -> None:
    """Train both ways and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 40 updates, a model of 0.1 million")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.quick else options.threads)
    steps, seeds, size, lr = (40, 1, QUICK, 3e-3) if options.quick else (options.steps, options.seeds, SIZE, 1e-3)
    print(f"loss on held out text after {', '.join(str(steps // 4 * i) for i in (1, 2, 3, 4))} updates")
    for ours in (False, True):
        for seed in range(seeds):
            losses = "  ".join(f"{loss:.3f}" for loss in train(ours, seed, steps, size, lr))
            print(
                f"  {'fused_opt.AdamW, averaged and balanced' if ours else 'torch.optim.AdamW':40} seed {seed}: {losses}"
            )
    if options.quick:
        print("--quick: this shows that the example runs; its figures mean nothing")


if __name__ == "__main__":
    main()
