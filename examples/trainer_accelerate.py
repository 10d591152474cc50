"""Accelerate with gradient accumulation on handwritten digits: with torch.optim.SGD, and with fused_opt.CLARS.

    python examples/trainer_accelerate.py [--quick] [--seeds N]

Trains a small convolutional network with batches of 512 that are accumulated from 8 micro-batches, in bfloat16 mixed
precision. Accelerate has no callbacks: what fused_opt changes or adds are the marked lines of the loop. In the middle a
checkpoint is saved, and the run resumed from it. Printed for both: the accuracy on the test images, and whether the
resumed run ended with the very same weights.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fused_opt  # new
from fused_opt.integrations.loop import averaged  # new


def train(ours: bool, seed: int, epochs: int, folder: str, resume: bool = False) -> tuple[float, list[torch.Tensor]]:
    """Accuracy, and the weights; with `resume` only the epochs after the checkpoint that the whole run has saved."""
    set_seed(seed)
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=8)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if ours:
        optimizer = fused_opt.CLARS(model.parameters(), lr=1.0, cap=1.0, averaging=fused_opt.EMA(0.8))  # changed
        optimizer.track_parts("microbatch")  # new
    loader = DataLoader(TensorDataset(data[0][:1024], data[1][:1024]), batch_size=64, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if ours:
        balance = fused_opt.TempBalance(model, optimizer.optimizer, min_eigenvalues=8)  # new
        accelerator.register_for_checkpointing(balance)  # new
    if resume:
        accelerator.load_state(folder)
    for epoch in range(epochs // 2 if resume else 0, epochs):
        if epoch == epochs // 2 and not resume:
            accelerator.save_state(folder)
        if ours:
            balance.step()  # new
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad(), averaged([optimizer]):  # new
        accuracy = (model(data[0][1024:]).argmax(1) == data[1][1024:]).float().mean().item()
    accelerator.free_memory()
    return accuracy, weights


def main() -> None:
    """Train both ways and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, four epochs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="the networks are so small that a second does not pay")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    epochs = 4 if options.quick else 20
    for ours in (False, True):
        for seed in range(1 if options.quick else options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                accuracy, weights = train(ours, seed, epochs, folder)
                _, resumed = train(ours, seed, epochs, folder, resume=True)
            same = all(torch.equal(p, q) for p, q in zip(weights, resumed))
            print(
                f"  {'fused_opt.CLARS, averaged and balanced' if ours else 'torch.optim.SGD':40} seed {seed}: accuracy "
                f"{100 * accuracy:.2f} %, resumed from epoch {epochs // 2}: {'the same bits' if same else 'other weights'}"
            )
    if options.quick:
        print("--quick: this shows that the example runs; its figures mean nothing")


if __name__ == "__main__":
    main()
