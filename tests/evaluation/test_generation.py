import copy
import logging

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GenerationConfig

from ftlib import adapters
from ftlib.errors import CapabilityError, ConfigError, DataError
from ftlib.evaluation.generation import decode, generate
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import CONTEXT, EOS, VOCAB, tiny_model

# peft asks the model by a name that transformers 5.23 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20, 21]]
NEW = 10  # tokens


def greedy_by_hand(model, prompt, stop_ids, new=NEW):
    """The definition: append the likeliest token, without cache, padding or batch."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


def stop_id_seen(model, prompt):
    """A token that greedy decoding does reach, so that stopping is seen to act."""
    return greedy_by_hand(model, prompt, ())[NEW // 2]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "mistral", "opt"])
def test_batched_greedy_is_the_argmax_of_one_prompt_at_a_time(arch):
    model = tiny_model(arch)
    stop = stop_id_seen(model, PROMPTS[0])
    expected = [greedy_by_hand(model, prompt, [stop]) for prompt in PROMPTS]
    for batch_size in (1, 2, 8):
        got = generate(model, None, PROMPTS, stop_ids=[stop], max_new_tokens=NEW, batch_size=batch_size)
        assert got == expected
    assert min(map(len, expected)) < NEW  # one of them did stop


def test_an_adapter_takes_part_in_generation():
    model = adapters.attach(tiny_model(), adapters.lora(r=4))
    before = generate(model, None, PROMPTS, stop_ids=[EOS], max_new_tokens=NEW)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    after = generate(model, None, PROMPTS, stop_ids=[EOS], max_new_tokens=NEW)
    assert after == [greedy_by_hand(model, prompt, [EOS]) for prompt in PROMPTS]
    assert after != before


def test_a_pad_token_equal_to_a_stop_token_changes_nothing():
    model, tokenizer = tiny_model(), tiny(pad="</s>")
    stops = [tokenizer.pad_token_id]
    assert generate(model, tokenizer, PROMPTS, stop_ids=stops, max_new_tokens=NEW) == [
        greedy_by_hand(model, prompt, stops) for prompt in PROMPTS
    ]


def test_without_stop_ids_not_even_the_models_own_ends_a_completion():
    model = tiny_model()
    [expected] = [greedy_by_hand(model, PROMPTS[0], [])]
    model.generation_config.eos_token_id = expected[1]
    assert generate(model, None, PROMPTS[:1], stop_ids=[], max_new_tokens=NEW) == [expected]


def test_without_stop_ids_every_completion_has_full_length():
    got = generate(tiny_model(), None, PROMPTS, stop_ids=[], max_new_tokens=NEW)
    assert [len(row) for row in got] == [NEW] * len(PROMPTS)


def test_no_prompts_give_no_completions():
    assert generate(tiny_model(), None, [], stop_ids=[EOS]) == []


def test_a_seed_fixes_the_sample_and_leaves_the_global_state_alone():
    model = tiny_model()
    before = torch.get_rng_state()
    options = {"stop_ids": [], "max_new_tokens": NEW, "do_sample": True, "temperature": 2.0}
    first = generate(model, None, PROMPTS, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert generate(model, None, PROMPTS, seed=1, **options) == first
    assert generate(model, None, PROMPTS, seed=2, **options) != first
    assert generate(model, None, PROMPTS, **options) != generate(model, None, PROMPTS, **options)


def test_modes_gradients_and_settings_of_the_model_stay():
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_k=5, eos_token_id=3)
    modes = [module.training for module in model.modules()]
    settings, config = copy.deepcopy(model.generation_config.to_dict()), model.config.to_dict()
    generate(model, None, PROMPTS, stop_ids=[EOS], max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.to_dict() == settings
    assert model.config.to_dict() == config
    assert "prepare_inputs_for_generation" not in vars(model)


def test_modes_come_back_after_an_exception():
    model = tiny_model()
    model.train()
    with pytest.raises(Exception, match="index out of range"):
        generate(model, None, [[VOCAB + 5]], stop_ids=[EOS], max_new_tokens=2)
    assert model.training


def test_greedy_ignores_settings_of_the_model_that_would_change_what_is_returned(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = tiny_model()
    expected = generate(model, None, PROMPTS, stop_ids=[EOS], max_new_tokens=NEW)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_p=0.5, top_k=3, return_dict_in_generate=True
    )
    assert generate(model, None, PROMPTS, stop_ids=[EOS], max_new_tokens=NEW) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 0.5}, r"unknown option 'temprature': did you mean 'temperature'"),
        ({"zzzz": 1}, r"unknown option 'zzzz'"),
        ({"eos_token_id": 3}, r"eos_token_id has no effect here: pass stop_ids"),
        ({"num_return_sequences": 2}, r"num_return_sequences has no effect here"),
        ({"temperature": 0.5}, r"temperature has no effect without do_sample=True"),
        ({"seed": 1}, r"seed has no effect without do_sample=True"),
        ({"max_new_tokens": 0}, r"max_new_tokens: expected a whole number >= 1, got 0"),
        ({"batch_size": 0}, r"batch_size: expected a whole number >= 1, got 0"),
    ],
)
def test_options_that_cannot_act_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        generate(tiny_model(), None, PROMPTS, stop_ids=[EOS], **options)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_completions_end_with_the_context_whatever_their_batch_mates(arch):
    model, long = tiny_model(arch), [7] * (CONTEXT - 4)
    got = generate(model, None, [[5], long, [6, 7]], stop_ids=[], max_new_tokens=NEW)
    assert [len(row) for row in got] == [NEW, 4, NEW]
    assert got == [
        greedy_by_hand(model, [5], ()),
        greedy_by_hand(model, long, (), 4),
        greedy_by_hand(model, [6, 7], ()),
    ]


def test_a_prompt_that_fills_the_context_is_refused():
    with pytest.raises(ConfigError, match=rf"context of {CONTEXT} tokens, got {CONTEXT} in prompt 2"):
        generate(tiny_model(), None, [[5], [7] * CONTEXT], stop_ids=[EOS])


def test_an_empty_prompt_is_refused_with_its_number():
    with pytest.raises(DataError, match=r"<prompts>:2: expected at least one token"):
        generate(tiny_model(), None, [[5], []], stop_ids=[EOS])


def test_a_model_that_writes_nothing_is_refused():
    reward = tiny_model(auto=AutoModelForSequenceClassification, num_labels=1)
    with pytest.raises(CapabilityError, match="expected a causal language model, got LlamaForSeq"):
        generate(reward, None, [[5]], stop_ids=[EOS])


def test_text_ends_before_the_first_stop_token_and_shows_no_special_token():
    tokenizer = tiny()
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    word = tokenizer("yes", add_special_tokens=False).input_ids
    rows = [[*word, stop], [*word, tokenizer.bos_token_id, *word], [*word, stop, *word], []]
    assert decode(tokenizer, rows, stop_ids=[stop]) == ["yes", "yesyes", "yes", ""]


def test_spaces_before_punctuation_stay_in_the_text():
    tokenizer = tiny()
    text = "yes , no ."
    assert decode(tokenizer, [tokenizer(text, add_special_tokens=False).input_ids]) == [text]
