"""How well a reward model of 300 pairs orders pairs it has not seen, over three seeds.

    python -m benchmarks.reward_accuracy [--data pairs.jsonl] [--pairs 300] [--seeds 0 1 2]

Without --data: docstrings of the standard library against the answer to another question, whole modules
held out. With it: `prompt`, `chosen`, `rejected` of a file, prompts held out. The interval is Wilson's, at
95 %, of the held-out pairs of one seed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import ftlib as ft
from benchmarks.tasks.pairs import with_rejected
from ftlib.demo.corpora import docstring_pairs, split_pairs

HELD_OUT = 200
Z = 1.96  # standard deviations of a 95 % interval
Pairs = Sequence[Mapping[str, Any]]


def pairs_of(data: str | None, count: int) -> tuple[Pairs, Pairs]:
    """Training pairs, as many as asked for, and held-out ones."""
    if data is None:
        train, held_out = map(with_rejected, split_pairs(docstring_pairs()))
        every = len(train) // count
        return list(train[::every])[:count], list(held_out[:: max(1, len(held_out) // HELD_OUT)])[:HELD_OUT]
    records = ft.load_records(data)
    left = len(records) - count
    if left < 1:
        raise SystemExit(f"{data}: expected more than {count} pairs, got {len(records)}.")
    train, held_out = ft.split(records, validation=left / len(records))
    return list(train)[:count], list(held_out)


def wilson(right: float, rows: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927, JASA 22:209)."""
    centre = (right + Z**2 / (2 * rows)) / (1 + Z**2 / rows)
    half = Z / (1 + Z**2 / rows) * math.sqrt(right * (1 - right) / rows + Z**2 / (4 * rows**2))
    return centre - half, centre + half


def accuracy(seed: int, train: Pairs, held_out: Pairs, epochs: int) -> tuple[float, float]:
    """Held-out accuracy before and after training."""
    torch.manual_seed(seed)  # of adapter and head
    adapter = ft.adapters.lora(r=16)
    model, tokenizer = ft.load(ft.demo_model(), adapter=adapter, task="reward")
    config = ft.TrainConfig(epochs=epochs, batch_size=8, seed=seed, progress="off")
    trainer = ft.RewardTrainer(model, train, held_out, tokenizer=tokenizer, config=config)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    return before, trainer.evaluate()["eval_accuracy"]


def table(found: Mapping[int, tuple[float, float]], rows: int) -> str:
    """A line per seed."""
    lines: list[str] = ["| seed | before | after | 95 % interval |", "|---|---|---|---|"]
    for seed, (before, after) in found.items():
        low, high = wilson(after, rows)
        lines.append(f"| {seed} | {before:.3f} | {after:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once per seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    train, held_out = pairs_of(options.data, options.pairs)
    print(f"{len(train)} pairs, {len(held_out)} held out")
    found = {seed: accuracy(seed, train, held_out, options.epochs) for seed in options.seeds}
    print(table(found, len(held_out)))


if __name__ == "__main__":
    main()
