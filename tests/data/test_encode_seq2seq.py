"""Encoding for encoder-decoders: a prompt ends as the tokenizer ends text, an answer is a text of its own."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from ftlib.data import Encoder, Segment, Segments, load_records
from ftlib.data.segments import Answers
from ftlib.errors import ConfigError, DataError
from tests.data.test_encode import CHAT, PAIRS, TURNS
from tests.data.tokenizers_zoo import KINDS, tiny
from tests.seq2seq import COUPLES, ROWS, t5_tokenizer


def encoded(tokenizer: Any, rows: Any, **options: Any) -> tuple[Encoder, Dataset]:
    encoder = Encoder(tokenizer, task="seq2seq_lm", **options)
    return encoder, encoder(load_records(rows))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_have_the_ids_that_the_tokenizer_gives_them_alone(kind: str, bos: bool) -> None:
    tokenizer = tiny(kind, template=None, bos=bos, eos=True)
    encoder, data = encoded(tokenizer, PAIRS)
    for pair, row in zip(PAIRS, data, strict=True):
        assert row["prefix_ids"] == tokenizer(pair["prompt"]).input_ids
        assert row["continuation_ids"] == [tokenizer(pair["completion"]).input_ids]
        assert encoder.encode_prompt(pair["prompt"]) == encoder.encode_prompt(pair) == row["prefix_ids"]


def test_the_prompt_is_read_and_the_answer_learned_with_one_terminator() -> None:
    tokenizer = t5_tokenizer()
    encoder, data = encoded(tokenizer, ROWS)
    for row in data:
        assert set(row["prefix_weights"]) == {0.0}
        assert set(row["continuation_weights"][0]) == {1.0}
        assert row["continuation_ids"][0].count(tokenizer.eos_token_id) == 1
        assert row["continuation_ids"][0][-1] == tokenizer.eos_token_id
    assert encoder.stop_ids == (tokenizer.eos_token_id,)
    assert encoder.report.without_terminator == 0


def test_a_tokenizer_that_ends_nothing_leaves_the_prompt_open() -> None:
    tokenizer = tiny("unigram", template=None)
    _, data = encoded(tokenizer, ROWS[:1])
    assert data[0]["prefix_ids"] == tokenizer(ROWS[0]["prompt"]).input_ids
    assert data[0]["continuation_ids"][0][-1] == tokenizer.eos_token_id


def test_a_decoder_gets_other_ids_of_the_same_rows() -> None:
    """No EOS before the answer, which goes on in the prompt's text; and no cache mixes the two up."""
    tokenizer, records = t5_tokenizer(), load_records(ROWS)
    apart, joined = (Encoder(tokenizer, task=task)(records) for task in ("seq2seq_lm", "causal_lm"))
    assert apart[0]["prefix_ids"] == [*joined[0]["prefix_ids"], tokenizer.eos_token_id]
    assert apart[0]["continuation_ids"] != joined[0]["continuation_ids"]


def test_a_pair_shares_its_whole_prompt() -> None:
    tokenizer = t5_tokenizer()
    for couple, row in zip(COUPLES, encoded(tokenizer, COUPLES)[1], strict=True):
        assert row["prefix_ids"] == tokenizer(couple["prompt"]).input_ids
        assert row["continuation_ids"] == [
            tokenizer(couple[side]).input_ids for side in ("chosen", "rejected")
        ]


def test_every_answer_of_a_conversation_has_all_before_it_as_prompt() -> None:
    tokenizer = t5_tokenizer(template="chatml")
    encoder, data = encoded(tokenizer, CHAT)
    assert [tokenizer.decode(row["prefix_ids"]) for row in data] == [
        tokenizer.decode(
            tokenizer.apply_chat_template(TURNS[:k], add_generation_prompt=True, return_dict=False)
        )
        for k in (1, 3)
    ]
    for row, k in zip(data, (1, 3), strict=True):
        assert row["prefix_ids"] == encoder.encode_prompt(TURNS[:k])
        trained = [
            i for i, w in zip(row["continuation_ids"][0], row["continuation_weights"][0], strict=True) if w
        ]
        assert tokenizer.decode(trained) == f"{TURNS[k]['content']}<|im_end|>"


def test_a_cut_prompt_keeps_its_ending() -> None:
    tokenizer = t5_tokenizer()
    whole = encoded(tokenizer, ROWS[:1])[1][0]
    limit = whole["length"] - 3
    (row,) = encoded(tokenizer, ROWS[:1], max_length=limit, overflow="truncate_prompt")[1]
    assert row["prefix_ids"] == whole["prefix_ids"][3:]
    assert row["continuation_ids"] == whole["continuation_ids"]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{"text": "yes indeed"}, {"chosen": "yes indeed", "rejected": "no"}], ids=str)
def test_rows_without_a_prompt_are_refused_by_name(row: dict[str, str]) -> None:
    with pytest.raises(DataError, match="for the encoder to read, got text without a prompt") as caught:
        encoded(t5_tokenizer(), [row])
    assert (caught.value.code, caught.value.row) == ("no_prompt", 1)


def test_a_prompt_of_no_tokens_is_refused() -> None:
    """Where the tokenizer ends text there is always one token to read."""
    row = {"prompt": "", "completion": "yes"}
    assert encoded(t5_tokenizer(), [row])[1][0]["prefix_ids"] == [t5_tokenizer().eos_token_id]
    with pytest.raises(DataError, match="for the encoder to read, got an empty prompt"):
        encoded(tiny("unigram", template=None), [row])


def test_a_conversation_without_a_template_is_refused() -> None:
    with pytest.raises(DataError, match="chat template") as caught:
        encoded(t5_tokenizer(), CHAT)
    assert caught.value.code == "template"


def differing(row: Any) -> Answers:
    """A formatter whose two prompts begin alike."""
    return Answers(
        tuple(
            Segments((Segment(f"What {end}", "prompt"), Segment(answer, "completion", boundary=True)))
            for end, answer in (("does it do?", "yes"), ("is it?", "no"))
        )
    )


def test_answers_to_prompts_that_differ_are_refused() -> None:
    """For a decoder they share what they begin with; an encoder reads one prompt."""
    rows, tokenizer = Dataset.from_list([{"id": 1}]), t5_tokenizer()
    assert len(Encoder(tokenizer, formatter=differing)(rows)) == 1
    with pytest.raises(DataError, match="prompts that differ, of which an encoder can read one") as caught:
        Encoder(tokenizer, formatter=differing, task="seq2seq_lm")(rows)
    assert caught.value.code == "prompts_differ"


@pytest.mark.parametrize(
    "options",
    [{"train_on": "all"}, {"train_on": "weighted"}, {"train_on": "assistant"}, {"prompt_loss_weight": 0.1}],
    ids=str,
)
def test_options_that_would_train_the_prompt_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="would train the prompt, which an encoder-decoder never predicts"):
        Encoder(t5_tokenizer(), task="seq2seq_lm", **options)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"task: expected one of \['causal_lm', 'seq2seq_lm'\], got 'seq2seq'"
    ):
        Encoder(t5_tokenizer(), task="seq2seq")
