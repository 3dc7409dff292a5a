"""Lengths in tokens, and what a tokenizer does with the start of a word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, final

from ftlib.errors import ConfigError

__all__ = ["BYTES_PER_TOKEN", "TokenCounter", "estimated_tokens"]

BYTES_PER_TOKEN = 3  # a careful estimate where there is no tokenizer
_BATCH = 256


def estimated_tokens(size: int) -> int:
    """Tokens of `size` bytes of UTF-8, rounded up.

    Example:
        >>> estimated_tokens(7)
        3
    """
    return -(-size // BYTES_PER_TOKEN)


@final
class TokenCounter:
    """A tokenizer, asked for lengths only.

    Args:
        tokenizer: of transformers, or its name or folder.
    """

    def __init__(self, tokenizer: Any) -> None:
        if isinstance(tokenizer, str):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if not callable(getattr(tokenizer, "tokenize", None)):
            raise ConfigError(
                "prepare: expected tokenizer as one of transformers, its name or its folder, got "
                f"{tokenizer!r:.80}."
            )
        self.tokenizer = tokenizer

    @property
    def name(self) -> str:
        """Its name or folder."""
        return str(getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__)

    @property
    def is_chat(self) -> bool:
        """Whether it belongs to a chat model: it has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def adds_space(self) -> bool:
        """Whether a word has the same tokens with and without a space before it: Llama 2 yes, GPT-2 no."""
        bare, spaced = self.tokenizer.tokenize("a"), self.tokenizer.tokenize(" a")
        return list(bare) == list(spaced)

    def ids(self, text: str) -> list[int]:
        """The tokens of one text, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def lengths(self, texts: Iterable[str]) -> Iterator[int]:
        """Tokens of each text, without special ones."""
        rest = iter(texts)
        while batch := list(islice(rest, _BATCH)):
            yield from map(len, self.tokenizer(batch, add_special_tokens=False)["input_ids"])
