"""The encoder's private copy of a tokenizer. The user's own object is never called or changed.

Three things differ from calling the tokenizer: text that continues other text gets no word-start mark
(SentencePiece's leading ▁), control tokens inside what people wrote stay ordinary characters, and no
special tokens are added by a post-processor. Offsets come untrimmed.

Left out: tokenizers without a `tokenizers` backend, which know no character offsets.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ftlib.checks import Wanted, check
from ftlib.data.environment import no_garbage_collection
from ftlib.errors import CapabilityError, DataError

__all__ = ["Piece", "TokenBackend"]


@final
@dataclass(frozen=True)
class Piece:
    """Text that is tokenised in one go.

    Args:
        text: the characters, at least one.
        runs: (end, weight) of each stretch of equal weight, ends ascending, the last at `len(text)`.
        starts: the text begins a sequence, or starts with a control token.
        ids: already known ids, for a control token spelled out as ordinary characters.
    """

    text: str
    runs: tuple[tuple[int, float], ...]
    starts: bool
    ids: tuple[int, ...] | None = None


TOKENIZER = Wanted("a tokenizer of transformers", lambda value: isinstance(value, PreTrainedTokenizerBase))


@final
class TokenBackend:
    """Text pieces to ids, in few batched calls.

    Args:
        tokenizer: any transformers tokenizer with a fast backend; it is copied.

    Raises:
        CapabilityError: a tokenizer without a fast backend.
    """

    @no_garbage_collection()  # of the vocabulary's objects none is garbage, and looking costs as much again
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check("Encoder", {"tokenizer": (tokenizer, TOKENIZER)})
        if not tokenizer.is_fast:
            raise CapabilityError(
                f"Encoder: expected a tokenizer with a fast backend, got {type(tokenizer).__name__}, which "
                "gives no character offsets. Load it with AutoTokenizer, or convert it to tokenizer.json."
            )
        backend = tokenizer.backend_tokenizer
        written = backend.to_str()
        # The vocabulary is written and read once: of several hundred milliseconds, most go into that.
        self.tokenizer = copy.deepcopy(tokenizer, {id(backend): Tokenizer.from_str(written)})
        spec = json.loads(written)
        post_processor = spec["post_processor"]
        spec |= {"truncation": None, "padding": None, "post_processor": None}
        if "dropout" in spec["model"]:
            spec["model"]["dropout"] = None  # random merges would train ids that inference never sees
        inner = {**spec, **copy.deepcopy({name: spec[name] for name in ("normalizer", "pre_tokenizer")})}
        _without_word_start(inner)
        written = json.dumps(spec)
        self.fingerprint = _fingerprint(self.tokenizer, written, post_processor)
        self._starting = Tokenizer.from_str(written)
        self.marks_start = inner != spec
        self._inner = Tokenizer.from_str(json.dumps(inner)) if self.marks_start else self._starting
        self.control = _control_pattern(self.tokenizer)
        self.eos_id: int | None = self.tokenizer.eos_token_id
        self.bos_ids, self.ending_ids = self._ids_around_text()
        # The unknown token is left out: any text may hold a character the vocabulary lacks.
        self.control_ids = frozenset(
            index
            for index, token in self.tokenizer.added_tokens_decoder.items()
            if self.control.fullmatch(token.content) and index != self.tokenizer.unk_token_id
        )

    def encode(self, pieces: Sequence[Piece]) -> list[tuple[list[int], list[float]]]:
        """Ids of each piece, and the weight of each id: the largest weight among its characters."""
        encoded: dict[int, tuple[list[int], list[float]]] = {}
        for starts in (True, False):
            backend = self._starting if starts else self._inner
            mine = [i for i, piece in enumerate(pieces) if piece.starts is starts and piece.ids is None]
            even = [i for i in mine if len(pieces[i].runs) == 1]
            mixed = [i for i in mine if len(pieces[i].runs) > 1]
            texts = [pieces[i].text for i in even]  # without offsets, which cost more than the ids
            for i, encoding in zip(
                even, backend.encode_batch_fast(texts, add_special_tokens=False), strict=True
            ):
                encoded[i] = encoding.ids, [pieces[i].runs[0][1]] * len(encoding.ids)
            texts = [pieces[i].text for i in mixed]
            for i, encoding in zip(mixed, backend.encode_batch(texts, add_special_tokens=False), strict=True):
                encoded[i] = encoding.ids, _weights(encoding.offsets, pieces[i].runs)
        for i, piece in enumerate(pieces):
            if piece.ids is not None:
                encoded[i] = list(piece.ids), [max(weight for _, weight in piece.runs)] * len(piece.ids)
        return [encoded[i] for i in range(len(pieces))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens included."""
        return str(self._starting.decode(list(ids), skip_special_tokens=False))

    def spell(self, text: str) -> tuple[int, ...]:
        """Ids of a control token as ordinary characters.

        Raises:
            DataError: this vocabulary has no other way to write it.
        """
        # Set on each call: the flag is lost when the backend travels to a worker process.
        self._inner.encode_special_tokens = True
        try:
            ids = list(self._inner.encode(text, add_special_tokens=False).ids)
            if self.control_ids.intersection(ids):  # a vocabulary that holds the control token as a word
                ids = [i for char in text for i in self._inner.encode(char, add_special_tokens=False).ids]
        finally:
            self._inner.encode_special_tokens = False
        if self.control_ids.intersection(ids):
            raise DataError(
                f"expected text, got the control token {text!r}, which this tokenizer cannot write as text. "
                "Remove it from the data.",
                code="control_token",
                excerpt=text,
            )
        return tuple(ids)

    def _ids_around_text(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer itself puts before plain text, and after it: BOS and EOS, say, or nothing."""
        probe = "a"
        body = self.tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = self.tokenizer(probe)["input_ids"]
        for start in range(len(whole) - len(body) + 1):
            if whole[start : start + len(body)] == body:
                return tuple(whole[:start]), tuple(whole[start + len(body) :])
        return (), ()


def _weights(offsets: Iterable[tuple[int, int]], runs: Sequence[tuple[int, float]]) -> list[float]:
    """The largest weight among the characters of each token. A gap before a token belongs to it."""
    weights = []
    done = run = 0
    for start, end in offsets:
        if done < start:
            start = done
        while runs[run][0] <= start and run < len(runs) - 1:
            run += 1
        last = run
        while runs[last][0] < end and last < len(runs) - 1:
            last += 1
        weights.append(runs[run][1] if run == last else max(weight for _, weight in runs[run : last + 1]))
        if end > done:
            done = end
    return weights


def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any control token, the longest first; never the empty string."""
    listed = set(tokenizer.chat_control_tokens or ())
    tokens = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or token.content in listed
    }
    ordered = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def _without_word_start(spec: dict[str, Any]) -> None:
    """Edit a backend so that the first word of its input is treated like any other."""
    for step in _steps(spec["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for step in _steps(spec["normalizer"], "normalizers"):
        if step["type"] == "Strip":
            step["strip_left"] = False
    spec["normalizer"] = _without_prepend(spec["normalizer"])


def _steps(step: dict[str, Any] | None, children: str) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for child in step[children]:
            yield from _steps(child, children)
    else:
        yield step


def _without_prepend(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        kept = [child for child in map(_without_prepend, step["normalizers"]) if child is not None]
        return {**step, "normalizers": kept}
    return step


def _fingerprint(tokenizer: PreTrainedTokenizerBase, written: str, post_processor: Any) -> str:
    """Changes with anything that changes ids: vocabulary, rules, special tokens, chat template."""
    own = {
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "control": sorted(tokenizer.chat_control_tokens or ()),
        "post_processor": post_processor,
    }
    state = hashlib.blake2b(written.encode(), digest_size=16)
    state.update(json.dumps(own, sort_keys=True).encode())
    return state.hexdigest()
