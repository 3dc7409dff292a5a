"""One fixture per format: rows as others write them, and the records they become."""

from __future__ import annotations

import json
import re

import pytest

from ftlib.data import load_records, load_report
from ftlib.data.formats import BY_NAME, RULES
from ftlib.errors import ConfigError, DataError
from tests.conftest import ROOT


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


ASK, ANSWER = [user("Hi")], [assistant("Hello")]
CHAT = [*ASK, *ANSWER]
PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
PAIR_CHAT = {"prompt": ASK, "chosen": [assistant("yes")], "rejected": [assistant("no")]}
QA = {"messages": [user("Q"), assistant("A")]}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}

# rule -> [(row as it is written, its record)]
FORMATS = {
    "tokenised": [
        (
            {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]},
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        ),
        (
            {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]},
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        ),
        (
            {"input_ids": [5, 6], "assistant_masks": [1, 1], "loss_weights": [0.5, 0.0]},
            {"input_ids": [5, 6], "labels": [5, -100], "loss_weights": [0.5, 0.0]},
        ),
        ({"input_ids": [5, 6]}, {"input_ids": [5, 6]}),
    ],
    "tokenised_pair": [
        (
            {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]},
            {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]},
        )
    ],
    "segments": [
        (
            {"segments": [{"text": "Q: ", "label": False}, {"text": "A</s>", "label": True}]},
            {"segments": [{"text": "Q: ", "weight": 0.0}, {"text": "A</s>", "weight": 1.0}]},
        )
    ],
    "weighted_text": [
        (
            {"data": {"text_list": ["Q: ", "A"], "loss_weights": [0, 0.5]}},
            {"segments": [{"text": "Q: ", "weight": 0.0}, {"text": "A", "weight": 0.5}]},
        ),
        ({"data": "All of it."}, {"segments": [{"text": "All of it.", "weight": 1.0}]}),
    ],
    "openai_preference": [
        (
            {
                "input": {"messages": ASK},
                "preferred_output": [assistant("yes")],
                "non_preferred_output": [assistant("no")],
            },
            PAIR_CHAT,
        ),
        (
            {
                "input": {"messages": ASK},
                "preferred_completion": assistant("yes"),
                "non_preferred_completion": assistant("no"),
            },
            PAIR_CHAT,
        ),
    ],
    "preference": [
        (PAIR, PAIR),
        ({"instruction": "Q", "input": "", "chosen": "good", "rejected": "bad"}, PAIR),
        ({"question": "Q", "chosen": "good", "rejected": "bad", "margin": 2}, {**PAIR, "margin": 2.0}),
        ({"input": "Q", "chosen": "good", "rejected": "bad"}, PAIR),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            PAIR_CHAT,
        ),
        ({**PAIR_CHAT, "chosen": [*ASK, assistant("yes")], "rejected": [*ASK, assistant("no")]}, PAIR_CHAT),
    ],
    "preference_turns": [
        ({"chosen": [*ASK, assistant("yes")], "rejected": [*ASK, assistant("no")]}, PAIR_CHAT)
    ],
    "preference_dialogues": [
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
            {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
        )
    ],
    "rejected_answer": [
        ({"messages": [*ASK, assistant("yes")], "rejected_response": "no"}, PAIR_CHAT),
        ({"messages": [*ASK, assistant("yes")], "rejected_message": assistant("no")}, PAIR_CHAT),
        ({"messages": [*ASK, assistant("yes")], "rejected_messages": [*ASK, assistant("no")]}, PAIR_CHAT),
    ],
    "argilla": [({"prompt": "Q", "chosen_response": "good", "rejected_response": "bad"}, PAIR)],
    "stack_exchange": [({"question": "Q", "response_j": "good", "response_k": "bad"}, PAIR)],
    "judged": [
        ({"history": "Q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1}, PAIR),
        ({"history": "Q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0}, PAIR),
    ],
    "ranked": [
        (
            {"prompt": "Q", "answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]},
            {"prompt": "Q", "answers": ["a", "b"], "ranks": [2.0, 1.0]},
        ),
        (
            {"prompt": "Q", "responses": [{"response": "a", "score": 2}, {"response": "b", "score": 7}]},
            {"prompt": "Q", "answers": ["a", "b"], "scores": [2.0, 7.0]},
        ),
    ],
    "steps": [
        (
            {"prompt": "Q", "completions": ["one", "two"], "labels": [True, False]},
            {"prompt": "Q", "completions": ["one", "two"], "labels": [True, False]},
        )
    ],
    "kto": [
        (
            {"prompt": "Q", "completion": "A", "label": False},
            {"prompt": "Q", "completion": "A", "label": False},
        ),
        (
            {"prompt": ASK, "completion": ANSWER, "kto_tag": True},
            {"prompt": ASK, "completion": ANSWER, "label": True},
        ),
        (
            {"prompt": "Q", "completion": "A", "label": "True"},
            {"prompt": "Q", "completion": "A", "label": True},
        ),
    ],
    "kto_messages": [
        ({"messages": CHAT, "label": True}, {"prompt": ASK, "completion": ANSWER, "label": True}),
        (
            {"conversations": CHAT, "system": "Be kind.", "kto_tag": False},
            {"prompt": [system("Be kind."), *ASK], "completion": ANSWER, "label": False},
        ),
    ],
    "messages_prompt": [({"messages": ASK}, {"prompt": ASK})],
    "messages": [
        ({"messages": CHAT}, {"messages": CHAT}),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {"messages": CHAT},
        ),
        ({"conversation": [{"human": "Hi", "assistant": "Hello"}]}, {"messages": CHAT}),
        ({"conversation": {"messages": CHAT}}, {"messages": CHAT}),
        ({"conversation_json": json.dumps({"messages": CHAT})}, {"messages": CHAT}),
        (
            {"messages": [user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), *ANSWER]},
            {"messages": CHAT},
        ),
        ({"conversations": CHAT, "system": "Be kind."}, {"messages": [system("Be kind."), *CHAT]}),
    ],
    "instruction": [
        ({"instruction": "Q", "input": "", "output": "A"}, QA),
        ({"Instruction": "Q", "Response": "A"}, QA),
        (
            {
                "instruction": "Add.",
                "context": "1 2",
                "response": "3",
                "system": "Count.",
                "history": [["Hi", "Hello"]],
            },
            {"messages": [system("Count."), *CHAT, user("Add.\n1 2"), assistant("3")]},
        ),
    ],
    "prompt_completion": [
        ({"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": "A"}),
        ({"prompt": "Q", "generation": "A"}, {"prompt": "Q", "completion": "A"}),
        ({"prompt": ASK, "completion": ANSWER}, {"prompt": ASK, "completion": ANSWER}),
    ],
    "flan": [
        ({"inputs": "Q", "targets": "A"}, {"prompt": "Q", "completion": "A"}),
        (
            {"inputs_pretokenized": "Q", "targets_pretokenized": "A", "is_correct": True},
            {"prompt": "Q", "completion": "A"},
        ),
    ],
    "choices": [
        (
            {"question": "Q", "choices": ["a", "b", "c"], "answer": 2},
            {"question": "Q", "choices": ["a", "b", "c"], "answer": 2},
        ),
        (
            {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
            {"question": "Q", "choices": ["a", "b"], "answer": 1},
        ),
        (
            {"question": "Q", "choices": ["red", "blue"], "answer": "B"},
            {"question": "Q", "choices": ["red", "blue"], "answer": 1},
        ),
        (
            {"question": "Q", "choices": ["red", "blue"], "answer": "red"},
            {"question": "Q", "choices": ["red", "blue"], "answer": 0},
        ),
    ],
    "question": [
        ({"question": "Q", "answer": "A"}, QA),
        (
            {"system_prompt": "Be kind.", "question": "Q", "response": "A"},
            {"messages": [system("Be kind."), *QA["messages"]]},
        ),
        ({"query": "Q", "context": "C", "response": "A"}, {"messages": [user("Q\nC"), assistant("A")]}),
    ],
    "input_output": [({"input": "Q", "output": "A"}, {"prompt": "Q", "completion": "A"})],
    "tasks": [
        (
            {"Definition": ["Add."], "Instances": [{"input": "1 2", "output": ["3", "three"]}]},
            {"prompt": "Add.\n\n1 2", "completion": "3"},
        )
    ],
    "labelled": [
        ({"text": "Fine.", "label": 1}, {"text": "Fine.", "label": 1}),
        ({"sentence": "Fine.", "label": "good"}, {"text": "Fine.", "label": "good"}),
    ],
    "labelled_pair": [
        (
            {"premise": "It rains.", "hypothesis": "Wet.", "label": 0},
            {"text_a": "It rains.", "text_b": "Wet.", "label": 0},
        ),
        ({"text_a": "a", "text_b": "b", "label": 1}, {"text_a": "a", "text_b": "b", "label": 1}),
    ],
    "prompt": [
        ({"prompt": "Q", "answer": 4, "text": "other"}, {"prompt": "Q", "answer": 4, "text": "other"}),
        ({"prompt": ASK}, {"prompt": ASK}),
    ],
    "text": [({"text": "Once."}, {"text": "Once."})],
}
BY_NAME_ONLY = {
    "trees": [
        (
            {"message_id": "1", "parent_id": None, "role": "assistant", "text": "Hello"},
            {"messages": ANSWER},
        )
    ],
    "masked_tokens": [
        ({"tokens": [5, 6], "mask": [True, False]}, {"input_ids": [5, 6], "labels": [-100, 6]})
    ],
    "content": [({"content": "Once."}, {"text": "Once."})],
    "raw_content": [({"raw_content": "Once."}, {"text": "Once."})],
}
CASES = [(name, k) for name, cases in FORMATS.items() for k in range(len(cases))]
NAMED = [(name, k) for name, cases in (FORMATS | BY_NAME_ONLY).items() for k in range(len(cases))]


def loaded(rows, **options):
    """The records without their source and without null columns."""
    records = load_records(rows, **options)
    return [{k: v for k, v in row.items() if k != "_source" and v is not None} for row in records]


def refused(rows, **options):
    with pytest.raises(DataError) as caught:
        load_records(rows, **options)
    return caught.value


def test_every_rule_has_its_rows_here():
    assert list(FORMATS) == [rule.name for rule in RULES]
    assert list(BY_NAME_ONLY) == [rule.name for rule in BY_NAME]


def test_the_rules_stand_in_the_order_of_the_table():
    numbers = [rule.number for rule in RULES]
    assert sorted(set(numbers)) == list(range(1, 24))
    assert numbers == sorted(numbers)


def test_the_page_of_formats_has_rows_of_every_rule():
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert re.findall(r"^### `(\w+)`$", page, re.MULTILINE) == [rule.name for rule in (*RULES, *BY_NAME)]


@pytest.mark.parametrize(("name", "k"), CASES)
def test_a_row_is_recognised_and_becomes_its_record(name, k):
    row, record = FORMATS[name][k]
    before = json.dumps(row)
    records = load_records([row])
    assert load_report(records).format == name
    assert loaded([row]) == [record]
    assert json.dumps(row) == before
    assert records["_source"] == ["<list>:1"]


@pytest.mark.parametrize(("name", "k"), NAMED)
def test_a_format_that_is_named_needs_no_guess(name, k):
    row, record = (FORMATS | BY_NAME_ONLY)[name][k]
    assert loaded([row], format=name) == [record]


@pytest.mark.parametrize("name", FORMATS)
def test_records_of_records_are_the_same(name):
    once = load_records([FORMATS[name][0][0]])
    assert load_records(once).to_list() == once.to_list()


@pytest.mark.parametrize("name", FORMATS)
def test_null_counts_as_absent(name):
    row, record = FORMATS[name][0]
    nulls = dict.fromkeys(("messages", "completion", "chosen", "text", "label", "input_ids"))
    assert loaded([{**nulls, **row}]) == [record]


@pytest.mark.parametrize("name", BY_NAME_ONLY)
def test_formats_that_are_never_guessed_are_named_in_the_error(name):
    error = refused([BY_NAME_ONLY[name][0][0]])
    assert error.code == "unknown_format"
    assert f"format={name!r}" in str(error)


@pytest.mark.parametrize("column", ["content", "solution", "answer"])
def test_no_text_is_guessed_to_be_an_answer(column):
    assert loaded([{"prompt": "Q", column: "A"}]) == [{"prompt": "Q", column: "A"}]


# --- conflicts ---

CONFLICTS = {  # rows in two formats: the one that wins, and the columns that the other would have read
    "ids_and_messages": ({"input_ids": [5], "messages": CHAT}, "tokenised", ("messages",)),
    "messages_and_pair": (
        {"messages": CHAT, "prompt": "Q", "completion": "A"},
        "messages",
        ("completion", "prompt"),
    ),
    "messages_and_alpaca": (
        {"messages": CHAT, "instruction": "Q", "output": "A"},
        "messages",
        ("instruction", "output"),
    ),
    "alpaca_and_torchtune": ({"instruction": "Q", "input": "more", "output": "A"}, "instruction", ()),
    "choices_and_question": ({"question": "Q", "choices": ["a", "b"], "answer": "a"}, "choices", ()),
    "kto_and_completion": ({"prompt": "Q", "completion": "A", "label": True}, "kto", ()),
    "steps_and_prompt": ({"prompt": "Q", "completions": ["s"], "labels": [True]}, "steps", ()),
    "completion_and_question": (
        {"prompt": "Q", "completion": "A", "question": "Q", "answer": "A"},
        "prompt_completion",
        ("answer", "question"),
    ),
    "pair_and_messages": (
        {"prompt": "Q", "chosen": "a", "rejected": "b", "messages": CHAT},
        "preference",
        (),
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_the_first_rule_of_the_table_wins_and_the_rest_is_reported(name):
    row, winner, ignored = CONFLICTS[name]
    report = load_report(load_records([row]))
    assert (report.format, report.ignored) == (winner, ignored)


@pytest.mark.parametrize("name", [name for name, (_, _, ignored) in CONFLICTS.items() if ignored])
def test_strict_refuses_rows_whose_text_could_be_read_in_two_ways(name):
    row, winner, _ = CONFLICTS[name]
    error = refused([row], strict=True)
    assert error.code == "ambiguous_format"
    assert f"format={winner!r}" in str(error)


def test_strict_leaves_rows_of_one_format_alone():
    assert loaded([{"question": "Q", "answer": "A", "id": 3}], strict=True) == [{**QA, "id": 3}]


def test_canonical_names_of_other_formats_are_kept_aside():
    row = {"messages": CHAT, "text": "t", "label": 1, "id": 7, "extra_text": "older"}
    assert loaded([row]) == [
        {"messages": CHAT, "extra_extra_text": "t", "extra_label": 1, "id": 7, "extra_text": "older"}
    ]
    assert load_report(load_records([row])).moved == ("extra_extra_text", "extra_label")


def test_mapped_columns_decide_between_formats():
    row = {"messages": CHAT, "q": "Q", "a": "A"}
    record = loaded([row], columns={"prompt": "q", "completion": "a"})[0]
    assert json.loads(record.pop("extra_messages")) == CHAT
    assert record == {"prompt": "Q", "completion": "A"}
    assert loaded([{"cmd": "Q", "out": "A"}], columns={"instruction": "cmd", "output": "out"}) == [QA]
    assert loaded([{"q": "Q", "a": "4"}], columns={"prompt": "q", "answer": "a"}) == [
        {"prompt": "Q", "answer": "4"}
    ]


def test_a_rule_needs_every_row():
    rows = [{"prompt": "Q", "completion": "A", "label": True}] * 2 + [{"prompt": "Q", "completion": "A"}]
    report = load_report(load_records(rows))
    assert (report.format, report.fits) == ("prompt_completion", {"kto": 2, "prompt_completion": 3})
    assert report.nearly == ("kto",)
    assert "kto, which comes first, fits 2 of them" in str(report)
    assert load_report(load_records(rows[:2])).nearly == ()


def test_rows_far_behind_the_first_are_looked_at_too():
    report = load_report(load_records([{"text": "t", "label": 0}] * 300 + [{"text": "t"}] * 300))
    assert (report.format, report.looked_at) == ("text", 512)


def test_mixed_rows_each_have_their_own_format():
    rows = [{"instruction": "Q", "output": "A"}, {"conversations": CHAT}, {"question": "Q", "answer": "A"}]
    assert loaded(rows, mixed=True) == [QA, {"messages": CHAT}, QA]
    assert refused([*rows, {"a": 1}], mixed=True).code == "unknown_format"
    with pytest.raises(ConfigError, match="mixed=True decides"):
        load_records(rows, mixed=True, format="messages")


# --- formats that give more or fewer records than rows ---


def test_flan_rows_that_say_they_are_wrong_are_dropped_and_counted():
    rows = [{"inputs": "Q", "targets": "A", "is_correct": good} for good in (True, False, True, False)]
    report = load_report(load_records(rows))
    assert (report.rows, report.records, report.dropped) == (4, 2, {"is_correct is false": 2})


def test_tasks_give_one_record_per_instance_or_per_output():
    instances = [{"id": "x", "input": "1 2", "output": ["3", "three"]}, {"input": "2 2", "output": ["4"]}]
    rows = [{"Definition": "Add.", "Instances": instances, "Source": "s"}]
    assert [row["completion"] for row in loaded(rows)] == ["3", "4"]
    assert [row["completion"] for row in loaded(rows, outputs="all")] == ["3", "three", "4"]
    assert {row["Source"] for row in loaded(rows)} == {"s"}
    assert set(load_records(rows)["_source"]) == {"<list>:1"}


RANKED = {"prompt": "Q", "answers": ["b", "a", "d", "c"], "ranks": [2, 1, 3, 3]}


def test_ranked_answers_become_pairs_on_request():
    def pairs(how):
        return [(row["chosen"], row["rejected"]) for row in loaded([RANKED], pairs=how)]

    assert pairs("best_worst") == [("a", "c")]
    assert pairs("all") == [("a", "b"), ("a", "d"), ("a", "c"), ("b", "d"), ("b", "c")]
    assert load_report(load_records([RANKED], pairs="all")).notes == {"ties, skipped": 1}


TREE = [
    {"message_id": "q", "parent_id": None, "role": "prompter", "text": "Q", "lang": "en"},
    {"message_id": "bad", "parent_id": "q", "role": "assistant", "text": "bad", "rank": 1},
    {"message_id": "good", "parent_id": "q", "role": "assistant", "text": "good", "rank": 0},
    {"message_id": "more", "parent_id": "good", "role": "prompter", "text": "More?"},
    {"message_id": "x", "parent_id": "more", "role": "assistant", "text": "x"},
    {"message_id": "y", "parent_id": "more", "role": "assistant", "text": "y", "deleted": True},
    {"message_id": "thanks", "parent_id": "x", "role": "prompter", "text": "Thanks"},
]


def test_trees_follow_the_best_ranked_reply_to_the_last_answer():
    records = load_records(TREE[::-1], format="trees")  # any order of rows
    expected = [user("Q"), assistant("good"), user("More?"), assistant("x")]
    assert records["messages"][0] == expected
    report = load_report(records)
    assert (report.rows, report.used, report.records) == (7, 4, 1)
    assert report.dropped == {"deleted message": 1, "message on no path that is learned": 2}


def test_all_paths_of_a_tree_learn_every_answer_once():
    tree = [*TREE, {"message_id": "z", "parent_id": "more", "role": "assistant", "text": "z"}]
    rows = loaded(tree, format="trees", outputs="all")
    learned = [
        message["content"]
        for row in rows
        for message in row["messages"]
        if message["role"] == "assistant" and message.get("weight") != 0
    ]
    assert sorted(learned) == ["bad", "good", "x", "z"]
    assert [len(row["messages"]) for row in rows] == [2, 4, 4]


def test_messages_in_no_tree_are_bad_rows():
    circle = [
        {"message_id": "a", "parent_id": "b", "role": "assistant", "text": "a"},
        {"message_id": "b", "parent_id": "a", "role": "prompter", "text": "b"},
    ]
    rows = [*TREE, {**TREE[1], "message_id": "o", "parent_id": "gone"}, *circle, TREE[0], {"text": "t"}]
    error = refused(rows, format="trees")
    places = [line.split(": ")[0] for line in str(error).split("\n")]
    columns = ["parent_id", "parent_id", "parent_id", "message_id", "message_id"]
    assert places == [f"<list>:{row}:{column}" for row, column in enumerate(columns, start=8)]


# --- messages ---


@pytest.mark.parametrize(
    ("role", "canonical"),
    [
        *((name, "system") for name in ("system", "developer")),
        *((name, "user") for name in ("user", "human", "prompter", "input", "query", "question")),
        *(
            (name, "assistant")
            for name in (
                *("assistant", "gpt", "chatgpt", "bot", "model", "output", "response", "ai"),
                *("bing", "bard"),
            )
        ),
        *(
            (name, "tool")
            for name in (
                *("tool", "ipython", "observation", "observations", "function"),
                *("function_response", "tool_response"),
            )
        ),
    ],
)
def test_every_spelling_of_a_role_is_mapped(role, canonical):
    rows = [{"messages": [{"role": role, "content": "x"}, *CHAT]}]
    assert loaded(rows)[0]["messages"][0]["role"] == canonical


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_roles_that_call_become_tool_calls(role):
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    message = loaded([{"conversations": [*ASK, {"from": role, "value": call}]}])[0]["messages"][1]
    assert (message["role"], message["content"]) == ("assistant", "")
    assert json.loads(message["tool_calls"]) == [CALL]


def test_calls_of_openai_have_objects_as_arguments():
    function = {"name": "f", "arguments": '{"x": 1}'}
    for given in (
        {"tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"function_call": function},
    ):
        message = loaded([{"messages": [*ASK, assistant(None, **given)]}])[0]["messages"][1]
        assert json.loads(message["tool_calls"])[0]["function"] == CALL["function"]
        assert message["content"] == ""


def test_anthropic_blocks_become_calls_results_and_reasoning():
    rows = [
        {
            "messages": [
                user([{"type": "text", "text": "Hi"}]),
                assistant(
                    [
                        {"type": "thinking", "thinking": "Hm."},
                        {"type": "text", "text": "Let me see."},
                        {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}},
                    ]
                ),
                user(
                    [
                        {
                            "type": "tool_result",
                            "tool_use_id": "c",
                            "content": [{"type": "text", "text": "1"}],
                        },
                        {"type": "text", "text": "And now?"},
                    ]
                ),
                assistant("One."),
            ]
        }
    ]
    messages = [
        {k: v for k, v in message.items() if v is not None} for message in loaded(rows)[0]["messages"]
    ]
    assert json.loads(messages[1].pop("tool_calls")) == [{"id": "c", **CALL}]
    assert messages == [
        user("Hi"),
        assistant("Let me see.", reasoning="Hm."),
        {"role": "tool", "content": "1", "tool_call_id": "c"},
        user("And now?"),
        assistant("One."),
    ]


def test_pictures_are_refused_rather_than_left_out():
    rows = [{"messages": [user([{"type": "image_url", "image_url": {"url": "u"}}]), *ANSWER]}]
    assert (refused(rows).code, refused(rows).column) == ("bad_row", "messages[0].content")


def test_unknown_message_keys_are_kept_and_counted():
    rows = [{"messages": [*ASK, assistant("Hello", mood="calm")]}] * 3
    records = load_records(rows)
    assert json.loads(records[0]["messages"][1]["extra"]) == {"mood": "calm"}
    assert load_report(records).notes == {"messages with the unknown key 'mood'": 3}


def test_empty_content_is_a_bad_row_unless_there_are_calls():
    error = refused([{"messages": [*ASK, assistant(None)]}])
    assert (error.code, error.column) == ("bad_row", "messages[1].content")


def test_two_system_texts_are_one_too_many():
    rows = [{"messages": [system("A"), *CHAT], "system": "B"}]
    assert refused(rows).column == "system"
    assert loaded([{"messages": [system("A"), *CHAT], "system": "A"}]) == [{"messages": [system("A"), *CHAT]}]


# --- bad rows of single formats: all of them, each with its column ---

BAD = {
    "tokenised": [
        ({"input_ids": [5, 6], "labels": [6, -100]}, "labels"),
        ({"input_ids": [5, 6], "labels": [5]}, "labels"),
        ({"input_ids": [], "labels": []}, "input_ids"),
        ({"input_ids": [5], "labels": [5], "loss_weights": [-1.0]}, "loss_weights"),
    ],
    "tokenised_pair": [({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}, "rejected_ids")],
    "segments": [
        ({"segments": [{"text": "a", "label": "yes"}]}, "segments[0]"),
        ({"segments": []}, "segments"),
    ],
    "weighted_text": [({"data": {"text_list": ["a"], "loss_weights": []}}, "data")],
    "judged": [({"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "labels")],
    "steps": [
        ({"prompt": "Q", "completions": ["a"], "labels": [True, False]}, "labels"),
        ({"prompt": "Q", "completions": ["a", ""], "labels": [True, False]}, "completions[1]"),
        ({"prompt": "Q", "completions": ["a"], "labels": ["good"]}, "labels[0]"),
    ],
    "kto": [({"prompt": "Q", "completion": "A", "label": "perhaps"}, "label")],
    "kto_messages": [({"messages": ASK, "label": True}, "messages")],
    "instruction": [
        ({"instruction": "Q", "output": ""}, "output"),
        ({"instruction": "Q", "output": "A", "input": 5}, "input"),
        ({"instruction": "Q", "output": "A", "history": [["Hi"]]}, "history"),
    ],
    "flan": [({"inputs": "Q", "targets": " "}, "targets")],
    "choices": [
        ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "answer"),
        ({"question": "Q", "choices": ["a", "b"], "answer": "z"}, "answer"),
        ({"question": "Q", "choices": ["1", "0"], "answer": "1"}, "answer"),
        ({"question": "Q", "choices": ["a"], "answer": 0}, "choices"),
    ],
    "tasks": [({"Definition": "Add.", "Instances": [{"input": "1", "output": []}]}, "Instances[0]")],
    "labelled": [({"text": "t", "label": None}, "label"), ({"text": "", "label": 1}, "text")],
    "labelled_pair": [({"text_a": "a", "text_b": " ", "label": 1}, "text_b")],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_all_named_with_their_columns(name):
    good = FORMATS[name][0][0]
    rows = [good] * (len(BAD[name]) + 1) + [row for row, _ in BAD[name]]
    lines = str(refused(rows, format=name)).split("\n")
    start = len(BAD[name]) + 2
    expected = [f"<list>:{row}:{column}" for row, (_, column) in enumerate(BAD[name], start=start)]
    if name == "tasks":
        expected = [f"<list>:{start}:Instances[0].output"]
    assert [line.split(": ")[0] for line in lines] == expected


def test_labels_that_look_shifted_are_told_apart():
    assert "shifted by one" in str(refused([{"input_ids": [5, 6, 7], "labels": [6, 7, -100]}]))
