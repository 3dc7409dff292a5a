"""A trained reward model as a reward.

    score = head(state of the completion's last token), on the scale that was fitted to the model, if one was

The ids that the policy wrote are scored as they are; a completion that stopped ends in its stop token, as
those the model was trained on. Completions of one prompt share its computation.

Shapes: C completions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ftlib.adapters.normalisation import normalisation_of
from ftlib.batches import Group
from ftlib.data.collate import collate, group
from ftlib.data.encode import Encoder
from ftlib.data.sampler import pack
from ftlib.errors import CapabilityError, ConfigError
from ftlib.models.forward import forward
from ftlib.models.modes import evaluation_mode
from ftlib.models.parts import inner_model

__all__ = ["reward_model"]


def reward_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    retokenise: bool = False,
    encoder: Encoder | None = None,
    max_tokens: int = 4096,
) -> ModelReward:
    """A model with a score head as a reward function.

    Args:
        model: as ``ftlib.load(name, task="reward")`` gives it, plain or with an adapter; one score.
        tokenizer: the model's own.
        retokenise: score the text instead of the policy's ids: for a model with another vocabulary.
        encoder: how text becomes ids; None is the default encoder, as the model was trained with.
        max_tokens: of one forward; changes speed and memory, not the scores.

    Raises:
        ConfigError: `max_tokens` below 1.

    Example:
        >>> reward = reward_model(model, tokenizer)  # doctest: +SKIP
        >>> reward(["2 + 2?"], [" 4"])  # doctest: +SKIP
        [1.25]
    """
    if max_tokens < 1:
        raise ConfigError(f"reward_model: expected max_tokens >= 1, got {max_tokens}.")
    return ModelReward(model, tokenizer, retokenise, encoder or Encoder(tokenizer), max_tokens)


@final
class ModelReward:
    """What `reward_model` returns."""

    __name__ = "reward_model"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        retokenise: bool,
        encoder: Encoder,
        max_tokens: int,
    ) -> None:
        self.model = model
        self._tokenizer, self._retokenise, self._encoder = tokenizer, retokenise, encoder
        self._max_tokens = max_tokens

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """One score per row; the model's mode comes back afterwards.

        Raises:
            ConfigError: ids that are not of the model's vocabulary.
            CapabilityError: a model that is none for scores, or gives several.
        """
        groups, rows_of = self._groups(prompts, completions, columns)
        device = inner_model(self.model).device
        scores: list[float] = [0.0] * len(prompts)
        scale = normalisation_of(self.model)
        with evaluation_mode(self.model), torch.no_grad():
            for chosen in pack([len(member) for member in groups], self._max_tokens):
                batch = collate([groups[index] for index in chosen]).to(device)
                scores_C = _one_each(forward(self.model, batch, scores=True).scores_CK)
                rows = [row for index in chosen for row in rows_of[index]]
                for row, score in zip(rows, scores_C.tolist(), strict=True):
                    scores[row] = score if scale is None else scale(score)
        return scores

    def _groups(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> tuple[list[Group], list[list[int]]]:
        """Groups, and the rows of their continuations."""
        if self._retokenise or not {"prompt_ids", "completion_ids"} <= columns.keys():
            pairs = zip(prompts, completions, strict=True)
            encoded = self._encoder([{"prompt": prompt, "completion": text} for prompt, text in pairs])
            return [group(row) for row in encoded], [[row] for row in range(len(prompts))]
        prompt_ids, completion_ids = columns["prompt_ids"], columns["completion_ids"]
        self._check_vocabulary(prompt_ids, completion_ids, completions)
        together: dict[tuple[int, ...], list[int]] = {}
        for row, ids in enumerate(prompt_ids):
            together.setdefault(tuple(ids), []).append(row)
        groups = [_group(ids, [completion_ids[row] for row in rows]) for ids, rows in together.items()]
        return groups, list(together.values())

    def _check_vocabulary(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        texts: Sequence[Any],
    ) -> None:
        """Ids of another tokenizer would be scored without a word: look at the largest, and at one text."""
        size = inner_model(self.model).config.get_text_config(decoder=True).vocab_size
        largest = max((max(ids) for rows in (prompt_ids, completion_ids) for ids in rows), default=0)
        if largest < size and (not texts or self._reads(completion_ids[0], _content(texts[0]))):
            return
        read = self._tokenizer.decode(list(completion_ids[0]))
        raise ConfigError(
            f"reward_model: expected ids of the reward model's own vocabulary ({size} tokens), got ids up to "
            f"{largest}, of which the first completion reads {read!r} instead of {texts[0]!r}. If policy "
            "and reward model have different tokenizers, score the text: "
            "reward_model(model, tokenizer, retokenise=True)."
        )

    def _reads(self, ids: Sequence[int], text: str | None) -> bool:
        """Whether the ids say the text, blanks and special tokens aside; ids alone say nothing else."""
        if text is None:
            return True
        wanted = "".join(text.split())
        return any(
            wanted in "".join(str(self._tokenizer.decode(list(ids), skip_special_tokens=skip)).split())
            for skip in (True, False)
        )


def _group(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Group:
    ids = tuple(torch.as_tensor(each, dtype=torch.int64) for each in completions)
    weights = tuple(torch.ones(len(each)) for each in ids)
    return Group(torch.as_tensor(prompt, dtype=torch.int64), torch.zeros(len(prompt)), ids, weights)


def _content(completion: Any) -> str | None:
    """The text of a completion; None where it came as ids."""
    if isinstance(completion, str):
        return completion
    last = completion[-1]
    return str(last["content"]) if isinstance(last, Mapping) else None


def _one_each(scores_CK: Tensor | None) -> Tensor:
    if scores_CK is None or scores_CK.shape[1] != 1:
        found = "none" if scores_CK is None else scores_CK.shape[1]
        raise CapabilityError(
            f"reward_model: expected one score per completion, got {found}. Load the model with "
            "ftlib.load(name, task='reward')."
        )
    return scores_CK[:, 0]
