"""The model card: what was trained, on what, how, with what result, and the code that loads it.

huggingface_hub writes the header. All text is escaped; secrets and machine paths are left out.
"""

from __future__ import annotations

import html
import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ftlib.adapters.vetting import BENEATH, NEW_TOKENS

__all__ = ["CardData", "card_text", "describe_hardware", "public_name"]

MAX_SAMPLES, MAX_SAMPLE_CHARACTERS = 3, 400
_PACKAGES = ("ftlib", "torch", "transformers", "peft", "datasets", "safetensors", "accelerate")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|passwd|api_?key)$", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{10,})|(?<=[Bb]earer )\S+|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
)
_PATH = re.compile(r"(?<![\w:/.<])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:'\"<>|]+[/\\])+([^\s/\\:'\"<>|]*)")


@final
@dataclass(frozen=True)
class CardData:
    """What a model card tells. Everything but the title may be left out, and then is left out there.

    Args:
        title: the model's name.
        trainer: how it was trained, e.g. "SFT".
        base: the base model's name; None is filled in from the model.
        adapter: kind and size in words; None is filled in from the model.
        data_name: name of the training data.
        data_rows: rows of them.
        data_fingerprint: hash that changes with them.
        samples: rows of the data as text; at most three are shown, cut at 400 characters.
        show_samples: False leaves them out.
        trained_share: tokens with a loss weight over all tokens, in [0, 1].
        template_hash: SHA-256 of the chat template trained with.
        hyperparameters: name -> value.
        metrics: name -> number.
        hardware: in words; None describes this machine.
        auto_class: of transformers, for the code that loads the model.
        parts: subfolders with what belongs to the adapter, in the order in which peft reads them: rows of
            new tokens, weights under virtual tokens.
    """

    title: str
    trainer: str = "SFT"
    base: str | None = None
    adapter: str | None = None
    data_name: str | None = None
    data_rows: int | None = None
    data_fingerprint: str | None = None
    samples: tuple[str, ...] = ()
    show_samples: bool = True
    trained_share: float | None = None
    template_hash: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    hardware: str | None = None
    auto_class: str = "AutoModelForCausalLM"
    parts: tuple[str, ...] = ()


def card_text(card: CardData, *, adapted: bool) -> str:
    """The card as Markdown with a YAML header.

    Args:
        card: what to tell.
        adapted: the folder holds an adapter rather than a whole model.
    """
    about = {
        "Base model": card.base,
        "Trained": card.adapter if adapted else "all weights",
        "Trainer": card.trainer,
        "Chat template (SHA-256)": card.template_hash,
        "Hardware": card.hardware or describe_hardware(),
    }
    data = {
        "Name": card.data_name,
        "Rows": card.data_rows,
        "Fingerprint": card.data_fingerprint,
        "Trained tokens": None if card.trained_share is None else f"{card.trained_share:.1%} of all",
    }
    shown = card.samples[:MAX_SAMPLES] if card.show_samples else ()
    sections = [
        f"# {_cell(card.title)}",
        _table(about),
        _section("Use", f"```python\n{_loading_code(card, adapted=adapted)}\n```"),
        _section("Results", _table(card.metrics)),
        _section("Data", _table(data)),
        _section("Samples", "\n\n".join(f"<pre>{_sample(text)}</pre>" for text in shown)),
        _section("Hyper-parameters", _table(card.hyperparameters)),
        _section("Versions", _table(_versions())),
    ]
    body = "\n\n".join(section for section in sections if section)
    header = _header(card, adapted=adapted).to_yaml(line_break="\n")
    return str(ModelCard(f"---\n{header}\n---\n\n{body}\n"))


def describe_hardware() -> str:
    """This machine in words: processor and cores, or GPUs."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine())
    return f"CPU only: {name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def public_name(name: str | Path | None) -> str | None:
    """A model's name as others may read it: a hub name whole, of a folder the last part only."""
    text = str(name or "")
    if not text:
        return None
    if _HUB_NAME.fullmatch(text) and not Path(text).exists():
        return text
    return Path(text).expanduser().resolve().name


def _header(card: CardData, *, adapted: bool) -> ModelCardData:
    title, data_name = _plain(card.title), _plain(card.data_name or "unnamed data")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"\W+", "-", data_name),
            dataset_name=data_name,
            metric_type=_plain(name),
            metric_value=float(value),
        )
        for name, value in card.metrics.items()
        if math.isfinite(value)
    ]
    base = _plain(card.base or "")
    return ModelCardData(
        library_name="peft" if adapted else "transformers",
        pipeline_tag="text-generation",
        base_model=base if _HUB_NAME.fullmatch(base) else None,
        tags=["ftlib", _plain(card.trainer).lower()],
        model_name=title,
        eval_results=results or None,
    )


def _loading_code(card: CardData, *, adapted: bool) -> str:
    here = "path/to/this/folder"
    if not adapted:
        return (
            f"from transformers import {card.auto_class}, AutoTokenizer\n\n"
            f'model = {card.auto_class}.from_pretrained("{here}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{here}")'
        )
    base = re.sub(r"[^\w./-]", "", _plain(card.base or "path/to/the/base/model"))
    steps = {
        NEW_TOKENS: "# needs a base with a row for each token: base.resize_token_embeddings(len(tokenizer))\n"
        f'base = PeftModel.from_pretrained(base, "{here}", subfolder="{NEW_TOKENS}").merge_and_unload()\n',
        BENEATH: "# LoRA or IA3, under the virtual tokens\n"
        f'base = PeftModel.from_pretrained(base, "{here}", subfolder="{BENEATH}").get_base_model()\n',
    }
    return (
        "from peft import PeftModel\n"
        f"from transformers import {card.auto_class}, AutoTokenizer\n\n"
        f'base = {card.auto_class}.from_pretrained("{base}")\n'
        f"{''.join(steps[part] for part in card.parts)}"
        f'model = PeftModel.from_pretrained(base, "{here}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{here}")'
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a source tree, or without an optional one
    return found


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(rows: Mapping[str, Any]) -> str:
    """A two-column table of the values that are not None."""
    lines = [f"| {_cell(key)} | {_value(key, value)} |" for key, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def _value(key: str, value: Any) -> str:
    if isinstance(value, str) and _SECRET_KEY.search(key):
        return "[redacted]"
    if isinstance(value, Path):
        return _cell(value.name)
    return _cell(f"{value:.6g}" if isinstance(value, float) else value)


def _plain(text: object) -> str:
    """Text on one line, without secrets and without the folders of any path."""
    return _PATH.sub(r"…/\1", _SECRET_TEXT.sub("[redacted]", " ".join(str(text).split())))


def _cell(text: object) -> str:
    """Text that neither Markdown nor HTML reads as anything else."""
    escaped = html.escape(_plain(text), quote=False)
    return re.sub(r"[\\`*\[\]|~#]", lambda match: f"&#{ord(match[0])};", escaped)


def _sample(text: str) -> str:
    """A row of the data, cut and escaped; the user's own folders are left out."""
    text = _SECRET_TEXT.sub("[redacted]", text)
    for folder in (Path.cwd(), Path.home()):
        if len(folder.parts) > 1:
            text = text.replace(str(folder), "…")
    cut = text if len(text) <= MAX_SAMPLE_CHARACTERS else text[:MAX_SAMPLE_CHARACTERS] + " …"
    return html.escape(cut)
