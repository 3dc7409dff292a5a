"""Proximal policy optimisation of a LoRA adapter: TRL's PPOTrainer, last in TRL 1.12, and ftlib's.

Each side draws its own completions, so losses differ. The same are: prompts and their order, the length
of every completion (nothing ends one early), temperature, optimiser steps on them, optimiser, constants
of the algorithm, the adapter's initialisation, and the reward: a tiny sequence classifier with random
weights, made once for both, whose scores are computed again by plain transformers. In a short float32 run
both make one pass over each step's completions, where the ratio must be 1 and, at first, the KL 0.

| side | policy and reference | critic |
|---|---|---|
| ftlib | one base, an adapter | a head on the policy's trunk, its default |
| ftlib-adapter | likewise | a second adapter on the same base |
| trl | float32 weights, an adapter | a second model, trained whole |
| trl-autocast | likewise, in bfloat16 autocast | likewise |
| trl-tuned | weights in bfloat16 where the processor has it, an adapter | likewise in bfloat16 |
| trl-adapter | likewise | likewise, with an adapter of its own |

TRL's default is `bf16=True`, but it makes an `Accelerator` of its own that does not hear of it: with the
pinned transformers its defaults compute in float32. `trl-autocast` tells accelerate by its environment
variable. Gradient checkpointing is never switched on.

TRL has neither gradient clipping here nor a warm-up of the critic, so ftlib has neither. TRL shuffles its
rows; its collator gives out the workload's prompts in their order instead. It is given a padding token
outside the vocabulary, which no policy can draw: it takes padding for the end of a completion.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from benchmarks.drawn import EXACT_UPDATES
from benchmarks.floor import forward_bytes, forward_flops, training_bytes, training_flops
from benchmarks.jobs import Evaluate, Evaluation, Prepare, Task, Train
from benchmarks.materials import ADAPTER, Rows, adapter_delta, load_plain, longest, workload
from benchmarks.recorder import base_sha256
from benchmarks.records import Drawing, Run, Workload
from benchmarks.rollouts import Drawn, RolloutRecorder, plain_scores, recorded, without_labels
from benchmarks.sides import fast_dtype, saved

__all__ = ["TASK"]

NEW_TOKENS = 53  # TRL's default, as are the following
UPDATES = 4
TEMPERATURE = 0.7
# Formulas and their constants, as ftlib names them; those it leaves out have the same default on both sides.
ALGORITHM: dict[str, Any] = {
    "kl_coef": 0.05,
    "kl_kind": "k1",
    "clip": 0.2,
    "value_clip": 0.2,
    "value_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
    "critic_warmup": 0,
    "max_grad_norm": inf,
    "eps": 1e-8,
    "weight_decay": 0.0,
}
HELD_OUT_SHARE = 0.1
REWARD_WIDTH = 32


# -- data -----------------------------------------------------------------------------------------


def prepare(job: Prepare) -> Workload:
    """Prompts, adapters and the reward model, written to the job's folder.

    Raises:
        ValueError: less data than the steps need.
    """
    import ftlib as ft

    folder = Path(job.folder)
    room = longest(job.model) - NEW_TOKENS
    encoder = ft.Encoder(AutoTokenizer.from_pretrained(job.model))
    kept, left_out = [], 0
    for records, count in zip(_records(job.data), (job.steps * job.batch_size, job.held_out), strict=True):
        some = records.shuffle(seed=job.seed).select(range(min(2 * count, len(records))))
        rows = [{"prompt": text, "prompt_ids": encoder.encode_prompt(text)} for text in some["prompt"]]
        short = [row for row in rows if len(row["prompt_ids"]) <= room]
        left_out += len(rows) - len(short)
        kept.append(short[:count])
    train, held_out = kept
    Dataset.from_list(train).save_to_disk(folder / "prompts")
    Dataset.from_list(held_out).save_to_disk(folder / "held-out")
    _write_reward_model(job)
    lengths = [(0, len(row["prompt_ids"]) + NEW_TOKENS) for row in train]
    examples = [without_labels(row["prompt_ids"]) for row in train]
    described = workload(job, Rows(examples, lengths, "prompts", len(held_out), left_out))
    return _with_floors(described, lengths)


def _records(data: str) -> tuple[Dataset, Dataset]:
    """Prompts to train on and prompts to hold out; each ends in a line break."""
    import ftlib as ft
    from ftlib.demo.corpora import docstring_pairs, split_pairs

    if data:
        train, held_out = ft.split(ft.load_records(data, format="rows"), validation=HELD_OUT_SHARE)
    else:
        train, held_out = split_pairs(docstring_pairs(), validation=HELD_OUT_SHARE)
    return _prompts(train), _prompts(held_out)


def _prompts(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    return Dataset.from_list([{"prompt": f"{row['prompt']}\n"} for row in rows])


def _write_reward_model(job: Prepare) -> None:
    """One layer with random weights, of a scale at which scores spread over about 1."""
    policy = AutoConfig.from_pretrained(job.model).get_text_config(decoder=True)
    torch.manual_seed(job.seed)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=policy.vocab_size,
            max_position_embeddings=policy.max_position_embeddings,
            hidden_size=REWARD_WIDTH,
            intermediate_size=2 * REWARD_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,
            initializer_range=REWARD_WIDTH**-0.5,
        )
    )
    model.save_pretrained(_reward_folder(job.folder))


def _reward_folder(folder: str) -> str:
    return f"{folder}/reward-model"


def _reward_model(folder: str) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(_reward_folder(folder), dtype=torch.float32)
    return model.eval()


def _with_floors(made: Workload, lengths: Sequence[tuple[int, int]]) -> Workload:
    """The least work of each step.

    Drawing: one forward's arithmetic, and the weights once per token. Training: the reference's forward and
    the values' over what was drawn, then the optimiser steps, the critic a head on the policy's trunk.
    """
    sizes, drawn = made.sizes, made.batch_size * NEW_TOKENS
    draw_flops, flops, moved = [], [], []
    for start in range(0, len(lengths), made.batch_size):
        step = lengths[start : start + made.batch_size]
        draw_flops.append(forward_flops(sizes, step, drawn))
        values = forward_flops(sizes, step, 0)
        flops.append(draw_flops[-1] + values + UPDATES * training_flops(sizes, step, drawn))
        moved.append(2 * forward_bytes(sizes) + UPDATES * training_bytes(sizes, step))
    draw_bytes = [NEW_TOKENS * forward_bytes(sizes)] * len(flops)
    return replace(
        made,
        floor_flops=flops * made.epochs,
        floor_bytes=moved * made.epochs,
        drawing=Drawing(NEW_TOKENS, UPDATES, TEMPERATURE, draw_flops * made.epochs, draw_bytes * made.epochs),
    )


def _updates(job: Train) -> int:
    return EXACT_UPDATES if job.precision == "float32" else UPDATES


# -- ftlib ----------------------------------------------------------------------------------------


def train_ftlib(job: Train, critic: str = "head") -> Run:
    """ftlib with its defaults, or with another critic."""
    import ftlib as ft

    torch.manual_seed(job.seed)  # of a second adapter's initialisation
    dtype = "float32" if job.precision == "float32" else "auto"
    model, tokenizer = ft.load(job.model, adapter=job.adapter, dtype=dtype, device=job.device)
    reward_model = _reward_model(job.folder)
    recorder, reward = RolloutRecorder(job.stop_after), _KeptReward(reward_model, tokenizer)
    sampler = _TimedSampler(model, tokenizer)
    trainer = ft.PPOTrainer(
        model,
        saved(job, "prompts")["prompt"][:],
        tokenizer=tokenizer,
        reward=reward,
        critic=critic,
        sampler=sampler,
        config=ft.PPOConfig(
            max_steps=job.steps,
            batch_size=job.batch_size,
            epochs_per_rollout=_updates(job),
            max_new_tokens=NEW_TOKENS,
            stop=(),
            temperature=TEMPERATURE,
            learning_rate=job.learning_rate,
            value_learning_rate=job.learning_rate,
            shuffle=False,
            seed=job.seed,
            schedule="constant",
            log_steps=1,
            **ALGORITHM,
        ),
        callbacks=[recorder],
    )
    recorder.built()
    before = base_sha256(model)
    recorder.starting()
    trainer.train()
    trainer.save(job.output)
    run = _run(job, recorder, model, reward.drawn, before)
    measures = [
        {
            "score": log["score"],
            "kl": log["kl"],
            "optimizer_steps": log["optimizer_steps"],
            "ratio_error": log["first_ratio_deviation"],
            "seconds_drawing": drawing,
            "seconds_scoring": scoring,
        }
        for log, drawing, scoring in zip(recorder.logs, sampler.seconds, reward.seconds, strict=True)
    ]
    return recorded(run, reward.drawn, measures, reward_model)


def _run(
    job: Train, recorder: RolloutRecorder, policy: nn.Module, drawn: Sequence[Drawn], before: str
) -> Run:
    """On prompts alone."""
    examples = [[without_labels(prompt) for prompt in each.prompts] for each in drawn]
    return recorder.run(job.side, job.precision, policy, examples, [before, base_sha256(policy)])


class _KeptReward:
    """ftlib's reward from a reward model, with what it was asked, what it said and how long it took."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        from ftlib.rollouts.rewards import reward_model

        self._reward = reward_model(model, tokenizer)
        self.drawn: list[Drawn] = []
        self.seconds: list[float] = []

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        start = time.perf_counter()
        scores = self._reward(prompts, completions, **columns)
        self.seconds.append(time.perf_counter() - start)
        self.drawn.append(Drawn(columns["prompt_ids"], columns["completion_ids"], scores))
        return scores


class _TimedSampler:
    """ftlib's sampler, and how long it took."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        from ftlib.rollouts import TransformersSampler

        self._sampler = TransformersSampler(model, tokenizer)
        self.seconds: list[float] = []

    def sync(self, policy: nn.Module, version: int) -> None:
        self._sampler.sync(policy, version)

    def generate(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        drawn = self._sampler.generate(*arguments)
        self.seconds.append(time.perf_counter() - start)
        return drawn


# -- TRL ------------------------------------------------------------------------------------------


def train_trl(
    job: Train,
    *,
    fast: bool = False,
    autocast: bool = False,
    critic_adapter: bool = False,
) -> Run:
    """TRL with its defaults, or with weights of the dtype that is fast here, autocast or another critic."""
    dtype = fast_dtype(job) if fast else torch.float32
    if autocast:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.manual_seed(job.seed)
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)
    policy = PeftModel.from_pretrained(base, job.adapter, is_trainable=True)
    reward_model = _reward_model(job.folder)
    tokenizer = _padding_outside(AutoTokenizer.from_pretrained(job.model), base.config)
    prompts = saved(job, "prompts")["prompt_ids"][:]
    recorder = _TRLRecorder(job.stop_after, policy)
    kept = _KeptModel(reward_model)
    precision: dict[str, Any] = {"bf16": False} if job.precision == "float32" else {}
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=f"{job.output}-trainer",
            use_cpu=job.device == "cpu",
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            seed=job.seed,
            total_episodes=job.stop_after * job.batch_size,
            per_device_train_batch_size=job.batch_size,
            num_ppo_epochs=_updates(job),
            response_length=NEW_TOKENS,
            temperature=TEMPERATURE,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            adam_epsilon=ALGORITHM["eps"],
            weight_decay=ALGORITHM["weight_decay"],
            kl_coef=ALGORITHM["kl_coef"],
            kl_estimator=ALGORITHM["kl_kind"],
            cliprange=ALGORITHM["clip"],
            cliprange_value=ALGORITHM["value_clip"],
            vf_coef=ALGORITHM["value_coef"],
            gamma=ALGORITHM["gamma"],
            lam=ALGORITHM["lam"],
            **precision,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        value_model=_value_model(job, dtype, adapter=critic_adapter),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
        data_collator=_InOrder(prompts, job.batch_size, tokenizer.pad_token_id),
        callbacks=[recorder],
    )
    recorder.built()
    before = base_sha256(policy)
    hooks = [register_optimizer_step_pre_hook(recorder.on_update), *kept.hooks]
    recorder.starting()
    trainer.train()
    for hook in hooks:
        hook.remove()
    policy.save_pretrained(job.output)
    drawn = kept.drawn()
    run = _run(job, recorder, policy, drawn, before)
    return recorded(run, drawn, recorder.measures, reward_model)


def _padding_outside(tokenizer: Any, config: Any) -> Any:
    """The tokenizer with a padding token behind the ids that the policy can draw."""
    behind = config.get_text_config(decoder=True).vocab_size - len(tokenizer)
    tokenizer.add_tokens([f"<unused-{number}>" for number in range(behind)])
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    return tokenizer


def _value_model(job: Train, dtype: torch.dtype, *, adapter: bool) -> nn.Module:
    """As TRL's examples make it: the policy's base with a score head; trained whole, or adapter and head."""
    model = AutoModelForSequenceClassification.from_pretrained(job.model, dtype=dtype, num_labels=1)
    if adapter:
        inject_adapter_in_model(LoraConfig(**ADAPTER), model)
        model.score.weight.requires_grad_(True)
    return model


class _InOrder:
    """A collator that gives out the workload's prompts, padded on the left, whatever rows it is given."""

    def __init__(self, prompts: Sequence[Sequence[int]], size: int, pad: int) -> None:
        self._batches = cycle(prompts[start : start + size] for start in range(0, len(prompts), size))
        self._pad = pad

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:  # noqa: ARG002  the protocol's
        return {"input_ids": _padded(next(self._batches), self._pad)}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """On the left, int64 [B, L]."""
    return nn.utils.rnn.pad_sequence(
        list(map(torch.tensor, rows)), batch_first=True, padding_value=value, padding_side="left"
    )


class _KeptModel:
    """References to what a reward model was given and what it said."""

    def __init__(self, model: Any) -> None:
        self._given: list[tuple[Tensor, Tensor]] = []
        self._said: list[Tensor] = []
        backbone = getattr(model, model.base_model_prefix)
        self.hooks = [
            backbone.register_forward_pre_hook(self._keep_given, with_kwargs=True),
            model.score.register_forward_hook(self._keep_said),
        ]

    def _keep_given(self, _backbone: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        self._given.append((kwargs["input_ids"], kwargs["attention_mask"]))

    def _keep_said(self, _head: nn.Module, _args: Any, scores_BL1: Tensor) -> None:
        self._said.append(scores_BL1[:, -1, 0].clone())

    def drawn(self) -> list[Drawn]:
        """What each call was about; completions have one length, prompts are padded on the left."""
        return [
            Drawn(
                [ids[real][:-NEW_TOKENS].tolist() for ids, real in zip(ids_BL, real_BL.bool(), strict=True)],
                [ids[real][-NEW_TOKENS:].tolist() for ids, real in zip(ids_BL, real_BL.bool(), strict=True)],
                scores_B.tolist(),
            )
            for (ids_BL, real_BL), scores_B in zip(self._given, self._said, strict=True)
        ]


class _TRLRecorder(RolloutRecorder):
    """Reads TRL's names, counts optimiser steps, and takes the norm of the policy's last gradient."""

    def __init__(self, stop_after: int, policy: nn.Module) -> None:
        super().__init__(stop_after)
        self._adapter = [weight for weight in policy.parameters() if weight.requires_grad]
        self._updates, self._norm = 0, torch.zeros(())
        self.measures: list[dict[str, float]] = []

    def built(self) -> None:
        """TRL does not tell when its set-up ends, and does nothing after it."""

    def on_update(self, *_args: Any) -> None:
        gradients = [weight.grad for weight in self._adapter if weight.grad is not None]
        self._updates, self._norm = self._updates + 1, nn.utils.get_total_norm(gradients)

    def on_log(self, *_args: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "objective/kl" not in logs:
            return
        loss = logs["loss/policy_avg"] + ALGORITHM["value_coef"] * logs["loss/value_avg"]
        self.logs.append({"loss": loss, "grad_norm": float(self._norm)})
        self.measures.append(
            {
                "score": logs["objective/scores"],
                "kl": logs["objective/kl"],
                "optimizer_steps": float(self._updates),
                # of several optimiser steps TRL tells the mean alone, which moves away from 1
                **({"ratio_error": abs(logs["val/ratio"] - 1)} if self._updates == 1 else {}),
            }
        )
        self._updates = 0


# -- evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(job: Evaluate) -> Evaluation:
    """Minus the mean score of one completion of each held-out prompt, drawn by plain transformers and peft.

    In float32, from the same random numbers for every adapter.
    """
    base = load_plain(job.model)
    base.generation_config.eos_token_id = None
    reward = _reward_model(job.folder)
    prompts = load_from_disk(f"{job.folder}/held-out")["prompt_ids"][:]
    losses, deltas = {}, {}
    for name, folder in job.adapters.items():
        model = PeftModel.from_pretrained(base, folder).eval()
        torch.manual_seed(0)
        scores = plain_scores(reward, prompts, _completions(model, prompts))
        losses[name] = -fmean(scores)
        deltas[name] = adapter_delta(Path(folder), Path(job.initial[name]))
        base = model.unload()
    return Evaluation(losses, deltas)


def _completions(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """One of each prompt, all of the same length."""
    ids_BL = _padded(prompts, 0)
    drawn_BL = model.generate(
        input_ids=ids_BL,
        attention_mask=_padded([[1] * len(ids) for ids in prompts], 0),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    completions: list[list[int]] = drawn_BL[:, ids_BL.shape[1] :].tolist()
    return completions


TASK = Task(
    prepare=prepare,
    sides={
        "ftlib": train_ftlib,
        "ftlib-adapter": partial(train_ftlib, critic="adapter"),
        "trl": train_trl,
        "trl-autocast": partial(train_trl, autocast=True),
        "trl-tuned": partial(train_trl, fast=True),
        "trl-adapter": partial(train_trl, fast=True, critic_adapter=True),
    },
    evaluate=evaluate,
)
