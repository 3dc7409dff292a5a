import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig

from ftlib import adapters, models
from ftlib.batches import Group, Sampling
from ftlib.data.collate import collate
from ftlib.errors import CapabilityError, ConfigError, DataError, NonFiniteError
from ftlib.rollouts import TransformersSampler, prompt_seeds
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import ARCHITECTURES, CONTEXT, EOS, PAD, VOCAB, tiny_model

# peft asks the model by a name that transformers 5.23 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [16, 17], [8]]
NEW = 12  # tokens; with the longest prompt more than twice the sliding window of 8
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
FAMILIES = [(arch, attention) for arch in ("llama", "gpt2", "qwen2") for attention in ("eager", "sdpa")]
FAMILIES += [("gemma2", "eager"), ("gemma3_text", "sdpa")]  # sdpa has no soft cap


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


@pytest.mark.parametrize(("arch", "attention"), FAMILIES)
def test_greedy_tokens_are_those_of_generate(arch, attention):
    model = tiny_model(arch, attention=attention)
    sampler = TransformersSampler(model)
    got = ids_of(sampler.generate(PROMPTS, Sampling(temperature=0, max_new_tokens=NEW, stop_ids=(EOS,)), 0))
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_in_training_agrees_with_the_sampler(side):
    """C5: absolute positions, through transformers' own padded forward with explicit positions."""
    model = tiny_model("gpt2")
    drawn = TransformersSampler(model).generate(PROMPTS, Sampling(max_new_tokens=NEW), 0)
    for prompt, row in zip(PROMPTS, drawn, strict=True):
        pad = [PAD] * 5
        whole = prompt + row.ids.tolist()
        start = len(pad) if side == "left" else 0
        ids_1L = torch.tensor([pad + whole if side == "left" else whole + pad])
        mask_1L = torch.zeros_like(ids_1L)
        mask_1L[:, start : start + len(whole)] = 1
        positions_1L = (mask_1L.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits_LV = model(input_ids=ids_1L, attention_mask=mask_1L, position_ids=positions_1L).logits[0]
        rows = torch.arange(start + len(prompt) - 1, start + len(whole) - 1)
        assert_close(row.logprobs, logits_LV.log_softmax(-1)[rows, row.ids], **TOLERANCE)


def test_logprobs_are_of_the_distribution_that_top_k_and_top_p_leave():
    """P7: softmax over the kept tokens alone, by hand."""
    model = tiny_model()
    top_k, top_p, temperature = 7, 0.8, 1.3
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=NEW)
    for prompt, row in zip(PROMPTS, TransformersSampler(model).generate(PROMPTS, sampling, 0), strict=True):
        with torch.no_grad():
            logits_LV = model(input_ids=torch.tensor([prompt + row.ids.tolist()])).logits[0] / temperature
        for place, token in enumerate(row.ids.tolist()):
            ordered, order = logits_LV[len(prompt) - 1 + place].sort(descending=True)
            probs = ordered[:top_k].softmax(-1)
            kept = int((probs.cumsum(-1) - probs < top_p).sum())  # up to and with the one that reaches top_p
            probs = probs[:kept] / probs[:kept].sum()
            assert token in order[:kept]
            expected = probs[order[:kept].tolist().index(token)].log()
            assert_close(row.logprobs[place], expected, **TOLERANCE)


def test_greedy_keeps_no_logprobs():
    (row,) = TransformersSampler(tiny_model()).generate([[5]], Sampling(temperature=0, max_new_tokens=2), 0)
    assert row.logprobs is None


def test_sampled_frequencies_are_the_softmax():
    """Chi-square at a fixed seed; its upper tail is Q(df / 2, x / 2), the regularised gamma function."""
    model, draws = tiny_model(), 4000
    drawn = TransformersSampler(model, batch_size=1000).generate(
        [[5, 6, 7]], Sampling(temperature=2.0, max_new_tokens=1, n=draws), 0
    )
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    expected_V = draws * (logits_V / 2.0).softmax(-1)
    seen_V = torch.bincount(torch.cat([row.ids for row in drawn]), minlength=VOCAB)
    statistic = ((seen_V - expected_V).square() / expected_V).sum()
    tail = torch.special.gammaincc(torch.tensor((VOCAB - 1) / 2).double(), statistic / 2)
    assert expected_V.min() > 5  # where the chi-square distribution holds
    assert tail > 0.01


# --- what a completion depends on, and what not ----------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_completion_depends_on_its_own_stream_alone(batch_size):
    model, sampling = tiny_model(), Sampling(max_new_tokens=NEW, stop_ids=(EOS, 7), n=3)
    whole = TransformersSampler(model).generate(PROMPTS, sampling, 11)
    seeds = prompt_seeds(11, 0, range(len(PROMPTS)))
    order = [3, 0, 4, 2, 1]
    parts = TransformersSampler(model, batch_size=batch_size).generate(
        [PROMPTS[index] for index in order], sampling, [seeds[index] for index in order]
    )
    by_prompt = {index: ids_of(parts[3 * place : 3 * place + 3]) for place, index in enumerate(order)}
    assert ids_of(whole) == [ids for index in range(len(PROMPTS)) for ids in by_prompt[index]]
    assert len({len(row.ids) for row in whole}) > 2  # rows did end at different steps


def test_samples_prompts_iterations_and_seeds_have_streams_of_their_own():
    model, sampling = tiny_model(), Sampling(temperature=3.0, max_new_tokens=NEW, n=2)
    sampler = TransformersSampler(model)
    same = [[5, 6], [5, 6]]
    drawn = ids_of(sampler.generate(same, sampling, 0))
    drawn += ids_of(sampler.generate(same, sampling, 1))
    drawn += ids_of(sampler.generate(same, sampling, prompt_seeds(0, 1, [0, 1])))
    assert len({tuple(ids) for ids in drawn}) == 12
    assert ids_of(sampler.generate(same, sampling, prompt_seeds(0, 0, [0, 1]))) == drawn[:4]


def test_a_prompt_is_read_once_for_all_its_samples():
    model = tiny_model()
    rows = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sampler = TransformersSampler(model)
    rows.clear()  # of the check at the start
    sampler.generate([[5, 6, 7], [8], [5, 6, 7]], Sampling(max_new_tokens=2, n=4), 0)
    assert rows == [(2, 3), (12, 1)]


def test_rows_that_have_ended_are_not_computed_any_more():
    model = tiny_model()
    computed = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    sampler = TransformersSampler(model)
    computed.clear()
    drawn = sampler.generate([[5, 6, 7]], Sampling(max_new_tokens=NEW, n=20, stop_ids=tuple(range(20))), 0)
    lengths = [len(row.ids) for row in drawn]
    alive = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert computed == [1, *alive]


# --- stopping --------------------------------------------------------------------------------------


def test_the_stop_token_is_part_of_the_completion_and_ends_it():
    """C6: neither the model's EOS nor its pad id matters, only the stop ids given."""
    model, stops = tiny_model(), (7, 30, 41)
    drawn = TransformersSampler(model).generate(
        [[EOS, 7, 5]] * 8, Sampling(temperature=3.0, max_new_tokens=40, stop_ids=stops), 0
    )
    assert {row.stop_reason for row in drawn} == {"stop_id", "length"}
    for row in drawn:
        ids = row.ids.tolist()
        assert not set(ids[:-1]) & set(stops)
        assert (ids[-1] in stops) == row.finished == (row.stop_reason == "stop_id")
        assert row.finished or len(ids) == 40
        assert len(row.logprobs) == len(ids)
        assert row.mask.all()


def test_pad_equal_to_the_stop_id_changes_nothing():
    """C6"""
    sampling = Sampling(max_new_tokens=NEW, stop_ids=(EOS,), n=4)
    plain = TransformersSampler(tiny_model()).generate(PROMPTS, sampling, 0)
    padded = TransformersSampler(tiny_model(pad_token_id=EOS)).generate(PROMPTS, sampling, 0)
    assert ids_of(plain) == ids_of(padded)
    for one, two in zip(plain, padded, strict=True):
        assert torch.equal(one.logprobs, two.logprobs)


def test_without_stop_ids_every_row_is_finished():
    drawn = TransformersSampler(tiny_model()).generate(PROMPTS, Sampling(max_new_tokens=3), 0)
    assert all(row.finished and row.stop_reason == "length" and len(row.ids) == 3 for row in drawn)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace_first", "unigram"])
def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(kind):
    tokenizer = tiny(kind)
    model = tiny_model(vocab_size=len(tokenizer))
    options = {"temperature": 3.0, "max_new_tokens": 40, "n": 12}
    sampler = TransformersSampler(model, tokenizer)
    whole = sampler.generate([[40, 41]], Sampling(**options), 0)
    cut = sampler.generate([[40, 41]], Sampling(**options, stop_strings=("es", "th", "ou")), 0)
    for free, row in zip(whole, cut, strict=True):
        assert row.ids.tolist() == free.ids[: len(row.ids)].tolist()
        ends = [
            any(stop in tokenizer.decode(row.ids[:end]) for stop in ("es", "th", "ou"))
            for end in range(1, 41)
        ]
        assert ends.index(True) + 1 == len(row.ids) if row.stop_reason == "stop_string" else not any(ends)
        assert row.finished == (row.stop_reason == "stop_string")
    assert {row.stop_reason for row in cut} == {"stop_string", "length"}


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ConfigError, match="expected a tokenizer for stop strings"):
        TransformersSampler(tiny_model()).generate([[5]], Sampling(stop_strings=("end",)), 0)


def test_the_end_of_the_context_ends_a_completion():
    prompt = [5] * (CONTEXT - 2)
    drawn = TransformersSampler(tiny_model()).generate([prompt, [5]], Sampling(max_new_tokens=NEW), 0)
    assert [len(row.ids) for row in drawn] == [2, NEW]


def test_a_prompt_that_fills_the_context_is_named():
    with pytest.raises(ConfigError, match=f"context of {CONTEXT} tokens, got {CONTEXT} in prompt 2"):
        TransformersSampler(tiny_model()).generate([[5], [5] * CONTEXT], Sampling(), 0)


def test_an_empty_prompt_is_named():
    with pytest.raises(DataError, match="<prompts>:2: expected at least one token"):
        TransformersSampler(tiny_model()).generate([[5], []], Sampling(), 0)


def test_no_prompts_give_no_completions():
    assert TransformersSampler(tiny_model()).generate([], Sampling(), 0) == []


# --- the model is left as it was -------------------------------------------------------------------


def test_the_models_generation_config_never_overrides():
    model, sampling = tiny_model(), Sampling(max_new_tokens=NEW, stop_ids=(7, 30, 41), n=2)
    expected = ids_of(TransformersSampler(model).generate(PROMPTS, sampling, 0))
    settings = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, min_new_tokens=9, repetition_penalty=9.0, eos_token_id=5
    )
    model.generation_config = settings
    before = settings.to_dict()
    assert ids_of(TransformersSampler(model).generate(PROMPTS, sampling, 0)) == expected
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("merge", [None, False])
def test_dropout_is_off_while_sampling_and_every_mode_comes_back(merge):
    """C3, on the sampler's side."""
    model = trained_lora(dropout=0.5)
    drawn = ids_of(TransformersSampler(model, merge=merge).generate(PROMPTS, Sampling(), 0))
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    sampler = TransformersSampler(model, merge=merge)
    assert ids_of(sampler.generate(PROMPTS, Sampling(), 0)) == drawn
    assert [module.training for module in model.modules()] == modes


def test_modes_come_back_after_an_exception():
    model = tiny_model().train()
    with pytest.raises(IndexError):
        TransformersSampler(model).generate([[10_000]], Sampling(), 0)
    assert model.training


def test_a_call_can_be_ended_before_any_forward():
    calls = []

    def poll():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    model = tiny_model().train()
    with pytest.raises(KeyboardInterrupt):
        TransformersSampler(model, poll=poll).generate([[5]], Sampling(max_new_tokens=NEW), 0)
    assert model.training


def test_weights_random_state_and_gradients_are_left_alone():
    model = trained_lora()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    (row,) = TransformersSampler(model, merge=True).generate([[5]], Sampling(), 0)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not row.logprobs.requires_grad
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_checkpointing_stays_on_for_training_and_out_of_sampling():
    model = tiny_model()
    expected = TransformersSampler(model).generate(PROMPTS, Sampling(), 0)
    model.activation_checkpointing_enable()
    model.train()
    drawn = TransformersSampler(model).generate(PROMPTS, Sampling(), 0)
    assert ids_of(drawn) == ids_of(expected)
    assert model.is_gradient_checkpointing


# --- following the policy --------------------------------------------------------------------------


def test_sync_brings_the_new_weights_and_their_version():
    sampler = TransformersSampler(trained_lora(1))
    (before,) = sampler.generate([[5]], Sampling(), 0)
    newer = trained_lora(2)
    sampler.sync(newer, 7)
    (after,) = sampler.generate([[5]], Sampling(), 0)
    (fresh,) = TransformersSampler(newer).generate([[5]], Sampling(), 0)
    assert after.ids.tolist() == fresh.ids.tolist() != before.ids.tolist()
    assert (before.version, after.version) == (0, 7)


def test_a_merged_copy_follows_weights_that_changed_in_place():
    model = trained_lora(1)
    sampler = TransformersSampler(model, merge=True)
    sampler.generate([[5]], Sampling(), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    sampler.sync(model, 1)
    (row,) = sampler.generate([[5, 6]], Sampling(), 0)
    assert_close(row.logprobs, recomputed(model, [5, 6], row), **TOLERANCE)


def test_half_precision_is_decoded_in_place_unless_asked():
    """Rounding a merged copy would move what is drawn away from the policy."""
    model = trained_lora().to(torch.bfloat16)
    direct = TransformersSampler(model).generate(PROMPTS, Sampling(), 0)
    assert ids_of(direct) == ids_of(TransformersSampler(model, merge=False).generate(PROMPTS, Sampling(), 0))
    merged = TransformersSampler(model, merge=True).generate(PROMPTS, Sampling(), 0)
    assert ids_of(merged) != ids_of(direct)
    assert all(row.logprobs.dtype == torch.float32 for row in direct)


def test_a_plain_model_has_nothing_to_merge():
    with pytest.raises(CapabilityError, match="got a plain model"):
        TransformersSampler(tiny_model(), merge=True)


def test_weights_that_hold_nan_are_refused_by_name():
    model = tiny_model()
    sampler = TransformersSampler(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="got NaN for prompt 1"):
        sampler.generate([[5]], Sampling(), 0)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ConfigError, match="batch_size >= 1, got 0"):
        TransformersSampler(tiny_model(), batch_size=0)
