"""What each adapter reaches on one task at one budget: held-out loss, memory, size, time.

    python -m benchmarks.adapter_table [--steps 40] [--only lora ia3] [--out docs/adapter-table.md]

Docstrings of the standard library, whole modules held out, the same rows in the same order for every
adapter, each at its own default learning rate. Every adapter runs in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ftlib as ft
from ftlib.demo.corpora import docstring_pairs, split_pairs

WORDS = "Say in one sentence what this part of the standard library does."
ADAPTERS: dict[str, Callable[[], Any]] = {
    "full": ft.adapters.full,
    "lora": lambda: ft.adapters.lora(r=16),
    "dora": lambda: ft.adapters.lora(r=16, dora=True),
    "qlora": lambda: ft.adapters.lora(r=16),
    "ia3": ft.adapters.ia3,
    "prompt": lambda: ft.adapters.prompt(20, init="text", text=WORDS),
    "p_tuning, mlp": lambda: ft.adapters.p_tuning(20, encoder="mlp"),
    "p_tuning, lstm": lambda: ft.adapters.p_tuning(20),
    "prefix": lambda: ft.adapters.prefix(20, init="text", text=WORDS),
    "prefix, projection": lambda: ft.adapters.prefix(20, projection=True),
}
HELD_OUT = 96  # rows of the held-out modules that are evaluated


def measure(name: str, steps: int) -> dict[str, float]:
    """One adapter: trained, evaluated, saved, and its process's peak memory."""
    torch.manual_seed(0)
    train, held_out = split_pairs(docstring_pairs())
    model, tokenizer = ft.load(
        ft.demo_model(), adapter=ADAPTERS[name](), quantize="nf4" if name == "qlora" else None
    )
    config = ft.TrainConfig(max_steps=steps, batch_size=8, progress="off")
    trainer = ft.SFTTrainer(model, train, held_out[:HELD_OUT], tokenizer=tokenizer, config=config)
    before = trainer.evaluate()["eval_loss"]
    started = time.process_time()
    trainer.train()
    seconds = (time.process_time() - started) / steps
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {
        "before": before,
        "after": trainer.evaluate()["eval_loss"],
        "trained": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "rate": trainer.learning_rate,
        "seconds": seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "size": size,
    }


def row(name: str, found: dict[str, float], second: float) -> str:
    """A line of the table; processor time as a multiple of LoRA's."""
    cells = (
        name,
        f"{found['before']:.3f}",
        f"{found['after']:.3f}",
        f"{found['trained']:,}",
        f"{found['rate']:.0e}",
        f"{found['peak'] / 2**30:.2f}",
        f"{found['size'] / 2**20:.2f}",
        f"{found['seconds'] / second:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Start a process per adapter, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--out", type=Path, help="also write the table there")
    parser.add_argument("--measure", choices=list(ADAPTERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.steps)))
        return
    found = {name: _child(name, options.steps) for name in options.only}
    second = found["lora" if "lora" in found else options.only[0]]["seconds"]
    lines = [
        "| adapter | loss at start | after | trained numbers | rate | peak, GiB | saved, MiB | CPU time |",
        "|---|---|---|---|---|---|---|---|",
        *(row(name, each, second) for name, each in found.items()),
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        options.out.write_text(table, encoding="utf-8")


def _child(name: str, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.adapter_table", "--measure", name, "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name}: {found['before']:.3f} -> {found['after']:.3f}", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
