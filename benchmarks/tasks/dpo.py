"""Direct preference optimisation of a LoRA adapter: TRL's DPOTrainer and ftlib's.

TRL takes text alone, so it is given the text, and only pairs whose text it tokenises to the very ids
that ftlib has; the others are left out and counted. Its best settings, `trl-tuned`: base weights in
bfloat16, no gradient checkpointing, the reference's log-probabilities computed beforehand. The time
that takes is recorded apart from the steps. `padding_free` is left out: TRL 1.16 ignores it.

With several epochs the steps of each are summed up apart: from the second on, nothing about the
reference is new.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from peft import TaskType
from transformers import PreTrainedTokenizerBase

from benchmarks.jobs import Evaluate, Evaluation, Prepare, Task, Train
from benchmarks.materials import workload
from benchmarks.recorder import IGNORED, Example, Row
from benchmarks.records import Run, Workload
from benchmarks.sides import examples_of, run_ftlib, run_trl, saved, tuned
from benchmarks.tasks.pairs import Pair, evaluate_pairs, prepare_pairs

__all__ = ["TASK", "labelled", "same_in_trl", "unpadded"]

BETA = 0.1


def prepare(job: Prepare) -> Workload:
    """Pairs and adapters, written to the job's folder."""
    return workload(job, prepare_pairs(job, labelled, same_in_trl), starts_at=math.log(2))


def labelled(pair: Pair) -> Example:
    """Every token of both answers is scored."""
    prompt = pair["prompt_ids"]
    return [
        ([*prompt, *answer], [*[IGNORED] * len(prompt), *answer])
        for answer in (pair["chosen_ids"], pair["rejected_ids"])
    ]


def same_in_trl(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> bool:
    """TRL tokenises the prompt alone and before either answer, and appends the terminator as text."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text)["input_ids"]
        return found

    def ended(text: str) -> str:
        end = str(tokenizer.eos_token)
        return text if text.endswith(end) else text + end

    prompt = pair["prompt"]
    rows = [ids(prompt), ids(prompt + ended(pair["chosen"])), ids(prompt + ended(pair["rejected"]))]
    ours = [pair["prompt_ids"], *(row for row, _ in labelled(pair))]
    return rows == ours


def train_ftlib(job: Train) -> Run:
    """ftlib with its defaults."""
    import ftlib as ft

    return run_ftlib(job, partial(ft.DPOTrainer, beta=BETA), examples_of)


def train_trl(job: Train) -> Run:
    """TRL with its defaults: the reference runs in every step."""
    return _train_trl(job, {})


def train_trl_tuned(job: Train) -> Run:
    """TRL in the precision that is fast here, without checkpointing, the reference run beforehand."""
    return _train_trl(job, {**tuned(job), "precompute_ref_log_probs": True})


def _train_trl(job: Train, settings: Mapping[str, Any]) -> Run:
    from trl import DPOConfig, DPOTrainer

    texts = saved(job, "pairs").select_columns(["prompt", "chosen", "rejected"])
    return run_trl(job, DPOTrainer, DPOConfig, texts, unpadded, {"beta": BETA, **settings})


def unpadded(batch: Mapping[str, Any]) -> list[Example]:
    """A batch holds the chosen rows, then the rejected rows in the same order."""
    rows: list[Row] = []
    for ids_L, real_L, counts_L in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
    ):
        labels_L = ids_L.where(counts_L, IGNORED)
        rows.append((ids_L[real_L].tolist(), labels_L[real_L].tolist()))
    half = len(rows) // 2
    return list(zip(rows[:half], rows[half:], strict=True))


def evaluate(job: Evaluate) -> Evaluation:
    """The margin is beta times how much more the policy prefers the chosen answer than the base does."""
    return evaluate_pairs(job, TaskType.CAUSAL_LM, _margins)


def _margins(model: Any, pairs: Iterable[Pair]) -> list[float]:
    def lead(pair: Pair) -> float:
        chosen, rejected = (_logprob(model, row) for row in labelled(pair))
        return chosen - rejected

    margins = []
    for pair in pairs:
        policy = lead(pair)
        with model.disable_adapter():
            margins.append(BETA * (policy - lead(pair)))
    return margins


def _logprob(model: Any, row: Row) -> float:
    """Of the labelled tokens of one row together."""
    ids_1L, labels_L = torch.tensor([row[0]]), torch.tensor(row[1])[1:]
    scored_L = labels_L != IGNORED
    logprobs_NV = model(input_ids=ids_1L, use_cache=False).logits[0, :-1][scored_L].log_softmax(-1)
    return float(logprobs_NV.gather(-1, labels_L[scored_L][:, None]).double().sum())


TASK = Task(
    prepare=prepare,
    sides={"ftlib": train_ftlib, "trl": train_trl, "trl-tuned": train_trl_tuned},
    evaluate=evaluate,
)
