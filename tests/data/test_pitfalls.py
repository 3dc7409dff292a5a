"""The ways in which training data go wrong in silence, each over the templates of many model families.

`docs/templates.md` lists them with their tests. Those of stop tokens, prompts, BOS, forged control tokens and
weights stand in `test_templates`, those of tokenizers in `test_encode`; here is what else a template breaks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig

from ftlib.data import Encoder, collate, formatters, load_records
from ftlib.errors import DataError
from ftlib.export import CardData, save
from ftlib.models import forward
from tests.data.templates_zoo import FAMILIES, family_tokenizer
from tests.data.test_templates import TRAINABLE, TURNS, encoded, inference, whole
from tests.models_zoo import tiny_model

SHORT = [TURNS[2], {"role": "assistant", "content": "yes"}]
EXCHANGE = TURNS[:2]


def test_there_are_more_than_ten_families() -> None:
    assert len(TRAINABLE) > 10


# --- 1: the stop token is learned, whatever pads ---


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_pad_that_is_the_stop_token_or_eos_changes_nothing(name: str) -> None:
    plain = encoded(name, TURNS)[2].to_list()
    for pad in ("</s>", FAMILIES[name].stop.strip()):
        tokenizer = family_tokenizer(name)
        tokenizer.pad_token = pad
        assert Encoder(tokenizer)(load_records([{"messages": TURNS}])).to_list() == plain


@pytest.mark.parametrize("train_on", ["all", "weighted"])
@pytest.mark.parametrize("name", TRAINABLE)
def test_no_preset_is_said_to_lack_the_stop_token_that_it_learns(name: str, train_on: str) -> None:
    _, encoder, data = encoded(name, EXCHANGE, train_on=train_on)
    (stop,) = encoder.stop_ids
    ids, weights = whole(data[0])
    assert stop in [i for i, weight in zip(ids, weights, strict=True) if weight > 0]
    assert encoder.report.without_terminator == 0
    assert encoder.preview(load_records([{"messages": EXCHANGE}])).rows[0].stops


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_stop_token_that_was_cut_off_is_missed(name: str) -> None:
    _, _, data = encoded(name, EXCHANGE)
    ids, weights = whole(data[0])
    learned = max(k for k, weight in enumerate(weights) if weight > 0)
    for train_on in ("last", "all"):
        options: dict[str, Any] = {"max_length": learned, "overflow": "truncate", "train_on": train_on}
        encoder, rest = encoded(name, EXCHANGE, **options)[1:]
        assert whole(rest[0])[0] == ids[:learned]
        assert (encoder.report.truncated, encoder.report.without_terminator) == (1, 1)


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_stop_token_is_saved_with_the_model_and_the_model_in_memory_left_alone(
    name: str, tmp_path: Path
) -> None:
    _, encoder, _ = encoded(name, EXCHANGE)
    model = tiny_model(vocab_size=512, eos_token_id=2)
    save(tmp_path / "m", model, None, card=CardData("tiny"), stop_ids=encoder.stop_ids)
    saved = GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id
    listed = saved if isinstance(saved, list) else [saved]
    assert set(encoder.stop_ids) <= set(listed)
    assert 2 in listed
    assert model.generation_config.eos_token_id == 2


# --- 2, 10: nothing left to learn is refused, and every cut is counted ---


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_prompt_beyond_the_limit_leaves_nothing_to_learn_and_is_refused(name: str) -> None:
    prompt = len(encoded(name, EXCHANGE)[2][0]["prefix_ids"])
    with pytest.raises(DataError, match=f"the prompt alone fills max_length={prompt}") as caught:
        encoded(name, EXCHANGE, max_length=prompt, overflow="truncate")
    assert (caught.value.code, caught.value.row) == ("empty_target", 1)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_long_conversation_is_refused_dropped_or_cut_as_asked(name: str) -> None:
    _, _, data = encoded(name, SHORT, EXCHANGE)
    short, long = data
    limit = long["length"] - 1
    assert short["length"] <= limit
    with pytest.raises(DataError, match=f"expected at most {limit} tokens") as caught:
        encoded(name, SHORT, EXCHANGE, max_length=limit)
    assert (caught.value.code, caught.value.row) == ("too_long", 2)
    _, encoder, kept = encoded(name, SHORT, EXCHANGE, max_length=limit, overflow="drop")
    assert kept.to_list() == [short]
    assert (encoder.report.rows, encoder.report.dropped) == (2, {"too_long": 1})
    _, encoder, cut = encoded(name, SHORT, EXCHANGE, max_length=limit, overflow="truncate_prompt")
    assert cut[1]["continuation_ids"] == long["continuation_ids"]
    assert len(cut[1]["prefix_ids"]) == len(long["prefix_ids"]) - 1
    assert (encoder.report.truncated, encoder.report.without_terminator) == (1, 0)


# --- 4: a text that was rendered already ---


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rendered_text_gets_no_second_bos_and_ends_in_one_eos(name: str) -> None:
    tokenizer = family_tokenizer(name)
    render = tokenizer.apply_chat_template(EXCHANGE, tokenize=False)
    encoder = Encoder(tokenizer, formatter=formatters.text(control="parse"))
    ids, _ = whole(encoder(load_records([{"text": render}]))[0])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[-2] != tokenizer.eos_token_id
    assert tokenizer.decode(ids).removeprefix("<s>").removesuffix("</s>") == render.removeprefix(
        "<s>"
    ).removesuffix("</s>")


# --- 5, 9, 14: spans start where the model does, and nothing is shifted ---


@pytest.mark.parametrize("name", TRAINABLE)
def test_targets_of_a_batch_are_what_the_model_writes_each_predicted_by_the_token_before(name: str) -> None:
    tokenizer, _, data = encoded(name, EXCHANGE)
    batch = collate([data[0]])
    learned = batch.weights_N > 0
    assert tokenizer.decode(batch.targets_N[learned]) == (
        FAMILIES[name].lead + "It copies a file." + FAMILIES[name].stop
    )
    assert torch.equal(batch.ids_T[batch.rows_N + 1], batch.targets_N)
    first = int(batch.rows_N[learned][0])
    assert batch.ids_T[: first + 1].tolist() == inference(tokenizer, EXCHANGE[:1])


# --- 7: a template's own system text is read once, and learned never ---


@pytest.mark.parametrize("name", TRAINABLE)
def test_answers_of_a_pair_hold_nothing_but_what_the_model_writes(name: str) -> None:
    row = {"prompt": EXCHANGE[:1], "chosen": EXCHANGE[1:], "rejected": SHORT[1:]}
    tokenizer, _, data = encoded(name, row)
    family = FAMILIES[name]
    assert data[0]["prefix_ids"] == inference(tokenizer, EXCHANGE[:1])[: len(data[0]["prefix_ids"])]
    for ids, weights, said in zip(
        data[0]["continuation_ids"],
        data[0]["continuation_weights"],
        ("It copies a file.", "yes"),
        strict=True,
    ):
        learned = [i for i, weight in zip(ids, weights, strict=True) if weight > 0]
        assert tokenizer.decode(data[0]["prefix_ids"] + ids).count(family.lead + said + family.stop) == 1
        assert tokenizer.decode(learned).endswith(said + family.stop)


def test_the_system_text_of_a_template_is_counted_and_can_be_declined() -> None:
    tokenizer, encoder, data = encoded("qwen_2", TURNS)
    assert encoder.report.system_from_template == 1
    assert tokenizer.decode(data[0]["prefix_ids"]).count("You help people.") == 1
    tokenizer, encoder, data = encoded("qwen_2", TURNS, formatter=formatters.chat(system=""))
    assert encoder.report.system_from_template == 0
    assert "You help people." not in tokenizer.decode(whole(data[0])[0])


# --- 11, 17: conversations side by side in a batch ---


@pytest.mark.parametrize("path", ["grouped", "padded"])
@pytest.mark.parametrize("name", TRAINABLE)
def test_conversations_in_one_batch_are_scored_as_each_alone(name: str, path: Any) -> None:
    _, _, data = encoded(name, TURNS, SHORT, EXCHANGE)
    model = tiny_model(vocab_size=512)
    with torch.no_grad():
        alone = [forward(model, collate([row]), hidden=True) for row in data]
        together = forward(model, collate(list(data)), hidden=True, path=path)
    assert_close(together.logprobs_N, torch.cat([each.logprobs_N for each in alone]), rtol=1e-5, atol=1e-5)
    last_CD = torch.cat([each.last_CD for each in alone])  # type: ignore[misc]
    assert_close(together.last_CD, last_CD, rtol=1e-5, atol=1e-5)


# --- 12: a token weighs the same in every batch ---


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_loss_of_a_step_is_the_same_however_it_is_cut(name: str) -> None:
    _, _, data = encoded(name, TURNS, SHORT, EXCHANGE)
    rows, model = list(data), tiny_model(vocab_size=512)

    def summed(batches: list[list[Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        loss, weight = torch.zeros(()), torch.zeros(())
        for batch in map(collate, batches):
            loss = loss - (forward(model, batch).logprobs_N * batch.weights_N).sum()
            weight = weight + batch.weights_N.sum()
        return loss / weight, weight

    with torch.no_grad():
        whole_step, cut = summed([rows]), summed([[row] for row in rows])
    assert_close(whole_step, cut, rtol=1e-5, atol=1e-5)
    assert int(whole_step[1]) == sum(
        weight > 0 for row in rows for weight in row["continuation_weights"][0] + row["prefix_weights"]
    )


# --- 13: the cache knows the template ---


def test_each_template_has_an_encoding_of_its_own_in_the_cache() -> None:
    records = load_records([{"messages": EXCHANGE}])
    prints = set()
    for name in TRAINABLE:
        tokenizer = family_tokenizer("chatml")  # one vocabulary, so that the template alone differs
        tokenizer.chat_template = FAMILIES[name].template
        prints.add(Encoder(tokenizer)(records)._fingerprint)
    assert len(prints) == len({FAMILIES[name].template for name in TRAINABLE})


# --- 15: every row is accounted for ---


@pytest.mark.parametrize("name", TRAINABLE)
def test_rows_in_are_rows_out_and_dropped_by_reason(name: str) -> None:
    rows = [[TURNS[0], {"role": "assistant", "content": "yes " * (k % 20 + 1)}] for k in range(40)]
    limit = sorted(encoded(name, *rows)[2]["length"][:])[20]
    _, encoder, data = encoded(name, *rows, max_length=limit, overflow="drop")
    report = encoder.report
    assert report.rows == 40 == len(data) + report.dropped["too_long"]
    assert 0 < len(data) < 40


# --- 16: no tools are none ---


@pytest.mark.parametrize("tools", [None, []])
@pytest.mark.parametrize("name", TRAINABLE)
def test_templates_see_no_tools_where_there_are_none(name: str, tools: list[Any] | None) -> None:
    probe = "{% if tools is defined and tools is not none %}{{ 'SOME TOOLS' }}{% endif %}"
    chat = formatters.chat(
        template=FAMILIES[name].template.replace("{{ bos_token }}", "{{ bos_token }}" + probe, 1)
    )
    if "{{ bos_token }}" not in FAMILIES[name].template:
        chat = formatters.chat(template=probe + FAMILIES[name].template)
    tokenizer, _, data = encoded(name, {"messages": EXCHANGE, "tools": tools}, formatter=chat)
    assert "SOME TOOLS" not in tokenizer.decode(whole(data[0])[0])


# --- 18: nothing depends on who encodes ---


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_stream_gives_what_the_map_gives(name: str) -> None:
    tokenizer, _, data = encoded(name, TURNS, SHORT, EXCHANGE)
    records = load_records([{"messages": turns} for turns in (TURNS, SHORT, EXCHANGE)])
    assert list(Encoder(tokenizer)(records.to_iterable_dataset())) == data.to_list()
