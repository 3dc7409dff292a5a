"""What a tokenizer makes of a verbalizer's words, checked before anything is scored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from ftlib.data.tokens import Piece, TokenBackend
from ftlib.errors import ConfigError

__all__ = ["check_words", "word_ids"]

Candidates = Sequence[tuple[int, str]]


def word_ids(backend: TokenBackend, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of candidates, as they are after other text."""
    pieces = [Piece(text, ((len(text), 1.0),), starts=False) for text in texts]
    return [ids for ids, _ in backend.encode(pieces)]


def check_words(
    backend: TokenBackend, labels: Sequence[str], candidates: Candidates, count: int | None
) -> None:
    """Refuse words by which classes cannot be told apart.

    Args:
        backend: of the tokenizer.
        labels: the classes.
        candidates: (class, text) of each word, the blank before it included.
        count: tokens of every word, from ``{mask:k}``; None leaves it to the words.

    Raises:
        ConfigError: an unknown token, a word that is only blank or has a blank too many, two classes with
            the same tokens or one beginning with another's, a word of another size than the mask.
    """
    listed = word_ids(backend, [text for _, text in candidates])
    unknown = backend.tokenizer.unk_token_id
    for (number, text), ids in zip(candidates, listed, strict=True):
        where = f"class {labels[number]!r}: expected a word"
        tokens = backend.tokenizer.convert_ids_to_tokens(ids)
        if text.startswith("  ") or text != text.rstrip():
            raise ConfigError(
                f"cloze: {where} without blanks around it, got {text!r} with the one before {{mask}}."
            )
        if not ids or (unknown is not None and unknown in ids):
            raise ConfigError(
                f"cloze: {where} in the vocabulary, got {text!r} as {tokens}, an unknown token. "
                "Choose another word."
            )
        if not backend.decode(ids).strip():
            raise ConfigError(f"cloze: {where} of letters, got {text!r} as {tokens}, a bare blank.")
        if count is not None and len(ids) != count:
            raise ConfigError(
                f"cloze: {where} of {count} tokens for {{mask:{count}}}, got {text!r} as {tokens}. Write "
                "{mask} to let each word have its own number."
            )
    for (one, a), (other, b) in combinations(zip(candidates, listed, strict=True), 2):
        size = min(len(a), len(b))
        if one[0] != other[0] and a[:size] == b[:size]:
            first, second = (one, other) if len(a) <= len(b) else (other, one)
            tokens = backend.tokenizer.convert_ids_to_tokens(a[:size])
            what = "has the same tokens as" if len(a) == len(b) else "begins"
            raise ConfigError(
                f"cloze: expected classes that can be told apart, got {first[1]!r} of {labels[first[0]]!r} "
                f"as {tokens}, which {what} {second[1]!r} of {labels[second[0]]!r}. Choose other words."
            )
