"""Round trips and inference ids over any text, for every kind of tokenizer."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data import Encoder
from tests.data.tokenizers_zoo import CONTROL, KINDS, TEMPLATES, tiny

# Any character but halves of surrogate pairs, blanks and line breaks often, control tokens now and then.
TEXT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from([" ", "\n", "  ", ": ", "▁", "\u2028", "é", "e\u0301", "😀", "<", "|>", *CONTROL]),
    ),
    max_size=6,
).map("".join)
ANSWER = TEXT.filter(str.strip)
LOSSLESS = [kind for kind in KINDS if kind not in ("words", "unigram")]


@cache
def encoder(kind, template="chatml"):
    tokenizer = tiny(kind, template=template, bos=True)
    return tokenizer, Encoder(tokenizer)


def rows_of(encoder, rows):
    """Encoded without a data set around it, which would only slow the search."""
    examples = encoder._rows(rows).encode(rows, range(len(rows)))
    assert [example.problem for example in examples] == [None] * len(examples)
    return examples


def text_of(kind, tokenizer, ids):
    """The text of ids as `kind` decodes it: the mark of the first word is taken off by some decoders only."""
    if kind == "byte_level_prefix_space":
        return tokenizer.decode(ids).removeprefix(" ")
    return tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=TEXT, completion=ANSWER)
@settings(max_examples=40, deadline=None)
def test_prompt_ids_equal_inference_ids(kind, prompt, completion):
    tokenizer, own = encoder(kind)
    (example,) = rows_of(own, [{"prompt": prompt, "completion": completion}])
    assert own.encode_prompt(prompt) == example.prefix[0]
    assert example.continuations[0][0][-1] == tokenizer.eos_token_id
    if not any(token in prompt for token in CONTROL):
        assert example.prefix[0] == tokenizer(prompt).input_ids


@pytest.mark.parametrize("kind", LOSSLESS)
@given(prompt=TEXT, completion=ANSWER)
@settings(max_examples=40, deadline=None)
def test_decoding_gives_back_prompt_and_completion(kind, prompt, completion):
    """The prompt starts with a letter: some decoders take a blank off the start of a text, whoever wrote it.

    And "▁" is how SentencePiece writes a blank, so it cannot come back as itself.
    """
    tokenizer, own = encoder(kind)
    prompt = f"a{prompt}"
    (example,) = rows_of(own, [{"prompt": prompt, "completion": completion}])
    ids = [*example.prefix[0], *example.continuations[0][0]]
    assert ids[0] == tokenizer.bos_token_id
    blank = (lambda text: text) if kind.startswith("byte_level") else (lambda text: text.replace("▁", " "))
    assert text_of(kind, tokenizer, ids[1:]) == blank(prompt + completion) + "</s>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["chatml", "llama_marked", "eos_at_end"])
@given(question=ANSWER, answer=ANSWER)
@settings(max_examples=20, deadline=None)
def test_control_ids_of_a_conversation_are_those_of_its_template(kind, template, question, answer):
    tokenizer, own = encoder(kind, template)

    def control(q, a):
        messages = [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        (example,) = rows_of(own, [{"messages": messages}])
        wanted = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
        return [i for i in example.prefix[0] if i in wanted], [
            i for i in example.continuations[0][0] if i in wanted
        ]

    assert control(question, answer) == control("yes", "yes")


@pytest.mark.parametrize("template", TEMPLATES)
@given(question=ANSWER, answer=ANSWER)
@settings(max_examples=20, deadline=None)
def test_a_conversation_decodes_to_its_render(template, question, answer):
    tokenizer, own = encoder("byte_level", template)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (example,) = rows_of(own, [{"messages": messages}])
    render = tokenizer.apply_chat_template(messages, tokenize=False)
    ending = "</s>" if template == "no_last_stop" else ""
    assert tokenizer.decode([*example.prefix[0], *example.continuations[0][0]]) == render + ending
    assert own.encode_prompt(question) == example.prefix[0]


def test_rows_are_encoded_by_few_calls_of_the_tokenizer(monkeypatch):
    """A call per piece would cost more than its work: 300 rows take one call per kind of piece."""
    _, own = encoder("metaspace_always")
    rows = [{"prompt": f"Answer {i}", "completion": "yes"} for i in range(300)]
    worker = own._rows(rows)
    calls = []

    class Counted:
        def __init__(self, backend):
            self.backend = backend

        def encode_batch_fast(self, texts, **options):
            calls.append(len(texts))
            return self.backend.encode_batch_fast(texts, **options)

        def encode_batch(self, texts, **options):
            calls.append(len(texts))
            return self.backend.encode_batch(texts, **options)

    monkeypatch.setattr(worker.backend, "_starting", Counted(worker.backend._starting))
    monkeypatch.setattr(worker.backend, "_inner", Counted(worker.backend._inner))
    worker.encode(rows, range(300))
    assert sum(calls) == 600
    assert len(calls) <= 4
