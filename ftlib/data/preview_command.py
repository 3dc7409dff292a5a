"""``python -m ftlib preview FILE``: rows of a file as a model gets them, trained tokens marked.

Exit codes: 0 done; 1 the data cannot be used; 2 wrong usage.

Left out: the options of `Encoder`. A preview of more than its defaults is ``encoder.preview(records)``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ftlib.data.encode import Encoder
from ftlib.data.records import load_records
from ftlib.errors import ConfigError, DataError

__all__ = ["add_arguments", "run"]

_DONE, _BAD_DATA, _BAD_USAGE = 0, 1, 2
_START, _END = "<|im_start|>", "<|im_end|>"
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_BYTES = "Without --tokenizer, bytes stand for tokens, and chats are laid out as ChatML.\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="data in any format that load_records reads")
    add(
        "--tokenizer",
        metavar="NAME",
        help="of the model that will be trained: a folder, or a name on the hub",
    )
    add("-n", type=int, default=3, metavar="ROWS", help="how many rows (default: %(default)s)")
    add("--json", action="store_true", help="print ids, tokens, weights and spans as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    try:
        if args.n < 1:
            raise ConfigError(f"preview: expected -n of at least 1, got {args.n}.")
        tokenizer = _bytes() if args.tokenizer is None else _tokenizer(args.tokenizer)
        preview = Encoder(tokenizer).preview(load_records(args.file), n=args.n)
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return _BAD_DATA
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return _BAD_USAGE
    if args.tokenizer is None:
        sys.stderr.write(_BYTES)
    shown = json.dumps(preview.to_dict(), ensure_ascii=False) if args.json else str(preview)
    sys.stdout.write(f"{shown}\n")
    return _DONE


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"preview: expected --tokenizer as a folder or a name on the hub, got {name!r}: {error}"
        ) from error
    return tokenizer


def _bytes() -> PreTrainedTokenizerBase:
    """One token per byte, so that a preview needs no model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (_START, _END)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=_END, chat_template=_CHATML)
