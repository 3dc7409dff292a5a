"""The cloze objective: derived numbers, reductions, and the relations every objective keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from ftlib.data import Encoder, collate, formatters
from ftlib.data.cloze import MultiWord
from ftlib.errors import ConfigError, ShapeError
from ftlib.models import Masking, score
from ftlib.objectives import SFT, Cloze, weighted
from tests.models.masked_zoo import MASK, masking_tokenizer, tiny_masked
from tests.models_zoo import tiny_model

VOCAB = 420
WORDS = MultiWord({"place": ["Paris", "France"], "thing": ["file"], "none": ["no"]})
ROWS = [
    {"text": "The fox", "label": "thing"},
    {"text": "What does it do?", "label": "place"},
    {"text": "hello there", "label": "none"},
    {"text": "yes", "label": "place"},
]


def examples(rows=ROWS, words=WORDS, pattern="{text} is {mask}"):
    data = Encoder(masking_tokenizer(bos=True, eos=True), formatter=formatters.cloze(pattern, words))(rows)
    return [data[k] for k in range(len(data))]


def causal():
    return tiny_model(vocab_size=VOCAB)


def masked():
    return tiny_masked(vocab_size=VOCAB)


MODELS = {"causal": (causal, None), "masked": (masked, Masking(MASK)), "apart": (masked, Masking(MASK, True))}
every_model = pytest.mark.parametrize(("make", "masking"), MODELS.values(), ids=MODELS)


def word_scores(rows=ROWS):
    """[G, 4]: log-probabilities of all words, each question scored for itself."""
    tokenizer = masking_tokenizer(bos=True)
    listed = [" " + word for words in WORDS.words.values() for word in words]
    return score(causal(), [f"{row['text']} is" for row in rows], listed, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("reduce", "function"),
    [
        ("mean", lambda x: x.mean(-1)),
        ("max", lambda x: x.amax(-1)),
        ("logsumexp", lambda x: x.logsumexp(-1)),
    ],
)
def test_the_loss_is_the_cross_entropy_of_reduced_word_scores(reduce, function):
    batch = collate(examples())
    objective = Cloze(reduce=reduce)
    words_GW = word_scores()
    scores_GK = torch.stack([function(words_GW[:, :2]), words_GW[:, 2], words_GW[:, 3]], -1)
    assert_close(objective.scores(causal(), batch), scores_GK, rtol=1e-5, atol=1e-5)
    gold_G = torch.tensor([1, 0, 2, 0])
    expected = torch.nn.functional.cross_entropy(scores_GK, gold_G, reduction="sum")
    output = objective(causal(), batch)
    assert_close(output.terms["cross_entropy"].sum, expected, rtol=1e-5, atol=1e-5)
    assert objective.counts(batch) == {"cross_entropy": torch.tensor(4.0)}
    right = (scores_GK.argmax(-1) == gold_G).float().sum()
    assert_close(output.metrics["accuracy"].sum, right)


def test_words_of_equal_probability_cost_log_k():
    """Three classes, a head of zeros: log 3 each."""
    model = causal()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    output = Cloze(norm="tokens")(model, collate(examples()))
    assert_close(output.terms["cross_entropy"].value, torch.tensor(math.log(3)))


def test_norms_divide_by_tokens_and_bytes():
    batch = collate(examples())
    plain = Cloze(reduce="max").scores(causal(), batch)
    tokens = (
        torch.zeros(batch.continuations)
        .index_add(0, batch.owner_N, torch.ones(len(batch.owner_N)))
        .view(4, 4)
    )
    assert tokens.unique().numel() > 1
    bytes_K = torch.tensor([5.0, 3.0])  # " file" and " no"
    assert_close(Cloze(reduce="max", norm="bytes").scores(causal(), batch)[:, 1:], plain[:, 1:] / bytes_K)
    assert_close(
        Cloze(reduce="max", norm="tokens").scores(causal(), batch)[:, 1:], plain[:, 1:] / tokens[:, 2:]
    )


def test_a_bias_is_taken_from_each_class():
    batch = collate(examples())
    plain, moved = Cloze(), Cloze(bias=(1.0, 0.0, -2.0))
    assert_close(
        plain.scores(causal(), batch) - moved.scores(causal(), batch),
        torch.tensor([[1.0, 0.0, -2.0]]).expand(4, 3),
    )


@every_model
def test_one_batch_is_two_halves_in_loss_and_gradient(make, masking):
    rows, objective = examples(), Cloze(masking=masking)
    grads = []
    for cut in (4, 2, 1):
        model = make()
        parts = [collate(rows[k : k + cut]) for k in range(0, 4, cut)]
        counts = sum(objective.counts(part)["cross_entropy"] for part in parts)
        for part in parts:
            objective(model, part).loss({"cross_entropy": counts}).backward()
        grads.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))
    assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
    assert_close(grads[2], grads[0], rtol=1e-4, atol=1e-5)
    assert grads[0].abs().sum() > 0


@every_model
def test_questions_without_weight_count_nothing_and_stay_finite(make, masking):
    alpha = 0.5 if masking else 0.0
    row = examples()[0]
    idle = {**row, "continuation_weights": [[0.0] * len(ids) for ids in row["continuation_ids"]]}
    objective = Cloze(masking=masking, alpha=alpha)
    batch = collate([idle])
    output = objective(make(), batch)
    assert all(float(count) == 0 for count in objective.counts(batch).values())
    assert all(float(mean.sum.detach()) == 0 for mean in output.terms.values())
    assert all(mean.sum.requires_grad for mean in output.terms.values())


def test_probabilities_of_another_model_are_the_targets_where_there_are_any():
    shares = [0.2, 0.5, 0.3]
    batch = collate(examples([{**row, "probabilities": shares} for row in ROWS]))
    logprobs_GK = Cloze().scores(causal(), batch).log_softmax(-1)
    expected = -(torch.tensor(shares) * logprobs_GK).sum()
    assert_close(Cloze()(causal(), batch).terms["cross_entropy"].sum, expected)


def test_alpha_mixes_in_the_loss_of_hidden_tokens_with_a_count_known_before():
    batch = collate(examples())
    objective = Cloze(masking=Masking(MASK), alpha=0.25)
    model = masked()
    with torch.no_grad():
        plain, mixed = Cloze(masking=Masking(MASK))(model, batch), objective(model, batch)
    assert_close(mixed.terms["cross_entropy"].sum, 0.75 * plain.terms["cross_entropy"].sum)
    assert_close(mixed.terms["mlm"].count, objective.counts(batch)["mlm"])
    assert mixed.terms["mlm"].sum > 0
    assert mixed.terms["mlm"].count >= 4  # a token of every right text
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().bias.zero_()
        uniform = objective(model, batch)
    assert_close(uniform.terms["mlm"].value, torch.tensor(0.25 * math.log(VOCAB)))


def test_hidden_tokens_do_not_touch_the_scores():
    batch = collate(examples())
    model = masked()
    with torch.no_grad():
        plain = Cloze(masking=Masking(MASK))(model, batch)
        mixed = Cloze(masking=Masking(MASK), alpha=0.5)(model, batch)
    assert_close(mixed.terms["cross_entropy"].sum * 2, plain.terms["cross_entropy"].sum)


def test_it_mixes_with_other_objectives():
    batch = collate(examples())
    output = weighted({Cloze(): 1.0, SFT(): 0.5})(causal(), batch)
    assert set(output.terms) == {"weighted_cross_entropy", "weighted_nll"}


def test_what_is_impossible_is_refused():
    for options in ({"reduce": "sum"}, {"norm": "words"}, {"alpha": 1.0}, {"alpha": 0.1}):
        with pytest.raises(ConfigError, match=r"objectives\.Cloze"):
            Cloze(**options)
    unlabelled = collate(examples([{"text": "The fox"}]))
    with pytest.raises(ShapeError, match="expected labelled questions"):
        Cloze()(causal(), unlabelled)
    assert Cloze().scores(causal(), unlabelled).shape == (1, 3)
    with pytest.raises(ShapeError, match="a bias per class"):
        Cloze(bias=(0.0, 0.0)).scores(causal(), unlabelled)
    plain = {**examples()[0]}
    del plain["class"]
    with pytest.raises(ShapeError, match="expected extras 'class'"):
        Cloze()(causal(), collate([plain]))
