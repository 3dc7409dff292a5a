"""A real PPO run with a reward one can count: 60 updates of SmolLM2-135M on three seeds, and their curve.

    python -m benchmarks.ppo_curve [--updates 60] [--seeds 0 1 2] [--out benchmarks/results]

The reward is the share of an answer's words that have at most four letters, times how much of the asked
length (twelve words) it has: plain words, but an answer. Prompts are those of `faq.jsonl`. Writes
<date>-ppo-curve.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ftlib as ft

WORDS = 12
SHORT = 4  # letters
SHOWN = ("score", "score_std", "kl", "beta", "completion_tokens", "finished", "explained_variance")
WINDOW = 5  # updates at either end that are averaged for the table


def plain_words(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:  # noqa: ARG001
    """Share of words with at most four letters, times the share of twelve words that are there."""
    return [_plainness(text.split()) for text in completions]


def _plainness(words: Sequence[str]) -> float:
    if not words:
        return 0.0
    plain = sum(len(word.strip(".,;:!?\"'()")) <= SHORT for word in words) / len(words)
    return plain * min(1.0, len(words) / WORDS)


def run(seed: int, updates: int) -> list[dict[str, Any]]:
    """The history of one run."""
    torch.manual_seed(seed)  # of the adapter
    prompts = [row["prompt"] for row in ft.load_records("faq.jsonl")]
    model, tokenizer = ft.load(ft.demo_model(), adapter=ft.adapters.lora(r=16))
    config = ft.PPOConfig(
        max_steps=updates,
        batch_size=32,
        epochs_per_rollout=2,
        max_new_tokens=32,
        learning_rate=4e-4,
        missing_stop_penalty=0.5,
        seed=seed,
        log_steps=1,
        progress="plain",
    )
    trainer = ft.PPOTrainer(model, prompts, tokenizer=tokenizer, reward=plain_words, config=config)
    return [{name: row[name] for name in ("step", *SHOWN)} for row in trainer.train().history]


def table(histories: dict[int, list[dict[str, Any]]]) -> str:
    """Means over the first and last updates of every run."""
    lines = [
        f"| seed | score, first {WINDOW} | score, last {WINDOW} | KL, last {WINDOW} (nats) | finished | EV |",
        "|---|---|---|---|---|---|",
    ]
    for seed, rows in histories.items():
        first, last = rows[:WINDOW], rows[-WINDOW:]
        numbers = (
            _mean(first, "score"),
            _mean(last, "score"),
            _mean(last, "kl"),
            _mean(last, "finished"),
            _mean(last, "explained_variance"),
        )
        lines.append(f"| {seed} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |")
    return "\n".join(lines) + "\n"


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def rises(histories: dict[int, list[dict[str, Any]]]) -> bool:
    """Whether every run ends higher than any run began, by more than the runs differ."""
    first = [_mean(rows[:WINDOW], "score") for rows in histories.values()]
    last = [_mean(rows[-WINDOW:], "score") for rows in histories.values()]
    spread = max(max(first) - min(first), max(last) - min(last))
    return min(last) - max(first) > spread


def picture(histories: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """All runs on one figure."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 7.5), layout="constrained").subplots(3, sharex=True)
    for rows in histories.values():
        figure = ft.plots.reward(rows, ax=axes)
    figure.savefig(path)


def main() -> None:
    """Run, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    histories = {seed: run(seed, options.updates) for seed in options.seeds}
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{datetime.now(tz=UTC).date().isoformat()}-ppo-curve"
    facts = {
        "torch": torch.__version__,
        "processor": platform.processor(),
        "threads": torch.get_num_threads(),
    }
    record = {"command": "python -m benchmarks.ppo_curve", "machine": facts, "histories": histories}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(table(histories), encoding="utf-8")
    picture(histories, stem.with_suffix(".svg"))
    print(table(histories))
    print("every run rises by more than the runs differ:", rises(histories))


if __name__ == "__main__":
    main()
