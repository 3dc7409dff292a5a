import copy

import pytest
import torch
from scipy.stats import chisquare
from torch.testing import assert_close
from transformers import GenerationConfig

from ftlib import adapters, models
from ftlib.batches import Group, Sampling
from ftlib.data.collate import collate
from ftlib.errors import CapabilityError, ConfigError, DataError, NonFiniteError
from ftlib.rollouts import TransformersSampler, prompt_seeds
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import ARCHITECTURES, CONTEXT, EOS, PAD, tiny_model

# peft asks the model by a name that transformers 5.23 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [16, 17], [8]]
NEW = 12  # tokens; with the longest prompt more than twice the sliding window of 8
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
FAMILIES = ("llama", "gpt2", "qwen2", "gemma2")


def ids_of(drawn):
    return [row.ids.tolist() for row in drawn]


def recomputed(model, prompt, row, **options):
    """Log-probabilities of a completion by the forward that trains."""
    group = Group(torch.tensor(prompt), torch.zeros(len(prompt)), (row.ids,), (torch.ones(len(row.ids)),))
    with torch.no_grad():
        return models.forward(model, collate([group]), **options).logprobs_N


def trained_lora(seed=1, **options):
    """A tiny model whose adapter does something."""
    model = adapters.attach(tiny_model(), adapters.lora(r=4, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    return model


# --- greedy: the same tokens as transformers -------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_greedy_tokens_are_those_of_generate(arch, attention):
    if (arch, attention) == ("gemma2", "sdpa"):
        pytest.skip("sdpa has no soft cap")
    model = tiny_model(arch, attention=attention)
    sampler = TransformersSampler(model)
    got = ids_of(sampler.generate(PROMPTS, Sampling(temperature=0, max_new_tokens=NEW), 0))
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    for prompt, ids in zip(PROMPTS, got, strict=True):
        ids_1L = torch.tensor([prompt])
        whole = model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), generation_config=settings)
        assert ids == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_are_the_argmax_without_cache_padding_or_batch(arch):
    model = tiny_model(arch)
    got = ids_of(TransformersSampler(model).generate(PROMPTS, Sampling(temperature=0, max_new_tokens=NEW), 0))
    for prompt, ids in zip(PROMPTS, got, strict=True):
        row_1L = torch.tensor([prompt + ids])
        with torch.no_grad():
            likeliest = model(input_ids=row_1L, use_cache=False).logits[0].argmax(-1)
        assert ids == likeliest[len(prompt) - 1 : -1].tolist()


# --- the log-probabilities are those of the forward that trains ------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logprobs_are_those_of_the_forward_at_the_sampling_temperature(arch, temperature):
    """C4, and C5 for absolute positions: the prompts of a batch are padded on the left."""
    model = tiny_model(arch)
    sampling = Sampling(temperature=temperature, max_new_tokens=NEW, stop_ids=(EOS,), n=2)
    drawn = TransformersSampler(model).generate(PROMPTS, sampling, 0)
    for index, row in enumerate(drawn):
        again = recomputed(model, PROMPTS[index // 2], row, temperature=temperature)
        assert_close(row.logprobs, again, **TOLERANCE)


@pytest.mark.parametrize("merge", [None, True, False])
def test_logprobs_of_an_adapter_are_those_of_the_forward(merge):
    model = trained_lora()
    sampler = TransformersSampler(model, merge=merge)
    drawn = sampler.generate(PROMPTS, Sampling(max_new_tokens=NEW), 0)
    for prompt, row in zip(PROMPTS, drawn, strict=True):
        assert_close(row.logprobs, recomputed(model, prompt, row), **TOLERANCE)
    base = TransformersSampler(tiny_model()).generate(PROMPTS, Sampling(max_new_tokens=NEW), 0)
    assert ids_of(drawn) != ids_of(base)
