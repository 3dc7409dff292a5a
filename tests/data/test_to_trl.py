"""Records on their way to TRL: its own data utilities and trainers' preparation accept them."""

from __future__ import annotations

import json

import pytest

from ftlib.data import load_records, to_trl
from ftlib.errors import CapabilityError
from tests.data.test_formats import FORMATS
from tests.data.tokenizers_zoo import tiny

pytestmark = pytest.mark.oracle
trl = pytest.importorskip("trl.data_utils")

FORMS = {  # rule -> the columns that TRL reads
    "tokenised": {"input_ids", "labels"},
    "openai_preference": {"prompt", "chosen", "rejected"},
    "preference": {"prompt", "chosen", "rejected"},
    "preference_turns": {"prompt", "chosen", "rejected"},
    "preference_dialogues": {"prompt", "chosen", "rejected"},
    "rejected_answer": {"prompt", "chosen", "rejected"},
    "argilla": {"prompt", "chosen", "rejected"},
    "stack_exchange": {"prompt", "chosen", "rejected"},
    "judged": {"prompt", "chosen", "rejected"},
    "kto": {"prompt", "completion", "label"},
    "kto_messages": {"prompt", "completion", "label"},
    "messages_prompt": {"prompt"},
    "messages": {"messages"},
    "instruction": {"messages"},
    "prompt_completion": {"prompt", "completion"},
    "flan": {"prompt", "completion"},
    "question": {"messages"},
    "input_output": {"prompt", "completion"},
    "tasks": {"prompt", "completion"},
    "prompt": {"prompt", "answer", "text"},
    "text": {"text"},
}
WITHOUT_FORM = set(FORMATS) - set(FORMS) - {"labelled"}  # whose text alone is a form


@pytest.mark.parametrize("name", FORMS)
def test_every_form_that_trl_has_is_made(name):
    data = to_trl(load_records([FORMATS[name][0][0]]))
    assert set(data.column_names) == FORMS[name]


@pytest.mark.parametrize("name", sorted(WITHOUT_FORM))
def test_what_trl_has_no_form_for_is_refused(name):
    with pytest.raises(CapabilityError, match="to_trl: expected one of the forms"):
        to_trl(load_records([FORMATS[name][0][0]]))


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("tokenised", "text", "prompt")])
def test_trl_renders_what_it_gets(name):
    """`maybe_apply_chat_template` raises for rows in no form of TRL's, and tells text from messages."""
    (row,) = to_trl(load_records([FORMATS[name][-1][0]]))
    rendered = trl.maybe_apply_chat_template(row, tiny())
    assert all(isinstance(value, str | bool) for value in rendered.values())
    is_chat = any(isinstance(row.get(key), list) for key in ("messages", "prompt", "chosen"))
    assert trl.is_conversational(row) is is_chat


def test_pairs_need_no_further_extraction_and_can_be_taken_apart():
    data = to_trl(load_records([FORMATS["preference_turns"][0][0]]))
    assert trl.maybe_extract_prompt(data[0]) == data[0]
    unpaired = trl.maybe_unpair_preference_dataset(data)
    assert unpaired["label"] == [True, False]


def test_margins_and_columns_of_rewards_stay():
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 0.5, "kind": "x"}
    assert to_trl([row])[0] == row
    assert to_trl([{"prompt": "Q", "answer": 4}])[0] == {"prompt": "Q", "answer": 4}


def test_messages_have_objects_and_no_null_keys():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning": "Hm."},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
        {"role": "assistant", "content": "One"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    (row,) = to_trl([{"messages": messages, "tools": json.dumps(tools)}])
    messages[1]["reasoning_content"] = messages[1].pop("reasoning")
    assert row == {"messages": messages, "tools": tools}


def test_weights_that_trl_would_not_see_are_refused():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(CapabilityError, match=r"messages\[1\].weight of <list>:1"):
        to_trl([{"messages": [chat[0], {**chat[1], "weight": 0}]}])
    same = [{**message, "weight": weight} for message, weight in zip(chat, (0, 1), strict=True)]
    assert to_trl([{"messages": same}])[0] == {"messages": chat}
    with pytest.raises(CapabilityError, match="loss_weights of <list>:1"):
        to_trl([{"input_ids": [5], "labels": [5], "loss_weights": [0.5]}])


def test_ranked_answers_go_to_trl_as_pairs():
    rows = [{"prompt": "Q", "answers": ["a", "b"], "ranks": [2, 1]}]
    assert to_trl(load_records(rows, pairs="best_worst"))[0] == {
        "prompt": "Q",
        "chosen": "b",
        "rejected": "a",
    }
