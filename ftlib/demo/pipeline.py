"""The demo's pipeline on a real model and real text: one function per phase, in the order they run.

    1. domain pre-training: the language reference, held-out topics
    2. supervised fine-tuning: docstrings of the standard library, held-out modules
    3. and 4. a reward model and DPO: `preferences.py`
    5. PPO with that reward model: `rlhf.py`
    6. save, and answer again from plain peft and transformers in a fresh process

Each phase prints a short account, adds its section to the report, and hands the model on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import ftlib as ft
from ftlib.demo.corpora import docstring_pairs, split_pairs, topic_records
from ftlib.demo.report import Report
from ftlib.evaluation import decode, generate
from ftlib.trainers import SFTTrainer, TrainResult

__all__ = ["ANSWER_TOKENS", "Demo", "curve", "fine_tune", "line", "pretrain", "question", "save_and_reload"]

ASKED = 5  # held-out questions answered before and after
ANSWER_TOKENS = 48


@final
@dataclass
class Demo:
    """What the phases share.

    Args:
        folder: where the report and the adapter go.
        base: the base model's folder.
        model: the model with its adapter; the phases train it one after the other.
        tokenizer: the base's own.
        report: the page being written.
        small: a few steps on few rows, to see that it runs.
    """

    folder: Path
    base: Path
    model: Any
    tokenizer: Any
    report: Report = field(default_factory=lambda: Report("ftlib: one model through the pipeline"))
    small: bool = False

    def say(self, text: str) -> None:
        """Print, and put the same sentence into the report."""
        print(text, flush=True)
        self.report.text(text)

    def start(self, title: str) -> float:
        """Begin a phase; its starting time."""
        print(f"\n== {title}", flush=True)
        self.report.section(title)
        return time.perf_counter()


def pretrain(demo: Demo) -> None:
    """Phase 1: the same trainer on `text` records. Measures perplexity on topics it never saw."""
    began = demo.start("1. Domain pre-training on the Python language reference")
    train, held_out = topic_records()
    held_out = held_out[: 4 if demo.small else 16]
    steps = 2 if demo.small else 12
    config = ft.TrainConfig(max_steps=steps, batch_size=4, learning_rate=4e-4, warmup=2, log_steps=1)
    trainer = SFTTrainer(demo.model, train, held_out, tokenizer=demo.tokenizer, config=config)
    before = trainer.evaluate()
    result = trainer.train()
    after = trainer.evaluate()
    demo.report.curve(curve(result, before, after), "optimiser step", "loss (nats per token)")
    demo.say(
        f"{len(train)} texts of {len(train) + len(held_out)}; {result.metrics['tokens']:,} tokens trained at "
        f"{result.metrics['tokens_per_second']:.0f} tokens/s. Held-out topics: perplexity "
        f"{before['eval_perplexity']:.2f} before, {after['eval_perplexity']:.2f} after "
        f"({time.perf_counter() - began:.0f} s)."
    )


def fine_tune(demo: Demo) -> list[str]:
    """Phase 2: questions about the standard library. Saves the adapter and returns the questions asked."""
    began = demo.start("2. Supervised fine-tuning on the docstrings of the standard library")
    train, valid = split_pairs(docstring_pairs())
    valid = valid[:: max(1, len(valid) // (8 if demo.small else 160))]
    steps = 3 if demo.small else 50
    config = ft.TrainConfig(max_steps=steps, batch_size=16, learning_rate=4e-4, warmup=0.05, log_steps=5)
    trainer = SFTTrainer(demo.model, _chats(train), _chats(valid), tokenizer=demo.tokenizer, config=config)
    print(trainer.encoder.preview(_chats(train), n=1).text, flush=True)
    asked = valid[:: max(1, len(valid) // ASKED)][:ASKED]
    prompts = [question(row) for row in asked]
    before, answers_before = trainer.evaluate(), trainer.generate(prompts, max_new_tokens=ANSWER_TOKENS)
    result = trainer.train()
    after, answers_after = trainer.evaluate(), trainer.generate(prompts, max_new_tokens=ANSWER_TOKENS)
    demo.report.curve(curve(result, before, after), "optimiser step", "loss (nats per token)")
    demo.say(
        f"{len(train):,} questions from {len({row['module'] for row in train})} modules, validation on "
        f"{len({row['module'] for row in valid})} others; {result.metrics['tokens']:,} tokens at "
        f"{result.metrics['tokens_per_second']:.0f} tokens/s. Validation loss {before['eval_loss']:.3f} "
        f"before, {after['eval_loss']:.3f} after ({time.perf_counter() - began:.0f} s)."
    )
    for row, old, new in zip(asked, answers_before, answers_after, strict=True):
        demo.report.answers(row["prompt"], old, new, row["completion"])
        told = f"before: {line(old)}\n  after:  {line(new)}\n  docs:   {row['completion']}"
        print(f"\n{row['prompt']}\n  {told}")
    trainer.save(demo.folder / "sft")
    return [row["prompt"] for row in asked]


def save_and_reload(demo: Demo, asked: Sequence[str]) -> None:
    """Phase 6: the saved adapter in ftlib, and in a fresh process that knows only peft and transformers.

    Both in float32: in bfloat16 peft rounds W x before it adds the adapter (see docs/performance.md), and
    a greedy answer can turn on that.
    """
    began = demo.start("6. The saved adapter in plain peft and transformers")
    adapter, question = str(demo.folder / "sft"), asked[0]
    model, tokenizer = ft.load(demo.base, adapter=adapter, dtype="float32")
    encoder = ft.Encoder(tokenizer)
    prompt = encoder.encode_prompt([{"role": "user", "content": question}])
    ids = generate(model, tokenizer, [prompt], stop_ids=encoder.stop_ids, max_new_tokens=ANSWER_TOKENS)
    (ours,) = decode(tokenizer, ids, stop_ids=encoder.stop_ids)
    job = {"base": str(demo.base), "adapter": adapter, "question": question, "tokens": ANSWER_TOKENS}
    told = subprocess.run(  # noqa: S603  this interpreter, a file of ours
        [sys.executable, str(Path(__file__).with_name("plain.py"))],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if told.returncode != 0:
        raise RuntimeError(f"the fresh process failed:\n{told.stderr}")
    plain = json.loads(told.stdout)["answer"]
    demo.say(
        f"{question} ftlib, reloaded: {line(ours)!r}. A process without ftlib: {line(plain)!r} "
        f"({time.perf_counter() - began:.0f} s)."
    )
    if plain.strip() != ours.strip():
        raise RuntimeError(f"expected the answer {ours!r} from the saved adapter, got {plain!r}")


def question(row: Mapping[str, str]) -> list[dict[str, str]]:
    """The prompt of a docstring pair as messages."""
    return [{"role": "user", "content": row["prompt"]}]


def _chats(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Pairs of strings as prompt and completion in messages, which go through the model's own template."""
    return [
        {"prompt": question(row), "completion": [{"role": "assistant", "content": row["completion"]}]}
        for row in rows
    ]


def curve(
    result: TrainResult, before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, list[tuple[float, float]]]:
    """Training and held-out losses by step, for `Report.curve`."""
    trained = [(float(row["step"]), float(row["loss"])) for row in result.history if "loss" in row]
    held_out = [(0.0, before["eval_loss"]), (float(result.metrics["steps"]), after["eval_loss"])]
    return {"training": trained, "held out": held_out}


def line(text: str) -> str:
    """A text in one line."""
    return " ".join(text.split())
