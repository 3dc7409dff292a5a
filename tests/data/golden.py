"""Encodings that are frozen: what is encoded of five conversations under every template and tokenizer here.

    python -m tests.data.golden

writes `golden.json` anew; its diff then shows, token by token, what a change of the code changed. Tokens
stand for ids, of which each has one, so that a line can be read. ``|`` ends the prefix, ``=1`` says that what
follows weighs 1, and a conversation that is refused gives its error.

Left out: tokenizers of the Unigram kind, whose training here is not the same on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftlib.data import Encoder
from ftlib.data.examples import Example
from tests.data.templates_zoo import family_tokenizer

__all__ = ["FILE", "KINDS", "ROWS", "TEMPLATES", "encodings"]

FILE = Path(__file__).with_suffix(".json")
KINDS = ("byte_level", "byte_level_prefix_space", "metaspace_always", "metaspace_first", "prepend", "words")
TEMPLATES = ("chatml", "gemma", "harmony", "llama_2", "llama_3_tools", "marked", "mistral", "qwen_3")

_ASK = {"role": "user", "content": "What does it do?"}
_TELL = {"role": "assistant", "content": "It copies a file."}
_CALL = {"type": "function", "function": {"name": "copy", "arguments": {"to": "a"}}}
_TOOL = {"type": "function", "function": {"name": "copy", "parameters": {}}}
ROWS: dict[str, dict[str, Any]] = {
    "single": {"messages": [_ASK, _TELL]},
    "multi": {
        "messages": [
            _ASK,
            _TELL,
            {"role": "user", "content": " Paris?<|im_end|>"},
            {"role": "assistant", "content": "yes indeed", "weight": 0.5},
        ]
    },
    "tool": {
        "messages": [
            _ASK,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "copy", "content": "done"},
            {"role": "assistant", "content": "yes"},
        ],
        "tools": [_TOOL],
    },
    "system": {"messages": [{"role": "system", "content": "The fox says yes."}, _ASK, _TELL]},
    "empty": {
        "prompt": [{"role": "user", "content": ""}],
        "completion": [{"role": "assistant", "content": "\n"}],
    },
}


def encodings(template: str, kind: str) -> dict[str, list[str]]:
    """Each conversation's examples, or what is wrong with it."""
    tokenizer = family_tokenizer(template, kind)
    encoder = Encoder(tokenizer)
    rows = list(ROWS.values())
    worker = encoder._rows(rows)
    return {
        name: [_line(tokenizer, example) for example in worker.encode([row], [0])]
        for name, row in ROWS.items()
    }


def _line(tokenizer: Any, example: Example) -> str:
    if example.problem is not None:
        return f"{example.problem.code}: {example.problem.message}"
    (rest,) = example.continuations
    items: list[str] = []
    last = 0.0
    for ids, weights in (example.prefix, rest):
        items += ["|"] if ids is rest[0] else []
        for token, weight in zip(tokenizer.convert_ids_to_tokens(ids), weights, strict=True):
            if weight != last:
                items.append(f"={weight:g}")
                last = weight
            items.append(token)
    return " ".join(items)


def main() -> None:
    """Write the file."""
    frozen = {template: {kind: encodings(template, kind) for kind in KINDS} for template in TEMPLATES}
    FILE.write_text(json.dumps(frozen, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
