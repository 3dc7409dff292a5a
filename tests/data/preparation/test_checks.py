"""Each check: when it speaks, what it does by default, and when it holds back."""

from __future__ import annotations

import pytest

from tests.data.preparation.harness import execute, lines, pairs

# Prompts and completions that start and end unlike each other.
ASKED = [
    "What is a fen?",
    "Name a red berry",
    "How old is the oak",
    "Where does the Inn rise?",
    "Describe basalt",
]
SAID = ["A wet meadow", "cranberry or rowan", "Nine hundred years", "in the Engadine", "dark volcanic rock"]
FACTS = list(zip(ASKED, SAID, strict=True))
DONE = [(f"{asked} ->", f" {said}\n") for asked, said in FACTS]


def prompts(run):
    return [row["prompt"] for row in run.records]


def completions(run):
    return [row["completion"] for row in run.records]


def test_finished_data_need_nothing_and_nothing_is_written(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(*DONE)})
    assert (run.exit, run.applied, run.files) == (0, [], {})
    assert run.finding("prompt_separator")["present"] == " ->"
    assert run.finding("completion_ending")["present"] == "\n"
    assert run.report["inference"] == {
        "separator": " ->",
        "ending": "\n",
        "stop": ["\n"],
        "leading_space": True,
        "removed_prefix": None,
    }


@pytest.mark.parametrize(("rows", "speaks"), [(99, True), (100, False)])
def test_fewer_than_a_hundred_rows_get_advice(tmp_path, rows, speaks):
    data = pairs(*((f"Item {k} of many ->", f" piece {k}\n") for k in range(rows)))
    run = execute(tmp_path, {"d.jsonl": data}, "--no")
    assert ("row_count" in run.checks) == speaks


# --- task ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "labels", "task"),
    [(12, 4, "conditional"), (13, 4, "classification")],  # fewer than a third, strictly
)
def test_few_different_completions_make_a_classification(tmp_path, rows, labels, task):
    data = pairs(*((f"{k}th thing ->", f" {'abcd'[k % labels]}") for k in range(rows)))
    run = execute(tmp_path, {"d.jsonl": data})
    assert run.report["task"] == task
    assert ("split" in run.applied) == (task == "classification")


def test_the_task_can_be_told(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(*FACTS)}, "--task", "classification")
    assert run.report["task"] == "classification"
    assert "completion_ending" not in run.checks


def test_the_task_is_guessed_again_before_the_split(tmp_path):
    """12 rows of 2 labels are a classification; without their duplicates 4 rows of 2 labels are none."""
    data = pairs(*([("a thing", "yes"), ("b thing", "no"), ("c item", "yes"), ("d item", "no")] * 3))
    run = execute(tmp_path, {"d.jsonl": data})
    tasks = [each["data"]["task"] for each in run.report["findings"] if each["check"] == "task"]
    assert tasks == ["classification", "conditional"]
    assert list(run.data) == ["d_prepared.jsonl"]


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([("Same?", f"answer {k}") for k in range(4)], "identical_prompts"),
        ([(f"question {k}", "same") for k in range(3)], "identical_completions"),
        ([(f"question {k}", "same") for k in range(4)], "single_class"),
    ],
)
def test_rows_that_are_all_alike_are_refused(tmp_path, rows, code):
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert (run.exit, run.error["code"], run.files) == (1, code, {})


def test_one_row_is_not_alike_to_others(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(("What is a fen?", "A wet meadow"))})
    assert run.records == [{"prompt": "What is a fen? ->", "completion": " A wet meadow\n"}]


def test_one_row_with_a_candidate_has_a_separator(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(("fen? ->", " meadow\n"))})
    assert (run.applied, run.report["inference"]["separator"]) == ([], " ->")


# --- rows that go --------------------------------------------------------------------------------


def test_the_first_of_equal_pairs_stays(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(*FACTS, FACTS[1], (FACTS[1][0], "other words"), FACTS[0])})
    finding = run.finding("duplicate")
    assert (finding["rows"], finding["level"], finding["default"]) == ([6, 8], "warn", "on")
    assert len(run.records) == 6
    assert run.unaccounted() == 0


def test_repetition_without_prompts_carries_information(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(*([("", " heads"), ("", " tails"), ("", " heads")] * 3))})
    finding = run.finding("duplicate")
    assert (finding["default"], finding["count"], finding["level"]) == ("off", 7, "warn")
    assert "forgotten" in finding["message"]
    assert run.files == {}
    assert len(execute(tmp_path, {"d.jsonl": pairs(("", " a"), ("", " a"), ("", " b"))}).records) == 2


@pytest.mark.parametrize(("length", "goes"), [(10_000, False), (10_001, True)])
def test_long_rows_go_without_a_tokenizer_by_characters(tmp_path, length, goes):
    long = ("Say it", "x" * (length - len("Say it")))
    run = execute(tmp_path, {"d.jsonl": pairs(*FACTS, long)})
    assert ("too_long" in run.applied) == goes
    assert run.finding("length_estimate")["rows"] == [6]  # more than 2,048 tokens of 3 bytes


def test_long_texts_without_prompts_stay(tmp_path):
    run = execute(tmp_path, {"d.txt": "x" * 20_000 + "\nshort\n"})
    assert run.finding("too_long")["default"] == "off"
    assert len(run.records) == 2


@pytest.mark.parametrize(("text", "speaks"), [("é" * 14 + "x", False), ("é" * 15, True)])
def test_the_estimate_counts_bytes_not_characters(tmp_path, text, speaks):
    """Ten tokens are thirty bytes: one of the prompt, two of each é."""
    run = execute(tmp_path, {"d.jsonl": pairs(("q", "r"), ("p", text))}, "--max-length", "10", "--no")
    assert ("length_estimate" in run.checks) == speaks


# --- capitals ------------------------------------------------------------------------------------


def test_capitals_go_but_for_separator_and_ending(tmp_path):
    rows = [(f"{asked.upper()} REPLY:", f" {said.upper()} END") for asked, said in FACTS]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert run.applied == ["prompt_case", "completion_case"]
    assert prompts(run)[0] == "what is a fen? REPLY:"
    assert completions(run)[0] == " a wet meadow END"
    assert run.report["inference"]["separator"] == " REPLY:"


def test_a_shared_last_letter_is_no_ending_to_spare(tmp_path):
    rows = [(asked, f"{said.upper()}S.") for asked, said in FACTS]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert completions(run)[0] == " a wet meadows."


def test_one_capital_in_three_letters_is_the_limit(tmp_path):
    """2 · upper > lower: 5 of 15 letters are no reason, 6 of 16 are."""
    quiet = [("aaaaaaaaaa bbb ->", " one two three\n"), ("AAAAA bb ->", " four five six\n")]
    loud = [quiet[0], ("AAAAAAAA bb ->", quiet[1][1])]
    assert "prompt_case" not in execute(tmp_path, {"d.jsonl": pairs(*quiet)}, "--no").checks
    assert "prompt_case" in execute(tmp_path, {"d.jsonl": pairs(*loud)}, "--no").checks


def test_capitals_of_the_separator_alone_are_nothing_to_change(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(("a b REPLY:", " one two\n"), ("c d REPLY:", " two three\n"))})
    assert (run.applied, run.files) == ([], {})


def test_capitals_of_an_ending_are_reported_and_no_reason_to_change_the_text(tmp_path):
    """The letters of " END" outnumber those of short answers, some of which are capitals too."""
    rows = [(f"Item {k} ->", f" {said} END") for k, said in enumerate(("An ox", "Wet fen", "Red oak"))]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    found = run.finding("completion_case")
    assert (found["level"], found["default"], run.applied) == ("info", "off", [])
    asked = execute(tmp_path, {"e.jsonl": pairs(*rows)}, "--fix", "completion_case=on")
    assert completions(asked) == [" an ox END", " wet fen END", " red oak END"]


def test_capitals_before_an_ending_of_capitals_go(tmp_path):
    rows = [(f"Item {k} ->", f" {said} END") for k, said in enumerate(("AN OX", "WET FEN", "RED OAK"))]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert run.finding("completion_case")["default"] == "on"
    assert completions(run) == [" an ox END", " wet fen END", " red oak END"]


@pytest.mark.parametrize(
    "rows",
    [
        [(f"Item {k} ->", f" {('GO', 'STOP')[k % 2]}") for k in range(12)],  # labels
        [(f"Item {k} ->", f" CODE{k}\n") for k in range(4)],  # one word
    ],
)
def test_labels_and_single_words_keep_their_capitals(tmp_path, rows):
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert run.finding("completion_case")["default"] == "off"
    assert "completion_case" not in run.applied
    told = execute(tmp_path, {"d2.jsonl": pairs(*rows)}, "--fix", "completion_case=on")
    assert all(text == text.lower() for text in completions(told))


# --- separator, prefixes, ending, space ----------------------------------------------------------

MARKS = ["###", "===", "---", "===>", "--->"]


@pytest.mark.parametrize("taken", range(7))
def test_the_first_free_separator_is_taken(tmp_path, taken):
    order = [" ->", *(f"\n\n{mark}\n\n" for mark in MARKS), "\n\n### =>\n\n"]
    held = "".join(f"{separator}." for separator in order[:taken])
    run = execute(
        tmp_path, {"d.jsonl": pairs((f"Look at {held} this", "alpha beta"), ("And that", "gamma delta"))}
    )
    expected = order[taken] if taken < len(order) else order[-1]
    assert run.finding("prompt_separator")["append"] == expected
    assert prompts(run) == [f"Look at {held} this{expected}", f"And that{expected}"]


def test_prompts_of_several_lines_get_no_arrow(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(("one\ntwo", "alpha beta"), ("three", "gamma delta"))})
    assert run.finding("prompt_separator")["append"] == "\n\n###\n\n"


@pytest.mark.parametrize(
    ("shared", "separator"),
    [
        (" ->", " ->"),
        ("? ->", " ->"),
        ("\n\n===>\n\n", "\n\n===>\n\n"),
        ("\n", "\n"),
        (" Answer:", " Answer:"),
        (" =>", " =>"),
    ],
)
def test_what_all_prompts_end_in_is_a_separator_if_it_looks_like_one(tmp_path, shared, separator):
    run = execute(tmp_path, {"d.jsonl": pairs(("Alder" + shared, " tree\n"), ("fern" + shared, " plant\n"))})
    assert run.finding("prompt_separator")["present"] == separator
    assert run.applied == []


@pytest.mark.parametrize("shared", ["?", "s", "Answer:", " please"])
def test_chance_is_no_separator(tmp_path, shared):
    run = execute(tmp_path, {"d.jsonl": pairs(("Alder" + shared, " tree\n"), ("fen" + shared, " meadow\n"))})
    finding = run.finding("prompt_separator")
    assert (finding["doubtful"], finding["append"], finding["level"]) == (shared, " ->", "warn")
    assert prompts(run) == [f"Alder{shared} ->", f"fen{shared} ->"]


def test_a_long_separator_and_one_that_repeats_are_noted(tmp_path):
    long = " and so the answer:"
    rows = [(f"Alder{long}", " tree\n"), (f"fern{long} again{long}", " plant\n")]
    finding = execute(tmp_path, {"d.jsonl": pairs(*rows)}).finding("prompt_separator")
    assert (finding["long"], finding["repeated_in_rows"], finding["level"]) == (True, [2], "warn")


@pytest.mark.parametrize(("prefix", "goes"), [("Of plants: ", False), ("Question of: ", True)])
def test_a_shared_start_of_more_than_twelve_characters_goes(tmp_path, prefix, goes):
    assert (len(prefix) > 12) == goes
    rows = [(prefix + asked, said) for asked, said in DONE]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert run.finding("prompt_prefix")["prefix"] == prefix
    assert run.report["inference"]["removed_prefix"] == (prefix if goes else None)
    if goes:
        assert prompts(run) == [asked for asked, _ in DONE]


def test_a_prefix_that_is_a_whole_prompt_stays(tmp_path):
    prefix = "Tell me a story"
    rows = [
        (f"{prefix} ->", " one\n"),
        (f"{prefix} of bees ->", " two\n"),
        (f"{prefix} of ants ->", " three\n"),
    ]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert run.finding("prompt_prefix")["withheld"] is True
    assert run.applied == []


def test_a_shared_start_of_completions_goes_but_for_a_space(tmp_path):
    rows = [(asked, f" Well: {said}") for (asked, _), (_, said) in zip(DONE, DONE, strict=True)]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert run.finding("completion_prefix")["prefix"] == " Well:  "
    assert completions(run) == [said for _, said in DONE]


def test_four_shared_characters_are_too_few(tmp_path):
    rows = [(asked, " No:" + said.strip(" ")) for asked, said in DONE]
    assert "completion_prefix" not in execute(tmp_path, {"d.jsonl": pairs(*rows)}).checks


def test_a_completion_is_never_emptied(tmp_path):
    rows = [("Alder ->", " maybe\n"), ("fern ->", " maybe not\n"), ("moss ->", " maybe so\n")]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    finding = run.finding("completion_prefix")
    assert (finding["prefix"], finding["withheld"]) == (" maybe", True)
    assert run.applied == []


ENDINGS = ["\n", " END", "***", "+++", "&&&", "$$$", "@@@", "%%%", " [END]"]


@pytest.mark.parametrize("taken", range(10))
def test_the_first_free_ending_is_taken(tmp_path, taken):
    held = "".join(f"{ending}," for ending in ENDINGS[:taken])
    rows = [("Alder", f"a tree{held} it is"), ("fern", "no tree at all")]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert run.finding("completion_ending")["append"] == ENDINGS[min(taken, 8)]
    assert run.report["inference"]["stop"] == [ENDINGS[min(taken, 8)]]


@pytest.mark.parametrize(("shared", "ending"), [(".", "."), ("\n", "\n"), ("!\n", "\n"), (" END", " END")])
def test_completions_that_end_alike_have_an_ending(tmp_path, shared, ending):
    rows = [("Alder ->", " a tree" + shared), ("fern ->", " a plant" + shared)]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert run.finding("completion_ending")["present"] == ending


def test_an_ending_of_ones_own(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(*FACTS)}, "--ending", " <stop>")
    assert all(text.endswith(" <stop>") for text in completions(run))
    assert run.report["inference"]["stop"] == [" <stop>"]


def test_the_end_of_sequence_token_is_ending_enough(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(*FACTS)}, "--ending", "eos")
    assert run.applied == ["prompt_separator", "leading_space"]
    assert run.report["inference"]["stop"] == []


def test_labels_get_no_ending_and_no_stop_text(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(*((f"{k} thing", ("ham", "spam")[k % 2]) for k in range(12)))})
    assert "completion_ending" not in run.checks
    assert run.report["inference"]["stop"] == []


def test_a_space_is_added_where_it_is_absent(tmp_path):
    rows = [("Alder ->", "a tree\n"), ("fern ->", " a plant\n"), ("moss ->", "\ta carpet\n")]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert run.finding("leading_space")["count"] == 2
    assert completions(run) == [" a tree\n", " a plant\n", " \ta carpet\n"]


# --- what deserves a look ------------------------------------------------------------------------


def test_near_duplicates_are_reported_and_stay(tmp_path):
    rows = [
        *DONE,
        ("what is a FEN ->", " a wet meadow!\n"),
        ("Name a  red berry ->", " cranberry, or rowan\n"),
    ]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    finding = run.finding("near_duplicate")
    assert (finding["clusters"], finding["count"], finding["default"]) == ([[1, 6], [2, 7]], 2, "off")
    assert run.files == {}
    told = execute(tmp_path, {"e.jsonl": pairs(*rows)}, "--fix", "near_duplicate=on")
    assert len(told.records) == len(DONE)


def test_one_prompt_with_two_answers_is_a_conflict(tmp_path):
    rows = [*DONE, ("what is a fen ->", " Something else\n"), (DONE[1][0], " " + SAID[1].upper() + "\n")]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    finding = run.finding("conflicting_completion")
    assert (finding["clusters"], finding["count"], finding["level"]) == ([[1, 6]], 1, "warn")


def test_some_empty_prompts_are_reported(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(*FACTS, ("", "out of nowhere"))})
    assert run.finding("empty_prompt")["rows"] == [6]


def test_blanks_before_the_separator_are_reported(tmp_path):
    rows = [*DONE, ("What is moss?  ->", " a carpet\n")]
    assert execute(tmp_path, {"d.jsonl": pairs(*rows)}).finding("trailing_blank")["rows"] == [6]


def test_a_separator_that_ends_in_a_newline_is_no_trailing_blank(tmp_path):
    rows = [("Alder\n\n###\n\n", " a tree\n"), ("fern\n\n###\n\n", " a plant\n")]
    assert "trailing_blank" not in execute(tmp_path, {"d.jsonl": pairs(*rows)}).checks


def test_separators_in_completions_are_reported(tmp_path):
    rows = [*DONE, ("What is moss? ->", " green -> brown\n")]
    assert execute(tmp_path, {"d.jsonl": pairs(*rows)}).finding("separator_in_completion")["rows"] == [6]


def test_answers_in_their_prompts_are_reported(tmp_path):
    """Normalised, of four characters or more: `bog` is too short to be more than chance."""
    rows = [*DONE, ("Is it Peat, or not? ->", " peat!\n"), ("A bog or a fen? ->", " bog\n")]
    assert execute(tmp_path, {"d.jsonl": pairs(*rows)}).finding("answer_in_prompt")["rows"] == [6]


def test_control_characters_are_reported_and_go_on_request(tmp_path):
    rows = [*DONE, ("What\x00 is moss? ->", " a\tcarpet\n")]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert (run.finding("control_char")["rows"], run.files) == ([6], {})
    told = execute(tmp_path, {"e.jsonl": pairs(*rows)}, "--fix", "control_char=on")
    assert told.records[-1] == {"prompt": "What is moss? ->", "completion": " a\tcarpet\n"}


def test_a_completion_of_control_characters_alone_goes_with_them(tmp_path):
    rows = [*DONE, ("What is moss? ->", " \x07\n"), ("What is peat? ->", " \x1b turf\n")]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)}, "--fix", "control_char=on")
    assert [row["completion"] for row in run.records[len(DONE) :]] == ["  turf\n"]
    assert run.report["rows"]["dropped"] == {"control_char": 1}
    assert run.unaccounted() == 0


PERSONAL = {
    "email": "Write to jo.doe+x@mail.example.org today",
    "phone": "Call +49 30 901820 or ring",
    "card": "Pay with 5500 0000 0000 0004 now",
    "iban": "Send it to DE89 3704 0044 0532 0130 00 soon",
}


@pytest.mark.parametrize("kind", PERSONAL)
def test_personal_data_are_found_and_shown_masked(tmp_path, kind):
    rows = [*DONE, ("What is due? ->", f" {PERSONAL[kind]}\n")]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    finding = run.finding("pii")
    assert (finding["rows"], finding["kinds"]) == ([6], [kind])
    value = PERSONAL[kind].split(" ", 2)[-1].rsplit(" ", 1)[0]
    assert value not in str(run.report)
    assert "***" in finding["examples"][0]["value"]
    dropped = execute(tmp_path, {"e.jsonl": pairs(*rows)}, "--fix", "pii=on")
    assert len(dropped.records) == len(DONE)


@pytest.mark.parametrize(
    "text",
    [
        "on 2024-01-15 at noon",
        "1234 5678 9012 3456 is no card",
        "version 1.2.3.4",
        "in 1999 and 2001",
        "DE12 3456",
    ],
)
def test_numbers_of_other_kinds_are_not_personal(tmp_path, text):
    run = execute(tmp_path, {"d.jsonl": pairs(*DONE, ("What is due? ->", f" {text}\n"))})
    assert "pii" not in run.checks


# Put together here, so that no scanner takes this file for a leak.
KEYS = {
    "aws": "AKIA" + "Q" * 16,
    "github": "ghp_" + "a1" * 18,
    "openai": "sk-" + "b2" * 12,
    "private_key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "assigned": "hunter2hunter2",
}


@pytest.mark.parametrize("kind", KEYS)
def test_secrets_are_found_and_shown_masked(tmp_path, kind):
    said = f"password = {KEYS[kind]}" if kind == "assigned" else KEYS[kind]
    run = execute(tmp_path, {"d.jsonl": pairs(*DONE, ("How to get in? ->", f" with {said}\n"))})
    finding = run.finding("secret")
    assert (finding["rows"], finding["kinds"], finding["level"]) == ([6], [kind], "warn")
    assert KEYS[kind] not in str(run.report)


# --- labels --------------------------------------------------------------------------------------


def labelled(*counts):
    """Rows of labels in turn, as far as their counts last."""
    rows = [label for label, count in counts for _ in range(count)]
    return pairs(*((f"Item no {k} ->", label) for k, label in enumerate(rows)))


def test_spellings_of_one_label_are_reported(tmp_path):
    run = execute(tmp_path, {"d.jsonl": labelled((" yes", 12), (" Yes", 12), (" no", 12))})
    finding = run.finding("label_variant")
    assert (finding["labels"], finding["count"], finding["level"]) == ([[" Yes", " yes"]], 1, "warn")


@pytest.mark.parametrize(("rows", "speaks"), [(9, True), (10, False)])
def test_fewer_than_ten_rows_make_a_rare_class(tmp_path, rows, speaks):
    run = execute(tmp_path, {"d.jsonl": labelled((" fine", 20), (" odd", rows))})
    assert ("rare_class" in run.checks) == speaks
    if speaks:
        assert run.finding("rare_class")["labels"] == {" odd": rows}


@pytest.mark.parametrize(("rows", "speaks"), [(100, False), (101, True)])
def test_more_than_ten_to_one_is_imbalance(tmp_path, rows, speaks):
    run = execute(tmp_path, {"d.jsonl": labelled((" fine", rows), (" odd", 10))})
    assert ("class_imbalance" in run.checks) == speaks


def test_labels_of_several_words_and_of_one_first_word_are_reported(tmp_path):
    run = execute(tmp_path, {"d.jsonl": labelled((" very good", 12), (" very bad", 12), (" none", 12))})
    finding = run.finding("label_tokens")
    assert (finding["several"], finding["unit"]) == ([" very bad", " very good"], "words")
    assert finding["shared_first"] == [[" very bad", " very good"]]


def test_the_positive_class_is_told_never_guessed(tmp_path):
    data = {"d.jsonl": labelled((" fine", 20), (" fraud", 12))}
    assert execute(tmp_path, data, "--dry-run").report["positive_class"] is None
    assert (
        execute(tmp_path, data, "--dry-run", "--positive-class", "fraud").report["positive_class"] == "fraud"
    )
    wrong = execute(tmp_path, data, "--dry-run", "--positive-class", "theft")
    assert (wrong.exit, "fraud" in wrong.error["message"]) == (2, True)


# --- split ---------------------------------------------------------------------------------------


def test_the_split_keeps_shares_of_classes_and_leaves_no_prompt_on_both_sides(tmp_path):
    rows = [(f"Thing {k // 2} ->", (" a", " b")[k // 2 % 2]) for k in range(80)]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)}, "--fix", "duplicate=off")
    split = run.report["split"]
    assert split["per_class"] == {" a": [32, 8], " b": [32, 8]}  # a fifth of 40 each
    assert (split["shared_prompts"], split["sizes"]) == (0, {"train": 64, "valid": 16})
    train, valid = (run.data[f"d_prepared_{side}.jsonl"] for side in ("train", "valid"))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in valid}
    order = {prompt: at for at, (prompt, _) in enumerate(rows)}
    assert [order[row["prompt"]] for row in train] == sorted(order[row["prompt"]] for row in train)


def test_the_legacy_split_repeats_the_old_membership(tmp_path):
    """numpy's RandomState(42).permutation(15) begins 9, 11, 0, 13, 5, 8, 2, 1, 14, 4, 7, 10."""
    rows = [(f"Thing {k} ->", (" a", " b")[k % 2]) for k in range(15)]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)}, "--split-method", "legacy")
    numbers = {name: [int(row["prompt"].split()[1]) for row in rows] for name, rows in run.data.items()}
    assert numbers["d_prepared_train.jsonl"] == [9, 11, 0, 13, 5, 8, 2, 1, 14, 4, 7, 10]
    assert numbers["d_prepared_valid.jsonl"] == [3, 6, 12]


def test_a_share_of_ones_own_and_a_column_of_groups(tmp_path):
    rows = [{"prompt": f"Thing {k} ->", "completion": (" a", " b")[k % 2], "who": k // 4} for k in range(40)]
    flags = ("--validation", "0.4", "--group", "who")
    run = execute(tmp_path, {"d.jsonl": lines(rows)}, *flags)
    who = {row["prompt"]: row["who"] for row in rows}
    train, valid = (
        {who[row["prompt"]] for row in run.data[f"d_prepared_{side}.jsonl"]} for side in ("train", "valid")
    )
    assert not train & valid
    assert run.report["split"]["sizes"] == {"train": 24, "valid": 16}


def test_a_seed_moves_the_split_and_no_seed_is_zero(tmp_path):
    data = {"d.jsonl": labelled((" a", 40), (" b", 40))}
    sides = [
        execute(tmp_path, data, "--out", str(tmp_path / name), *flags).report["hashes"][
            "d_prepared_valid.jsonl"
        ]
        for name, flags in (("x", ()), ("y", ("--seed", "0")), ("z", ("--seed", "1")))
    ]
    assert sides[0] == sides[1] != sides[2]


def test_a_split_that_was_not_asked_for_is_not_made(tmp_path):
    data = {"d.jsonl": labelled((" a", 20), (" b", 20))}
    run = execute(tmp_path, data, "--fix", "split=off")
    assert (run.report["split"], run.files) == (None, {})


def test_prompts_on_both_sides_of_a_legacy_split_are_leakage(tmp_path):
    rows = [(f"Thing {k // 2} ->", (" a", " b")[k % 2]) for k in range(60)]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)}, "--split-method", "legacy")
    assert run.finding("leakage")["count"] == run.report["split"]["shared_prompts"] > 0
