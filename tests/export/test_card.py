from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ftlib.export.card import CardData, card_text, public_name

TOKEN = "hf_" + "a1B2" * 8
FULL = CardData(
    title="docstrings",
    trainer="SFT",
    base="org/base",
    adapter="LORA (r=16)",
    data_name="standard library",
    data_rows=4000,
    data_fingerprint="abc123",
    samples=("What does copy do?", "It copies.", "Third.", "Fourth."),
    trained_share=0.25,
    template_hash="feed",
    hyperparameters={"learning_rate": 2e-4, "betas": (0.9, 0.999)},
    metrics={"eval_loss": 1.25, "eval_perplexity": 3.5},
    hardware="two cores",
)


def test_the_header_holds_base_and_results_as_the_hub_reads_them():
    data = ModelCard(card_text(FULL, adapted=True)).data
    assert (data.base_model, data.library_name, data.model_name) == ("org/base", "peft", "docstrings")
    assert [(r.metric_type, r.metric_value, r.dataset_name) for r in data.eval_results] == [
        ("eval_loss", 1.25, "standard library"),
        ("eval_perplexity", 3.5, "standard library"),
    ]


FACTS = ("org/base", "LORA (r=16)", "standard library", "4000", "abc123", "25.0% of all", "feed", "0.0002")
FACTS += ("1.25", "two cores", "It copies.", "transformers |", "PeftModel.from_pretrained")


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_is_in_the_text(fact):
    assert fact in ModelCard(card_text(FULL, adapted=True)).text


def test_at_most_three_samples_are_shown_each_cut():
    long = "x" * 1000
    text = card_text(CardData("t", samples=(long, "b", "c", "fourth")), adapted=True)
    assert "x" * 400 + " …" in text
    assert "x" * 401 not in text
    assert "fourth" not in text


def test_one_argument_leaves_the_samples_out():
    text = card_text(CardData("t", samples=("private text",), show_samples=False), adapted=True)
    assert "private text" not in text
    assert "Samples" not in text


def test_what_is_not_known_is_left_out():
    text = card_text(CardData("t"), adapted=False)
    assert "None" not in text
    assert "Results" not in text


@pytest.mark.parametrize("metric", [float("nan"), float("inf")])
def test_a_result_that_is_no_number_stands_in_the_table_only(metric):
    card = ModelCard(card_text(CardData("t", metrics={"eval_loss": metric}), adapted=True))
    assert card.data.eval_results is None
    assert f"| eval_loss | {metric:g} |" in card.text


TEXT_FIELDS = (
    "title",
    "trainer",
    "base",
    "adapter",
    "data_name",
    "data_fingerprint",
    "template_hash",
    "hardware",
)


def with_text(text):
    """A card with one text in every field that takes any."""
    fields = dict.fromkeys(TEXT_FIELDS, text)
    return CardData(**fields, samples=(text,), hyperparameters={"a": text, text: 1}, metrics={text: 1.0})


@pytest.mark.parametrize(
    "secret",
    [TOKEN, "sk-" + "abcd1234" * 4, "AKIAABCDEFGHIJKLMNOP", "Bearer abc.def", "https://ann:pw1@host/x"],
)
def test_secrets_in_any_field_are_redacted(secret):
    text = card_text(with_text(f"before {secret} after"), adapted=True)
    for part in (secret, "abc.def", "ann:pw1"):
        assert part not in text
    assert "[redacted]" in text


def test_a_value_under_a_secret_name_is_redacted_whatever_its_shape():
    card = CardData("t", hyperparameters={"hub_token": "letmein", "api_key": "letmein", "max_tokens": 1024})
    text = card_text(card, adapted=True)
    assert "letmein" not in text
    assert "1024" in text


@pytest.mark.parametrize(
    "path", ["/home/ann/runs/out", "~/runs/out", r"C:\Users\ann\out", str(Path.cwd() / "x")]
)
def test_machine_paths_keep_their_last_part_only(path):
    card = CardData("t", data_name=path, hyperparameters={"output_dir": path, "where": f"in {path}, there"})
    text = card_text(card, adapted=True)
    assert "ann" not in text
    assert "runs" not in text
    assert str(Path.cwd()) not in text


def test_paths_of_this_machine_are_left_out_of_samples():
    text = card_text(CardData("t", samples=(f"open {Path.cwd()}/secret.txt",)), adapted=True)
    assert str(Path.cwd()) not in text
    assert "secret.txt" in text


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "</pre><img src=x onerror=y>", "a | b\n# c"]
)
def test_text_is_escaped_wherever_it_stands(hostile):
    card = ModelCard(card_text(with_text(hostile), adapted=True))
    body = card.text
    for live in ("<script", "<img", "</pre><", "a | b"):
        assert live not in body.replace("<pre>a | b\n# c</pre>", "")
    assert body.count("<pre>") == body.count("</pre>") == 1


def test_text_cannot_end_the_header():
    card = ModelCard(card_text(with_text("x\n---\nevil: true"), adapted=True))
    assert "evil" not in card.data.to_dict()


@pytest.mark.parametrize(
    ("name", "shown"),
    [("org/model", "org/model"), ("/home/ann/models/base", "base"), ("", None), (None, None)],
)
def test_a_model_is_named_without_the_folders_it_lies_in(name, shown):
    assert public_name(name) == shown
