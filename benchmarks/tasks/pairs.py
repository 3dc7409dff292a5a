"""What the tasks on preference pairs have in common: their data, their rows, their evaluation.

Data: a file of `prompt`, `chosen` and `rejected` strings. Without one, docstrings of the standard
library: the chosen answer is the docstring's first paragraph, the rejected one *the first paragraph of
another docstring*, half the list away. That is a cheap, offline stand-in for a preference, and an easy
one: it measures speed and equality, not how well a model learns to prefer.

Both sides get the same token ids of prompt, chosen and rejected, terminators included. A line break
stands between prompt and answer; no chat template is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from peft import PeftModel, TaskType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.jobs import Evaluate, Evaluation, Prepare
from benchmarks.materials import Rows, adapter_delta, load_plain, longest
from benchmarks.recorder import Example

__all__ = ["Pair", "evaluate_pairs", "prepare_pairs", "with_rejected"]

HELD_OUT_SHARE = 0.1
TEXTS = ("prompt", "chosen", "rejected")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")

Pair = Mapping[str, Any]  # the columns TEXTS and IDS, and perhaps those of encoded data
Takes = Callable[[PreTrainedTokenizerBase, Pair], bool]


def prepare_pairs(job: Prepare, label: Callable[[Pair], Example], takes: Takes | None = None) -> Rows:
    """Write the data sets "encoded" (for ftlib), "pairs" (for TRL) and "held-out" to the job's folder.

    Args:
        label: a pair to ids and labels of its two rows, as both sides must hold them.
        takes: whether the baseline makes the same ids of a pair's text; None where it takes ids.
    """
    folder, limit = Path(job.folder), longest(job.model)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    left_out = differing = 0
    kept: list[list[Pair]] = []
    for records, count in zip(_records(job.data), (job.steps * job.batch_size, job.held_out), strict=True):
        # twice the pairs that are needed: some may be left out
        some = records.shuffle(seed=job.seed).select(range(min(2 * count, len(records))))
        pairs = _encoded(some, tokenizer)
        short = [pair for pair in pairs if _longest_row(pair) <= limit]
        same = [pair for pair in short if takes is None or takes(tokenizer, pair)]
        left_out, differing = left_out + len(pairs) - len(short), differing + len(short) - len(same)
        kept.append(same[:count])
    train, held_out = kept
    names = (*TEXTS, *IDS)
    Dataset.from_list([_without(pair, names) for pair in train]).save_to_disk(folder / "encoded")
    Dataset.from_list([{name: pair[name] for name in names} for pair in train]).save_to_disk(folder / "pairs")
    Dataset.from_list([{name: pair[name] for name in IDS} for pair in held_out]).save_to_disk(
        folder / "held-out"
    )
    return Rows(
        examples=list(map(label, train)),
        lengths=[tuple(len(pair[name]) for name in IDS) for pair in train],
        unit="pairs",
        held_out=len(held_out),
        left_out=left_out,
        differing=differing,
    )


def _records(data: str) -> tuple[Dataset, Dataset]:
    """Training pairs and pairs to hold out, no prompt in both; the prompt ends in a line break."""
    import ftlib as ft
    from ftlib.demo.corpora import docstring_pairs, split_pairs

    if data:
        train, held_out = ft.split(ft.load_records(data, format="rows"), validation=HELD_OUT_SHARE)
    else:
        train, held_out = map(with_rejected, split_pairs(docstring_pairs(), validation=HELD_OUT_SHARE))
    return _strings(train), _strings(held_out)


def with_rejected(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Each row's own completion against that of the row half the list away."""
    others = [*rows[len(rows) // 2 :], *rows[: len(rows) // 2]]
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(rows, others, strict=True)
    ]


def _strings(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """The three columns of text.

    Raises:
        ValueError: another kind of data.
    """
    made = []
    for row in rows:
        found = {name: row.get(name) for name in TEXTS}
        if not all(isinstance(text, str) for text in found.values()):
            raise ValueError(f"expected rows with {', '.join(TEXTS)} as strings, got {dict(row)!r:.200}.")
        made.append({**found, "prompt": f"{found['prompt']}\n"})
    return Dataset.from_list(made)


def _encoded(records: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """Text, ids, and all columns that ftlib's encoder gives each pair.

    Raises:
        ValueError: an answer of which not every token counts the same.
    """
    import ftlib as ft

    pairs = []
    for row, encoded in zip(records, ft.Encoder(tokenizer)(ft.load_records(records)), strict=True):
        if any(weight != 1.0 for weights in encoded["continuation_weights"] for weight in weights):
            raise ValueError(f"expected loss weights of 1 in both answers to {row['prompt']!r:.80}.")
        parts = (encoded["prefix_ids"], *encoded["continuation_ids"])
        pairs.append({**row, **encoded, **dict(zip(IDS, parts, strict=True))})
    return pairs


def _without(pair: Pair, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in pair.items() if name not in names}


def _longest_row(pair: Pair) -> int:
    prompt, *answers = (len(pair[name]) for name in IDS)
    return prompt + max(answers)


@torch.no_grad()
def evaluate_pairs(
    job: Evaluate, task: TaskType, margins: Callable[[Any, Iterable[Pair]], list[float]]
) -> Evaluation:
    """Loss and accuracy on the held-out pairs: plain transformers and peft, float32, row by row.

        loss = mean of -log sigmoid(margin), accuracy = share of margins above 0

    Args:
        task: peft's.
        margins: how far a model puts each pair's chosen answer ahead, nats.
    """
    base = load_plain(job.model, task)
    pairs = load_from_disk(f"{job.folder}/held-out")
    losses, deltas, accuracies = {}, {}, {}
    for name, folder in job.adapters.items():
        model = PeftModel.from_pretrained(base, folder).eval()
        margins_P = torch.tensor(margins(model, pairs), dtype=torch.float64)
        losses[name] = float(-torch.nn.functional.logsigmoid(margins_P).mean())
        accuracies[name] = float((margins_P > 0).double().mean())
        deltas[name] = adapter_delta(Path(folder), Path(job.initial[name]))
        base = model.unload()
    return Evaluation(losses, deltas, accuracies)
