"""A reward model, LoRA adapter and score head, trained on pairs: TRL's RewardTrainer and ftlib's.

TRL takes ids, so both get the same. The score head is part of the adapter initialisation that both
load. One change to TRL's defaults beside those of every task: its tokenizer gets a *padding token that
no row holds*. TRL scores the last token that is not padding, and where padding is EOS, as in many
tokenizers, that is the token before the terminator. What is labelled here is the token that each side
scores.

TRL's best settings, `trl-tuned`: base weights in bfloat16, no gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import TaskType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.jobs import Evaluate, Evaluation, Prepare, Task, Train
from benchmarks.materials import workload
from benchmarks.recorder import IGNORED, Example, Row
from benchmarks.records import Run, Workload
from benchmarks.sides import examples_of, run_ftlib, run_trl, saved, tuned
from benchmarks.tasks.pairs import Pair, evaluate_pairs, prepare_pairs

__all__ = ["TASK", "labelled", "unpadded", "unused_token"]


def prepare(job: Prepare) -> Workload:
    """Pairs and adapters, written to the job's folder."""
    return workload(job, prepare_pairs(job, labelled), task=TaskType.SEQ_CLS)


def labelled(pair: Pair) -> Example:
    return [_scored_last([*pair["prompt_ids"], *pair[name]]) for name in ("chosen_ids", "rejected_ids")]


def _scored_last(ids: Sequence[int]) -> Row:
    """The score is read at the last token."""
    return ids, [*[IGNORED] * (len(ids) - 1), ids[-1]]


def train_ftlib(job: Train) -> Run:
    """ftlib with its defaults."""
    import ftlib as ft

    def unpack(batch: Any) -> list[Example]:
        return [[_scored_last(ids) for ids, _ in example] for example in examples_of(batch)]

    return run_ftlib(job, ft.RewardTrainer, unpack, task="reward")


def train_trl(job: Train) -> Run:
    """TRL with its defaults."""
    return _train_trl(job, {})


def train_trl_tuned(job: Train) -> Run:
    """TRL in the precision that is fast here, without gradient checkpointing."""
    return _train_trl(job, tuned(job))


def _train_trl(job: Train, settings: Mapping[str, Any]) -> Run:
    from trl import RewardConfig, RewardTrainer

    rows = [
        {"chosen_ids": chosen, "rejected_ids": rejected}
        for (chosen, _), (rejected, _) in map(labelled, saved(job, "pairs"))
    ]
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token = unused_token(tokenizer, rows)
    unpack = partial(unpadded, pad=tokenizer.pad_token_id)
    return run_trl(job, RewardTrainer, RewardConfig, Dataset.from_list(rows), unpack, settings, tokenizer)


def unused_token(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Sequence[int]]]) -> str:
    """The padding token if no row holds it, else the first special token that none holds.

    Raises:
        ValueError: there is none.
    """
    used = {token for row in rows for ids in row.values() for token in ids}
    for token in (tokenizer.pad_token, *tokenizer.all_special_tokens):
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in used:
            return str(token)
    raise ValueError("expected a special token that no row holds, to pad with, got none.")


def unpadded(batch: Mapping[str, Any], *, pad: int) -> list[Example]:
    """A batch holds the chosen rows, then the rejected rows in the same order."""
    rows: list[Row] = []
    for ids_L, real_L in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        labels_L = torch.full_like(ids_L, IGNORED)
        scored = int((ids_L != pad).nonzero()[-1])  # as transformers finds the token to score
        labels_L[scored] = ids_L[scored]
        rows.append((ids_L[real_L].tolist(), labels_L[real_L].tolist()))
    half = len(rows) // 2
    return list(zip(rows[:half], rows[half:], strict=True))


def evaluate(job: Evaluate) -> Evaluation:
    """The margin is the chosen answer's score less the rejected one's."""
    return evaluate_pairs(job, TaskType.SEQ_CLS, _margins)


def _margins(model: Any, pairs: Iterable[Pair]) -> list[float]:
    # of one row without padding token the last token is scored
    model.config.pad_token_id = None

    def score(row: Row) -> float:
        return float(model(input_ids=torch.tensor([row[0]]), use_cache=False).logits)

    return [score(chosen) - score(rejected) for chosen, rejected in map(labelled, pairs)]


TASK = Task(
    prepare=prepare,
    sides={"ftlib": train_ftlib, "trl": train_trl, "trl-tuned": train_trl_tuned},
    evaluate=evaluate,
)
