"""The demo's preference phases: pairs made in the run, a reward model, and DPO from the tuned adapter.

3. reward modelling: chosen is the docstring's own first paragraph, rejected what the untuned model says
4. direct preference optimisation, from the adapter of phase 2, on the same kind of pairs
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ftlib as ft
from ftlib.demo.corpora import docstring_pairs, split_pairs
from ftlib.demo.pipeline import ANSWER_TOKENS, Demo, curve, line, question
from ftlib.evaluation import decode, generate
from ftlib.models.roles import adapters_off
from ftlib.trainers import DPOTrainer, RewardTrainer

__all__ = ["Pairs", "optimise_preferences", "preference_pairs", "train_reward"]

Pairs = list[dict[str, Any]]
REJECTED_TOKENS = 40
TRAIN_PAIRS, HELD_OUT_PAIRS = 240, 40


def preference_pairs(demo: Demo) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs: the docstring against what the model answers with its adapter off."""
    train, valid = split_pairs(docstring_pairs())
    train_pairs, held_out_pairs = (16, 8) if demo.small else (TRAIN_PAIRS, HELD_OUT_PAIRS)
    rows = _spread(train, train_pairs) + _spread(valid, held_out_pairs)
    encoder = ft.Encoder(demo.tokenizer)
    prompts = [encoder.encode_prompt(question(row)) for row in rows]
    with adapters_off(demo.model):
        ids = generate(
            demo.model,
            demo.tokenizer,
            prompts,
            stop_ids=encoder.stop_ids,
            max_new_tokens=REJECTED_TOKENS,
            batch_size=32,
        )
    answers = decode(demo.tokenizer, ids, stop_ids=encoder.stop_ids)
    pairs = [
        {"prompt": question(row), "chosen": _said(row["completion"]), "rejected": _said(answer)}
        for row, answer in zip(rows, answers, strict=True)
        if answer.strip() and answer.strip() != row["completion"]
    ]
    held_out = {row["prompt"] for row in rows[train_pairs:]}
    asked = [pair["prompt"][0]["content"] in held_out for pair in pairs]
    return (
        [pair for pair, out in zip(pairs, asked, strict=True) if not out],
        [pair for pair, out in zip(pairs, asked, strict=True) if out],
    )


def train_reward(demo: Demo, train: Pairs, held_out: Pairs) -> None:
    """Phase 3: a reward model on a fresh base. Saves its adapter with the score head."""
    began = demo.start("3. A reward model: the docstring against the untuned model's answer")
    config = ft.TrainConfig(
        max_steps=2 if demo.small else 24, batch_size=8, learning_rate=2e-4, warmup=0.1, log_steps=2
    )
    trainer = RewardTrainer(
        str(demo.base),
        train,
        held_out,
        tokenizer=demo.tokenizer,
        adapter=ft.adapters.lora(r=16),
        config=config,
    )
    before = trainer.evaluate()
    result = trainer.train()
    after = trainer.evaluate()
    demo.report.curve(curve(result, before, after), "optimiser step", "loss (nats per pair)")
    demo.say(
        f"{len(train)} pairs, {len(held_out)} held out. Held-out accuracy {before['eval_accuracy']:.2f} "
        f"before, {after['eval_accuracy']:.2f} after; mean lead {after['eval_margin']:.2f}; calibration "
        f"error {after['eval_calibration_error']:.2f}; preferring the longer answer would be right in "
        f"{after['eval_longer_wins_accuracy']:.2f} ({time.perf_counter() - began:.0f} s)."
    )
    trainer.save(demo.folder / "reward")


def optimise_preferences(demo: Demo, train: Pairs, held_out: Pairs) -> None:
    """Phase 4: DPO goes on from the adapter of phase 2, whose policy is the reference."""
    began = demo.start("4. Direct preference optimisation from the tuned adapter")
    config = ft.TrainConfig(
        max_steps=2 if demo.small else 24, batch_size=8, learning_rate=5e-5, warmup=0.1, log_steps=2
    )
    trainer = DPOTrainer(demo.model, train, held_out, tokenizer=demo.tokenizer, config=config, beta=0.1)
    asked = [pair["prompt"] for pair in held_out[:: max(1, len(held_out) // 3)][:3]]
    before, answers_before = trainer.evaluate(), trainer.generate(asked, max_new_tokens=ANSWER_TOKENS)
    result = trainer.train()
    after, answers_after = trainer.evaluate(), trainer.generate(asked, max_new_tokens=ANSWER_TOKENS)
    demo.report.curve(curve(result, before, after), "optimiser step", "loss (nats per pair)")
    demo.say(
        f"Held-out loss {before['eval_loss']:.3f} before (ln 2 is 0.693), {after['eval_loss']:.3f} after; "
        f"accuracy {after['eval_accuracy']:.2f}; margin {after['eval_margin']:.2f}; log-probability of the "
        f"chosen answers {before['eval_logp_chosen']:.1f} before, {after['eval_logp_chosen']:.1f} after "
        f"({time.perf_counter() - began:.0f} s)."
    )
    for prompt, old, new in zip(asked, answers_before, answers_after, strict=True):
        content = prompt[0]["content"]
        demo.report.answers(content, old, new)
        print(f"\n{content}\n  before: {line(old)}\n  after:  {line(new)}")
    trainer.save(demo.folder / "dpo")


def _spread(rows: Sequence[Mapping[str, str]], count: int) -> list[Mapping[str, str]]:
    """`count` rows, evenly over all modules."""
    return list(rows[:: max(1, len(rows) // count)][:count])


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
