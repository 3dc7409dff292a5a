"""Whatever is given for an option, the answer names the option, what it must be, and what it was."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from copy import deepcopy
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ftlib as ft
from ftlib.checks import COUNT, INTEGER, NAMES, NATURAL, PATH, SWITCH, TEXT, check, listed, number, one_of
from ftlib.errors import ConfigError, DataError, FtlibError
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import tiny_model
from tests.trainers.ppo_tiny import by_tokens, prompts
from tests.trainers.preferences import preference_trainer
from tests.trainers.tiny import sft

ANYTHING: list[Any] = [
    None,
    "x",
    "1",
    "",
    -1,
    0,
    1.5,
    math.nan,
    math.inf,
    [],
    {},
    (),
    True,
    b"x",
    object(),
    "(",
]
RECORDS = ft.load_records([{"prompt": f"Where is {n}?", "completion": " Here."} for n in range(6)])


@pytest.mark.parametrize(
    ("wanted", "words", "holds", "fails"),
    [
        (COUNT, "a whole number >= 1", [1, 10**9], [0, 1.0, True, "1", None]),
        (NATURAL, "a whole number >= 0", [0], [-1, False]),
        (INTEGER, "a whole number", [-5], [0.0, True]),
        (COUNT.or_none, "a whole number >= 1, or None", [None, 3], [0]),
        (
            number(0),
            "a finite number >= 0",
            [0, 1e300, Fraction(1, 3)],
            [-1e-9, math.inf, math.nan, "0", True],
        ),
        (number(above=0, most=1), "a number > 0 and <= 1", [1], [0, 1.1]),
        (number(0, below=1), "a number >= 0 and < 1", [0.0], [1]),
        (number(above=0, most=math.inf), "a number > 0", [math.inf], [0, math.nan]),
        (number(), "a finite number", [-3], [-math.inf, None]),
        (SWITCH, "True or False", [True, False], [0, 1, "no", None]),
        (TEXT, "text", [""], [None, b""]),
        (PATH, "a path", ["a", Path("a")], [1, None]),
        (NAMES, "a dict of names to names", [{}, {"a": "b"}], [{"a": 1}, "ab", None]),
        (one_of(Literal["a", "b"]), "one of ['a', 'b']", ["a"], ["c", [], None]),
        (listed("ids", INTEGER.holds, least=1), "a list of ids, 1 or more", [[1], (2,)], [[], "1", 1, [1.0]]),
    ],
)
def test_what_is_wanted_holds_for_it_and_for_nothing_else(wanted, words, holds, fails):
    assert wanted.words == words
    assert [wanted.holds(value) for value in holds] == [True] * len(holds)
    assert [wanted.holds(value) for value in fails] == [False] * len(fails)


def test_the_first_option_that_is_wrong_is_named():
    with pytest.raises(ConfigError, match=r"^lora: r: expected a whole number >= 1, got '8'\.$"):
        check("lora", {"alpha": (None, TEXT.or_none), "r": ("8", COUNT), "s": ("9", COUNT)})


# -- the public surface, swept ---------------------------------------------------------------------

CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "TrainConfig": (ft.TrainConfig, ()),
    "PPOConfig": (ft.PPOConfig, ()),
    **{name: (getattr(ft.adapters, name), ()) for name in ("lora", "ia3", "prompt", "p_tuning", "prefix")},
    "stack": (ft.adapters.stack, (ft.adapters.prompt(2), ft.adapters.lora(2))),
    "merge": (ft.adapters.merge, (tiny_model("llama"),)),
    "load": (ft.load, ("no/such/folder",)),
    "load_records": (ft.load_records, ([{"prompt": "a", "completion": "b"}],)),
    "split": (ft.split, (RECORDS,)),
    "Encoder": (ft.Encoder, (tiny(),)),
    "deduplicate": (ft.deduplicate, (RECORDS,)),
    "decontaminate": (ft.decontaminate, (RECORDS, ["a text"])),
    "few_shot_split": (ft.few_shot_split, ([{"label": "a"}] * 4, 1)),
    "mix": (ft.mix, ({"a": RECORDS},)),
    "collate": (ft.collate, ([],)),
    "load_report": (ft.load_report, (RECORDS,)),
    "compare": (ft.compare, (["x"], ["y"], ["Q"])),
    **{name: (getattr(ft.objectives, name), ()) for name in ("Reward", "DPO", "PPO", "Classification")},
    "weighted": (ft.objectives.weighted, ({ft.objectives.SFT(): 1.0},)),
    "ensemble": (ft.rewards.ensemble, ([len],)),
    **{name: (getattr(ft.plots, name), ([],)) for name in ("loss", "margins", "reward", "roc", "confusion")},
}


@pytest.mark.parametrize("name", CALLS)
def test_no_argument_of_any_type_breaks_out_below_the_surface(name, monkeypatch):
    """Each argument in turn is replaced: the call works, or answers with an error of this library."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    function, arguments = CALLS[name]
    names = list(inspect.signature(function).parameters)
    kinds = inspect.signature(function).parameters
    for option in (one for one in names if kinds[one].kind is not inspect.Parameter.VAR_KEYWORD):
        for value in ANYTHING:
            given_ = dict(zip(names, arguments, strict=False)) | {option: value}
            try:
                function(**given_)
            except FtlibError as error:
                assert len(str(error)) > 20, (option, value)  # noqa: PT017  both outcomes are right
            except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
                pytest.fail(f"{name}({option}={value!r:.30}): {type(error).__name__}: {error}")


@pytest.mark.parametrize("value", ANYTHING, ids=lambda value: f"{value!r:.12}")
def test_only_an_adapter_is_attached_only_to_a_model_and_only_under_a_name(value):
    adapter, model = ft.adapters.lora(2), tiny_model("llama")
    with pytest.raises(FtlibError):
        ft.adapters.attach(model, value)
    with pytest.raises(FtlibError):
        ft.adapters.attach(value, adapter)
    if not isinstance(value, str) or not value:
        with pytest.raises(ConfigError, match="attach: name: expected a word without dots"):
            ft.adapters.attach(model, adapter, name=value)


@given(st.text(max_size=30))
def test_any_other_name_of_an_option_is_answered_with_one_that_exists(name):
    for config in (ft.TrainConfig, ft.PPOConfig):
        if name not in inspect.signature(config).parameters:
            with pytest.raises(ConfigError, match="unknown option"):
                config(**{name: 1})


@pytest.mark.parametrize("option", ["objective", "encoder", "callbacks", "config", "adapter", "tokenizer"])
@pytest.mark.parametrize("value", ["x", 1.5, [3], object()], ids=["text", "number", "list", "object"])
def test_a_trainer_refuses_what_is_no_part_of_it(option, value):
    with pytest.raises(FtlibError):
        ft.SFTTrainer(tiny_model("llama"), sft().train_data, **{option: value})


TRAINERS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "SFTTrainer": (ft.SFTTrainer, lambda: {"train_dataset": sft().train_data}),
    "RewardTrainer": (
        ft.RewardTrainer,
        lambda: {"train_dataset": preference_trainer(ft.DPOTrainer).train_data},
    ),
    "DPOTrainer": (ft.DPOTrainer, lambda: {"train_dataset": preference_trainer(ft.DPOTrainer).train_data}),
    "PPOTrainer": (ft.PPOTrainer, lambda: {"prompts": prompts(4), "reward": by_tokens}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_no_argument_of_a_trainer_breaks_out_below_the_surface(name):
    kind, usual = TRAINERS[name]
    base, given_ = tiny_model("llama"), usual()
    kind(model=deepcopy(base), adapter=ft.adapters.lora(2), **given_)  # as it stands, it is right
    for option in inspect.signature(kind).parameters:
        for value in ANYTHING:
            options = {"model": deepcopy(base), "adapter": ft.adapters.lora(2), **given_, option: value}
            try:
                kind(**options)
            except FtlibError as error:
                assert len(str(error)) > 20, (option, value)  # noqa: PT017  both outcomes are right
            except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
                pytest.fail(f"{name}({option}={value!r:.30}): {type(error).__name__}: {error}")


def test_what_is_asked_of_a_trainer_is_checked():
    trainer = sft()
    with pytest.raises(ConfigError, match="save: folder: expected a path, got 3"):
        trainer.save(3)
    with pytest.raises(ConfigError, match="train: resume: expected a path, got 3"):
        trainer.train(resume=3)
    with pytest.raises(ConfigError, match="generate: expected a list of prompts, got None"):
        trainer.generate(None)


def test_modules_that_are_not_there_are_refused_by_name():
    """peft trains those it finds, and says nothing of the others."""
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"target_modules.*found none for \['v_prj'\].*q_proj"):
        ft.adapters.attach(model, ft.adapters.lora(2, targets=["q_proj", "v_prj"]))
    with pytest.raises(ConfigError, match=r"modules_to_save.*found none for \['head'\]"):
        ft.adapters.attach(model, ft.adapters.lora(2, modules_to_save=["head"]))
    with pytest.raises(ConfigError, match=r"found none for \['layers"):
        ft.adapters.attach(model, ft.adapters.lora(2, targets=r"layers\.0\..*"))


def test_a_configuration_that_lists_many_architectures_trains_what_is_there(caplog):
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "c_attn"])
    assert ft.adapters.attach(tiny_model("llama"), config).peft_config
    assert "no module of the model is called c_attn" in caplog.text


@pytest.mark.parametrize("kind", [ft.DPOTrainer, ft.RewardTrainer])
def test_single_answers_are_no_comparisons(kind):
    with pytest.raises(DataError, match=r"train_dataset: expected comparisons.*1 answer in rows:0"):
        kind(tiny_model("llama"), sft().train_data, adapter=ft.adapters.lora(2))


def test_columns_that_differ_in_case_alone_are_mapped_in_the_message():
    with pytest.raises(DataError, match=r"columns=\{'label': 'Label', 'text': 'Text'\}"):
        ft.load_records([{"Text": "good", "Label": "pos"}])
