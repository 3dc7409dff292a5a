"""Records of pairs and ranked answers: what people write, and the one form it becomes."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from datasets import Dataset

from ftlib.data import load_records, split
from ftlib.errors import DataError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


ASK = [user("Hi")]
TEXT = {"prompt": "Answer: ", "chosen": "yes", "rejected": "no"}
CHAT = {"prompt": ASK, "chosen": [assistant("yes")], "rejected": [assistant("no")]}
LONG_PROMPT = [user("Hi"), assistant("Hello"), user("More?")]


def loaded(*rows, **options):
    """The records without their source and without null columns."""
    return [
        {name: value for name, value in row.items() if name != "_source"}
        for row in load_records(list(rows), **options)
    ]


SPELLINGS = {
    "canonical": (TEXT, TEXT),
    "accepted": ({"prompt": "Answer: ", "accepted": "yes", "rejected": "no"}, TEXT),
    "question": ({"question": "Answer: ", "chosen_response": "yes", "rejected_response": "no"}, TEXT),
    "response_first": ({"query": "Answer: ", "response_chosen": "yes", "response_rejected": "no"}, TEXT),
    "stack_exchange": ({"question": "Answer: ", "response_j": "yes", "response_k": "no"}, TEXT),
    "instruction": ({"instruction": "Answer: ", "chosen": "yes", "rejected": "no"}, TEXT),
    "instruction_and_empty_input": (
        {"instruction": "Answer: ", "input": "", "chosen": "yes", "rejected": "no"},
        TEXT,
    ),
    "instruction_and_input": (
        {"instruction": "Say", "input": "it", "chosen": "yes", "rejected": "no"},
        {**TEXT, "prompt": "Say\nit"},
    ),
    "without_prompt": ({"chosen": "It is", "rejected": "It was"}, {"chosen": "It is", "rejected": "It was"}),
    "dialogue": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " yes", "rejected": " no"},
    ),
    "messages": (CHAT, CHAT),
    "one_message": ({"prompt": ASK, "chosen": assistant("yes"), "rejected": assistant("no")}, CHAT),
    "answers_as_text": ({"prompt": ASK, "chosen": "yes", "rejected": "no"}, CHAT),
    "question_as_text": ({**CHAT, "prompt": "Hi"}, CHAT),
    "whole_conversations": (
        {"chosen": [*ASK, assistant("yes")], "rejected": [*ASK, assistant("no")]},
        CHAT,
    ),
    "whole_conversations_of_several_turns": (
        {"chosen": [*LONG_PROMPT, assistant("yes")], "rejected": [*LONG_PROMPT, assistant("no")]},
        {**CHAT, "prompt": LONG_PROMPT},
    ),
    "whole_conversations_and_their_question": (
        {"prompt": "Hi", "chosen": [*ASK, assistant("yes")], "rejected": [*ASK, assistant("no")]},
        CHAT,
    ),
    "whole_conversations_and_prompt": (
        {"prompt": ASK, "chosen": [*ASK, assistant("yes")], "rejected": [*ASK, assistant("no")]},
        CHAT,
    ),
    "answer_to_compare_with": ({"messages": [*ASK, assistant("yes")], "rejected_response": "no"}, CHAT),
    "message_to_compare_with": (
        {"messages": [*ASK, assistant("yes")], "rejected_message": assistant("no")},
        CHAT,
    ),
    "conversation_to_compare_with": (
        {"messages": [*ASK, assistant("yes")], "rejected_messages": [*ASK, assistant("no")]},
        CHAT,
    ),
    "request": (
        {
            "input": {"messages": ASK, "tools": []},
            "preferred_output": [assistant("yes")],
            "non_preferred_output": [assistant("no")],
        },
        CHAT,
    ),
    "ranks": (
        {"prompt": "Q", "answers": ["a", "b", "c"], "ranks": [2, 1, 2]},
        {"prompt": "Q", "answers": ["a", "b", "c"], "ranks": [2.0, 1.0, 2.0]},
    ),
    "scores": (
        {"question": "Q", "responses": ["a", "b"], "scores": [0.5, 7]},
        {"prompt": "Q", "answers": ["a", "b"], "scores": [0.5, 7.0]},
    ),
    "order": ({"prompt": "Q", "answers": ["a", "b"]}, {"prompt": "Q", "answers": ["a", "b"]}),
    "objects_with_rank": (
        {"prompt": "Q", "answers": [{"answer": "a", "rank": 2, "model": "x"}, {"answer": "b", "rank": 1}]},
        {"prompt": "Q", "answers": ["a", "b"], "ranks": [2.0, 1.0]},
    ),
    "objects_with_score": (
        {
            "instruction": "Q",
            "completions": [{"response": "a", "overall_score": 2.5}, {"response": "b", "overall_score": 4}],
        },
        {"prompt": "Q", "answers": ["a", "b"], "scores": [2.5, 4.0]},
    ),
    "answers_to_messages": (
        {"prompt": ASK, "answers": ["a", [assistant("b")], assistant("c")]},
        {"prompt": ASK, "answers": [[assistant("a")], [assistant("b")], [assistant("c")]]},
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_the_canonical_columns(name):
    given, expected = SPELLINGS[name]
    assert loaded(given) == [expected]


@pytest.mark.parametrize("name", SPELLINGS)
def test_loading_twice_changes_nothing(name):
    once = load_records([SPELLINGS[name][0]])
    assert load_records(once).to_list() == once.to_list()


@pytest.mark.parametrize("name", ["canonical", "messages", "ranks", "answers_to_messages"])
def test_files_and_data_sets_give_the_same_records(name, tmp_path):
    given, expected = SPELLINGS[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(given))
    assert load_records(tmp_path / "a.jsonl").remove_columns("_source").to_list() == [expected]
    data = Dataset.from_list([expected])
    assert load_records(data).remove_columns("_source").to_list() == [expected]


def test_margins_are_numbers_also_where_cells_are_text(tmp_path):
    pd.DataFrame([{**TEXT, "margin": 2}, {**TEXT, "margin": 0.5}]).to_csv(tmp_path / "a.csv", index=False)
    assert load_records(tmp_path / "a.csv")["margin"] == [2.0, 0.5]
    assert loaded({**TEXT, "margin": 2}) == [{**TEXT, "margin": 2.0}]


def test_scores_of_the_two_sides_make_no_margin():
    row = {**TEXT, "score_chosen": 8.5, "score_rejected": 3.0}
    assert loaded(row) == [row]


def test_other_columns_stay_and_a_second_spelling_is_one_of_them():
    row = {**TEXT, "chosen_response": "more", "rejected_response": "less", "source": "here"}
    assert loaded(row) == [row]


def test_columns_can_be_mapped():
    rows = [{"ask": "Answer: ", "good": "yes", "bad": "no"}]
    assert loaded(*rows, columns={"prompt": "ask", "chosen": "good", "rejected": "bad"}) == [TEXT]


def test_tools_stay_beside_messages():
    assert json.loads(loaded({**CHAT, "tools": [{"name": "f"}]})[0]["tools"]) == [{"name": "f"}]


def test_answers_in_order_of_preference_are_announced(caplog):
    load_records([{"prompt": "Q", "answers": ["a", "b"], "ranks": [1, 2]}])
    assert "best first" not in caplog.text
    load_records([{"prompt": "Q", "answers": ["a", "b"]}])
    assert "answers without ranks or scores are read as best first" in caplog.text


def test_answers_that_only_a_reward_reads_leave_prompts_alone():
    """One row with a single answer is enough: then they are no comparison."""
    rows = [{"prompt": "Q", "answers": ["a", "b"]}, {"prompt": "R", "answers": ["a"]}]
    assert loaded(*rows) == rows


def test_learned_completions_stay_what_is_learned():
    row = {"prompt": "Q", "completion": "c", "answers": ["a", "b"], "scores": [1.0, 2.0]}
    assert loaded(row) == [row]


# --- bad rows, all at once ---


def refused(rows, **options):
    """(place, code) of each bad row."""
    with pytest.raises(DataError) as caught:
        load_records(rows, **options)
    return [line.split(": ")[0] for line in str(caught.value).split("\n")], caught.value


def test_all_bad_pairs_are_reported_at_once_with_file_row_and_column(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        TEXT,
        {**TEXT, "chosen": ""},
        {**TEXT, "rejected": None},
        {**TEXT, "rejected": 5},
        {**TEXT, "prompt": 5},
        {**TEXT, "rejected": "yes"},
        {**TEXT, "margin": float("nan")},
        {**TEXT, "margin": -1},
        {**TEXT, "margin": "high"},
        {**TEXT, "margin": True},
        {**TEXT, "rejected": [assistant("no")]},
        CHAT,
        *[TEXT] * 12,
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    places, error = refused(path)
    columns = ["chosen", "rejected", "rejected", "prompt", "rejected", *["margin"] * 4, "rejected", "prompt"]
    assert places == [f"{path}:{row}:{column}" for row, column in enumerate(columns, start=2)]
    lines = str(error).split("\n")
    assert "expected non-empty text, got ''" in lines[0]
    assert "got null" in lines[1]
    assert "expected answers that differ, got chosen and rejected equal" in lines[4]
    assert "expected a finite number >= 0, got nan" in lines[5]
    assert "both as text or both as messages" in lines[9]
    assert "expected text, as in the first row, got messages" in lines[10]
    assert error.code == "bad_row"


def test_a_bad_cell_is_named_as_the_file_names_it():
    rows = [{"question": "Q", "response_chosen": "yes", "response_rejected": text} for text in ("no", "")]
    assert refused(rows)[0] == ["<list>:2:response_rejected"]


def test_equal_sides_have_a_code_of_their_own():
    """D6."""
    for row in (TEXT, CHAT):
        _, error = refused([row, {**row, "rejected": row["chosen"]}])
        assert (error.code, error.row) == ("identical_answers", 2)


DIFFER = {
    "first_messages": {"chosen": [user("A"), assistant("x")], "rejected": [user("B"), assistant("y")]},
    "questions_after_a_system_text": {
        "chosen": [{"role": "system", "content": "Be kind."}, user("A"), assistant("x")],
        "rejected": [{"role": "system", "content": "Be kind."}, user("B"), assistant("y")],
    },
    "one_is_the_start_of_the_other": {
        "chosen": [user("A"), assistant("x")],
        "rejected": [user("A"), assistant("x"), user("B"), assistant("y")],
    },
    "prompt_is_another_question": {
        "prompt": "B",
        "chosen": [user("A"), assistant("x")],
        "rejected": [user("A"), assistant("y")],
    },
    "one_side_repeats_the_prompt": {
        "prompt": [user("A")],
        "chosen": [user("A"), assistant("x")],
        "rejected": [assistant("y")],
    },
    "dialogues": {
        "chosen": "\n\nHuman: A\n\nAssistant: x",
        "rejected": "\n\nHuman: B\n\nAssistant: y",
    },
}


@pytest.mark.parametrize("name", DIFFER)
def test_sides_that_answer_different_prompts_are_refused(name):
    """D6."""
    _, error = refused([DIFFER[name]])
    assert error.code == "prompts_differ"
    assert (error.row, error.column) == (1, "rejected")
    assert "to answer one prompt" in str(error)


def test_all_bad_ranked_answers_are_reported_at_once():
    good = {"prompt": "Q", "answers": ["a", "b", "c"], "ranks": [1, 2, 3]}
    rows = [
        good,
        {**good, "ranks": [1, 2]},
        {**good, "ranks": [1, None, 3]},
        {**good, "ranks": [0, 1, 2]},
        {**good, "ranks": [1, 1, 1]},
        {**good, "ranks": "best"},
        {**good, "answers": ["a"]},
        {**good, "answers": ["a", "", "c"]},
        {**good, "answers": ["a", 5, "c"]},
        {**good, "answers": ["a", "a", "c"]},
        {**good, "prompt": None},
        *[good] * 11,
    ]
    places, error = refused(rows)
    columns = ["ranks", "ranks[1]", "ranks[0]", "ranks", "ranks", "answers", "answers[1]", "answers[1]"]
    columns += ["answers[1]", "prompt"]
    assert places == [f"<list>:{row}:{column}" for row, column in enumerate(columns, start=2)]
    lines = str(error).split("\n")
    assert "expected one number per answer (3)" in lines[0]
    assert "expected a finite number >= 1, got null" in lines[1]
    assert "expected answers of at least two ranks, got all equal" in lines[3]
    assert "answers 1 and 2 of different rank equal" in lines[8]


def test_a_rank_missing_inside_an_answer_is_named():
    answers = [{"answer": "a", "rank": 1}, {"answer": "b"}]
    assert refused([{"prompt": "Q", "answers": answers}])[0] == ["<list>:1:answers[1].rank"]


def test_equal_answers_may_share_a_rank():
    row = {"prompt": "Q", "answers": ["a", "a", "c"], "ranks": [1.0, 1.0, 2.0]}
    assert loaded(row) == [row]


def test_ranks_win_over_scores():
    row = {"prompt": "Q", "answers": ["a", "b"], "ranks": [1.0, 2.0], "scores": [0.1, 0.9]}
    assert loaded(row) == [row]


def test_a_format_that_is_asked_for_needs_its_columns():
    _, error = refused([{"prompt": "Q", "completion": "c"}], format="preference")
    assert (error.code, error.column) == ("missing_column", "chosen")
    assert loaded({"prompt": "Q", "accepted": "a", "rejected": "b"}, format="preference") == [
        {"prompt": "Q", "chosen": "a", "rejected": "b"}
    ]


# --- splits ---


def sides(rows):
    return [
        {row["group"] for row in side} for side in split(load_records(rows), group="prompt", validation=0.5)
    ]


@pytest.mark.parametrize(
    "pair",
    [
        lambda i, k: {"prompt": f"Q {i}", "chosen": f"a{k}", "rejected": "b"},
        lambda i, k: {"prompt": [user(f"Q {i}")], "chosen": f"a{k}", "rejected": "b"},
        lambda i, k: {"chosen": f"Q {i} is a{k}", "rejected": f"Q {i} is b"},
        lambda i, k: {"prompt": f"Q {i}", "answers": [f"a{k}", "b"], "ranks": [1, 2]},
    ],
    ids=["text", "messages", "without_prompt", "ranked"],
)
def test_pairs_of_one_prompt_stay_together(pair):
    train, valid = sides([{**pair(i, k), "group": i} for i in range(20) for k in range(3)])
    assert train
    assert valid
    assert not train & valid
