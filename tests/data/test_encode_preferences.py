"""Several answers to one prompt: each encoded as by itself, what they share stored once."""

from __future__ import annotations

import os
from functools import cache

import datasets
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from ftlib.batches import Span
from ftlib.data import Answers, Encoder, Segment, Segments, collate, formatters, load_records
from ftlib.errors import ConfigError, DataError
from tests.data.test_encode_properties import ANSWER, TEXT
from tests.data.tokenizers_zoo import KINDS, TEMPLATES, tiny


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# A blank at the end of the prompt, or at the start of an answer, tempts tokenizers to merge across.
STRINGS = [
    {"prompt": "Answer: ", "chosen": "yes", "rejected": "yes indeed"},
    {"prompt": "Answer:", "chosen": " yes", "rejected": " no"},
    {"prompt": "What does it do?\n", "chosen": "\nIt copies a file.", "rejected": "\nIt"},
    {"prompt": "", "chosen": "yes", "rejected": "no"},
    {"prompt": "a", "chosen": "file.", "rejected": "s"},
]
TURNS = [user("What does it do?"), assistant("It copies a file."), user("the answer")]
CHATS = [
    {"prompt": TURNS[:1], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
    {"prompt": TURNS, "chosen": [assistant("yes indeed")], "rejected": [assistant("yes")]},
]
RANKED = {"prompt": "the fox ", "answers": ["b", "a", "c", "d"], "ranks": [2, 1, 2, 4]}


def encoded(tokenizer, rows, **options):
    encoder = Encoder(tokenizer, **options)
    return encoder, encoder(load_records(rows))


def alone(tokenizer, rows, **options):
    """(ids, weights) of rows with one continuation, as fine-tuning encodes them."""
    _, data = encoded(tokenizer, rows, **options)
    return [
        (
            row["prefix_ids"] + row["continuation_ids"][0],
            row["prefix_weights"] + row["continuation_weights"][0],
        )
        for row in data
    ]


def sides(row):
    """(ids, weights) of each answer with the shared prefix before it."""
    return [
        (row["prefix_ids"] + ids, row["prefix_weights"] + weights)
        for ids, weights in zip(row["continuation_ids"], row["continuation_weights"], strict=True)
    ]


def as_completions(row):
    return [{"prompt": row["prompt"], "completion": row[side]} for side in ("chosen", "rejected")]


# --- each side is what fine-tuning makes of it ---


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_prefix_and_continuation_are_the_encoding_of_that_side_alone(kind, bos):
    tokenizer = tiny(kind, bos=bos)
    _, data = encoded(tokenizer, STRINGS)
    for given_row, row in zip(STRINGS, data, strict=True):
        assert sides(row) == alone(tokenizer, as_completions(given_row))
        assert row["prefix_ids"] == tokenizer(given_row["prompt"]).input_ids
        assert not any(row["prefix_weights"])
        assert row["length"] == len(row["prefix_ids"]) + sum(map(len, row["continuation_ids"]))


@pytest.mark.parametrize("template", TEMPLATES)
def test_messages_are_what_fine_tuning_makes_of_them_and_the_prompt_s_turns_are_not_trained(template):
    tokenizer = tiny(template=template)
    encoder, data = encoded(tokenizer, CHATS)
    for given_row, row in zip(CHATS, data, strict=True):
        assert sides(row) == alone(tokenizer, as_completions(given_row))
        assert encoder.encode_prompt(given_row["prompt"]) == row["prefix_ids"]
        for side, (ids, weights) in zip(("chosen", "rejected"), sides(row), strict=True):
            trained = [i for i, weight in zip(ids, weights, strict=True) if weight]
            assert trained[-1] in encoder.stop_ids
            assert tokenizer.decode(trained[:-1]).strip() == given_row[side][0]["content"]


def test_whole_conversations_and_explicit_prompts_give_the_same():
    whole = [
        {name: [*row["prompt"], *row[name]] for name in ("chosen", "rejected")} | {"id": 1} for row in CHATS
    ]
    assert encoded(tiny(), whole)[1].to_list() == encoded(tiny(), CHATS)[1].to_list()


def test_turns_after_the_first_difference_belong_to_the_answers():
    row = {
        "prompt": TURNS[:1],
        "chosen": [assistant("yes"), user("the answer"), assistant("indeed")],
        "rejected": [assistant("no")],
    }
    tokenizer = tiny()
    _, data = encoded(tokenizer, [row])
    assert sides(data[0]) == alone(tokenizer, as_completions(row))
    both = sides(encoded(tokenizer, [row], train_on="last")[1][0])
    assert both == alone(tokenizer, as_completions(row), train_on="last")
    assert [tokenizer.decode([i for i, w in zip(*side, strict=True) if w]) for side in both] == [
        "indeed<|im_end|>",
        "no<|im_end|>",
    ]


def test_message_weights_multiply():
    row = {**CHATS[0], "chosen": [{**assistant("yes"), "weight": 0.5}]}
    _, data = encoded(tiny(), [row])
    assert [max(weights) for weights in data[0]["continuation_weights"]] == [0.5, 1.0]


# --- prompts inside both sides ---

IMPLICIT = [
    {"chosen": "The answer is: yes", "rejected": "The answer is: no"},
    {"chosen": "the answer is yes", "rejected": "the answer is yes indeed"},  # one starts the other
    {"chosen": "hello there.", "rejected": "hello then"},
]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_share_their_common_tokens_and_no_part_of_one(kind, bos):
    tokenizer = tiny(kind, bos=bos)
    _, data = encoded(tokenizer, IMPLICIT)
    for given_row, row in zip(IMPLICIT, data, strict=True):
        expected = alone(tokenizer, [{"text": given_row[side]} for side in ("chosen", "rejected")])
        shared = len(row["prefix_ids"])
        assert [ids for ids, _ in sides(row)] == [ids for ids, _ in expected]
        assert row["continuation_weights"] == [weights[shared:] for _, weights in expected]
        assert row["prefix_weights"] == [0.0] * shared
        first = [ids[0] for ids in row["continuation_ids"]]
        assert first[0] != first[1]  # nothing more could be shared
        assert shared > bos


def test_a_prompt_that_only_words_tell_apart_is_encoded_as_the_row_asks():
    encoder, data = encoded(tiny(), IMPLICIT)
    for given_row, row in zip(IMPLICIT, data, strict=True):
        assert encoder.encode_prompt(given_row) == row["prefix_ids"]


@pytest.mark.parametrize("bos", [True, False])
def test_texts_without_a_common_beginning_are_refused(bos):
    rows = [IMPLICIT[0], {"chosen": "yes", "rejected": "no"}, {"chosen": "a", "rejected": "b"}]
    with pytest.raises(DataError, match="texts without a common beginning") as caught:
        encoded(tiny(bos=bos), rows)
    assert (caught.value.code, caught.value.row) == ("prompts_differ", 2)
    assert "<list>:3: expected answers to one prompt" in str(caught.value)


def test_prompt_tokens_that_differ_stay_in_the_continuations_without_weight():
    """A formatter of one's own, whose prompts end differently: 'words' gives one token per word."""

    def formatter(row):
        return Answers(
            tuple(
                Segments(
                    (Segment(f"the quick {word}", "prompt"), Segment(" yes", "completion", boundary=True))
                )
                for word in row["words"]
            )
        )

    tokenizer = tiny("words")
    row = Encoder(tokenizer, formatter=formatter)([{"words": ["brown", "fox"]}])[0]
    assert tokenizer.convert_ids_to_tokens(row["prefix_ids"]) == ["the", "quick"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in row["continuation_ids"]] == [
        ["brown", "yes", "</s>"],
        ["fox", "yes", "</s>"],
    ]
    assert row["continuation_weights"] == [[0.0, 1.0, 1.0]] * 2


# --- ranks and margins ---


def test_answers_come_best_first_with_their_rank():
    tokenizer = tiny()
    encoder, data = encoded(tokenizer, [RANKED])
    assert [tokenizer.decode(ids) for ids in data[0]["continuation_ids"]] == [
        f"{answer}</s>" for answer in "abcd"
    ]
    assert data[0]["rank"] == [1.0, 2.0, 2.0, 4.0]
    report = encoder.report
    # Of 6 pairs of 4 answers, one is a tie.
    assert (report.examples, report.answers, report.pairs) == (1, 4, 5)
    assert report.trained_tokens == 4 * 2
    assert report.tokens == data[0]["length"] == len(data[0]["prefix_ids"]) + 4 * 2
    assert str(report).startswith("1 rows -> 1 examples (4 answers, 5 pairs), ")


def test_scores_become_ranks_and_equal_scores_tie():
    row = {"prompt": "the fox ", "answers": ["b", "a", "c"], "scores": [0.5, 9, 0.5]}
    _, data = encoded(tiny(), [row])
    assert data[0]["rank"] == [1.0, 2.0, 2.0]


def test_answers_in_order_of_preference_carry_no_rank():
    _, data = encoded(tiny(), [{"prompt": "the fox ", "answers": ["b", "a", "c"]}])
    assert "rank" not in data.column_names
    assert [tiny().decode(ids) for ids in data[0]["continuation_ids"]] == ["b</s>", "a</s>", "c</s>"]


def test_a_margin_is_the_difference_of_two_numbers_and_absent_without_margins():
    rows = [{**row, "margin": k} for k, row in enumerate(STRINGS)]
    _, data = encoded(tiny(), rows)
    assert data["margin"] == [[float(k), 0.0] for k in range(len(rows))]
    assert "margin" not in encoded(tiny(), STRINGS)[1].column_names


def test_a_margin_in_some_rows_is_a_mistake_in_the_others():
    rows = [STRINGS[0], {**STRINGS[1], "margin": 1.0}, STRINGS[2]]
    with pytest.raises(DataError, match="<list>:2:margin: expected margin in every row or in none, got one"):
        encoded(tiny(), rows)
    with pytest.raises(DataError, match="expected margin in every row or in none, got none here"):
        encoded(tiny(), [rows[1], rows[0]])


def test_a_first_row_that_is_refused_makes_no_other_row_wrong():
    rows = [{**row, "margin": 1.0} for row in STRINGS]
    raw = [{**rows[0], "rejected": "yes"}, *rows[1:]]
    with pytest.raises(DataError) as caught:
        Encoder(tiny(), formatter=formatters.preference())(raw)
    assert (caught.value.code, caught.value.row) == ("identical_answers", 1)
    assert "\n" not in str(caught.value)


# --- rows that compare nothing ---


def test_answers_of_equal_tokens_are_refused_with_their_row():
    """This template trims what people wrote, so a blank makes no difference."""
    rows = [CHATS[0], {**CHATS[0], "rejected": [assistant("yes ")]}]
    assert len(encoded(tiny(), rows)[1]) == 2
    with pytest.raises(
        DataError, match="<list>:2: expected answers that differ, got the same tokens"
    ) as caught:
        encoded(tiny(template="llama_marked"), rows)
    assert caught.value.code == "identical_answers"


def test_equal_answers_of_one_rank_are_no_pair_and_no_mistake():
    row = {"prompt": "the fox ", "answers": ["a", "a", "b"], "ranks": [1, 1, 2]}
    assert encoded(tiny(), [row])[0].report.pairs == 2


def test_an_answer_without_a_trained_token_is_refused():
    rows = [CHATS[0], {**CHATS[0], "rejected": [{**assistant("no"), "weight": 0}]}]
    with pytest.raises(DataError, match="<list>:2:messages: expected a trained token") as caught:
        encoded(tiny(), rows)
    assert caught.value.code == "empty_target"


def test_a_text_that_only_begins_the_other_has_nothing_left_to_learn():
    options = {"formatter": formatters.preference(formatters.text(eos="none"))}
    assert len(encoded(tiny(), IMPLICIT[:1], **options)[1]) == 1
    with pytest.raises(
        DataError, match="token in answer 1, got none: the other answers begin with all of it"
    ):
        encoded(tiny("words"), IMPLICIT[1:2], **options)


def test_an_answer_that_the_template_cannot_show_as_one_text_is_refused():
    turns = [assistant("<think>no</think>yes"), user("the answer"), assistant("indeed")]
    row = {"prompt": TURNS[:1], "chosen": turns, "rejected": [assistant("no")]}
    with pytest.raises(DataError, match="Keep one assistant turn per answer") as caught:
        encoded(tiny(template="drops_thinking"), [row])
    assert caught.value.code == "template"


def test_options_that_would_train_the_shared_prompt_are_refused():
    for options in (
        {"train_on": "assistant"},
        {"train_on": "all"},
        {"train_on": "weighted"},
        {"train_on": lambda segments: [0.0, 1.0]},
        {"prompt_loss_weight": 0.1},
    ):
        with pytest.raises(ConfigError, match="would train the prompt"):
            encoded(tiny(), STRINGS, **options)


def test_formatters_that_make_no_group_are_refused():
    part = Segments((Segment("a", "prompt"), Segment("b", "completion", boundary=True)))
    for made in (Answers((part,)), Answers((part, part), {"margin": (1.0,)})):
        with pytest.raises(ConfigError, match="at least two examples, and one number per example"):
            Encoder(tiny(), formatter=lambda row, made=made: made)([{"a": 1}])
    with pytest.raises(ConfigError, match="a base that lays out one answer"):
        encoded(tiny(), STRINGS, formatter=formatters.preference(formatters.preference()))


# --- length ---

LONG = {"prompt": "a b c d e f", "chosen": "brown fox", "rejected": "yes"}  # 'words': 6, 2 + EOS, 1 + EOS
SHORT = {"prompt": "a", "chosen": "fox", "rejected": "no"}


@pytest.mark.parametrize(
    ("overflow", "max_length", "sizes", "counts"),
    [
        ("error", 9, [(6, [3, 2]), (1, [2, 2])], {}),
        ("drop", 8, [(1, [2, 2])], {"dropped": {"too_long": 1}}),
        ("truncate_prompt", 5, [(2, [3, 2]), (1, [2, 2])], {"truncated": 1}),
        ("truncate", 8, [(6, [2, 2]), (1, [2, 2])], {"truncated": 1, "without_terminator": 1}),
        ("truncate", 7, [(6, [1, 1]), (1, [2, 2])], {"truncated": 1, "without_terminator": 1}),
    ],
)
def test_each_policy_cuts_both_sides_alike_and_counts_one_example(overflow, max_length, sizes, counts):
    encoder, data = encoded(tiny("words"), [LONG, SHORT], max_length=max_length, overflow=overflow)
    assert [(len(row["prefix_ids"]), list(map(len, row["continuation_ids"]))) for row in data] == sizes
    report = encoder.report.to_dict()
    expected = {
        "rows": 2,
        "examples": len(sizes),
        "pairs": len(sizes),
        "truncated": 0,
        "dropped": {},
    } | counts
    assert {name: report[name] for name in expected} == expected
    assert report["tokens"] == sum(data["length"])


def test_a_shared_prompt_is_cut_once_from_the_left_behind_bos():
    tokenizer = tiny(bos=True)
    full = encoded(tokenizer, [LONG])[1][0]
    longest = len(full["prefix_ids"]) + max(map(len, full["continuation_ids"]))
    _, data = encoded(tokenizer, [LONG], max_length=longest - 3, overflow="truncate_prompt")
    assert data[0]["prefix_ids"] == full["prefix_ids"][:1] + full["prefix_ids"][4:]
    assert data[0]["continuation_ids"] == full["continuation_ids"]


def test_the_longest_side_is_what_counts():
    with pytest.raises(DataError, match="<list>:1: expected at most 8 tokens, got 9") as caught:
        encoded(tiny("words"), [LONG], max_length=8)
    assert caught.value.code == "too_long"
    with pytest.raises(DataError, match="of which 3 are not prompt"):
        encoded(tiny("words"), [LONG], max_length=2, overflow="truncate_prompt")
    with pytest.raises(DataError, match="the prompt alone fills max_length=6"):
        encoded(tiny("words"), [LONG], max_length=6, overflow="truncate")


def test_answers_that_a_cut_makes_equal_are_refused():
    row = {"prompt": "the", "chosen": "quick brown fox", "rejected": "quick brown yes,"}
    assert len(encoded(tiny("words"), [row], max_length=4, overflow="truncate")[1]) == 1
    with pytest.raises(DataError, match="once cut to max_length=3") as caught:
        encoded(tiny("words"), [row], max_length=3, overflow="truncate")
    assert caught.value.code == "identical_answers"


# --- formatters and inference ---


def test_the_base_lays_out_each_answer():
    base = formatters.prompt_completion(separator=" ->", ending=" END")
    tokenizer = tiny()
    encoder, data = encoded(tokenizer, STRINGS[:1], formatter=formatters.preference(base))
    assert sides(data[0]) == alone(tokenizer, as_completions(STRINGS[0]), formatter=base)
    assert tokenizer.decode(data[0]["prefix_ids"]) == "Answer:  ->"
    assert encoder.encode_prompt("Answer: ") == data[0]["prefix_ids"]


def test_the_base_may_be_any_function_and_sees_the_other_columns():
    def shout(row):
        asked = f"{row['topic']}: {row['prompt']}"
        return Segments(
            (Segment(asked, "prompt"), Segment(row["completion"].upper(), "completion", boundary=True))
        )

    tokenizer = tiny()
    rows = [{**STRINGS[0], "topic": "fox"}]
    _, data = encoded(tokenizer, rows, formatter=formatters.preference(shout))
    assert tokenizer.decode(data[0]["prefix_ids"]) == "fox: Answer: "
    assert [tokenizer.decode(ids) for ids in data[0]["continuation_ids"]] == ["YES</s>", "YES INDEED</s>"]


@pytest.mark.parametrize("formatter", [None, formatters.preference()], ids=["picked", "given"])
def test_prompts_are_those_of_inference_after_encoding(formatter):
    tokenizer = tiny(bos=True)
    encoder, data = encoded(tokenizer, STRINGS, formatter=formatter)
    for given_row, row in zip(STRINGS, data, strict=True):
        for asked in (given_row, {"prompt": given_row["prompt"]}, given_row["prompt"]):
            assert encoder.encode_prompt(asked) == row["prefix_ids"]
    assert encoder.stop_ids == (tokenizer.eos_token_id,)
    encoder, data = encoded(tokenizer, CHATS, formatter=formatter)
    for given_row, row in zip(CHATS, data, strict=True):
        for asked in (given_row, {"prompt": given_row["prompt"]}, given_row["prompt"]):
            assert encoder.encode_prompt(asked) == row["prefix_ids"]
    assert encoder.encode_prompt("What does it do?") == data[0]["prefix_ids"]
    assert encoder.stop_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_the_system_text_is_shared():
    base = formatters.chat(system="Be brief.")
    encoder, data = encoded(tiny(), CHATS, formatter=formatters.preference(base))
    assert tiny().decode(data[0]["prefix_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert encoder.report.system_added == len(CHATS)


def test_rows_as_people_write_them_need_no_loading_with_a_formatter():
    rows = [{"question": "Answer: ", "response_chosen": "yes", "response_rejected": "no"}]
    _, expected = encoded(tiny(), rows)
    got = Encoder(tiny(), formatter=formatters.preference())(rows)
    assert got.remove_columns("source").to_list() == expected.remove_columns("source").to_list()


# --- previews ---


def test_a_preview_shows_the_prompt_once_and_the_marks_of_each_answer():
    """Two words of prompt; two words and EOS, one word and EOS."""
    rows = [{"prompt": "the quick", "chosen": "brown fox", "rejected": "yes,", "margin": 0.5}]
    shown = Encoder(tiny("words")).preview(rows)
    assert shown.text == (
        "--- <list>:1: 7 tokens, 5 trained (71%), stop token trained\n"
        "the quick\n"
        "--> chosen (margin 0.5): [[ brown fox </s>]]\n"
        "--> rejected: [[ yes, </s>]]"
    )
    (row,) = shown.to_dict()
    assert [label for label, _ in row["answers"]] == ["chosen (margin 0.5)", "rejected"]
    assert len(row["ids"]) == len(row["tokens"]) == len(row["weights"]) == 7
    assert "<p>rejected</p>" in shown._repr_html_()


def test_a_preview_of_ranked_answers_names_their_ranks():
    text = Encoder(tiny()).preview([RANKED]).text
    assert "\n--> answer 1 (rank 1): [[a</s>]]\n" in text
    assert text.endswith("\n--> answer 4 (rank 4): [[d</s>]]")


def test_a_preview_warns_if_one_answer_lacks_its_stop():
    shown = Encoder(tiny("words"), max_length=8, overflow="truncate").preview([LONG])
    assert "NO stop token trained, truncated" in shown.text


# --- data sets ---


def test_every_input_changes_the_fingerprint():
    def shout(row):
        return Segments((Segment(row["prompt"], "prompt"), Segment("X", "completion", boundary=True)))

    prints = [
        encoded(tiny(), rows, formatter=formatter)[1]._fingerprint
        for rows, formatter in [
            (STRINGS, None),
            (STRINGS[:4], None),
            ([{**row, "margin": 1} for row in STRINGS], None),
            (STRINGS, formatters.preference(formatters.prompt_completion())),
            (STRINGS, formatters.preference(formatters.prompt_completion(separator="\n"))),
        ]
    ]
    assert len(set(prints)) == len(prints)


def rows_of(count):
    return [
        {"prompt": f"Answer {i}: ", "chosen": "yes " * (i % 7 + 1), "rejected": "no", "margin": i / 8}
        for i in range(count)
    ]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_workers_change_nothing(num_proc):
    options = {"max_length": 12, "overflow": "drop"}
    first, expected = encoded(tiny(), rows_of(30), **options)
    datasets.config.HF_DATASETS_CACHE += "-other"
    encoder = Encoder(tiny(), **options)
    assert encoder(load_records(rows_of(30)), num_proc=num_proc).to_list() == expected.to_list()
    assert encoder.report == first.report
    assert 0 < first.report.dropped.total() < 30


def test_workers_leave_the_environment_as_it_was(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    datasets.config.HF_DATASETS_CACHE += "-environment"
    environ, before = os.environ, dict(os.environ)
    Encoder(tiny())(load_records(rows_of(30)), num_proc=2)
    assert os.environ is environ
    assert dict(os.environ) == before


def test_a_stream_gives_what_the_map_gives():
    first, expected = encoded(tiny(), rows_of(150))
    encoder = Encoder(tiny())
    stream = encoder(load_records(rows_of(150)).to_iterable_dataset())
    assert list(stream) == expected.to_list()
    assert encoder.report == first.report


def test_equal_inputs_are_encoded_once():
    encoder, first = encoded(tiny(), rows_of(5))
    report = encoder.report.to_dict()
    encoder._backend.encode = None  # encoding again would call it
    assert encoder(load_records(rows_of(5))).to_list() == first.to_list()
    assert encoder.report.to_dict() == report


def test_rows_collate_to_spans_with_two_continuations_behind_one_prompt():
    """'words': 2 prompt words; 2 answer words and EOS, 1 and EOS; then 1; 1 and EOS, 1 and EOS."""
    rows = [
        {"prompt": "the quick", "chosen": "brown fox", "rejected": "yes,", "margin": 0.5},
        {"prompt": "the", "chosen": "answer", "rejected": "capital", "margin": 2},
    ]
    batch = collate(encoded(tiny("words"), rows)[1])
    assert batch.spans == (Span(0, 2, (3, 2)), Span(7, 1, (2, 2)))
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 1, 2]
    assert batch.owner_N.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    # The last word of a prompt predicts the first word of both of its answers.
    assert batch.rows_N.tolist() == [1, 2, 3, 1, 5, 7, 8, 7, 10]
    assert_close(batch.weights_N, torch.ones(9))
    assert_close(batch.extras["margin"], torch.tensor([0.5, 0.0, 2.0, 0.0]))
    assert list(batch.extras) == ["margin"]


def test_ranks_ride_in_the_batch():
    batch = collate(encoded(tiny(), [RANKED])[1])
    assert_close(batch.extras["rank"], torch.tensor([1.0, 2.0, 2.0, 4.0]))


# --- any text ---


@cache
def own(kind, template="chatml"):
    return Encoder(tiny(kind, template=template, bos=True))


def examples(encoder, rows):
    found = encoder._rows(rows).encode(rows, range(len(rows)))
    return [example for example in found if example.problem is None]


def whole(example, number=0):
    return example.prefix[0] + example.continuations[number][0]


def check_sides(encoder, pair, singles):
    """The pair's sides are the single rows, and its prefix is as long as it can be; `False` if refused."""
    made = examples(encoder, [pair])
    expected = examples(encoder, singles)
    if not made:
        return False
    (example,) = made
    assert [whole(example, k) for k in (0, 1)] == [whole(each) for each in expected]
    for number, each in enumerate(expected):
        weights = (each.prefix[1] + each.continuations[0][1])[len(example.prefix[0]) :]
        assert example.continuations[number][1] == weights
    assert not any(example.prefix[1])
    return True


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXT, one=ANSWER, other=ANSWER)
@settings(max_examples=30, deadline=None)
def test_any_text_is_what_fine_tuning_makes_of_it(kind, prompt, one, other):
    pair = {"prompt": prompt, "chosen": one, "rejected": other}
    accepted = check_sides(own(kind), pair, as_completions(pair))
    assert accepted or one == other or kind in ("words", "unigram")  # these map many texts to one id


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=ANSWER, one=TEXT, other=TEXT)
@settings(max_examples=30, deadline=None)
def test_any_texts_without_a_prompt_are_what_fine_tuning_makes_of_them(kind, prompt, one, other):
    pair = {"chosen": f"a {prompt}{one}", "rejected": f"a {prompt}{other}"}
    accepted = check_sides(own(kind), pair, [{"text": pair["chosen"]}, {"text": pair["rejected"]}])
    assert accepted or one == other or kind in ("words", "unigram")


@pytest.mark.parametrize("template", TEMPLATES)
@given(question=ANSWER, one=ANSWER, other=ANSWER)
@settings(max_examples=20, deadline=None)
def test_any_messages_are_what_fine_tuning_makes_of_them(template, question, one, other):
    pair = {"prompt": [user(question)], "chosen": [assistant(one)], "rejected": [assistant(other)]}
    accepted = check_sides(own("byte_level", template), pair, as_completions(pair))
    assert accepted or one.strip() == other.strip()
