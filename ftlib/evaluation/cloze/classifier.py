"""A classifier made of a language model, a template and a verbalizer: zero-shot, few-shot, calibrated.

Shapes: B rows, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast, final

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.attach import AnyModel, attach, model_capabilities
from ftlib.data import collate, formatters, pack
from ftlib.data.cloze import Cloze as ClozeFormatter
from ftlib.data.cloze import Generation, Verbalizer, soft_tokens
from ftlib.data.encode import Encoder
from ftlib.data.pattern import Column, Mask, Special, Words, parse
from ftlib.errors import CapabilityError, ConfigError, DataError
from ftlib.evaluation.generation import decode, generate
from ftlib.models.encoders import first_position
from ftlib.models.masked import Masking, fills_masks
from ftlib.models.modes import evaluation_mode
from ftlib.models.parts import inner_model, language_task
from ftlib.models.soft_tokens import add_soft_tokens
from ftlib.objectives import SFT, Cloze, Objective

__all__ = ["ClozeClassifier"]

TOKENS = 4096  # of one forward, unless one question is longer
MASK = "mask"  # the content-free text that is the mask token
CONTENT_FREE = ("", "N/A", MASK)
Method = Literal["contextual", "pmi", "batch"]


@final
class ClozeClassifier:
    """Classes rows by the words a language model would put in the gap of a template.

    To train it, give its parts to a trainer:
    ``SFTTrainer(c.model, c.encoder(rows), tokenizer=c.tokenizer, encoder=c.encoder, objective=c.objective)``.

    Args:
        model: a causal or masked language model or an encoder-decoder, plain or with adapters.
        tokenizer: copied where the template or the verbalizer needs new tokens.
        pattern: template text, see `ftlib.data.pattern`; a causal model and an encoder-decoder read only
            what stands before the mask.
        verbalizer: one of `ftlib.data.cloze`, or class -> word.
        adapter: attached to the model; None leaves it as it is, but for the rows of new tokens, which are
            always trained.
        norm: size of a word: "none", its "tokens" or its "bytes".
        one_by_one: of a masked model: each token of a word with the others in view.
        alpha: of a masked model: share of the masked-token loss in training.
        max_length: tokens of a question; None takes the model's context. Only columns marked with
            ``truncate`` are shortened to it.
        label: column of the class.

    Raises:
        ConfigError: a template or words that do not fit the model or its tokenizer, or options without
            effect.
    """

    def __init__(
        self,
        model: AnyModel,
        tokenizer: PreTrainedTokenizerBase,
        pattern: str,
        verbalizer: Verbalizer | Mapping[str, str],
        *,
        adapter: Adapter | None = None,
        norm: Literal["none", "tokens", "bytes"] = "none",
        one_by_one: bool = False,
        alpha: float = 0.0,
        max_length: int | None = None,
        label: str = "label",
    ) -> None:
        unbound = formatters.cloze(pattern, verbalizer, label=label)
        new = soft_tokens(unbound.counted(tokenizer))
        if new:
            model, tokenizer = add_soft_tokens(model, tokenizer, new, adapter=adapter)
        elif adapter is not None:
            model = attach(model, adapter, tokenizer=tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.max_length = _context(model) if max_length is None else max_length
        self.encoder = Encoder(
            tokenizer, formatter=unbound, max_length=self.max_length, task=language_task(model)
        )
        self.formatter = cast(ClozeFormatter, self.encoder.formatter)
        masks = fills_masks(model)
        _check(self.formatter, tokenizer, masks=masks, norm=norm)
        if not masks and (one_by_one or alpha):
            raise ConfigError(
                "ClozeClassifier: one_by_one and alpha have no effect on a model without masks."
            )
        masking = Masking(tokenizer.mask_token_id, one_by_one) if masks else None
        self._cloze = Cloze(self.formatter.verbalizer.reduce, norm, masking, alpha)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of scores."""
        return self.formatter.labels

    @property
    def objective(self) -> Objective:
        """What trains it: `objectives.Cloze` with its calibration; for generated answers `objectives.SFT`."""
        return SFT() if isinstance(self.formatter.verbalizer, Generation) else self._cloze

    @property
    def bias(self) -> Tensor | None:
        """What calibration takes from the score of each class, [K]."""
        return None if self._cloze.bias is None else torch.tensor(self._cloze.bias)

    def scores(self, rows: Any) -> Tensor:
        """Score of each class, nats, less the bias of calibration: float32 [B, K], on the CPU.

        Args:
            rows: dicts, a `Dataset`, or what `load_records` takes, with the columns of the template.

        Raises:
            CapabilityError: a verbalizer whose answers are written, not scored.
        """
        return self._scores(self._cloze, self.encoder, rows)

    def probabilities(self, rows: Any) -> Tensor:
        """Softmax of `scores`, [B, K]."""
        return self.scores(rows).softmax(-1)

    def predict(self, rows: Any) -> list[str | None]:
        """The likeliest class of each row; of a generated answer the one it names, or None."""
        if not isinstance(self.formatter.verbalizer, Generation):
            return [self.labels[k] for k in self.scores(rows).argmax(-1).tolist()]
        prompts = [self.encoder.encode_prompt({**row, self.formatter.label: None}) for row in rows]
        room = max(len(word) for words in self.formatter.verbalizer.words.values() for word in words)
        stops = self.encoder.stop_ids
        written = generate(self.model, self.tokenizer, prompts, stop_ids=stops, max_new_tokens=room)
        return [
            self.formatter.verbalizer.read(text) for text in decode(self.tokenizer, written, stop_ids=stops)
        ]

    def accuracy(self, rows: Any) -> float:
        """Share of rows whose predicted class is their label."""
        wanted = [self.formatter.class_of(row) for row in rows]
        if not wanted or None in wanted:
            raise DataError(
                f"accuracy: expected labelled rows, got {wanted.count(None)} of {len(wanted)} without.",
                code="missing_label",
                column=self.formatter.label,
            )
        found = self.predict(rows)
        return sum(self.labels[k or 0] == name for k, name in zip(wanted, found, strict=True)) / len(wanted)

    def calibrate(
        self,
        method: Method | None = "contextual",
        *,
        content_free: Sequence[str] | None = None,
        domain: str | None = None,
        rows: Any = None,
    ) -> ClozeClassifier:
        """Take a bias from every class: what the model says where there is nothing to say.

        | method | bias of a class |
        |---|---|
        | `contextual` | mean of log p(class) over `content_free` texts in place of every column |
        | `pmi` | log p(class) in the `domain` prompt |
        | `batch` | log of the mean of p(class) over `rows`, whose labels are not read |

        Args:
            method: None takes the bias away.
            content_free: texts; "mask" is the mask token, for masked models. None: "", "N/A" and, with a
                masked model, the mask; without the empty text where it would leave nothing to read.
            domain: template text for ``"pmi"``, such as ``"It was {mask}."``.
            rows: for ``"batch"``.

        Returns:
            This classifier.

        Raises:
            ConfigError: options that do not belong to the method.

        Source: Zhao et al. 2021; Holtzman et al. 2021; Zhou et al. 2024.
        """
        given = {"content_free": content_free, "domain": domain, "rows": rows}
        needed = {"contextual": "content_free", "pmi": "domain", "batch": "rows", None: None}
        if method not in needed:
            raise ConfigError(f"calibrate: expected contextual, pmi, batch or None, got {method!r}.")
        wrong = [name for name, value in given.items() if value is not None and name != needed[method]]
        missing = method in ("pmi", "batch") and given[cast(str, needed[method])] is None
        if wrong or missing:
            raise ConfigError(
                f"calibrate: expected {needed[method]} for method={method!r} and nothing else, got "
                f"{[name for name, value in given.items() if value is not None]}."
            )
        plain = replace(self._cloze, bias=None)
        if method is None:
            self._cloze = plain
            return self
        if method == "contextual":
            texts = self._content_free() if content_free is None else content_free
            free = [self.encoder.using(self._without_content(text)) for text in texts]
            logs = [self._scores(plain, encoder, [{}]) for encoder in free]
            bias_K = torch.cat(logs).log_softmax(-1).mean(0)
        elif method == "pmi":
            asked = replace(self.formatter, pattern=parse(cast(str, domain)))
            bias_K = self._scores(plain, self.encoder.using(asked), [{}])[0]
        else:
            logs_BK = self._scores(plain, self.encoder, rows).log_softmax(-1)
            bias_K = logs_BK.logsumexp(0) - torch.tensor(float(len(logs_BK))).log()
        self._cloze = replace(plain, bias=tuple(bias_K.tolist()))
        return self

    def _scores(self, objective: Cloze, encoder: Encoder, rows: Any) -> Tensor:
        if isinstance(self.formatter.verbalizer, Generation):
            raise CapabilityError("ClozeClassifier: a generated answer has no scores. Use predict().")
        data = encoder(rows)
        lengths = [int(length) for length in data["length"]]
        scores: list[Tensor] = [torch.empty(0)] * len(lengths)
        device = next(self.model.parameters()).device
        with evaluation_mode(self.model), torch.no_grad():
            for members in pack(lengths, TOKENS):
                batch = collate([data[k] for k in members]).to(device)
                for k, row_K in zip(members, objective.scores(self.model, batch).float().cpu(), strict=True):
                    scores[k] = row_K
        return torch.stack(scores)

    def _content_free(self) -> tuple[str, ...]:
        """The default texts that this model and template can take."""
        texts = [text for text in CONTENT_FREE if text != MASK or self._cloze.masking is not None]
        before = [slot for slot in self.formatter.before if not isinstance(slot, Column)]
        read = any(not isinstance(slot, Words) or slot.text.strip() for slot in before)
        starts = bool(self.tokenizer("")["input_ids"])  # BOS
        return tuple(text for text in texts if text or read or starts)

    def _without_content(self, text: str) -> ClozeFormatter:
        """The template with `text` in place of every column."""
        slot = Special(MASK) if text == MASK else Words(text)
        slots = tuple(slot if isinstance(each, Column) else each for each in self.formatter.pattern.slots)
        return replace(self.formatter, pattern=replace(self.formatter.pattern, slots=slots))


def _check(formatter: ClozeFormatter, tokenizer: PreTrainedTokenizerBase, *, masks: bool, norm: str) -> None:
    """Refuse templates and words that this kind of model would read as something else."""
    if masks and tokenizer.mask_token_id is None:
        raise ConfigError(
            "ClozeClassifier: expected a mask token in the tokenizer of a masked model, got none."
        )
    if masks and isinstance(formatter.verbalizer, Generation):
        raise ConfigError("ClozeClassifier: a masked language model writes no text. Take another verbalizer.")
    unread = [slot.name for slot in formatter.after if isinstance(slot, Column)]
    if unread and not masks:
        raise ConfigError(
            f"ClozeClassifier: expected {{mask}} behind every column for a model that reads from left to "
            f"right, got {unread} after it, which would not be read."
        )
    count = formatter.pattern.only(Mask)[0].count
    if masks and count is None and norm == "none":
        texts = (text for _, text in formatter.candidates)
        sizes = dict(zip(texts, formatter.sizes or (), strict=True))
        if len(set(sizes.values())) > 1:
            raise ConfigError(
                f"ClozeClassifier: expected words of one number of tokens, got {sizes}: more masks are less "
                "likely whatever stands behind them. Choose norm='tokens', or other words."
            )


def _context(model: AnyModel) -> int | None:
    """Most tokens the model reads; None where its config does not say."""
    inner = inner_model(model)
    limit = getattr(inner.config.get_text_config(decoder=True), "max_position_embeddings", None)
    taken = model_capabilities(model).virtual_tokens
    return None if limit is None else int(limit) - taken - first_position(inner)
