"""Two answers to each prompt, side by side, whatever the answers hold."""

from __future__ import annotations

import pytest

import ftlib as ft
from ftlib.errors import ConfigError, DataError
from ftlib.evaluation.comparison import COLUMN
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import tiny_model
from tests.trainers.tiny import sft

PROMPTS = ["Who is Heron?", "Where?"]


class Parrot:
    """A trainer, as far as a comparison sees it."""

    def generate(self, prompts, **options):
        return [f"{prompt} {options}" for prompt in prompts]


def test_answers_given_functions_and_trainers_stand_side_by_side():
    seen = ft.compare(["A printer.", "Here."], lambda prompts: ["A printer.", "There."], PROMPTS)
    assert seen.answers == (("A printer.", "A printer."), ("Here.", "There."))
    assert seen.differing == 1
    assert seen.to_dict()[1] == {"prompt": "Where?", "a": "Here.", "b": "There."}
    asked = ft.compare(PROMPTS, Parrot(), PROMPTS, names=("said", "parroted"), max_new_tokens=3)
    assert asked.to_dict()[1]["parroted"] == "Where? {'max_new_tokens': 3}"


def test_a_real_trainer_answers_as_its_own_generate_does():
    tokenizer = tiny(eos=True)
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    rows = [{"prompt": "Hello", "completion": " there"}]
    trainer = ft.SFTTrainer(
        model, rows, tokenizer=tokenizer, adapter=ft.adapters.lora(4), config=ft.TrainConfig(progress="off")
    )
    before = trainer.generate(["Hello"], max_new_tokens=4)
    assert ft.compare(before, trainer, ["Hello"], max_new_tokens=4).differing == 0


def test_html_escapes_prompts_answers_and_names():
    html = ft.compare(["<b>&"], ["\u202ereversed"], ["<script>"], names=("<i>", "after"))._repr_html_()
    assert "&lt;b&gt;&amp;" in html
    assert "&lt;script&gt;" in html
    assert "&lt;i&gt;" in html
    assert "\u202e" not in html
    assert html.startswith("<p>1 of 1 answers differ</p>")


def test_columns_stay_apart_with_long_wide_and_many_lines():
    left, right = "漢字" * 30, "first\n\x1b[31mthird " + "word " * 30
    lines = ft.compare([left], [right], ["Q"]).text.split("\n")[3:]
    bars = {line.index(" | ") + sum(one in "漢字" for one in line) for line in lines}
    assert bars == {COLUMN}  # wide characters take two columns
    assert "\x1b" not in "".join(lines)


def test_prompts_of_turns_and_of_rows_are_shown_as_text():
    turns = [{"role": "user", "content": "Hi"}]
    seen = ft.compare(["x", "y"], ["x", "y"], [turns, {"prompt": "Bare"}])
    assert seen.prompts == ("user: Hi", "Bare")
    assert str(seen).startswith("0 of 2 answers differ")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((["x"], ["y"], "Who?"), {}, ConfigError, "prompts: expected a list of prompts, got 'Who"),
        ((["x"], ["y"], []), {}, DataError, "at least one prompt"),
        ((["x"], ["y"], PROMPTS), {}, DataError, "one text for each of 2 prompts, got 1"),
        (([1, 2], ["y", "z"], PROMPTS), {}, DataError, "one text for each"),
        ((None, ["y"], ["Q"]), {}, ConfigError, "a: expected a trainer.*got NoneType"),
        ((["x"], tiny_model("llama"), ["Q"]), {}, ConfigError, "b: expected a trainer.*LlamaForCausalLM"),
        ((["x"], ["y"], ["Q"]), {"top_p": 0.5}, ConfigError, "top_p has no effect"),
        ((["x"], ["y"], ["Q"]), {"names": ("a", "a")}, ConfigError, "names: expected two different texts"),
        ((["x"], ["y"], ["Q"]), {"names": "ab"}, ConfigError, "names: expected two different texts"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, options, error, words):
    with pytest.raises(error, match=words):
        ft.compare(*arguments, **options)


def test_options_that_no_trainer_knows_are_refused_by_it():
    with pytest.raises(ConfigError, match="tokenizer"):
        ft.compare(["x"], sft(), ["Q"])
