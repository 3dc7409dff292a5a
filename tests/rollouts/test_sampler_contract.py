"""What every sampler does: the same checks for each implementation, one row per implementation."""

import inspect

import pytest
import torch
from torch.testing import assert_close

from ftlib import adapters
from ftlib.batches import Sampling
from ftlib.errors import ConfigError, ShapeError
from ftlib.rollouts import FunctionSampler, Sampled, Sampler, TransformersSampler, VLLMSampler, prompt_seeds
from tests.models_zoo import tiny_model
from tests.rollouts.vllm_fake import TOKENIZER, FakeServer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPTS = [[40, 41, 42], [43], [40, 41, 42, 44]]
STOPS = tuple(range(60, 120))
SAMPLING = Sampling(temperature=2.0, max_new_tokens=8, stop_ids=STOPS, n=3)


def policy():
    return adapters.attach(tiny_model(vocab_size=len(TOKENIZER)), adapters.lora(r=2))


def of_function(model, tmp_path):
    inner = TransformersSampler(model, TOKENIZER)
    return FunctionSampler(inner.generate, sync=inner.sync)


MAKERS = {
    "transformers": lambda model, tmp_path: TransformersSampler(model, TOKENIZER),
    "function": of_function,
    "vllm": lambda model, tmp_path: VLLMSampler(FakeServer(model), model, tmp_path, tokenizer=TOKENIZER),
}


@pytest.fixture(params=MAKERS)
def sampler(request, tmp_path):
    return MAKERS[request.param](policy(), tmp_path)


def ids_of(drawn):
    return [row.ids.tolist() for row in drawn]


def test_it_has_the_protocols_arguments(sampler):
    for name in ("generate", "sync"):
        promised = list(inspect.signature(getattr(Sampler, name)).parameters)
        assert list(inspect.signature(getattr(type(sampler), name)).parameters) == promised


def test_samples_of_a_prompt_lie_next_to_each_other_in_its_order(sampler):
    drawn = sampler.generate(PROMPTS, SAMPLING, 0)
    assert len(drawn) == len(PROMPTS) * SAMPLING.n
    again = sampler.generate(PROMPTS[1:2], SAMPLING, prompt_seeds(0, 0, [1]))
    assert ids_of(again) == ids_of(drawn[3:6])


def test_a_seed_fixes_what_is_drawn_whatever_the_batch(sampler):
    drawn = ids_of(sampler.generate(PROMPTS, SAMPLING, 5))
    assert ids_of(sampler.generate(PROMPTS, SAMPLING, 5)) == drawn
    assert ids_of(sampler.generate(PROMPTS, SAMPLING, 6)) != drawn
    seeds = prompt_seeds(5, 0, [2, 0])
    assert ids_of(sampler.generate([PROMPTS[2], PROMPTS[0]], SAMPLING, seeds)) == drawn[6:] + drawn[:3]


def test_samples_of_one_prompt_differ(sampler):
    assert len({tuple(ids) for ids in ids_of(sampler.generate(PROMPTS[:1], SAMPLING, 0))}) == SAMPLING.n


def test_stop_tokens_are_kept_and_reported(sampler):
    drawn = sampler.generate(PROMPTS, SAMPLING, 0)
    assert {row.finished for row in drawn} == {True, False}
    for row in drawn:
        stopped = int(row.ids[-1]) in STOPS
        assert not set(row.ids[:-1].tolist()) & set(STOPS)
        assert (row.finished, row.stop_reason) == (stopped, "stop_id" if stopped else "length")


def test_without_stops_every_row_is_finished(sampler):
    drawn = sampler.generate(PROMPTS, Sampling(max_new_tokens=2), 0)
    assert all(row.finished and row.stop_reason == "length" for row in drawn)


def test_stop_strings_are_reported(sampler):
    free = sampler.generate(PROMPTS, Sampling(temperature=3.0, max_new_tokens=20, n=4), 0)
    options = Sampling(temperature=3.0, max_new_tokens=20, n=4, stop_strings=("es", "th"))
    drawn = sampler.generate(PROMPTS, options, 0)
    assert {row.stop_reason for row in drawn} == {"stop_string", "length"}
    for row, whole in zip(drawn, free, strict=True):
        assert row.ids.tolist() == whole.ids[: len(row.ids)].tolist()
        assert row.finished == any(stop in TOKENIZER.decode(row.ids) for stop in ("es", "th"))


@pytest.mark.parametrize("options", [{}, {"top_p": 0.7, "top_k": 9}])
def test_logprobs_are_of_what_was_drawn(sampler, options):
    model = tiny_model(vocab_size=len(TOKENIZER))  # the adapter is new, so it adds nothing yet
    drawn = sampler.generate(PROMPTS, Sampling(temperature=2.0, max_new_tokens=4, **options), 0)
    for prompt, row in zip(PROMPTS, drawn, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + row.ids.tolist()])).logits[0] / 2.0
        for place, token in enumerate(row.ids.tolist()):
            ordered, order = logits[len(prompt) - 1 + place].sort(descending=True)
            kept = ordered[: options.get("top_k", len(ordered))].softmax(-1)
            kept = kept[kept.cumsum(-1) - kept < options.get("top_p", 2.0)]
            expected = (kept / kept.sum())[order.tolist().index(token)].log()
            assert_close(row.logprobs[place], expected, atol=1e-5, rtol=0.0)


def test_greedy_is_there_for_evaluation(sampler):
    greedy = Sampling(temperature=0, max_new_tokens=4)
    drawn = sampler.generate(PROMPTS, greedy, 0)
    assert ids_of(drawn) == ids_of(sampler.generate(PROMPTS, greedy, 1))
    assert all(row.logprobs is None for row in drawn)


def test_the_version_is_the_one_synced_last(sampler):
    assert {row.version for row in sampler.generate(PROMPTS, SAMPLING, 0)} == {0}
    sampler.sync(policy(), 3)
    assert {row.version for row in sampler.generate(PROMPTS, SAMPLING, 0)} == {3}


def test_one_seed_or_one_per_prompt(sampler):
    with pytest.raises(ConfigError, match=r"one per prompt \(3\), got 2"):
        sampler.generate(PROMPTS, SAMPLING, [1, 2])


def test_a_function_that_loses_completions_is_refused():
    with pytest.raises(ShapeError, match="expected 3 completions of each of 1 prompts, got 1"):
        FunctionSampler(lambda *_: [[7]]).generate([[5]], Sampling(n=3), 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": torch.zeros(0, dtype=torch.long), "mask": torch.zeros(0, dtype=torch.bool)}, "at least one"),
        ({"mask": torch.ones(1, dtype=torch.bool)}, "expected mask as bool"),
        ({"logprobs": torch.zeros(3)}, "one log-probability per token, 2"),
    ],
)
def test_a_completion_whose_parts_do_not_fit_is_refused(fields, message):
    whole = {"ids": torch.tensor([5, 6]), "mask": torch.ones(2, dtype=torch.bool)}
    with pytest.raises(ShapeError, match=message):
        Sampled(**(whole | fields), finished=True, stop_reason="length")
