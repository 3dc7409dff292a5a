import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from ftlib.data import Encoder
from ftlib.errors import CapabilityError, ConfigError
from ftlib.rollouts.rewards import reward_model, reward_rows
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import tiny_model

PROMPTS = ["What does it do?", "What does it do?", "The fox says"]
COMPLETIONS = [" It copies a file.", " yes", " yes indeed, hello there."]


def scorer(labels=1, **changes):
    tokenizer = tiny(eos=True)
    auto = AutoModelForSequenceClassification
    return tiny_model(auto=auto, num_labels=labels, vocab_size=len(tokenizer), **changes), tokenizer


def rows(tokenizer):
    """The ids as the default encoder lays them out, the terminator included."""
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    encoded = Encoder(tokenizer)([{"prompt": prompt, "completion": text} for prompt, text in pairs])
    return {
        "prompt_ids": [row["prefix_ids"] for row in encoded],
        "completion_ids": [row["continuation_ids"][0] for row in encoded],
    }


def own_scores(model, columns):
    """The model's own head on one unpadded row at a time; without a pad id it pools the last token."""
    model.config.pad_token_id = None
    scores = []
    for prompt, completion in zip(columns["prompt_ids"], columns["completion_ids"], strict=True):
        with torch.no_grad():
            scores.append(model(input_ids=torch.tensor([prompt + completion])).logits[0, 0])
    return torch.stack(scores)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_ids_are_scored_as_they_are(arch):
    model, tokenizer = scorer(arch=arch)
    columns = rows(tokenizer)
    for max_tokens in (4096, 1):
        got = reward_model(model, tokenizer, max_tokens=max_tokens)(PROMPTS, COMPLETIONS, **columns)
        assert_close(torch.tensor(got), own_scores(model, columns), atol=1e-5, rtol=0.0)


def test_an_unfinished_completion_is_scored_at_its_last_token():
    model, tokenizer = scorer()
    columns = rows(tokenizer)
    columns["completion_ids"] = [ids[:2] for ids in columns["completion_ids"]]
    texts = [tokenizer.decode(ids) for ids in columns["completion_ids"]]
    got = reward_model(model, tokenizer)(PROMPTS, texts, **columns)
    assert_close(torch.tensor(got), own_scores(model, columns), atol=1e-5, rtol=0.0)


def test_text_alone_is_laid_out_as_in_training():
    model, tokenizer = scorer()
    reward = reward_model(model, tokenizer)
    text_alone, given_ids = reward(PROMPTS, COMPLETIONS), reward(PROMPTS, COMPLETIONS, **rows(tokenizer))
    assert_close(torch.tensor(text_alone), torch.tensor(given_ids))
    chat = [{"role": "user", "content": "why?"}]
    assert len(reward([chat], [[{"role": "assistant", "content": "because"}]])) == 1


def test_ids_of_another_vocabulary_are_refused_or_read_again():
    model, tokenizer = scorer()
    foreign = rows(tiny("words", eos=True))
    with pytest.raises(ConfigError, match="retokenise=True"):
        reward_model(model, tokenizer)(PROMPTS, COMPLETIONS, **foreign)
    again = reward_model(model, tokenizer, retokenise=True)(PROMPTS, COMPLETIONS, **foreign)
    own = reward_model(model, tokenizer)(PROMPTS, COMPLETIONS)
    assert_close(torch.tensor(again), torch.tensor(own))
    with pytest.raises(ConfigError, match="ids up to 9999"):
        reward_model(model, tokenizer)(["a"], [[9999]], prompt_ids=[[5]], completion_ids=[[9999]])


def test_the_models_mode_comes_back_and_no_gradient_is_kept():
    model, tokenizer = scorer(attention_dropout=0.5)
    columns = rows(tokenizer)
    still = reward_model(model, tokenizer)(PROMPTS, COMPLETIONS, **columns)
    model.train()
    assert reward_model(model, tokenizer)(PROMPTS, COMPLETIONS, **columns) == still
    assert model.training


def test_it_is_a_reward():
    model, tokenizer = scorer()
    columns = rows(tokenizer)
    values = reward_rows(reward_model(model, tokenizer), PROMPTS, COMPLETIONS, columns)
    scores = reward_model(model, tokenizer)(PROMPTS, COMPLETIONS, **columns)
    assert [value.score for value in values] == scores


def test_models_without_one_score_are_refused():
    model, tokenizer = scorer(labels=3)
    with pytest.raises(CapabilityError, match="expected one score per completion, got 3"):
        reward_model(model, tokenizer)(PROMPTS, COMPLETIONS)
    with pytest.raises(CapabilityError, match="score head"):
        reward_model(tiny_model(vocab_size=len(tokenizer)), tokenizer)(PROMPTS, COMPLETIONS)


def test_a_budget_below_one_token_is_refused():
    with pytest.raises(ConfigError, match="max_tokens >= 1, got 0"):
        reward_model(*scorer(), max_tokens=0)
