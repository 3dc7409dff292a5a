"""32 labelled rows: a cloze classifier against a head, on the same base, text, adapter, rate and steps.

The rows are docstrings of the standard library, the class is what their module is about: 8 rows of each of
4 classes to train on, 15 others of each to test on, five draws. Both train LoRA; the head is drawn new, the
cloze classifier starts from what the model knows. Nothing is tuned: one template, one rate for both.

    python -m benchmarks.cloze_vs_head --results cloze.jsonl           # everything, minutes on two CPU cores
    python -m benchmarks.cloze_vs_head --results cloze.jsonl --runs 1  # the next run alone; repeat

Runs that the file holds are not repeated. The table is of all runs in it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import ftlib as ft
from ftlib.data import LabelledEncoder, Labels, few_shot_split
from ftlib.demo.corpora import docstring_pairs
from ftlib.evaluation import ClozeClassifier
from ftlib.trainers import ClassificationTrainer

MODULES = {
    "email": ("email", "mailbox", "imaplib", "smtplib", "poplib"),
    "web": ("http", "urllib", "xmlrpc", "wsgiref", "cgi"),
    "testing": ("unittest", "doctest"),
    "files": ("pathlib", "tarfile", "zipfile", "shutil", "tempfile"),
}
PATTERN = "Python documentation: {text|truncate}\nThis is about {mask}"
SEEDS = (0, 1, 2, 3, 4)
SHOTS, TESTED, STEPS, RATE, MAX_LENGTH = 8, 15, 16, 1e-3, 64
RUNS = ("cloze", "head")
COLUMNS = ("zero-shot", "zero-shot, calibrated", "cloze", "head")


def rows() -> list[dict[str, str]]:
    """Docstrings with the topic of their module, each text once."""
    topics = {module: topic for topic, modules in MODULES.items() for module in modules}
    found = {pair["completion"]: topics.get(pair["module"].split(".")[0]) for pair in docstring_pairs()}
    return [{"text": text, "label": topic} for text, topic in sorted(found.items()) if topic]


def sides(seed: int) -> tuple[list[Any], list[Any]]:
    """Rows to train on and to test on; no text is on both sides."""
    listed = rows()
    train, _ = few_shot_split(listed, SHOTS, seed=seed)
    used = {row["text"] for row in train}
    rest = [row for row in listed if row["text"] not in used]
    random.Random(seed).shuffle(rest)  # noqa: S311  no secret
    return train, [row for topic in MODULES for row in [r for r in rest if r["label"] == topic][:TESTED]]


def config(seed: int) -> ft.TrainConfig:
    return ft.TrainConfig(
        max_steps=STEPS, batch_size=SHOTS, learning_rate=RATE, seed=seed, warmup=0.1, progress="off"
    )


def cloze(seed: int) -> dict[str, float]:
    """Test accuracy before training, raw and calibrated, and after it."""
    train, tested = sides(seed)
    model, tokenizer = ft.load(ft.demo_model(), dtype="float32")
    classifier = ClozeClassifier(
        model,
        tokenizer,
        PATTERN,
        {topic: topic for topic in MODULES},
        adapter=ft.adapters.lora(16),
        norm="tokens",
        max_length=MAX_LENGTH,
    )
    raw_BK = classifier.scores(tested)
    bias_K = classifier.calibrate().bias
    ft.SFTTrainer(
        classifier.model,
        classifier.calibrate(None).encoder(train),
        tokenizer=classifier.tokenizer,
        encoder=classifier.encoder,
        objective=classifier.objective,
        config=config(seed),
    ).train()
    gold_B = torch.tensor([classifier.labels.index(row["label"]) for row in tested])
    right = {
        "zero-shot": raw_BK,
        "zero-shot, calibrated": raw_BK - bias_K,
        "cloze": classifier.scores(tested),
    }
    return {name: float((scores.argmax(-1) == gold_B).float().mean()) for name, scores in right.items()}


def head(seed: int) -> dict[str, float]:
    """Test accuracy of a trained head on the last token's state."""
    train, tested = sides(seed)
    model, tokenizer = ft.load(ft.demo_model(), dtype="float32")
    trainer = ClassificationTrainer(
        model,
        train,
        tokenizer=tokenizer,
        adapter=ft.adapters.lora(16),
        encoder=LabelledEncoder(
            tokenizer, labels=Labels(tuple(MODULES)), max_length=MAX_LENGTH, overflow="truncate"
        ),
        config=config(seed),
    )
    trainer.train()
    return {"head": trainer.evaluate(tested)["eval_accuracy"]}


def pending(done: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """(method, seed) of the runs that are not done."""
    known = {(run["method"], run["seed"]) for run in done}
    return [(method, seed) for seed in SEEDS for method in RUNS if (method, seed) not in known]


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["| method | accuracy, mean (deviation) | seeds |", "|---|---|---|"]
    for column in COLUMNS:
        found = [run[column] for run in sorted(runs, key=lambda run: run["seed"]) if column in run]
        if found:
            deviation = stdev(found) if len(found) > 1 else 0.0
            each = " ".join(f"{value:.3f}" for value in found)
            lines.append(f"| {column} | {mean(found):.3f} ({deviation:.3f}) | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, one per run; appended to")
    parser.add_argument("--runs", type=int, default=None, help="at most so many runs; all by default")
    asked = parser.parse_args()
    lines = asked.results.read_text().splitlines() if asked.results.exists() else []
    runs = [json.loads(line) for line in lines]
    for method, seed in pending(runs)[: asked.runs]:
        measured = head(seed) if method == "head" else cloze(seed)
        runs.append({"method": method, "seed": seed, **measured})
        with asked.results.open("a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
