"""Rows per second from text to token ids and what is learned of them: ftlib's encoder against TRL's trainer.

    python -m benchmarks.encoding_speed [--rows 2000] [--rounds 2]

Both get the same rows, the real tokenizer of SmolLM2-135M-Instruct and one process: questions and answers
as text, and as conversations of two exchanges, with a template that marks what the assistant writes (TRL
needs the marks, ftlib does not) and with the model's own. ftlib is timed from rows, through `load_records`,
to `Encoder(...)(records)`. TRL tokenises while `SFTTrainer` is built, so it is timed in that; its model is
tiny and random. Of both, the time for two rows is taken off. The sides take turns, A B A B; the fastest run
of each counts. Caches are off.

ftlib renders each trained turn's prompt as well, to verify that it starts the example; TRL does not.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from typing import Any

import datasets
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import ftlib as ft
from ftlib.demo.corpora import docstring_pairs

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FEW = 2  # rows whose time is taken off: what a side takes before its first row
Side = Callable[[PreTrainedTokenizerBase, Dataset], None]


def pairs(count: int) -> Dataset:
    """Questions about the standard library and their answers."""
    rows = docstring_pairs()[:count]
    return Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])


def chats(count: int) -> Dataset:
    """The same, two to a conversation."""
    rows = docstring_pairs()
    twos = [(rows[i % len(rows)], rows[(i + 1) % len(rows)]) for i in range(count)]
    return Dataset.from_list([{"messages": [turn for row in two for turn in _exchange(row)]} for two in twos])


def _exchange(row: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def run_ftlib(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> None:
    """Canonical records, then ids and weights."""
    ft.Encoder(tokenizer)(ft.load_records(rows))


def run_trl(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> None:
    """The constructor, which tokenises."""
    from trl import SFTConfig, SFTTrainer

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=None,
            assistant_only_loss="messages" in rows.column_names,
        )
        SFTTrainer(LlamaForCausalLM(config), settings, train_dataset=rows, processing_class=tokenizer)


def seconds(side: Side, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> float:
    """How long one side takes for these rows."""
    start = time.perf_counter()
    side(tokenizer, rows)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    own = AutoTokenizer.from_pretrained(ft.demo_model())
    marked = AutoTokenizer.from_pretrained(ft.demo_model())
    marked.chat_template = MARKED
    cases: dict[str, tuple[Any, Dataset, tuple[Side, ...]]] = {
        "prompt and completion": (own, pairs(arguments.rows), (run_ftlib, run_trl)),
        "chat, marked template": (marked, chats(arguments.rows), (run_ftlib, run_trl)),
        "chat, the model's own": (own, chats(arguments.rows), (run_ftlib,)),
    }
    print("| rows | ftlib rows/s | TRL rows/s | ftlib over TRL |\n|---|---|---|---|")
    for name, (tokenizer, rows, compared) in cases.items():
        few = rows.select(range(FEW))
        found: dict[Side, list[tuple[float, float]]] = {side: [] for side in compared}
        for side in compared:  # the first call imports and compiles
            side(tokenizer, few)
        for _ in range(arguments.rounds):
            for side, times in found.items():
                times.append((seconds(side, tokenizer, few), seconds(side, tokenizer, rows)))
        fastest = [[min(column) for column in zip(*times, strict=True)] for times in found.values()]
        speed = [(len(rows) - FEW) / (many - start) for start, many in fastest]
        trl = f"{speed[1]:,.0f} | {speed[0] / speed[1]:.2f}" if len(speed) > 1 else "no marks | "
        print(f"| {name} | {speed[0]:,.0f} | {trl} |")


if __name__ == "__main__":
    main()
