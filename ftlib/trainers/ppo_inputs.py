"""What a PPO trainer is given, turned into what it works with: prompts, sampling, a reward function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ftlib.adapters.attach import AnyModel, load_adapter
from ftlib.batches import Sampling
from ftlib.data.encode import Encoder
from ftlib.data.records import load_records
from ftlib.engine.ppo_config import PPOConfig
from ftlib.errors import ConfigError, DataError
from ftlib.models.heads import as_reward_model
from ftlib.models.parts import inner_model
from ftlib.models.sharing import on_same_base, shared_with
from ftlib.rollouts.rewards import Asking, Reward, reward_model
from ftlib.trainers.inputs import tokenizer_beside

__all__ = [
    "AnyReward",
    "asking_of",
    "decoder_of",
    "encode_prompts",
    "ids_of",
    "resolve_reward",
    "sampling_of",
]

AnyReward = Reward | nn.Module | str | Path


def encode_prompts(data: Any, encoder: Callable[[], Encoder], name: str) -> list[dict[str, Any]]:
    """Prompts as rows with their ids, as they came, and their other columns.

    Args:
        data: a list of strings, message lists, or rows with a "prompt"; a data set, frame or path of such
            rows.
        encoder: lays out prompts.
        name: of the argument, for errors.

    Raises:
        DataError: no prompts, or rows without one; all of them are named.
        ConfigError: a stream, which has no length to plan steps by.
    """
    rows = _rows(data, name)
    if not rows:
        raise DataError(f"{name}: expected a list of prompts, got {data!r:.60}.", code="empty_data")
    if all(isinstance(row, Mapping) and "prefix_ids" in row for row in rows):
        return rows
    wrong = [i + 1 for i, row in enumerate(rows) if isinstance(row, Mapping) and not row.get("prompt")]
    if wrong:
        raise DataError(
            f'{name}: expected a "prompt" in every row, got none in rows {wrong[:20]}.', code="bad_row"
        )
    return [_row(row, index, encoder()) for index, row in enumerate(rows)]


def _rows(data: Any, name: str) -> list[Any]:
    if isinstance(data, IterableDataset):
        raise ConfigError(
            f"{name}: expected prompts with a length, got an IterableDataset. Take what you train on: "
            "list(stream.take(n))."
        )
    if isinstance(data, str):
        raise DataError(
            f"{name}: expected a list of prompts, got {data!r:.60}. Put it into a list; a file is given as a "
            "pathlib.Path.",
            code="empty_data",
        )
    return list(data) if isinstance(data, list | tuple | Dataset) else list(load_records(data))


def _row(row: Any, index: int, encoder: Encoder) -> dict[str, Any]:
    prompt = row["prompt"] if isinstance(row, Mapping) else row
    columns = (
        {name: value for name, value in row.items() if name not in ("prompt", "_source")}
        if isinstance(row, Mapping)
        else {}
    )
    ids = encoder.encode_prompt({"prompt": prompt})
    return {
        "prefix_ids": ids,
        "prefix_weights": [0.0] * len(ids),
        "continuation_ids": [],
        "continuation_weights": [],
        "length": len(ids),
        "source": f"<prompts>:{index + 1}",
        "prompt": prompt,
        "columns": columns,
    }


def ids_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """The ids that end a completion: EOS of tokenizer and generation config."""
    named = inner_model(model).generation_config.eos_token_id
    listed: Sequence[int] = [] if named is None else [named] if isinstance(named, int) else list(named)
    own = [] if tokenizer is None or tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return tuple(sorted({*listed, *own}))


def sampling_of(config: PPOConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> Sampling:
    """How the settings draw completions; where they name no end, those of tokenizer and model."""
    known = ids_of(model, tokenizer) if config.stop is None else config.stop
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens,
        stop_ids=tuple(stop for stop in known if isinstance(stop, int)),
        n=config.samples_per_prompt,
        stop_strings=tuple(stop for stop in known if isinstance(stop, str)),
    )


def asking_of(config: PPOConfig) -> Asking:
    """How the settings ask for rewards."""
    return Asking(
        retries=config.reward_retries,
        timeout=config.reward_timeout,
        on_error=config.reward_on_error,
        batch_size=config.reward_batch_size,
        max_drop_frac=config.max_drop_frac,
    )


def decoder_of(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Sequence[int]], str] | None:
    """Token ids to text; None without a tokenizer."""
    return None if tokenizer is None else lambda ids: str(tokenizer.decode(list(ids)))


def resolve_reward(
    reward: AnyReward,
    policy: AnyModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    trained: Sequence[nn.Module] = (),
) -> Reward:
    """A reward function from what the caller gave.

    Args:
        reward: a function; a reward model, which stays on its device; or the folder of a reward adapter,
            which is put on the policy's own base.
        policy: whose base that is.
        tokenizer: of policy and reward model.
        trained: the models that the run trains; a reward model must be none of them.

    Raises:
        ConfigError: a model without a tokenizer, one that reads other ids or would be trained, no reward
            adapter in the folder, or something else altogether.
        CapabilityError: a policy whose base cannot be shared, or a language model's adapter.
    """
    if isinstance(reward, str | Path):
        reward = _adapter_on_base_of(policy, Path(reward).expanduser(), tokenizer)
    if isinstance(reward, nn.Module):
        if tokenizer is None:
            raise ConfigError("PPOTrainer: a reward model needs a tokenizer. Give tokenizer=.")
        shared = [name for model in trained for name in shared_with(reward, model)]
        if shared:
            raise ConfigError(
                f"PPOTrainer: expected a reward model that stays as it is, got one of which the run trains "
                f"{len(shared)} weights, {shared[0]} among them. Save its adapter and give the folder, or "
                "give a copy of the model."
            )
        _require_same_words(reward, tokenizer)
        return reward_model(reward, tokenizer)
    if not callable(reward):
        raise ConfigError(
            f"PPOTrainer: expected reward as a function, a reward model or a folder, got {reward!r:.80}."
        )
    return reward


def _require_same_words(reward: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """The ids that the policy writes must be the same tokens to the reward model, as far as can be known."""
    own = tokenizer_beside(reward)
    if own is None:
        return
    theirs, written = own.get_vocab(), tokenizer.get_vocab()
    others = [token for token, index in written.items() if theirs.get(token, index) != index]
    if others or theirs.keys().isdisjoint(written):
        raise ConfigError(
            f"PPOTrainer: expected a reward model with the policy's tokenizer, got one whose own gives other "
            f"ids to {len(others)} of {len(written)} tokens. Let it read the text: "
            "reward=ftlib.rewards.reward_model(model, its_tokenizer, retokenise=True)."
        )


def _adapter_on_base_of(
    policy: AnyModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None
) -> nn.Module:
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"PPOTrainer: expected reward as the folder of a reward adapter, found no adapter_config.json in "
            f"{folder}. Load a whole reward model first: reward=ftlib.load(folder, task='reward')[0]."
        )
    base = as_reward_model(on_same_base(policy), tokenizer)
    return load_adapter(base, folder, trainable=False)
