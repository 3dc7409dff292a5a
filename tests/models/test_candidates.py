"""Scores of candidates: the same as one by one, for every kind of model and every norm."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from ftlib.adapters import attach, lora
from ftlib.batches import Group
from ftlib.data import collate
from ftlib.errors import CapabilityError, ConfigError, ShapeError
from ftlib.models import forward
from ftlib.models.candidates import score
from ftlib.models.masked import Masking, fills_masks
from tests.data.tokenizers_zoo import tiny
from tests.models.masked_zoo import CLS, MASK, MASKED, SEP, masking_tokenizer, tiny_masked
from tests.models_zoo import tiny_model

CONTEXTS = [[7, 8, 9, 10], [11, 12, 13], [14, 15]]
CANDIDATES = [[20, 21, 22], [20, 21, 30], [40], [50, 51]]  # two share a beginning
every_masked = pytest.mark.parametrize("kind", MASKED)


def one_by_one(model, context, candidate):
    """The candidate's tokens read off the model's own logits."""
    ids = torch.tensor([context + candidate])
    logprobs = model(input_ids=ids).logits.log_softmax(-1)[0]
    return sum(logprobs[len(context) + k - 1, one] for k, one in enumerate(candidate))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
@torch.no_grad()
def test_a_causal_model_scores_candidates_as_one_by_one(arch):
    model = tiny_model(arch)
    expected = torch.tensor([[one_by_one(model, c, k) for k in CANDIDATES] for c in CONTEXTS])
    assert_close(score(model, CONTEXTS, CANDIDATES), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_probabilities_of_all_tokens_sum_to_one():
    model = tiny_model()
    scores_BC = score(model, CONTEXTS, [[k] for k in range(97)])
    assert_close(scores_BC.exp().sum(-1), torch.ones(3))


@torch.no_grad()
def test_a_context_may_have_candidates_of_its_own():
    model = tiny_model()
    shared = score(model, CONTEXTS, CANDIDATES)
    own = score(model, CONTEXTS, [CANDIDATES, CANDIDATES[::-1], CANDIDATES])
    assert_close(own, torch.stack([shared[0], shared[1].flip(0), shared[2]]))


@torch.no_grad()
def test_norms_divide_by_tokens_or_bytes_or_subtract_what_the_domain_says():
    model, tokenizer = tiny_model(vocab_size=420), tiny()
    texts, words = ["the answer is", "it says"], [" yes", " hello there"]
    plain = score(model, texts, words, tokenizer=tokenizer)
    tokens = [len(tokenizer(word).input_ids) for word in words]
    assert tokens[0] != tokens[1]
    assert_close(score(model, texts, words, tokenizer=tokenizer, norm="tokens"), plain / torch.tensor(tokens))
    assert_close(score(model, texts, words, tokenizer=tokenizer, norm="bytes"), plain / torch.tensor([4, 12]))
    pmi = score(model, texts, words, tokenizer=tokenizer, norm="pmi", domain="it says")
    assert_close(pmi[1], torch.zeros(2))
    assert_close(pmi[0], plain[0] - plain[1])


@torch.no_grad()
def test_context_and_candidate_are_tokenised_apart():
    """ "the quick" is split as "the" and " quick" even where the tokenizer would join them otherwise."""
    model, tokenizer = tiny_model(vocab_size=420), tiny()
    ids = [tokenizer("say").input_ids, tokenizer("s").input_ids]
    assert tokenizer("says").input_ids != ids[0] + ids[1]
    assert_close(
        score(model, ["say"], ["s", "x"], tokenizer=tokenizer)[0, 0], one_by_one(model, ids[0], ids[1])
    )


@torch.no_grad()
def test_an_encoder_decoder_sums_over_what_its_decoder_writes():
    config = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.2)

    def alone(context, candidate):
        start = torch.tensor([[0, *candidate[:-1]]])
        logits = model(input_ids=torch.tensor([context]), decoder_input_ids=start).logits
        return logits.log_softmax(-1)[0, range(len(candidate)), candidate].sum()

    expected = torch.tensor([[alone(c, k) for k in CANDIDATES] for c in CONTEXTS])
    assert_close(score(model, CONTEXTS, CANDIDATES), expected, rtol=1e-5, atol=1e-5)


# --- masked models ---

AROUND = [[CLS, 7, 8, MASK, 9, SEP], [CLS, 10, MASK, 11, 12, 13, SEP]]


def hidden(model, around, candidate, *, apart):
    """Masks in place of the candidate, all at once or one at a time, by the model's own logits."""
    place = around.index(MASK)
    total = 0.0
    for k, one in enumerate(candidate):
        filled = [MASK if not apart or k == j else other for j, other in enumerate(candidate)]
        ids = torch.tensor([around[:place] + filled + around[place + 1 :]])
        total += model(input_ids=ids).logits.log_softmax(-1)[0, place + k, one]
    return total


@every_masked
@pytest.mark.parametrize("apart", [False, True])
@torch.no_grad()
def test_a_masked_model_reads_candidates_behind_masks(kind, apart):
    model = tiny_masked(kind)
    assert fills_masks(model)
    expected = torch.tensor([[hidden(model, row, k, apart=apart) for k in CANDIDATES] for row in AROUND])
    got = score(model, AROUND, CANDIDATES, tokenizer=masking_tokenizer(), one_by_one=apart)
    assert_close(got, expected, rtol=1e-5, atol=1e-5)


@every_masked
@torch.no_grad()
def test_what_else_is_in_a_batch_changes_no_score(kind):
    model = tiny_masked(kind)
    groups = [
        Group(
            torch.tensor(row[: row.index(MASK)]),
            torch.zeros(row.index(MASK)),
            tuple(torch.tensor([*k, *row[row.index(MASK) + 1 :]]) for k in CANDIDATES),
            tuple(torch.tensor([1.0] * len(k) + [0.0] * len(row[row.index(MASK) + 1 :])) for k in CANDIDATES),
        )
        for row in AROUND
    ]
    whole = forward(model, collate(groups), masking=Masking(MASK)).logprobs_N
    apart = [forward(model, collate([group]), masking=Masking(MASK)).logprobs_N for group in groups]
    assert_close(whole, torch.cat(apart), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_equal_masked_texts_are_read_once():
    """Three words of one token each in one gap: one row."""
    model = tiny_masked()
    seen = []
    model.register_forward_pre_hook(lambda *a: seen.append(a[2]["input_ids"].shape), with_kwargs=True)
    group = Group(
        torch.tensor([CLS, 7]),
        torch.zeros(2),
        tuple(torch.tensor([k, SEP]) for k in (20, 21, 22)),
        (torch.tensor([1.0, 0.0]),) * 3,
    )
    forward(model, collate([group]), masking=Masking(MASK))
    assert seen == [(1, 4)]


def test_gradients_reach_the_model_and_its_adapter():
    model = attach(tiny_masked(), lora(4, targets=["query", "value"]))
    score(model, AROUND, CANDIDATES, tokenizer=masking_tokenizer()).sum().backward()
    moved = [name for name, w in model.named_parameters() if w.grad is not None and w.grad.abs().sum() > 0]
    assert len(moved) == 4
    assert all("lora_B" in name for name in moved)


# --- what is refused ---


def test_options_that_do_not_fit_the_model_are_refused():
    causal, masked, tokenizer = tiny_model(), tiny_masked(), tiny()
    with pytest.raises(ConfigError, match="needs a tokenizer with a mask token"):
        score(masked, [[CLS, MASK]], CANDIDATES, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="one_by_one has no effect"):
        score(causal, CONTEXTS, CANDIDATES, one_by_one=True)
    with pytest.raises(ConfigError, match="expected a domain with norm='pmi'"):
        score(causal, CONTEXTS, CANDIDATES, norm="pmi")
    with pytest.raises(ConfigError, match="expected norm as"):
        score(causal, CONTEXTS, CANDIDATES, norm="words")
    with pytest.raises(ConfigError, match="texts need a tokenizer"):
        score(causal, ["a"], ["b", "c"])
    with pytest.raises(ShapeError, match="empty context"):
        score(causal, [[]], CANDIDATES)
    with pytest.raises(ShapeError, match="a token in every candidate"):
        score(causal, ["a"], ["b", ""], tokenizer=tokenizer)
    with pytest.raises(ShapeError, match="one list of candidates per context"):
        score(causal, CONTEXTS, [CANDIDATES, CANDIDATES[:1], CANDIDATES])
    with pytest.raises(ShapeError, match="expected contexts and candidates"):
        score(causal, [], CANDIDATES)
    with pytest.raises(ConfigError, match="the mask token once in every context"):
        score(masked, [[CLS, 7, SEP]], CANDIDATES, tokenizer=masking_tokenizer())


def test_masking_belongs_to_models_with_masks_alone():
    group = Group(torch.tensor([3, 7]), torch.zeros(2), (torch.tensor([8]),), (torch.ones(1),))
    with pytest.raises(CapabilityError, match="reads from left to right"):
        forward(tiny_model(), collate([group]), masking=Masking(MASK))
    with pytest.raises(CapabilityError, match=r"masking=Masking\(tokenizer.mask_token_id\)"):
        forward(tiny_masked(), collate([group]))
    with pytest.raises(CapabilityError, match="and no other option"):
        forward(tiny_masked(), collate([group]), masking=Masking(MASK), entropy=True)
