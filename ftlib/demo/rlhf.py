"""The demo's last training phase: PPO from the tuned adapter, with the reward model on the same base."""

from __future__ import annotations

import time

import ftlib as ft
from ftlib.demo.pipeline import ANSWER_TOKENS, Demo, line
from ftlib.demo.preferences import Pairs
from ftlib.trainers import PPOTrainer

__all__ = ["optimise_reward"]

ROLLOUTS = 8


def optimise_reward(demo: Demo, train: Pairs, held_out: Pairs) -> None:
    """Phase 5: PPO. Policy, reference, reward model and critic compute with one base in memory."""
    began = demo.start("5. PPO from the tuned adapter, with the reward model of phase 3")
    model, tokenizer = ft.load(demo.base, adapter=demo.folder / "sft")
    config = ft.PPOConfig(
        max_steps=2 if demo.small else ROLLOUTS,
        batch_size=4 if demo.small else 16,
        epochs_per_rollout=2,
        max_new_tokens=8 if demo.small else 32,
        learning_rate=1e-4,
        critic_warmup=1,
        kl_coef=0.02,
        missing_stop_penalty=0.5,
        log_steps=1,
    )
    trainer = PPOTrainer(
        model,
        [pair["prompt"] for pair in train],
        [pair["prompt"] for pair in held_out],
        tokenizer=tokenizer,
        reward=demo.folder / "reward",
        config=config,
    )
    asked = [pair["prompt"] for pair in held_out[:: max(1, len(held_out) // 3)][:3]]
    before, answers_before = trainer.evaluate(), trainer.generate(asked, max_new_tokens=ANSWER_TOKENS)
    result = trainer.train()
    after, answers_after = trainer.evaluate(), trainer.generate(asked, max_new_tokens=ANSWER_TOKENS)
    logged = [row for row in result.history if "score" in row]
    demo.report.curve(
        {"score": [(float(row["step"]), row["score"]) for row in logged]}, "rollout", "score of completions"
    )
    demo.report.curve(
        {"KL": [(float(row["step"]), row["kl"]) for row in logged]}, "rollout", "KL (nats per sequence)"
    )
    demo.say(
        f"{len(logged)} rollouts of {config.rows} completions. Held-out prompts, sampled: score "
        f"{before['eval_score']:.2f} before, {after['eval_score']:.2f} after; KL to the tuned policy "
        f"{logged[-1]['kl']:.2f} nats per sequence at the end; {after['eval_finished']:.0%} of the answers "
        f"end ({time.perf_counter() - began:.0f} s)."
    )
    for prompt, old, new in zip(asked, answers_before, answers_after, strict=True):
        content = prompt[0]["content"]
        demo.report.answers(content, old, new)
        print(f"\n{content}\n  before: {line(old)}\n  after:  {line(new)}")
    trainer.save(demo.folder / "ppo")
