"""Memory of PPO's four roles on one base against that of SFT with the same adapter and tokens.

    python -m benchmarks.roles_memory [--steps 4]

SFT trains on rows of as many tokens as PPO's prompts and completions have. PPO has a policy adapter, its
base as reference, a saved reward adapter and a critic adapter, all on one base. Each side is a fresh
process; the figure is the largest resident size over its life, weights and libraries included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import ftlib as ft

ROWS, NEW_TOKENS = 8, 53
SIDES = ("sft", "ppo")


def rows() -> list[dict[str, str]]:
    """Question and answer pairs."""
    return [{name: row[name] for name in ("prompt", "completion")} for row in ft.load_records("faq.jsonl")]


def policy() -> tuple[Any, Any]:
    """The model with the adapter that both sides train."""
    return ft.load(ft.demo_model(), adapter=ft.adapters.lora(r=16))


def save_reward(folder: Path) -> None:
    """A reward adapter, trained for one step."""
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No."} for row in rows()[:ROWS]
    ]
    config = ft.TrainConfig(max_steps=1, progress="off")
    judge = ft.RewardTrainer(ft.demo_model(), pairs, adapter=ft.adapters.lora(r=16), config=config)
    judge.train()
    judge.save(folder)


def sft(steps: int, _: Path) -> None:
    """Steps on eight rows, each as long as a prompt with a completion of `NEW_TOKENS` tokens."""
    model, tokenizer = policy()
    filler = tokenizer.decode([tokenizer.encode(" word", add_special_tokens=False)[0]] * (NEW_TOKENS - 1))
    data = [{"prompt": row["prompt"], "completion": filler} for row in rows()[: ROWS * steps]]
    config = ft.TrainConfig(max_steps=steps, batch_size=ROWS, progress="off")
    ft.SFTTrainer(model, data, tokenizer=tokenizer, config=config).train()


def ppo(steps: int, reward: Path) -> None:
    """Rollouts of eight prompts, completions of `NEW_TOKENS` tokens: nothing ends them."""
    model, tokenizer = policy()
    prompts = [row["prompt"] for row in rows()[: ROWS * steps]]
    config = ft.PPOConfig(
        max_steps=steps,
        batch_size=ROWS,
        max_new_tokens=NEW_TOKENS,
        stop=[],
        critic_warmup=0,
        progress="off",
    )
    ft.PPOTrainer(model, prompts, tokenizer=tokenizer, reward=reward, critic="adapter", config=config).train()


def main() -> None:
    """Start a process per side, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", choices=[*SIDES, "reward"], help=argparse.SUPPRESS)
    parser.add_argument("--reward", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.side == "reward":
        save_reward(options.reward)
    elif options.side:
        {"sft": sft, "ppo": ppo}[options.side](options.steps, options.reward)
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    else:
        with tempfile.TemporaryDirectory() as folder:
            _compare(options.steps, Path(folder) / "reward")


def _compare(steps: int, reward: Path) -> None:
    _child("reward", steps, reward)
    peaks = {side: int(json.loads(_child(side, steps, reward))) for side in SIDES}
    print("| side | peak resident memory |\n|---|---|")
    for side, peak in peaks.items():
        print(f"| {side} | {peak / 2**30:.2f} GiB |")
    print(f"\nPPO's four roles need {peaks['ppo'] / peaks['sft']:.2f} times the memory of SFT.")


def _child(side: str, steps: int, reward: Path) -> str:
    command = [sys.executable, "-m", "benchmarks.roles_memory", "--side", side]
    done = subprocess.run(
        [*command, "--steps", str(steps), "--reward", str(reward)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


if __name__ == "__main__":
    main()
