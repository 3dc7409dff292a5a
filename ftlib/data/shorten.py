"""Only marked fields are shortened, the longest first, until an example fits; other text never."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from ftlib.data.segments import Answers, Conversation, Segment, Segments

__all__ = ["shortened"]

_ROUNDS = 8  # a shorter text may be split into other tokens: cut again

Example = Segments | Answers


def shortened(
    made: Example, tokenizer: PreTrainedTokenizerBase, excess: Callable[[Example], int]
) -> tuple[Example, bool]:
    """An example whose marked parts are cut to fit, and whether any was.

    Args:
        made: what a formatter made; parts with `cut` stand at the same places in all of its answers.
        tokenizer: counts the tokens of a part.
        excess: tokens by which an example is too long; not above zero where it fits.
    """
    first = made.examples[0] if isinstance(made, Answers) else made
    if isinstance(first, Conversation):
        return made, False
    marked = [k for k, part in enumerate(first.parts) if part.cut is not None and part.text]
    cut = False
    for _ in range(_ROUNDS):
        over = excess(made) if marked else 0
        if over <= 0:
            break
        parts = (made.examples[0] if isinstance(made, Answers) else made).parts  # type: ignore[union-attr]
        offsets = {k: _offsets(tokenizer, parts[k].text) for k in marked}
        keep = _lengths({k: len(found) for k, found in offsets.items()}, over)
        texts = {k: _cut(parts[k], offsets[k], keep[k]) for k in marked}
        if all(texts[k] == parts[k].text for k in marked):
            break  # nothing left to give
        made, cut = _with(made, texts), True
    return made, cut


def _lengths(lengths: dict[int, int], over: int) -> dict[int, int]:
    """Lengths less `over` tokens, each taken from the longest.

    Example:
        >>> _lengths({0: 9, 1: 4}, 7)
        {0: 3, 1: 3}
    """
    kept = dict(lengths)
    for _ in range(min(over, sum(kept.values()))):
        kept[max(kept, key=lambda k: (kept[k], -k))] -= 1
    return kept


def _offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["offset_mapping"])


def _cut(part: Segment, offsets: list[tuple[int, int]], keep: int) -> str:
    if keep >= len(offsets):
        return part.text
    if keep == 0:
        return ""
    if part.cut == "left":
        return part.text[offsets[len(offsets) - keep][0] :]
    return part.text[: offsets[keep - 1][1]]


def _with(made: Example, texts: dict[int, str]) -> Example:
    if isinstance(made, Answers):
        examples = [_with(each, texts) for each in made.examples if isinstance(each, Segments)]
        return replace(made, examples=tuple(examples))  # type: ignore[arg-type]
    parts = [replace(part, text=texts.get(k, part.text)) for k, part in enumerate(made.parts)]
    return replace(made, parts=tuple(parts))
