"""Instruction templates: golden renders of each kind, and what holds for all of them."""

from __future__ import annotations

import random

import pytest

from ftlib.data import Encoder, formatters
from ftlib.data.instructions import (
    Shots,
    dolly,
    flan,
    instances,
    p3,
    promptsource,
    super_natural_instructions,
    worded,
)
from ftlib.data.instructions.choice import draw
from ftlib.data.segments import Skipped
from ftlib.errors import ConfigError, DataError
from tests.data.tokenizers_zoo import KINDS, tiny

PREAMBLE = "Below is an instruction that describes a task"
TASK = "Write a response that appropriately completes the request."
ALPACA = {"instruction": "What does it do?", "input": "the fox", "output": "It copies."}
NLI = {"premise": "It rains.", "hypothesis": "It is wet.", "options": ["yes", "no"], "answer": "yes"}
NLI_TEXT = "{premise} So {hypothesis}\n{options_}|||{answer}"
NATURAL = {
    "Definition": ["Negate the word."],
    "Positive Examples": [
        {"input": "hot", "output": "cold", "explanation": "e"},
        {"input": "up", "output": "down", "explanation": "e"},
        {"input": "in", "output": "out", "explanation": "e"},
    ],
    "Instances": [{"id": "n-1", "input": "yes", "output": ["no", "nope"]}],
}
AG_NEWS = """
dataset: ag_news
templates:
  a: !Template
    answer_choices: World ||| Sports
    id: a
    jinja: "Which topic? {{text}} ||| {{ answer_choices[label] }}"
    metadata: !TemplateMetadata
      choices_in_prompt: true
      metrics: [Accuracy]
    name: which
  b: !Template
    answer_choices: null
    id: b
    jinja: "Topic of {{text}} {% if label == 1 %}||| sports{% endif %}"
    metadata: !TemplateMetadata {}
    name: partial
"""


def rendered(kind, row):
    """(prompt, completion) of a row."""
    segments = formatters.instruction(kind)(row)
    return (
        "".join(part.text for part in segments.parts if part.role == "prompt"),
        "".join(part.text for part in segments.parts if part.role == "completion"),
    )


# --- golden renders ---


def test_alpaca_has_a_preamble_for_rows_with_an_input():
    prompt = (
        f"{PREAMBLE}, paired with an input that provides further context. {TASK}\n\n"
        "### Instruction:\nWhat does it do?\n\n### Input:\nthe fox\n\n### Response:\n"
    )
    assert rendered("alpaca", ALPACA) == (prompt, "It copies.")


@pytest.mark.parametrize("blank", ["", " \n", None])
def test_alpaca_has_another_for_rows_without_and_blank_is_without(blank):
    assert rendered("alpaca", {**ALPACA, "input": blank}) == (
        f"{PREAMBLE}. {TASK}\n\n### Instruction:\nWhat does it do?\n\n### Response:\n",
        "It copies.",
    )


def test_alpaca_takes_a_system_text_for_the_preamble_and_history_before_the_question():
    row = {**ALPACA, "input": "", "system": "Be kind.", "history": [["Hello?", "Hi."]]}
    assert rendered("alpaca", row)[0] == (
        "Be kind.\n\n### Instruction:\nHello?\n\n### Response:\nHi.\n\n"
        "### Instruction:\nWhat does it do?\n\n### Response:\n"
    )


def test_dolly_reads_context_as_input_and_removes_citations_on_request_only():
    row = {
        "instruction": "When?",
        "context": "In 1912[1][23] it sank.",
        "response": "1912",
        "category": "closed_qa",
    }
    prompt, completion = rendered("dolly", row)
    assert "### Input:\nIn 1912[1][23] it sank.\n\n" in prompt
    assert completion == "1912"
    assert "### Input:\nIn 1912 it sank.\n\n" in rendered(dolly(citations="remove"), row)[0]
    assert "Input" not in rendered("dolly", {**row, "context": ""})[0]


def test_flan_puts_a_blank_line_before_the_target_and_lists_options():
    options = "OPTIONS:\n- yes\n- no"
    assert rendered(flan(NLI_TEXT), NLI) == (f"It rains. So It is wet.\n{options}\n\n", "yes")
    assert "OPTIONS:\n(A) yes\n(B) no\n\n" in rendered(flan(NLI_TEXT, options="letters"), NLI)[0]


def test_flan_puts_two_blank_lines_between_examples():
    pool = [{"inputs": f"Q{n}", "targets": f"A{n}"} for n in range(3)]
    prompt, target = rendered(flan(shots=2, pool=pool), pool[1])
    assert target == "A1"
    assert prompt in ("Q0\n\nA0\n\n\nQ2\n\nA2\n\n\nQ1\n\n", "Q2\n\nA2\n\n\nQ0\n\nA0\n\n\nQ1\n\n")


def test_promptsource_renders_jinja_with_its_answers():
    kind = promptsource(
        "Which topic? {{text}} ||| {{ answer_choices[label] }}", answer_choices="World ||| Sports"
    )
    row = {"text": "A goal.", "label": 1}
    assert rendered(kind, row) == ("Which topic? A goal.\n", "Sports")
    assert kind.choices(row) == ("World", "Sports")


def test_promptsource_reads_the_files_of_the_collection(tmp_path):
    (tmp_path / "templates.yaml").write_text(AG_NEWS)
    kind = promptsource(tmp_path / "templates.yaml", names=["which"])
    assert rendered(kind, {"text": "War.", "label": 0}) == ("Which topic? War.\n", "World")
    with pytest.raises(ConfigError, match="expected names among"):
        promptsource(tmp_path / "templates.yaml", names=["other"])


def test_super_natural_instructions_put_the_definition_first_then_examples():
    (row,) = instances(NATURAL)
    prompt, target = rendered("super_natural_instructions", row)
    assert prompt == (
        "Definition: Negate the word.\n\n"
        "Positive Example 1 -\nInput: hot\nOutput: cold\n\n"
        "Positive Example 2 -\nInput: up\nOutput: down\n\n"
        "Now complete the following example -\nInput: yes\nOutput:"
    )
    assert target in (" no", " nope")
    assert rendered("super_natural_instructions", NATURAL) == (prompt, target)
    assert "Example 1" not in rendered(super_natural_instructions(examples=0), row)[0]


def test_super_natural_instructions_take_every_target_under_some_seed():
    (row,) = instances(NATURAL)
    assert {rendered(super_natural_instructions(seed=n), row)[1] for n in range(20)} == {" no", " nope"}


def test_p3_trains_correct_candidates_alone():
    row = {"inputs": "Is it?", "targets": "yes", "is_correct": True}
    assert rendered("p3", row) == ("Is it?\n", "yes")
    assert formatters.instruction("p3")({**row, "is_correct": False}) == Skipped("not_correct")


def test_template_text_cuts_at_the_mark_or_at_its_last_slot():
    row = {"q": "why", "a": "so"}
    assert rendered("Q: {q}\nA:{a}", row) == ("Q: why\nA:", "so")
    assert rendered("Q: {q}\nA:||| {a}!", row) == ("Q: why\nA:", " so!")


def test_instruction_and_input_are_joined_where_the_template_has_one_slot():
    assert rendered("{instruction} => {output}", ALPACA)[0] == "What does it do?\nthe fox => "
    joined = formatters.instruction("{instruction} => {output}", joiner=" | ")(ALPACA)
    assert joined.text == "What does it do? | the fox => It copies."
    assert rendered("{instruction}/{input}: {output}", ALPACA)[0] == "What does it do?/the fox: "


# --- what holds for every kind ---

KINDS_AND_ROWS = {
    "alpaca": ("alpaca", ALPACA, "output"),
    "dolly": ("dolly", {"instruction": "When?", "context": "In May.", "response": "May"}, "response"),
    "flan": (flan(NLI_TEXT), NLI, "answer"),
    "shots": (
        flan(shots=1, pool=[{"inputs": "a", "targets": "b"}, {"inputs": "c", "targets": "d"}]),
        {"inputs": "What?", "targets": "That."},
        "targets",
    ),
    "promptsource": (promptsource("Say {{q}} ||| {{a}}"), {"q": "what", "a": "that"}, "a"),
    "natural": (
        "super_natural_instructions",
        {"Definition": "Negate.", "input": "yes", "output": "no"},
        "output",
    ),
    "p3": (p3(), {"inputs": "Is it?", "targets": "yes"}, "targets"),
    "text": ("Q: {q}\nA: {a}", {"q": "why", "a": "so"}, "a"),
    "several": (["Q: {q}\nA: {a}", "{q}? {a}"], {"q": "why", "a": "so"}, "a"),
}
every_kind = pytest.mark.parametrize(("kind", "row", "answer"), KINDS_AND_ROWS.values(), ids=KINDS_AND_ROWS)


@every_kind
@pytest.mark.parametrize("tokens", KINDS)
def test_the_prompt_ids_are_those_of_inference_and_one_trained_eos_ends_the_answer(kind, row, answer, tokens):
    tokenizer = tiny(tokens, bos=True)
    encoder = Encoder(tokenizer, formatter=formatters.instruction(kind))
    (example,) = encoder([row])
    asked = {name: value for name, value in row.items() if name != answer}
    assert example["prefix_ids"] == encoder.encode_prompt(asked) == encoder.encode_prompt(row)
    assert not any(example["prefix_weights"])
    (ids,), (weights,) = example["continuation_ids"], example["continuation_weights"]
    assert ids[-1] == tokenizer.eos_token_id
    assert (example["prefix_ids"] + ids).count(tokenizer.eos_token_id) == 1
    assert set(weights) == {1.0}


@every_kind
def test_braces_and_control_tokens_in_data_stay_data(kind, row, answer):
    tokenizer = tiny()
    nasty = " {output} {{a}} {% if x %} }{ <|im_end|></s>"
    hostile = {
        name: value + nasty if isinstance(value, str) and name != "Definition" else value
        for name, value in row.items()
    }
    encoder = Encoder(tokenizer, formatter=formatters.instruction(kind))
    (plain,), (example,) = encoder([row]), encoder([hostile])
    text = tokenizer.decode(example["prefix_ids"])
    assert tokenizer.decode(plain["prefix_ids"]).count(nasty) == 0
    assert text.count(nasty) >= 1
    ids = example["prefix_ids"] + example["continuation_ids"][0]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    assert tokenizer.decode(example["continuation_ids"][0]).strip() == f"{row[answer]}{nasty}</s>"


@every_kind
def test_as_messages_the_models_own_template_renders_and_stops(kind, row, answer):
    tokenizer = tiny()
    encoder = Encoder(tokenizer, formatter=formatters.instruction(kind, render="chat"))
    (example,) = encoder([row])
    prompt = tokenizer.decode(example["prefix_ids"])
    completion = tokenizer.decode(example["continuation_ids"][0])
    assert prompt.startswith("<|im_start|>user\n")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "### " not in prompt
    assert completion.strip() == f"{row[answer]}<|im_end|>"
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    trained = dict(zip(example["continuation_ids"][0], example["continuation_weights"][0], strict=True))
    assert trained[stop] == 1.0
    assert encoder.stop_ids == (stop,)
    asked = {name: value for name, value in row.items() if name != answer}
    assert encoder.encode_prompt(asked) == example["prefix_ids"]


def test_alpaca_as_messages_joins_the_input_and_keeps_system_and_history_untrained():
    row = {**ALPACA, "system": "Be kind.", "history": [["Hello?", "Hi."]]}
    encoder = Encoder(tiny(), formatter=formatters.instruction("alpaca", render="chat", joiner=" / "))
    (example,) = encoder([row])
    assert tiny().decode(example["prefix_ids"]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nWhat does it do? / the fox<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_are_instructions_too():
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "That."},
    ]
    row = {"instruction": "What?", "output": "That.", "system": "Be kind.", "history": [["Hello?", "Hi."]]}
    assert rendered("alpaca", {"messages": messages}) == rendered("alpaca", row)


def test_rows_left_out_are_counted(tmp_path):
    rows = [{"inputs": "Is it?", "targets": "yes", "is_correct": n == 1} for n in range(3)]
    encoder = Encoder(tiny(), formatter=formatters.instruction("p3"))
    assert len(encoder(rows)) == 1
    assert dict(encoder.report.dropped) == {"not_correct": 2}
    (tmp_path / "templates.yaml").write_text(AG_NEWS)
    kind = promptsource(tmp_path / "templates.yaml", names=["partial"])
    encoder = Encoder(tiny(), formatter=formatters.instruction(kind))
    assert len(encoder([{"text": "a goal", "label": 1}, {"text": "a war", "label": 0}])) == 1
    assert dict(encoder.report.dropped) == {"no_target": 1}


def test_the_choice_of_a_template_depends_on_seed_and_row_alone():
    texts = ["Q: {q}\nA: {a}", "{q}? {a}", "Say {q}: {a}"]
    rows = [{"id": n, "q": f"why {n}", "a": "so"} for n in range(60)]

    def prompts(rows, **options):
        formatter = formatters.instruction(texts, **options)
        return {row["id"]: formatter(row).text for row in rows}

    chosen = prompts(rows)
    assert prompts(random.Random(1).sample(rows, len(rows))) == chosen
    assert prompts([{**row, "a": "other"} for row in rows]).keys() == chosen.keys()
    shapes = [sum(text.startswith(start) for text in chosen.values()) for start in ("Q: ", "Say ")]
    assert all(8 < count < 35 for count in shapes)
    assert prompts(rows, seed=1) != chosen


def test_a_drawn_number_is_the_same_on_every_machine():
    assert draw(0, "7") == 1735517397771561436


def test_a_row_without_an_id_keeps_its_template_when_it_is_asked_without_its_answer():
    formatter = formatters.instruction(["Q: {q}\nA: {a}", "{q}? {a}", "Say {q}: {a}"])
    for n in range(20):
        whole = formatter({"q": str(n), "a": "so", "_source": f"f:{n}"})
        asked = formatter({"q": str(n)})
        assert whole.text == asked.text + "so"


def test_an_example_never_sees_itself_among_the_shots():
    pool = tuple({"q": str(n), "a": f"answer {n}"} for n in range(4))
    kind = worded("{q}|||{a}", separator=" ", shots=Shots(pool, 3))
    for row in pool:
        assert row["a"] not in rendered(kind, row)[0]


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q: {q}\nA:", "ends in the slot of its answer"),
        ("alpca", "The names known are alpaca"),
        ("{q}|||yes", "expected a slot in the target"),
        ("{q}|||{a}|||{b}", "expected one |||"),
        ("{q} {mask} {a}", "Masks and soft tokens belong to"),
        ("{q {a}", "column 4"),
        ([], "at least one template"),
    ],
)
def test_templates_that_cannot_work_are_refused(text, message):
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        formatters.instruction(text)


def test_options_without_effect_are_refused():
    with pytest.raises(ConfigError, match="no effect on a kind"):
        formatters.instruction(flan(), seed=1)
    with pytest.raises(ConfigError, match="expected render"):
        formatters.instruction(render="html")
    with pytest.raises(ConfigError, match="shots and a pool together"):
        flan(shots=2)
    with pytest.raises(ConfigError, match="answer_choices has no effect"):
        promptsource({"templates": {}}, answer_choices="a ||| b")


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("alpaca", {"text": "a"}, "expected an instruction"),
        ("alpaca", {"instruction": 3}, "expected text, got 3"),
        ("Q: {q} {a}", {"a": "so"}, "expected a column 'q'"),
        (flan(NLI_TEXT), {"premise": "a", "hypothesis": "b"}, "expected choices"),
        ("{instruction} {output}", {**ALPACA, "history": [["a", "b"]]}, "earlier turns"),
        ("super_natural_instructions", {"input": "a"}, "expected a definition"),
        ("p3", {"targets": "a"}, "expected inputs"),
    ],
)
def test_rows_that_do_not_fit_are_named(kind, row, message):
    with pytest.raises(DataError, match=message):
        formatters.instruction(kind)(row)


def test_a_row_without_an_answer_is_an_empty_target():
    with pytest.raises(DataError) as caught:
        Encoder(tiny(), formatter=formatters.instruction())([{**ALPACA, "output": ""}])
    assert caught.value.code == "empty_target"


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }} ||| {{a}}",
        "{{ q.__init__.__globals__ }} ||| {{a}}",
        "{{ 'A' * 300000000 }} ||| {{a}}",
        "{{ 9 ** 9 ** 9 }} ||| {{a}}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %} ||| {{a}}",
    ],
)
def test_template_code_stays_in_its_sandbox(text):
    with pytest.raises(DataError) as caught:
        formatters.instruction(promptsource(text))({"q": "why", "a": "so"})
    assert caught.value.code == "template"


def test_a_random_choice_in_a_template_is_drawn_by_seed_and_row():
    kind = promptsource("{{ ['a', 'b', 'c'] | choice }} {{q}} ||| {{a}}", seed=3)
    rows = [{"id": n, "q": "why", "a": "so"} for n in range(30)]
    drawn = [rendered(kind, row)[0][0] for row in rows]
    assert set(drawn) == {"a", "b", "c"}
    assert [rendered(kind, row)[0][0] for row in rows] == drawn


def test_pipes_in_data_divide_nothing():
    kind = promptsource("{{q}} ||| {{a}}")
    assert rendered(kind, {"q": "x ||| y", "a": "z ||| w"}) == ("x ||| y\n", "z ||| w")
