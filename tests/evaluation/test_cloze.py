"""Cloze classifiers: zero-shot, trained, calibrated, together; soft tokens; words found by a model."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from ftlib.adapters import full, ia3, lora, prompt
from ftlib.data.cloze import Generation, Manual, MultiWord, Soft
from ftlib.data.few_shot import few_shot_split
from ftlib.engine import TrainConfig
from ftlib.errors import CapabilityError, ConfigError, DataError
from ftlib.evaluation.cloze import ClozeClassifier, ClozeEnsemble, find_words
from ftlib.models import score
from ftlib.models.soft_tokens import add_soft_tokens
from ftlib.trainers import SFTTrainer
from tests.models.masked_zoo import masking_tokenizer, tiny_masked
from tests.models_zoo import tiny_model

VOCAB = 420
PATTERN = "{text} is {mask}"
WORDS = {"place": "hello", "thing": "there", "answer": "does"}  # one token each
TEXTS = {
    "place": ["Paris is the capital", "the capital of France"],
    "thing": ["It copies a file", "a file, a tool"],
    "answer": ["yes indeed", "the answer: yes"],
}
ROWS = [{"text": text, "label": label} for label, texts in TEXTS.items() for text in texts]

TEXTS_ALONE = [{"text": row["text"]} for row in ROWS]


def causal():
    return tiny_model(vocab_size=VOCAB)


def masked():
    return tiny_masked(vocab_size=VOCAB)


def classifier(make=causal, pattern=PATTERN, words=WORDS, **options):
    return ClozeClassifier(make(), masking_tokenizer(bos=True), pattern, words, **options)


def trained(made, rows=ROWS, *, rate=1e-2, steps=30, adapter=None):
    """The classifier after some steps, and the history of its losses."""
    config = TrainConfig(max_steps=steps, learning_rate=rate, batch_size=6, log_steps=1, progress="off")
    trainer = SFTTrainer(
        made.model,
        made.encoder(rows),
        tokenizer=made.tokenizer,
        encoder=made.encoder,
        objective=made.objective,
        adapter=adapter,
        config=config,
    )
    return [row["loss"] for row in trainer.train().history]


both = pytest.mark.parametrize("make", [causal, masked])


# --- zero-shot ---


def test_zero_shot_scores_are_the_log_probabilities_of_the_words():
    made = classifier()
    texts = [f"{row['text']} is" for row in ROWS]
    with torch.no_grad():
        expected = score(made.model, texts, [f" {w}" for w in WORDS.values()], tokenizer=made.tokenizer)
    assert_close(made.scores(ROWS), expected, rtol=1e-5, atol=1e-5)
    assert made.predict(ROWS) == [list(WORDS)[k] for k in expected.argmax(-1).tolist()]
    assert_close(made.probabilities(ROWS).sum(-1), torch.ones(6))


@both
def test_labels_and_order_of_rows_do_not_touch_scores(make):
    made = classifier(make)
    assert_close(made.scores(TEXTS_ALONE), made.scores(ROWS))
    assert_close(made.scores(ROWS[::-1]), made.scores(ROWS).flip(0), rtol=1e-5, atol=1e-5)
    alone = torch.cat([made.scores([row]) for row in ROWS])
    assert_close(alone, made.scores(ROWS), rtol=1e-5, atol=1e-5)


def test_an_encoder_decoder_reads_the_template_and_scores_what_its_decoder_writes():
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model, tokenizer = T5ForConditionalGeneration(config).eval(), masking_tokenizer(eos=True)
    made = ClozeClassifier(model, tokenizer, PATTERN, {"place": "hello there", "thing": "does it"})
    start = [
        [0, *tokenizer(f" {words}", add_special_tokens=False).input_ids]
        for words in ("hello there", "does it")
    ]
    with torch.no_grad():
        for row, scores_K in zip(TEXTS_ALONE, made.scores(TEXTS_ALONE), strict=True):
            read = torch.tensor([tokenizer(f"{row['text']} is").input_ids])
            logits = [
                model(input_ids=read, decoder_input_ids=torch.tensor([ids[:-1]])).logits[0] for ids in start
            ]
            expected = [
                each.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum()
                for each, ids in zip(logits, start, strict=True)
            ]
            assert_close(scores_K, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_sequences_are_scored_whole_where_labels_share_their_first_token():
    """A model that knows only the second token: by the first alone the classes are equal."""
    made = classifier(words={"yes": "hello there", "no": "hello does"})
    first = classifier().tokenizer(" hello").input_ids
    ids = [made.tokenizer(f" hello {w}").input_ids for w in ("there", "does")]
    assert ids[0][: len(first)] == ids[1][: len(first)] == first
    scores_BK = made.scores(TEXTS_ALONE)
    assert (scores_BK[:, 0] - scores_BK[:, 1]).abs().min() > 1e-3


# --- calibration ---


@both
@pytest.mark.parametrize("text", ["", "N/A", "mask"])
def test_each_content_free_input_alone_gives_the_uniform_posterior(make, text):
    if text == "mask" and make is causal:
        with pytest.raises(ConfigError, match="expected a mask token"):
            ClozeClassifier(causal(), _without_mask(), PATTERN, WORDS).calibrate(content_free=["mask"])
        return
    made = classifier(make)
    free = text if text != "mask" else None
    before = made.scores([{"text": "N/A"}]).softmax(-1)
    made.calibrate("contextual", content_free=[text])
    if free is not None:
        assert_close(made.probabilities([{"text": free}]), torch.full((1, 3), 1 / 3), rtol=0, atol=1e-6)
    assert not torch.allclose(before, torch.full((1, 3), 1 / 3), atol=1e-2)
    assert made.bias.shape == (3,)
    made.calibrate(None)
    assert made.bias is None


def _without_mask():
    tokenizer = masking_tokenizer(bos=True)
    tokenizer.mask_token = None
    return tokenizer


def test_the_default_is_the_mean_over_all_content_free_inputs():
    made = classifier(masked)
    biases = [made.calibrate(content_free=[text]).bias for text in ("", "N/A", "mask")]
    assert_close(made.calibrate().bias, torch.stack(biases).mean(0))
    free = classifier(causal)
    biases = [free.calibrate(content_free=[text]).bias for text in ("", "N/A")]
    assert_close(free.calibrate().bias, torch.stack(biases).mean(0))


@both
def test_pmi_takes_away_what_the_domain_says(make):
    made = classifier(make)
    plain = made.scores([{"text": "the fox"}])
    made.calibrate("pmi", domain="the fox is {mask}")
    assert_close(made.probabilities([{"text": "the fox"}]), torch.full((1, 3), 1 / 3), rtol=0, atol=1e-6)
    assert_close(made.bias, plain[0])


@both
def test_batch_calibration_takes_away_the_mean_prediction(make):
    made = classifier(make)
    mean_K = made.probabilities(ROWS).mean(0)
    made.calibrate("batch", rows=ROWS)
    assert_close(made.bias, mean_K.log())
    made.calibrate("batch", rows=ROWS[:1])
    assert_close(made.probabilities(ROWS[:1]), torch.full((1, 3), 1 / 3), rtol=0, atol=1e-6)


def test_a_calibrated_classifier_undoes_a_bias_of_the_head():
    """A head that favours one word: raw, every row has that class; calibrated, as before."""
    made = classifier(masked)
    before = made.calibrate("batch", rows=ROWS).predict(ROWS)
    assert len(set(before)) > 1
    favoured = made.tokenizer(" there").input_ids
    with torch.no_grad():
        made.model.get_output_embeddings().bias[favoured] += 50.0
    assert set(made.calibrate(None).predict(ROWS)) == {"thing"}
    assert made.calibrate("contextual").predict(ROWS) == classifier(masked).calibrate().predict(ROWS)


def test_calibration_options_belong_to_their_method():
    made = classifier()
    for method, options in (
        ("pmi", {}),
        ("batch", {}),
        ("contextual", {"domain": "a {mask}"}),
        ("batch", {"rows": ROWS, "content_free": [""]}),
        (None, {"rows": ROWS}),
    ):
        with pytest.raises(ConfigError, match="and nothing else"):
            made.calibrate(method, **options)
    with pytest.raises(ConfigError, match="expected contextual, pmi"):
        made.calibrate("platt")


# --- training ---


@pytest.mark.parametrize(("make", "adapter", "rate"), [(causal, lora(8), 1e-2), (masked, full(), 3e-3)])
def test_few_rows_are_learned(make, adapter, rate):
    made = classifier(make)
    losses = trained(made, rate=rate, steps=50, adapter=adapter)
    assert losses[-1] <= 0.05 * losses[0]
    assert made.accuracy(ROWS) == 1.0


def test_a_masked_model_learns_with_a_share_of_masked_tokens():
    made = classifier(masked, alpha=1e-4)
    losses = trained(made, rate=3e-3, steps=40, adapter=full())
    assert losses[-1] <= 0.1 * losses[0]
    assert made.accuracy(ROWS) == 1.0


def test_permuted_labels_are_not_what_the_text_says():
    labels = [row["label"] for row in ROWS]
    permuted = [{**row, "label": label} for row, label in zip(ROWS, labels[2:] + labels[:2], strict=True)]
    made = classifier()
    trained(made, permuted, rate=3e-3, steps=40, adapter=full())
    assert made.accuracy(permuted) == 1.0
    assert made.accuracy(ROWS) == 0.0


def test_several_words_per_class_train_too():
    words = MultiWord({"place": ["hello", "no"], "thing": ["there"], "answer": ["does"]}, reduce="logsumexp")
    made = classifier(words=words)
    trained(made, rate=3e-3, steps=40, adapter=full())
    assert made.accuracy(ROWS) == 1.0


def test_a_generated_answer_is_trained_as_text_and_read_back():
    made = classifier(words=Generation({"place": "a place", "thing": "a thing", "answer": "an answer"}))
    trained(made, rate=3e-3, steps=50, adapter=full())
    assert made.predict(ROWS) == [row["label"] for row in ROWS]
    with pytest.raises(CapabilityError, match="has no scores"):
        made.scores(ROWS)


# --- soft tokens ---


@both
def test_soft_tokens_and_soft_words_are_all_that_is_trained(make):
    made = classifier(make, '{soft:2}{text}{soft:"the answer"} {mask}', Soft(WORDS))
    names = [name for name, weight in made.model.named_parameters() if weight.requires_grad]
    assert names
    assert all("trainable_tokens_delta" in name for name in names)
    assert len(made.tokenizer) > len(masking_tokenizer())
    base = {n: w.clone() for n, w in made.model.named_parameters() if not w.requires_grad}
    losses = trained(made, rate=5e-2, steps=60)
    assert losses[-1] <= 0.5 * losses[0]
    assert all(torch.equal(w, base[n]) for n, w in made.model.named_parameters() if n in base)


def test_soft_words_start_as_the_words_they_name():
    soft, hard = classifier(words=Soft(WORDS)), classifier()
    shift = soft.scores(ROWS).log_softmax(-1) - hard.scores(ROWS).log_softmax(-1)
    assert_close(shift, torch.zeros_like(shift), rtol=0, atol=1e-5)


def test_soft_tokens_start_as_the_words_they_name():
    """The same rows under other names: log-odds of classes as with the words."""
    soft = classifier(pattern='{text}{soft:"the answer"} {mask}')
    hard = classifier(pattern="{text} the answer {mask}")
    shift = soft.scores(ROWS).log_softmax(-1) - hard.scores(ROWS).log_softmax(-1)
    assert_close(shift, torch.zeros_like(shift), rtol=0, atol=1e-5)


def test_lora_trains_beside_soft_tokens():
    made = classifier(pattern="{soft:3}{text} {mask}", adapter=lora(4))
    names = [name for name, weight in made.model.named_parameters() if weight.requires_grad]
    assert any("lora_A" in name for name in names)
    assert any("trainable_tokens_delta" in name for name in names)
    losses = trained(made, rate=1e-2, steps=40)
    assert losses[-1] <= 0.2 * losses[0]


def test_the_users_tokenizer_stays_as_it_is():
    tokenizer = masking_tokenizer(bos=True)
    size = len(tokenizer)
    ClozeClassifier(causal(), tokenizer, "{soft:3}{text} {mask}", WORDS)
    assert len(tokenizer) == size


@pytest.mark.parametrize("adapter", [ia3(), prompt(4)], ids=["ia3", "prompt"])
def test_any_adapter_trains_beside_soft_tokens(adapter):
    made = classifier(pattern="{soft:3}{text} {mask}", adapter=adapter)
    names = [name for name, weight in made.model.named_parameters() if weight.requires_grad]
    assert any("trainable_tokens_delta" in name for name in names)
    assert any("ia3_l" in name or "prompt_encoder" in name for name in names)
    losses = trained(made, rate=5e-2, steps=40)
    assert losses[-1] <= 0.5 * losses[0]


def test_soft_tokens_on_a_model_with_an_adapter_are_refused():
    made = classifier(adapter=lora(4))
    with pytest.raises(CapabilityError, match="expected a plain model"):
        add_soft_tokens(made.model, made.tokenizer, {"<|a|>": None})


# --- ensembles ---


def test_an_ensemble_is_the_weighted_mean_of_scores():
    members = [classifier(pattern=p) for p in (PATTERN, "{text}: {mask}", "the answer {text} {mask}")]
    scores_PBK = torch.stack([member.scores(ROWS) for member in members])
    assert_close(ClozeEnsemble(members).scores(ROWS), scores_PBK.mean(0))
    weighed = ClozeEnsemble(members, [1.0, 0.0, 3.0]).scores(ROWS)
    assert_close(weighed, 0.25 * scores_PBK[0] + 0.75 * scores_PBK[2])
    ensemble = ClozeEnsemble(members)
    accuracies = tuple(member.accuracy(ROWS) for member in members)
    if sum(accuracies):
        assert ensemble.weigh(ROWS).weights == accuracies
    taught = ensemble.teach(ROWS)
    shares_BK = torch.tensor([row["probabilities"] for row in taught])
    assert_close(shares_BK, (ensemble.scores(TEXTS_ALONE) / 2).softmax(-1))
    assert all(set(row) == {"text", "probabilities"} for row in taught)


def test_a_student_learns_what_an_ensemble_says():
    teacher = ClozeEnsemble([classifier(pattern=p) for p in (PATTERN, "{text}: {mask}")])
    student, lessons = classifier(masked), teacher.teach(ROWS)
    trained(student, lessons, rate=3e-3, steps=60, adapter=full())
    taught_BK = torch.tensor([row["probabilities"] for row in lessons])
    assert_close(student.probabilities(TEXTS_ALONE), taught_BK, rtol=0, atol=0.05)


def test_ensembles_of_other_classes_or_weights_are_refused():
    made = classifier()
    for members, weights in (([], None), ([made, classifier(words={"a": "no", "b": "does"})], None)):
        with pytest.raises(ConfigError, match="expected members of the same classes"):
            ClozeEnsemble(members, weights)
    with pytest.raises(ConfigError, match="one weight >= 0 per member"):
        ClozeEnsemble([made], [0.0])


# --- words found ---


@both
def test_words_particular_to_a_class_are_found(make):
    made = classifier(make)
    trained(made, rate=3e-3, steps=40, adapter=full())
    candidates = ["hello", "there", "does", "yes", "fox"]
    found = find_words(made.model, made.tokenizer, PATTERN, ROWS, candidates=candidates)
    assert {label: words[0] for label, words in found.words.items()} == WORDS
    several = find_words(made.model, made.tokenizer, PATTERN, ROWS, words=2, reduce="max")
    listed = [word for words in several.words.values() for word in words]
    assert len(set(listed)) == len(listed) == 6
    assert several.reduce == "max"


def test_too_few_words_or_classes_are_refused():
    model, tokenizer = causal(), masking_tokenizer()
    with pytest.raises(ConfigError, match="at least two classes"):
        find_words(model, tokenizer, PATTERN, ROWS[:1])
    with pytest.raises(ConfigError, match="expected 3 words of one token, got 1"):
        find_words(model, tokenizer, PATTERN, ROWS, candidates=["hello", "zebra"])


# --- few-shot splits ---


def test_both_sides_have_k_rows_of_each_class_and_share_none():
    rows = [{"text": str(n), "label": "abc"[n % 3]} for n in range(60)]
    sides = [few_shot_split(rows, 4, seed=seed) for seed in range(5)]
    for train, dev in sides:
        for side in (train, dev):
            assert [sum(row["label"] == name for row in side) for name in "abc"] == [4, 4, 4]
        assert not {row["text"] for row in train} & {row["text"] for row in dev}
    assert len({tuple(row["text"] for row in train) for train, _ in sides}) == 5
    assert few_shot_split(rows, 4, seed=0) == sides[0]


def test_too_few_rows_of_a_class_are_refused():
    with pytest.raises(DataError, match="at least 4 rows of class 'b' for k=2, got 3"):
        few_shot_split([{"label": name} for name in "aaaabbb"], 2)


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "pattern", "words", "options", "message"),
    [
        (causal, "{mask}, {text}", WORDS, {}, r"expected \{mask\} behind every column"),
        (causal, PATTERN, WORDS, {"alpha": 0.1}, "no effect on a model without masks"),
        (causal, PATTERN, WORDS, {"one_by_one": True}, "no effect on a model without masks"),
        (masked, PATTERN, {"a": "hello", "b": "hi zebra"}, {}, "words of one number of tokens"),
        (masked, PATTERN, Generation(WORDS), {}, "writes no text"),
    ],
)
def test_templates_that_the_model_would_misread_are_refused(make, pattern, words, options, message):
    with pytest.raises(ConfigError, match=message):
        classifier(make, pattern, words, **options)


def test_words_of_several_sizes_are_compared_under_a_stated_norm():
    made = classifier(masked, words={"a": "hello", "b": "hi zebra"}, norm="tokens")
    assert made.scores(TEXTS_ALONE).isfinite().all()
    apart = classifier(masked, words={"a": "hello", "b": "hi zebra"}, norm="tokens", one_by_one=True)
    assert_close(apart.scores(TEXTS_ALONE)[:, 0], made.scores(TEXTS_ALONE)[:, 0])
    assert not torch.allclose(apart.scores(TEXTS_ALONE)[:, 1], made.scores(TEXTS_ALONE)[:, 1])


def test_rows_without_labels_have_no_accuracy():
    with pytest.raises(DataError, match="expected labelled rows"):
        classifier().accuracy([{"text": "a"}])


def test_a_question_longer_than_the_context_is_shortened_where_it_may_be():
    made = classifier(pattern="{text|truncate} is {mask}")
    assert made.scores([{"text": "yes " * 500}]).isfinite().all()
    with pytest.raises(DataError, match="expected at most 128 tokens"):
        classifier().scores([{"text": "yes " * 500}])


def test_a_manual_verbalizer_is_a_mapping():
    assert_close(classifier(words=Manual(WORDS)).scores(ROWS), classifier().scores(ROWS))
