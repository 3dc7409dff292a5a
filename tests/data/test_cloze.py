"""Cloze questions as segments and ids, verbalizers, and what is checked before anything is scored."""

from __future__ import annotations

import pytest

from ftlib.data import Encoder, formatters
from ftlib.data.cloze import Generation, Manual, MultiWord, Soft, soft_tokens
from ftlib.errors import ConfigError, DataError
from tests.data.tokenizers_zoo import KINDS, tiny

PATTERN = "{text} It says {mask}, yes."
WORDS = {"place": "Paris", "thing": "file"}
ROW = {"text": "The quick brown fox.", "label": "thing"}


def encoded(tokenizer, rows, pattern=PATTERN, words=WORDS, **options):
    return Encoder(tokenizer, formatter=formatters.cloze(pattern, words), **options)(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", [False, True])
def test_candidates_are_continuations_of_one_prompt_and_carry_the_only_weight(kind, around):
    tokenizer = tiny(kind, bos=around, eos=around)
    if kind == "words":  # which knows whole words alone
        pattern, words = "{text} says {mask} yes indeed", {"a": "fox", "b": "file."}
    else:
        pattern, words = PATTERN, WORDS
    (row,) = encoded(tokenizer, [{"text": "The quick", "label": 1}], pattern, words)
    before = pattern.replace("{text}", "The quick").split(" {mask}")[0]
    assert row["prefix_ids"] == Encoder(tokenizer).encode_prompt(before)
    texts = []
    for ids, weights in zip(row["continuation_ids"], row["continuation_weights"], strict=True):
        size = int(sum(weights))
        assert weights == [1.0] * size + [0.0] * (len(ids) - size)
        texts.append(tokenizer.decode(ids[:size]).strip())
        assert (ids[-1] == tokenizer.eos_token_id) == around
    assert texts == list(words.values())
    assert row["class"] == [0.0, 1.0]
    assert row["rank"] == [2.0, 1.0]
    assert row["bytes"] == [float(len(f" {word}")) for word in words.values()]


def test_the_blank_before_the_mask_belongs_to_the_word():
    tokenizer = tiny()
    (row,) = encoded(tokenizer, [ROW])
    assert tokenizer.decode(row["prefix_ids"]) == "The quick brown fox. It says"
    assert [tokenizer.decode(ids) for ids in row["continuation_ids"]] == [" Paris, yes.", " file, yes."]


def test_several_words_of_a_class_are_right_together():
    words = MultiWord({"place": ["Paris", "France"], "thing": ["file"]}, reduce="max")
    (row,) = encoded(tiny(), [{**ROW, "label": "place"}], words=words)
    assert row["class"] == [0.0, 0.0, 1.0]
    assert row["rank"] == [1.0, 1.0, 2.0]


def test_rows_without_a_label_are_to_be_answered():
    data = encoded(tiny(), [{"text": "The fox."}])
    assert "rank" not in data.column_names
    assert "class" in data.column_names


def test_what_follows_the_word_is_cut_off_from_it():
    """Byte pairs would join "fil" and "es" otherwise."""
    (row,) = encoded(tiny(), [ROW], "{text} {mask}es", {"place": "fox", "thing": "fil"})
    alone = tiny()(" fil").input_ids
    assert row["continuation_ids"][1][: len(alone)] == alone
    assert sum(row["continuation_weights"][1]) == len(alone)


def test_special_tokens_are_written_by_the_template_and_never_by_data():
    tokenizer = tiny()
    (row,) = encoded(tokenizer, [{"text": "a </s> {mask}", "label": "thing"}], "{special:bos}{text} {mask}")
    assert row["prefix_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in row["prefix_ids"]
    assert tokenizer.decode(row["prefix_ids"]) == "<s>a </s> {mask}"


def test_options_name_the_first_word_of_each_class():
    (row,) = encoded(tiny(), [ROW], "{text} {options}: {mask}")
    assert tiny().decode(row["prefix_ids"]).endswith(" Paris, file:")


# --- only marked fields are shortened, the longest first ---


@pytest.mark.parametrize(("cut", "left"), [("{a|truncate}", "one two"), ("{a|truncate:left}", "nine ten")])
def test_marked_fields_are_shortened_from_their_side_and_template_words_never(cut, left):
    tokenizer = tiny()
    row = {"a": "one two three four five six seven eight nine ten", "b": "yes indeed", "label": "thing"}
    encoder = Encoder(tokenizer, formatter=formatters.cloze(cut + " says: {b} {mask}", WORDS), max_length=24)
    (got,) = encoder([row])
    text = tokenizer.decode(got["prefix_ids"])
    assert text.endswith(" says: yes indeed")
    kept = text.removesuffix(" says: yes indeed")
    assert 0 < len(kept) < len(row["a"])
    assert (row["a"].startswith if cut == "{a|truncate}" else row["a"].endswith)(kept)
    longest = max(map(len, got["continuation_ids"]))
    assert 22 <= len(got["prefix_ids"]) + longest <= 24
    assert encoder.report.truncated == 1


def test_of_several_marked_fields_the_longest_gives_way_first():
    tokenizer = tiny()
    row = {"a": "yes " * 30, "b": "no indeed", "label": "thing"}
    pattern = "{a|truncate} and {b|truncate} {mask}"
    (got,) = encoded(tokenizer, [row], pattern, max_length=30)
    text = tokenizer.decode(got["prefix_ids"])
    assert text.endswith(" and no indeed")
    assert text.count("yes") < 30


def test_what_still_does_not_fit_is_left_to_the_overflow_policy():
    row = {"text": "yes " * 40, "label": "thing"}
    with pytest.raises(DataError, match="expected at most 12 tokens"):
        encoded(tiny(), [row], max_length=12)
    with pytest.raises(DataError, match="expected at most 3 tokens"):
        encoded(tiny(), [row], "{text|truncate} It says {mask}", max_length=3)
    (got,) = encoded(tiny(), [row], "{text|truncate} It says {mask}", max_length=12)
    assert len(got["prefix_ids"]) + max(map(len, got["continuation_ids"])) == 12


# --- checked at build, errors name class and tokens ---


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("words", {"a": "fox", "b": "zebra"}, r"class 'b'.*'<unk>'.*an unknown token"),
        ("byte_level", {"a": "yes", "b": "yes"}, "'yes' of 'a'.*has the same tokens as ' yes' of 'b'"),
        ("byte_level", {"a": "yes indeed", "b": "yes"}, "' yes' of 'b' as .*begins ' yes indeed' of 'a'"),
        ("byte_level", {"a": " yes", "b": "no"}, "class 'a'.*without blanks"),
        ("byte_level", {"a": "yes ", "b": "no"}, "class 'a'.*without blanks"),
    ],
)
def test_words_that_cannot_tell_classes_apart_are_refused(kind, words, message):
    with pytest.raises(ConfigError, match=message.replace("'yes' of 'a'", "' yes' of 'a'")):
        Encoder(tiny(kind), formatter=formatters.cloze("{text} {mask}", words))


def test_a_word_of_which_only_the_bare_blank_is_left_is_refused():
    tokenizer = tiny("metaspace_first")
    with pytest.raises(ConfigError, match=r"class 'b'.*a bare blank"):
        Encoder(tokenizer, formatter=formatters.cloze("{text} {mask}", {"a": "yes", "b": "▁"}))


def test_a_fixed_mask_fits_words_of_its_size_alone():
    tokenizer = tiny()
    assert len(tokenizer(" hello").input_ids) == 1 < len(tokenizer(" zebra").input_ids)
    with pytest.raises(ConfigError, match=r"class 'b': expected a word of 1 tokens for {mask:1}"):
        Encoder(tokenizer, formatter=formatters.cloze("{text} {mask:1}", {"a": "hello", "b": "zebra"}))


def test_labels_that_the_verbalizer_lacks_are_row_errors():
    with pytest.raises(DataError, match="expected one of the classes") as caught:
        encoded(tiny(), [ROW, {**ROW, "label": "person"}])
    assert (caught.value.code, caught.value.column, caught.value.row) == ("unknown_label", "label", 2)
    with pytest.raises(DataError, match="expected a column 'text'"):
        encoded(tiny(), [{"label": "thing"}])


@pytest.mark.parametrize("pattern", ["{text}", "{mask} {mask}"])
def test_a_template_has_exactly_one_mask(pattern):
    with pytest.raises(ConfigError, match=r"expected one \{mask\}"):
        formatters.cloze(pattern, WORDS)


@pytest.mark.parametrize("words", [{"a": "b"}, {"a": "b", "c": " "}, {}])
def test_a_verbalizer_has_two_classes_with_words(words):
    with pytest.raises(ConfigError, match="verbalizer: expected"):
        Manual(words)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ConfigError, match="expected reduce as"):
        MultiWord({"a": ["b"], "c": ["d"]}, reduce="sum")


# --- generation ---


def test_a_generated_answer_is_a_completion_with_a_trained_eos():
    tokenizer = tiny()
    verbalizer = Generation({"place": "a place", "thing": "a thing"})
    encoder = Encoder(tokenizer, formatter=formatters.cloze("{text} It is {mask}", verbalizer))
    (row,) = encoder([ROW])
    assert tokenizer.decode(row["continuation_ids"][0]) == " a thing</s>"
    assert set(row["continuation_weights"][0]) == {1.0}
    assert encoder.encode_prompt({"text": ROW["text"]}) == row["prefix_ids"]


def test_a_generated_answer_is_read_back_by_its_beginning():
    verbalizer = Generation({"place": "a place", "thing": "a thing"})
    assert verbalizer.read("  A  Place, in France") == "place"
    assert verbalizer.read("the place") is None
    with pytest.raises(ConfigError, match="none begins another"):
        Generation({"a": "yes", "b": "Yes indeed"})
    with pytest.raises(ConfigError, match="at the end of a template"):
        formatters.cloze("{mask} {text}", verbalizer)


# --- soft tokens ---


def test_soft_tokens_have_names_shared_by_their_id():
    formatter = formatters.cloze("{soft@p:2}{text}{soft@p:2}{soft:1} {mask}", WORDS)
    assert list(soft_tokens(formatter)) == ["<|soft_p_0|>", "<|soft_p_1|>", "<|soft_3_0|>"]
    soft = formatters.cloze("{text} {mask}", Soft(WORDS))
    assert soft_tokens(soft) == {"<|class_0|>": "Paris", "<|class_1|>": "file"}


def test_soft_tokens_without_a_model_that_has_them_are_refused():
    with pytest.raises(ConfigError, match="expected a tokenizer and a model with the soft tokens"):
        Encoder(tiny(), formatter=formatters.cloze("{text} {soft:3} {mask}", WORDS))


def test_soft_tokens_of_words_are_as_many_as_their_tokens():
    tokenizer = tiny()
    count = len(tokenizer(" hello there").input_ids)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|soft_1_{k}|>" for k in range(count)]})
    (row,) = encoded(tokenizer, [ROW], '{text}{soft:"hello there"} {mask}')
    names = tokenizer.convert_ids_to_tokens(row["prefix_ids"][-count:])
    assert names == [f"<|soft_1_{k}|>" for k in range(count)]


def test_probabilities_ride_along_for_training_on_another_model():
    rows = [{**ROW, "probabilities": [0.25, 0.75]}]
    assert encoded(tiny(), rows)[0]["probability"] == [0.25, 0.75]
    with pytest.raises(DataError, match="one probability per class"):
        encoded(tiny(), [{**ROW, "probabilities": [0.25, 0.25]}])
