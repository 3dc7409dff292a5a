"""Names and signatures that others' code depends on. Adding is free; a change here breaks someone."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

import ftlib as ft

NAMES = {
    "ClassificationTrainer",
    "DPOTrainer",
    "Encoder",
    "PPOConfig",
    "PPOTrainer",
    "RewardOut",
    "RewardTrainer",
    "SFTTrainer",
    "TrainConfig",
    "TrainResult",
    "adapters",
    "collate",
    "compare",
    "demo_model",
    "formatters",
    "forward",
    "load",
    "load_records",
    "losses",
    "models",
    "objectives",
    "plots",
    "prepare",
    "rewards",
    "rollouts",
    "split",
    "to_trl",
}
_TRAINER = (
    "model, train_dataset, eval_dataset=None, *, tokenizer=None, adapter=None, config=None, callbacks=(), "
    "objective=None"
)
_PAIR_LOSS = "chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, *, beta, label_smoothing=0.0"
SIGNATURES = {  # as far as they are promised: arguments in order, "*" before keyword-only ones, defaults
    "load": "name_or_path, *, adapter=None, task='causal_lm', dtype='auto', quantize=None, gguf_file=None, "
    "num_labels=None, revision=None, token=None, local_files_only=False, device=None, "
    "trust_remote_code=False",
    "load_records": "source, *, format='auto', columns=None, roles=None",
    "split": "records, *, validation=0.2, seed=0, group='prompt', stratify=None",
    "Encoder": "tokenizer, *, formatter=None, train_on='completion', prompt_loss_weight=0.0, "
    "max_length=None, overflow='error'",
    "Encoder.__call__": "self, records, *, num_proc=None",
    "Encoder.preview": "self, records, n=3",
    "collate": "examples",
    "compare": "a, b, prompts, *, names=('a', 'b')",
    "forward": "model, batch",
    "formatters.text": "column='text'",
    "formatters.prompt_completion": "*, separator='', ending=None",
    "formatters.chat": "*, template=None, system=None",
    "formatters.instruction": "template='alpaca'",
    "formatters.preference": "base=None",
    "formatters.cloze": "pattern, verbalizer",
    "prepare": "source, *, tokenizer=None",
    "to_trl": "records",
    "adapters.full": "",
    "adapters.lora": "r=16, *, alpha=None, dropout=0.0, targets='all-linear', modules_to_save=None, "
    "init='default', rslora=False, dora=False",
    "adapters.prefix": "tokens=20, *, projection=False, hidden=None",
    "adapters.p_tuning": "tokens=20, *, encoder='lstm', hidden=None",
    "adapters.prompt": "tokens=20, *, init='vocab', text=None",
    "adapters.ia3": "*, targets='auto'",
    "adapters.stack": "a, b",
    "adapters.attach": "model, adapter, *, name='default'",
    "adapters.merge": "model",
    "losses.nll": "logprobs_N",
    "losses.token_logprobs": "logits_TV, targets_T, *, temperature=1.0",
    "losses.entropy": "logits_TV",
    "losses.bradley_terry": "chosen_B, rejected_B, *, margin_B=None, center=0.0, label_B=None",
    "losses.dpo": _PAIR_LOSS,
    "losses.ipo": _PAIR_LOSS,
    "losses.hinge": _PAIR_LOSS,
    "losses.robust_dpo": _PAIR_LOSS,
    "losses.kl_estimate": "logprobs, ref_logprobs, *, kind",
    "losses.kl_exact": "logits, ref_logits",
    "losses.shape_rewards": "scores_B, log_ratio_BL, mask_BL, *, beta, token_rewards_BL=None",
    "losses.gae": "rewards_BL, values_BL, mask_BL, *, gamma=1.0, lam=0.95, lam_value=None, bootstrap_B=None",
    "losses.whiten": "x_BL, mask_BL, *, center=True, unbiased=True, reduce=None",
    "losses.reduce": "x, mask, *, denom, mode='token'",
    "losses.completion_mask": "ids_BL, lengths_B, stop_ids",
    "losses.ppo_policy": "logprobs_BL, old_logprobs_BL, advantages_BL, mask_BL, *, clip=0.2, dual=None, "
    "importance_BL=None",
    "losses.ppo_value": "values_BL, old_values_BL, returns_BL, mask_BL, *, clip=None",
    "losses.FixedKL": "kl_coef",
    "losses.AdaptiveKL": "kl_coef, kl_target, kl_horizon",
    "SFTTrainer": _TRAINER,
    "RewardTrainer": f"{_TRAINER}, center=0.0",
    "RewardTrainer.evaluate": "self, dataset=None",
    "RewardTrainer.answers": "self, dataset=None",
    "RewardTrainer.score": "self, prompts, completions",
    "RewardTrainer.fit_normalisation": "self, prompts, completions",
    "DPOTrainer": f"{_TRAINER}, beta=0.1, loss='sigmoid', label_smoothing=0.0, reference='auto', "
    "ipo_reduction='mean', reference_cache=True, allow_initial_kl=False",
    "ClassificationTrainer": f"{_TRAINER}, labels=None",
    "PPOTrainer": "model, prompts, *, tokenizer=None, adapter=None, reward, reference='auto', critic='head', "
    "sampler=None, config=None, callbacks=()",
    "PPOTrainer.rollout": "self, prompts",
    "PPOTrainer.update": "self, rollouts",
    "PPOTrainer.step": "self, queries, responses, rewards, *, masks=None, finished=None, logprobs=None",
    "rewards.ensemble": "members, reduce='mean'",
    "SFTTrainer.train": "self, resume=None",
    "SFTTrainer.step": "self, batch",
    "SFTTrainer.evaluate": "self, dataset=None",
    "SFTTrainer.predict": "self, dataset",
    "SFTTrainer.generate": "self, prompts, *, max_new_tokens=128, do_sample=False",
    "SFTTrainer.save": "self, folder",
    "SFTTrainer.add_callback": "self, callback",
    "objectives.SFT": "",
    "objectives.SFT.counts": "self, batch",
    "objectives.SFT.__call__": "self, model, batch",
    "objectives.Reward": "center=0.0",
    "objectives.Reward.counts": "self, batch",
    "objectives.Reward.__call__": "self, model, batch",
    "objectives.DPO": "reference='auto', beta=0.1, loss='sigmoid', label_smoothing=0.0, ipo_reduction='mean'",
    "objectives.DPO.bound": "self, model, *, cache=True",
    "objectives.DPO.counts": "self, batch",
    "objectives.DPO.__call__": "self, model, batch",
    "objectives.weighted": "objectives",
    "plots.loss": "result, *, ax=None",
    "plots.margins": "result, *, ax=None",
    "plots.reward": "result, *, kl_target=None, ax=None",
    "plots.roc": "answers, *, ax=None",
}
CONFIG = {
    "output_dir": None,
    "epochs": 1,
    "max_steps": None,
    "learning_rate": None,
    "batch_size": 8,
    "max_tokens": None,
    "shuffle": True,
    "seed": 0,
    "schedule": "linear",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "max_grad_norm": 1.0,
    "optimizer": "adamw",
    "gradient_checkpointing": False,
    "log_steps": 10,
    "eval_steps": None,
    "eval_batch_size": None,
    "save_steps": None,
    "keep_checkpoints": 2,
    "metric_for_best": None,
    "load_best": False,
    "run_name": None,
    "report_to": (),
}


def test_the_index_holds_every_promised_name_and_each_is_there():
    assert set(ft.__all__) >= NAMES
    assert len(ft.__all__) == len(set(ft.__all__))
    for name in ft.__all__:
        assert getattr(ft, name) is not None


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known():
    with pytest.raises(AttributeError, match="SFTTrainer"):
        ft.SFTTrainr  # noqa: B018


def promised(text: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, default) of positional and of keyword-only arguments."""
    function = {}
    exec(f"def stub({text}): pass", function)  # a literal of this file
    return shape(function["stub"])


def shape(function) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    parameters = inspect.signature(function).parameters.values()
    told = [
        (each.kind, each.name, "" if each.default is each.empty else repr(each.default))
        for each in parameters
    ]
    ordered = [
        (name, default) for kind, name, default in told if kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    return ordered, [
        (name, default) for kind, name, default in told if kind == inspect.Parameter.KEYWORD_ONLY
    ]


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_as_promised(name):
    """Positional arguments begin with the promised ones, the rest is optional; no keyword is missing."""
    function = ft
    for part in name.split("."):
        function = getattr(function, part)
    ordered, keywords = shape(function)
    promised_ordered, promised_keywords = promised(SIGNATURES[name])
    assert ordered[: len(promised_ordered)] == promised_ordered
    assert all(default for _, default in ordered[len(promised_ordered) :])
    assert set(keywords) >= set(promised_keywords)


PPO_CONFIG = {
    "eps": 1e-5,
    "samples_per_prompt": 1,
    "epochs_per_rollout": 4,
    "minibatches": 1,
    "max_new_tokens": 64,
    "temperature": 1.0,
    "top_p": 1.0,
    "stop": None,
    "kl_coef": 0.05,
    "kl_target": None,
    "gamma": 1.0,
    "lam": 0.95,
    "clip": 0.2,
    "value_clip": 0.2,
    "value_coef": 0.1,
    "whiten_advantages": True,
    "missing_stop_penalty": 1.0,
    "truncation": "terminal",
    "entropy_coef": 0.0,
}


def test_the_configuration_of_ppo_has_the_promised_options_and_defaults():
    known = {field.name: field.default for field in fields(ft.PPOConfig)}
    assert {name: known[name] for name in PPO_CONFIG} == PPO_CONFIG
    assert known.keys() >= CONFIG.keys()


def test_the_configuration_has_the_promised_options_and_defaults_in_order():
    known = {field.name: field.default for field in fields(ft.TrainConfig)}
    assert list(known)[: len(CONFIG)] == list(CONFIG)
    assert {name: known[name] for name in CONFIG} == CONFIG
