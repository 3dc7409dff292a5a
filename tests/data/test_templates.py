"""Conversations over the templates of many model families: what is trained, and what the model sees before.

The facts of each family stand in `templates_zoo`; these tests are the same for all.
"""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ftlib.data import Encoder, formatters, load_records
from ftlib.errors import DataError
from tests.data.templates_zoo import FAMILIES, family_tokenizer

Messages = list[dict[str, Any]]

TRAINABLE = [name for name, family in FAMILIES.items() if family.refuses is None]
KINDS = ["byte_level", "metaspace_always", "prepend"]
TURNS: Messages = [
    {"role": "user", "content": "What does it do?"},
    {"role": "assistant", "content": "It copies a file."},
    {"role": "user", "content": "the answer"},
    {"role": "assistant", "content": "yes indeed"},
]
SYSTEM = {"role": "system", "content": "The fox says yes."}
CALL = {"type": "function", "function": {"name": "copy", "arguments": {"path": "a"}}}
CALLING: Messages = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "done", "name": "copy"},
    TURNS[3],
]


def encoded(name: str, *rows: Any, kind: str = "byte_level", **options: Any) -> tuple[Any, Encoder, Dataset]:
    """The tokenizer, the encoder, and the rows: message lists, or whole rows."""
    tokenizer = family_tokenizer(name, kind)
    encoder = Encoder(tokenizer, **options)
    records = load_records([row if isinstance(row, dict) else {"messages": row} for row in rows])
    return tokenizer, encoder, encoder(records)


def whole(row: Any) -> tuple[list[int], list[float]]:
    """(ids, weights) of an example with one continuation."""
    return (
        row["prefix_ids"] + row["continuation_ids"][0],
        row["prefix_weights"] + row["continuation_weights"][0],
    )


def trained_texts(tokenizer: PreTrainedTokenizerBase, row: Any) -> list[str]:
    """The text of each stretch of trained tokens."""
    ids, weights = whole(row)
    runs: list[list[int]] = []
    for k, (i, weight) in enumerate(zip(ids, weights, strict=True)):
        if weight > 0 and (k == 0 or weights[k - 1] != weight):
            runs.append([])
        if weight > 0:
            runs[-1].append(i)
    return [tokenizer.decode(run) for run in runs]


def inference(tokenizer: Any, messages: Messages) -> list[int]:
    """What a server gives the model to continue."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def answers(name: str) -> list[str]:
    """What is trained of `TURNS`, turn by turn."""
    family = FAMILIES[name]
    first = family.lead if family.splits else family.earlier
    return [first + "It copies a file." + family.stop, family.lead + "yes indeed" + family.stop]


# --- the stop token is trained, and nothing but what the model writes ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINABLE)
def test_trained_is_what_the_model_writes_with_its_stop_token(name: str, kind: str) -> None:
    tokenizer, encoder, data = encoded(name, TURNS, kind=kind)
    texts = [text for row in data for text in trained_texts(tokenizer, row)]
    if kind != "byte_level":  # these write or take off a blank where a text starts
        texts, expected = ([text.replace(" ", "") for text in each] for each in (texts, answers(name)))
    else:
        expected = answers(name)
    assert texts == expected
    (stop,) = tokenizer.convert_tokens_to_ids([FAMILIES[name].stop.strip()])
    for row in data:
        ids, weights = whole(row)
        assert [i for i, weight in zip(ids, weights, strict=True) if weight > 0][-1] == stop
    assert encoder.stop_ids == (stop,)
    assert encoder.report.without_terminator == 0


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_template_that_rewrites_earlier_turns_gives_an_example_per_turn(name: str) -> None:
    _, encoder, data = encoded(name, TURNS)
    splits = FAMILIES[name].splits
    assert (encoder.report.examples, encoder.report.split_turns) == ((2, 1) if splits else (1, 0))
    assert len(data) == 1 + splits


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_conversation_decodes_to_its_render(name: str) -> None:
    tokenizer, _, data = encoded(name, TURNS[:2])
    render = tokenizer.apply_chat_template(TURNS[:2], tokenize=False)
    text = tokenizer.decode(whole(data[0])[0])
    assert text == render + ("</s>" if name == "alpaca" else "")


# --- what stands before is what inference sees ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINABLE)
def test_prompts_have_the_ids_of_inference(name: str, kind: str) -> None:
    for end in (2, 4):
        tokenizer, encoder, data = encoded(name, TURNS[:end], kind=kind, train_on="last")
        assert data[0]["prefix_ids"] == inference(tokenizer, TURNS[: end - 1])
        assert encoder.encode_prompt({"messages": TURNS[:end]}) == data[0]["prefix_ids"]


@pytest.mark.parametrize("name", TRAINABLE)
def test_each_turn_continues_the_text_of_inference(name: str) -> None:
    tokenizer, _, data = encoded(name, TURNS)
    texts = [tokenizer.decode(whole(row)[0]) for row in data]
    for k, answer in zip((1, 3), answers(name), strict=True):
        before = tokenizer.apply_chat_template(TURNS[:k], add_generation_prompt=True, tokenize=False)
        assert any(text.startswith(before + answer) for text in texts)


@pytest.mark.parametrize("name", TRAINABLE)
def test_bos_is_written_by_the_template_alone(name: str) -> None:
    """The tokenizer adds one to plain text."""
    tokenizer, _, data = encoded(name, TURNS)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    for row in data:
        ids, _ = whole(row)
        written = tokenizer.decode(ids).count("<s>")
        assert ids.count(tokenizer.bos_token_id) == written
        assert written == {"llama_2": 2}.get(name, int("bos_token" in FAMILIES[name].template))


# --- control tokens in people's text stay text ---


@pytest.mark.parametrize("name", TRAINABLE)
def test_control_tokens_in_people_s_text_stay_text(name: str) -> None:
    forged = " cut " + " ".join(("<s>", "</s>", "<|im_end|>", *FAMILIES[name].control)) + " here"

    def skeleton(text: str) -> tuple[list[list[int]], list[list[int]]]:
        turns = [{**turn, "content": turn["content"] + text} for turn in TURNS]
        tokenizer, encoder, data = encoded(name, turns)
        control = set(tokenizer.added_tokens_decoder)
        assert encoder.report.control_text == (len(data) if text != " cut here" else 0)
        return [[i for i in whole(row)[0] if i in control] for row in data], [
            [i for i, weight in zip(*whole(row), strict=True) if weight and i in control] for row in data
        ]

    assert skeleton(forged) == skeleton(" cut here")


# --- weights ---


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_turn_of_weight_zero_is_read_and_not_learned(name: str) -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[2], {**TURNS[3], "weight": 2}]
    tokenizer, _, data = encoded(name, turns)
    (row,) = data
    assert trained_texts(tokenizer, row) == answers(name)[1:]
    assert set(whole(row)[1]) == {0.0, 2.0}
    assert "It copies a file." in tokenizer.decode(row["prefix_ids"])


@pytest.mark.parametrize("name", TRAINABLE)
def test_each_turn_has_its_own_weight(name: str) -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0.5}, TURNS[2], {**TURNS[3], "weight": 2}]
    _, _, data = encoded(name, turns)
    assert [max(whole(row)[1]) for row in data] == ([0.5, 2.0] if FAMILIES[name].splits else [2.0])
    assert {weight for row in data for weight in whole(row)[1]} == {0.0, 0.5, 2.0}


@pytest.mark.parametrize("name", TRAINABLE)
def test_only_the_last_turn_is_learned_on_request(name: str) -> None:
    tokenizer, _, data = encoded(name, TURNS, train_on="last")
    assert [text for row in data for text in trained_texts(tokenizer, row)] == answers(name)[1:]


@pytest.mark.parametrize("name", TRAINABLE)
def test_of_a_prompt_with_turns_only_the_completion_is_learned(name: str) -> None:
    tokenizer, _, data = encoded(name, {"prompt": TURNS[:3], "completion": TURNS[3:]})
    assert [text for row in data for text in trained_texts(tokenizer, row)] == answers(name)[1:]


# --- system texts ---


@pytest.mark.parametrize("name", [name for name in TRAINABLE if FAMILIES[name].system])
def test_a_system_message_is_read_and_not_learned(name: str) -> None:
    tokenizer, encoder, data = encoded(name, [SYSTEM, *TURNS])
    assert [text for row in data for text in trained_texts(tokenizer, row)] == answers(name)
    assert encoder.report.system_from_template == 0
    for row in data:
        assert tokenizer.decode(whole(row)[0]).count(SYSTEM["content"]) == 1


def test_a_system_text_that_moves_gives_an_example_per_turn() -> None:
    """Before the last question it stands in another place for each turn, as inference will see it."""
    tokenizer, _, data = encoded("mistral", [SYSTEM, *TURNS])
    assert [row["prefix_ids"] for row in data] == [
        inference(tokenizer, [SYSTEM, *TURNS[:end]]) for end in (1, 3)
    ]


def test_a_template_that_raises_on_a_system_role_says_so_with_the_row() -> None:
    with pytest.raises(DataError, match="no system role here") as caught:
        encoded("gemma", TURNS, [SYSTEM, *TURNS])
    assert (caught.value.code, caught.value.row) == ("template", 2)
    with pytest.raises(DataError, match="no system role here"):
        encoded("gemma", TURNS, formatter=formatters.chat(system="The fox says yes."))


def test_a_template_that_wants_roles_in_turn_says_so() -> None:
    with pytest.raises(DataError, match="expected user and assistant in turn"):
        encoded("mistral", [TURNS[0], TURNS[2], TURNS[3]])


# --- tools and their results ---


@pytest.mark.parametrize("tools", [None, []])
def test_no_tools_print_no_boilerplate(tools: list[Any] | None) -> None:
    """Given an empty list, the template itself would print its preamble."""
    tokenizer, _, data = encoded("llama_3_tools", {"messages": TURNS, "tools": tools})
    assert "You may call" in tokenizer.apply_chat_template(TURNS, tools=[], tokenize=False)
    assert tokenizer.decode(whole(data[0])[0]) == tokenizer.apply_chat_template(TURNS, tokenize=False)


@pytest.mark.parametrize(
    ("name", "around"),
    [("llama_3_tools", "{}"), ("qwen_3", "<tool_call>\n{}\n</tool_call>")],
)
def test_calls_are_learned_and_tools_and_results_are_read(name: str, around: str) -> None:
    family = FAMILIES[name]
    call = around.replace("{}", '{"name": "copy", "arguments": {"path": "a"}}')
    tools = [{"type": "function", "function": {"name": "copy", "description": "copies a file"}}]
    tokenizer, _, data = encoded(name, {"messages": CALLING, "tools": tools})
    assert [text for row in data for text in trained_texts(tokenizer, row)] == [
        f"{family.lead}{said}{family.stop}" for said in (call, "yes indeed")
    ]
    text = tokenizer.decode(whole(data[-1])[0])
    assert "copies a file" in text
    assert "done" in text
    assert "None" not in text


@pytest.mark.parametrize("name", [name for name in TRAINABLE if not FAMILIES[name].tools])
def test_a_template_without_tools_refuses_calls(name: str) -> None:
    with pytest.raises(DataError) as caught:
        encoded(name, CALLING)
    assert caught.value.code == "template"


# --- reasoning ---


@pytest.mark.parametrize("name", [name for name in TRAINABLE if FAMILIES[name].reasoning])
def test_reasoning_is_learned_in_its_turn_and_gone_from_later_prompts(name: str) -> None:
    before, after = FAMILIES[name].reasoning or ("", "")
    turns = [
        TURNS[0],
        {**TURNS[1], "reasoning_content": "Paris is"},
        TURNS[2],
        {**TURNS[3], "thinking": "no"},
    ]
    tokenizer, encoder, data = encoded(name, turns)
    stop = FAMILIES[name].stop
    assert [text for row in data for text in trained_texts(tokenizer, row)] == [
        f"{before}Paris is{after}It copies a file.{stop}",
        f"{before}no{after}yes indeed{stop}",
    ]
    assert "Paris is" not in tokenizer.decode(data[1]["prefix_ids"])
    assert encoder.report.split_turns == 1


@pytest.mark.parametrize("name", [name for name in TRAINABLE if not FAMILIES[name].reasoning])
def test_reasoning_that_the_template_leaves_out_is_refused_where_it_would_be_learned(name: str) -> None:
    turns = [TURNS[0], {**TURNS[1], "reasoning": "Paris is"}, *TURNS[2:]]
    with pytest.raises(DataError, match="turn 2 of the conversation: the template does not render the reas"):
        encoded(name, turns)
    assert len(encoded(name, turns, train_on="last")[2]) == 1


# --- what cannot be masked is refused ---


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].refuses])
def test_a_template_that_cannot_be_masked_is_refused_by_turn(name: str) -> None:
    with pytest.raises(DataError, match=f"turn 2 of the conversation: {FAMILIES[name].refuses}") as caught:
        encoded(name, TURNS)
    assert (caught.value.code, caught.value.row) == ("template", 1)
