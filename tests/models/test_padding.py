"""The pad id of a reward model: which one, that no row ends in it, and the tokenizer that goes with it."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ftlib.models import as_reward_model
from ftlib.models.padding import NEW_PAD, choose_pad_id, padding_tokenizer
from tests.data.tokenizers_zoo import KINDS, tiny
from tests.models_zoo import tiny_model

TEXTS = ["yes", "The quick brown fox says yes", "ÿ Ä 0xFF <0xFF> ü", "<|im_end|>", "</s>", "¿no?"]


def model_for(tokenizer: PreTrainedTokenizerFast, *, extra: int = 0, **changes: object) -> PreTrainedModel:
    """A language model with `extra` embeddings past the vocabulary, and EOS for padding."""
    eos = tokenizer.eos_token_id
    sizes = {"vocab_size": len(tokenizer) + extra, "eos_token_id": eos, "pad_token_id": eos}
    return tiny_model(**(sizes | changes))  # type: ignore[arg-type]


def with_token(text: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny(pad=None)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False)])
    return tokenizer


def only_eos() -> PreTrainedTokenizerFast:
    """As GPT-2: one special token for everything, and an embedding for every token."""
    tokenizer = tiny(pad=None, template=None)
    tokenizer.bos_token = tokenizer.unk_token = tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_the_tokenizers_own_pad_is_kept_where_rows_do_not_end_in_it() -> None:
    tokenizer = tiny(pad="[INST]")
    assert choose_pad_id(model_for(tokenizer), tokenizer) == tokenizer.pad_token_id


@pytest.mark.parametrize("pad", ["</s>", "<unk>", None])
def test_a_pad_that_may_end_rows_gives_way_to_bos(pad: str | None) -> None:
    tokenizer = tiny(pad=pad)
    assert choose_pad_id(model_for(tokenizer), tokenizer) == tokenizer.bos_token_id


def test_the_stop_ids_of_the_generation_config_end_rows_too() -> None:
    tokenizer = tiny(pad="<|im_end|>")
    model = model_for(tokenizer)
    assert choose_pad_id(model, tokenizer) == tokenizer.pad_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert choose_pad_id(model, tokenizer) == tokenizer.bos_token_id


@pytest.mark.parametrize("text", ["<|reserved_special_token_7|>", "<unused0>", "<|fim_pad|>"])
def test_a_token_named_idle_comes_before_bos(text: str) -> None:
    tokenizer = with_token(text)
    assert choose_pad_id(model_for(tokenizer), tokenizer) == tokenizer.convert_tokens_to_ids(text)


def test_a_token_without_an_embedding_is_not_taken() -> None:
    tokenizer = with_token("<|fim_pad|>")
    assert choose_pad_id(model_for(tokenizer, extra=-1), tokenizer) == tokenizer.bos_token_id


def test_an_embedding_past_the_vocabulary_comes_before_bos_and_gets_a_token() -> None:
    tokenizer = tiny(pad="</s>")
    model = as_reward_model(model_for(tokenizer, extra=3), tokenizer)
    assert model.config.pad_token_id == len(tokenizer)
    ours = padding_tokenizer(model, tokenizer)
    assert (ours.pad_token, ours.pad_token_id) == (NEW_PAD, len(tokenizer))


def test_a_configs_pad_id_that_is_an_ordinary_word_is_not_taken() -> None:
    tokenizer = tiny(pad=None)
    word = tokenizer("yes").input_ids[-1]
    assert choose_pad_id(model_for(tokenizer, pad_token_id=word), tokenizer) == tokenizer.bos_token_id


def test_a_vocabulary_of_text_and_eos_pads_with_a_byte_that_no_text_has() -> None:
    """Its token cannot be the tokenizer's pad token: every letter like it would become padding."""
    tokenizer = only_eos()
    model = as_reward_model(model_for(tokenizer), tokenizer)
    assert tokenizer.convert_ids_to_tokens(model.config.pad_token_id) == "ÿ"
    assert model.config.pad_token_id not in tokenizer("ÿ" * 3).input_ids
    ours = padding_tokenizer(model, tokenizer)
    assert ours.pad_token is None
    assert ours("ÿ").input_ids == tokenizer("ÿ").input_ids


def test_without_a_tokenizer_the_models_own_is_kept_unless_rows_end_in_it() -> None:
    assert as_reward_model(tiny_model(pad_token_id=7, eos_token_id=2)).config.pad_token_id == 7
    assert as_reward_model(tiny_model(pad_token_id=2, eos_token_id=2)).config.pad_token_id is None
    assert as_reward_model(tiny_model(pad_token_id=2, eos_token_id=[1, 2])).config.pad_token_id is None


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_ends_in_it_and_the_users_tokenizer_stays(kind: str) -> None:
    tokenizer = tiny(kind, pad="</s>")
    before = [tokenizer(text).input_ids for text in TEXTS]
    model = as_reward_model(model_for(tokenizer), tokenizer)
    ours = padding_tokenizer(model, tokenizer)
    assert ours.pad_token_id == model.config.pad_token_id
    assert tokenizer.pad_token == "</s>"
    assert [ours(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS] == before
    assert all(ids[-1] != model.config.pad_token_id for ids in before)


def test_a_language_models_tokenizer_is_returned_itself() -> None:
    tokenizer = tiny(pad=None)
    assert padding_tokenizer(model_for(tokenizer), tokenizer) is tokenizer
