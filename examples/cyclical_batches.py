"""Cyclical batch sizes on a character-level language model of Python's own documentation strings.

At equal numbers of examples, and the same learning rate at every epoch, this compares: a small fixed batch;
a fixed batch that makes as many updates as the cycle; the cyclical schedule; and the small fixed batch with
noise added to the weights, which is annealed and injected again when the cycle's is. For each also the
ensemble of the models at the cycles' ends. Whole modules are held out.

`python examples/cyclical_batches.py` prints the table and draws the curves; `--quick` only tries it out.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from fused_opt import pictures
from fused_opt.batch_size import CyclicalBatchSampler, CyclicalBatchSize, by_update
from fused_opt.snapshots import Snapshots, average_predictions

LENGTH = 32  # characters in an example
FIXED = CyclicalBatchSize(32, levels=1)
CYCLE = CyclicalBatchSize(32, levels=4, width=0.5)
LR, MOMENTUM, CLIP = 1.0, 0.9, 1.0
STD = 1e-3  # of the explicit noise at the beginning of a cycle


class CharacterModel(nn.Module):
    """A GRU between an embedding and a linear layer."""

    def __init__(self, characters: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.recurrent = nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the next character (float32, [examples, length, characters])."""
        logits: Tensor = self.head(self.recurrent(self.embedding(text))[0])
        return logits


def docstrings(path: Path) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
    return "\n".join(filter(None, map(ast.get_docstring, nodes)))


def windows(limit: int) -> tuple[Tensor, Tensor, int]:
    """Examples to train on and to hold out (int64, [examples, LENGTH + 1]) and the number of characters."""
    texts = ["", ""]
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        texts[number % 8 == 7] += docstrings(path).encode("ascii", "ignore").decode() + "\n"
        if len(texts[0]) >= limit and len(texts[1]) >= limit // 6:
            break
    train, held_out = texts[0][:limit], texts[1][: limit // 6]
    code = {character: i for i, character in enumerate(sorted(set(train + held_out)))}

    def cut(text: str) -> Tensor:
        return torch.tensor([code[character] for character in text]).unfold(0, LENGTH + 1, LENGTH)

    return cut(train), cut(held_out), len(code)


@torch.no_grad()
def bits_per_character(probabilities: Callable[[Tensor], Tensor], examples: Tensor) -> float:
    likelihood = probabilities(examples[:, :-1]).gather(-1, examples[:, 1:, None])
    return -likelihood.log2().mean().item()


class Arm(NamedTuple):
    """One way to train."""

    name: str
    schedule: CyclicalBatchSize
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def make_arms(dataset_size: int) -> list[Arm]:
    def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)

    same_updates = round(CYCLE.period * dataset_size / CYCLE.updates(CYCLE.period, dataset_size))
    arms = [
        Arm(f"fixed {FIXED.base}", FIXED, sgd),
        Arm(f"fixed {same_updates}", CyclicalBatchSize(same_updates, levels=1), sgd),
        Arm(f"cyclical {CYCLE.base} to {CYCLE.largest}", CYCLE, sgd),
    ]
    try:
        from fused_opt import SGD, WeightNoise
    except ImportError as error:
        print(f"skipped: fixed {FIXED.base} with cyclical noise ({error})")
        return arms
    period = FIXED.updates(CYCLE.period, dataset_size)

    def noisy(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        noise = WeightNoise(std=STD, schedule="cycle", period=period)
        return SGD(parameters, lr=LR, momentum=MOMENTUM, noise=noise)

    return [*arms, Arm(f"fixed {FIXED.base}, cyclical noise", FIXED, noisy)]


class Result(NamedTuple):
    """Updates; held-out bits per character, every CYCLE.width epochs and of the cycles' ends together."""

    updates: int
    curve: list[float]
    ensemble: float


def run(
    arm: Arm, seed: int, train: Tensor, held_out: Tensor, model: CharacterModel, epochs: int, bar: tqdm[None]
) -> Result:
    optimizer = arm.optimizer(model.parameters())
    decay = by_update(lambda epoch: 1 - epoch / epochs, arm.schedule, len(train))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    order = RandomSampler(range(len(train)), generator=torch.Generator().manual_seed(seed))
    sampler = CyclicalBatchSampler(order, arm.schedule)
    loader: DataLoader[Tensor] = DataLoader(train, batch_sampler=sampler, collate_fn=torch.stack)  # type: ignore[arg-type]
    updates, seen = 0, 0
    curve: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        snapshots = Snapshots(model, CYCLE, folder)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for batch in loader:
                loss = nn.functional.cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                scheduler.step()
                updates, seen = updates + 1, seen + len(batch)
                bar.update(len(batch))
                snapshots(seen / len(train))
                if seen / len(train) >= CYCLE.width * (len(curve) + 1):
                    curve.append(bits_per_character(lambda text: model(text).softmax(-1), held_out))
        states = [torch.load(path) for path in snapshots.paths]
    ensemble = bits_per_character(lambda text: average_predictions(model, states, text), held_out)
    return Result(updates, curve, ensemble)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds: little text, small model, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="two or more, since a cycle takes two")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder of the pictures")
    parser.add_argument("--threads", type=int, default=1, help="the networks are so small that a second does not pay")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seeds, epochs, limit, width = range(options.seeds), options.epochs, 300_000, 128
    if options.quick:
        seeds, epochs, limit, width = range(1), 2, 32_001, 16
    train, held_out, characters = windows(limit)
    arms = make_arms(len(train))
    print(f"{len(train)} examples of {LENGTH} characters, {len(held_out)} held out, {epochs} epochs")

    results: dict[str, list[Result]] = {arm.name: [] for arm in arms}
    with tqdm(total=len(arms) * len(seeds) * epochs * len(train), unit=" examples", unit_scale=True) as bar:
        for seed in seeds:
            for arm in arms:
                bar.set_description(f"{arm.name}, seed {seed}")
                torch.manual_seed(seed)
                model = CharacterModel(characters, width)
                results[arm.name].append(run(arm, seed, train, held_out, model, epochs, bar))

    print("\nheld-out bits per character, mean over the seeds and each")
    print(f"{'':26}{'examples':>9}{'updates':>9}   {'at the end':34} ensemble of the cycles' ends")
    for name, runs in results.items():
        last, together = [one.curve[-1] for one in runs], [one.ensemble for one in runs]
        print(f"{name:26}{epochs * len(train):9}{runs[0].updates:9}   {spread(last):34} {spread(together)}")
    draw(results, epochs, len(train), options.out)
    if options.quick:
        print("--quick: this shows that the example runs; its figures mean nothing")


def draw(results: dict[str, list[Result]], epochs: int, dataset_size: int, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    figure, ((axes,),) = pictures.figure(1, 1, 7, 4.8)
    for (name, runs), color in zip(results.items(), pictures.SERIES):
        curves = list(zip(*(one.curve for one in runs), strict=True))
        at = [CYCLE.width * (i + 1) for i in range(len(curves))]
        line = "--" if "noise" in name else "-"  # it lies on the one without
        axes.plot(at, [statistics.mean(values) for values in curves], line, label=name, color=color)
        axes.fill_between(at, [*map(min, curves)], [*map(max, curves)], color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="epochs, equal numbers of examples", ylabel="held-out bits per character")
    pictures.finish((axes,), legends=(axes,))
    schedule = CYCLE.plot(
        epochs, lr=lambda epoch: LR * (1 - epoch / epochs), dataset_size=dataset_size, momentum=MOMENTUM
    )
    for name, picture in [("cyclical_batches.png", figure), ("cyclical_batches_schedule.png", schedule)]:
        picture.savefig(out / name, dpi=120, bbox_inches="tight")
        print(f"drawn: {out / name}")


if __name__ == "__main__":
    main()
