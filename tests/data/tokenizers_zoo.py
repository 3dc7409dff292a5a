"""Tiny tokenizers of every kind the encoder meets, and chat templates of every habit."""

from __future__ import annotations

import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

__all__ = ["KINDS", "TEMPLATES", "tiny"]

CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|eot|>")
CORPUS = [
    "The quick brown fox says yes, and the answer is: yes.",
    "system user assistant tool Question: Answer: What does it do?\n\nIt copies a file.\n",
    "Paris is the capital of France. <think> no </think> yes indeed, hello there.",
] * 4

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INJECTS_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
# Content is trimmed, BOS is written once, and assistant text carries generation marks.
LLAMA_MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + m['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)
LLAMA_UNMARKED = LLAMA_MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Reasoning stands only in the last turn, as in Qwen3: earlier turns change once others follow.
DROPS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_LAST_STOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not loop.last %}{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
)
# As in Phi-3: a stop token per turn, and EOS after the whole conversation unless an answer is asked for.
EOS_AT_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% if tools is not none and not tools %}{{ 'NO TOOLS' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m['tool_calls'] is defined %}{{ '[INST]' + (m['tool_calls'] | tojson) + '[/INST]' }}{% endif %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "injects_system": INJECTS_SYSTEM,
    "llama_marked": LLAMA_MARKED,
    "llama_unmarked": LLAMA_UNMARKED,
    "drops_thinking": DROPS_THINKING,
    "no_last_stop": NO_LAST_STOP,
    "eos_at_end": EOS_AT_END,
    "tools": TOOLS,
}


def _byte_level(*, add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _metaspace(scheme: str) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as in Llama 2 and Mistral."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*CONTROL, *bytes_], show_progress=False)
    learned.train_from_iterator(CORPUS, trainer)
    spec = json.loads(learned.to_str())
    spec["added_tokens"] = []  # the trainer takes bytes for control tokens, too
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.model.byte_fallback = True
    tokenizer.model.fuse_unk = True
    tokenizer.model.unk_token = "<unk>"
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _prepend() -> Tokenizer:
    """The same with the older normaliser, which marks the start of every stretch of text."""
    tokenizer = _metaspace("always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=list(CONTROL), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _words() -> Tokenizer:
    """Whole words between blanks; its vocabulary holds the control tokens as words too."""
    words = sorted({word for line in CORPUS for word in line.split()} | {"cut", "here"})
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate((*CONTROL, *words))}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


_BACKENDS = {
    "byte_level": _byte_level,
    "byte_level_prefix_space": lambda: _byte_level(add_prefix_space=True),
    "metaspace_always": lambda: _metaspace("always"),
    "metaspace_first": lambda: _metaspace("first"),
    "prepend": _prepend,
    "unigram": _unigram,
    "words": _words,
}
KINDS = tuple(_BACKENDS)


def tiny(
    kind: str = "byte_level",
    *,
    template: str | None = "chatml",
    bos: bool = False,
    eos: bool = False,
    pad: str | None = "<unk>",
) -> PreTrainedTokenizerFast:
    """A tokenizer; `bos` and `eos`: it adds these to plain text."""
    backend = _BACKENDS[kind]()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    if bos or eos:
        pattern = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad,
        chat_template=TEMPLATES[template] if template else None,
    )
