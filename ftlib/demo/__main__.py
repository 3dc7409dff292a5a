"""`python -m ftlib.demo`: the pipeline on a real model, offline, on CPU, in minutes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import ftlib as ft
from ftlib.demo.pipeline import Demo, fine_tune, pretrain, save_and_reload
from ftlib.demo.preferences import optimise_preferences, preference_pairs, train_reward
from ftlib.demo.rlhf import optimise_reward


def main() -> None:
    """Run every phase and write the report."""
    parser = argparse.ArgumentParser(prog="python -m ftlib.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="folder for report and adapters"
    )
    parser.add_argument("--model", help="a causal model's name or folder; default SmolLM2")
    parser.add_argument("--small", action="store_true", help="a few steps only, to see that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    base = Path(options.model) if options.model else ft.demo_model()
    model, tokenizer = ft.load(base, adapter=ft.adapters.lora(r=16))
    demo = Demo(options.out, base, model, tokenizer, small=options.small)
    pretrain(demo)
    asked = fine_tune(demo)
    train, held_out = preference_pairs(demo)
    train_reward(demo, train, held_out)
    optimise_preferences(demo, train, held_out)
    optimise_reward(demo, train, held_out)
    save_and_reload(demo, asked)
    demo.say(f"The whole pipeline took {time.perf_counter() - began:.0f} s.")
    page = demo.report.write(options.out / "report.html")
    names = [str(options.out / name) for name in ("sft", "reward", "dpo", "ppo")]
    print(f"\nReport: {page}\nAdapters: {', '.join(names)}")


if __name__ == "__main__":
    main()
