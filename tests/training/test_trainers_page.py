"""The block for transformers in docs/trainers.md, run as it is written, on a small GPT-2."""

import re
from pathlib import Path

import pytest
import torch

import fused_opt

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


@pytest.mark.filterwarnings("ignore")
def test_the_block_balances_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("accelerate", exc_type=ImportError)
    from fused_opt.integrations import transformers as ours

    section = PAGE.read_text().split("## transformers\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 8, "n_embd": 64, "n_layer": 2, "n_head": 2}
    tokens = torch.randint(64, (16, 8))
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    names = {
        **vars(ours),
        "fused_opt": fused_opt,
        "transformers": transformers,
        "TrainingArguments": transformers.TrainingArguments,
        "model": model,
        "folder": str(tmp_path),
        "train_dataset": [{"input_ids": row, "labels": row} for row in tokens],
    }
    exec(compile(block, str(PAGE), "exec"), names)
    trainer = names["trainer"]
    trainer.args.report_to, trainer.args.save_strategy, trainer.args.disable_tqdm = [], "no", True
    trainer.train()
    (balance,) = (
        callback.balance
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, ours.TempBalanceCallback)
    )
    layers = [
        f"transformer.h.{i}.{part}"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert list(balance.alphas) == layers[1:], "without the first; the last is the head, which is tied to the embedding"
    multipliers = [balance.multipliers[f"{name}.weight"] for name in layers[1:]]
    assert (min(multipliers), max(multipliers)) == (0.5, 1.5)
    assert len(balance.history) == 12
