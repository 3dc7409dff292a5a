"""A tiny random model with a tokenizer of its own, for `--smoke`."""

from __future__ import annotations

import string
from pathlib import Path

__all__ = ["write_tiny_model"]

SPECIAL = ("<pad>", "<bos>", "<eos>")  # ids 0, 1, 2, as the tiny models have them
CONTEXT = 512


def write_tiny_model(folder: Path) -> Path:
    """The tests' tiny Llama and a tokenizer with one token per printable ASCII character."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    from tests.models_zoo import tiny_model

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, "<unk>", *string.printable))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))  # noqa: S106  no password
    tokenizer.decoder = Fuse()
    pad, bos, eos = SPECIAL
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
    model = tiny_model("llama", vocab_size=len(vocabulary), max_position_embeddings=CONTEXT)
    model.save_pretrained(str(folder))
    wrapped.save_pretrained(str(folder))
    return folder
