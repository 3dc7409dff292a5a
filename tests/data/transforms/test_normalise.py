from __future__ import annotations

import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data.transforms import normalise

WORDS = st.text(alphabet="abcßéΣшщ漢字", min_size=1, max_size=6)


def spelled_out(text):
    """The rule, character by character."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in folded).split())


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_follows_the_rule(text):
    assert normalise(text) == spelled_out(text)


@settings(deadline=None)
@given(st.lists(WORDS, min_size=1), st.sampled_from([" ", "\t\n", ", ", " — ", "\u2028", "。", "\u200b"]))
def test_what_stands_between_words_does_not_matter(words, between):
    assert normalise(between + between.join(words) + between) == normalise(" ".join(words))


@settings(deadline=None)
@given(st.text(max_size=60))
def test_the_result_has_single_blanks_and_none_outside(text):
    made = normalise(text)
    assert made == " ".join(made.split())


def test_width_case_and_ligatures_are_one():
    assert normalise("Ｆｉｎｅ") == normalise("fine") == normalise("ﬁNE")
    assert normalise("STRASSE") == normalise("straße")


def test_symbols_are_kept():
    assert normalise("2 + 2 = 4 😀") == "2 + 2 = 4 😀"
