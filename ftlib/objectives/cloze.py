"""Cloze questions: the right class by the log-probabilities of the words that stand for it.

A batch is what `formatters.cloze` encodes to: the candidates of a question are the continuations of its
group, ``extras["class"]`` says which class each stands for, ``extras["rank"]`` which of them are right (1).

Shapes: G groups (questions), C continuations (candidates), N scored tokens, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftlib.batches import LossOutput, Mean, PackedBatch, Span
from ftlib.errors import ConfigError, ShapeError
from ftlib.models import forward
from ftlib.models.masked import Masking
from ftlib.objectives.pairs import best

__all__ = ["Cloze"]

Reduce = Literal["mean", "max", "logsumexp"]
MASKED_SHARE = 0.15  # of a text's tokens, as in Devlin et al. 2019


@final
@dataclass(frozen=True)
class Cloze:
    """Cross-entropy over the softmax of class scores.

        s_k = reduce over the words w of class k of (log p(w | context) / size(w)) - bias_k
        loss = (1 - alpha) mean over questions of -log softmax(s)_y + alpha mean masked-token loss

    With ``extras["probability"]``, the share another model gives each class, the cross-entropy is to these.

    Metric: ``accuracy``.

    Args:
        reduce: of the scores of several words of a class: "mean", "max" or "logsumexp".
        norm: size of a word: "none" (1), its "tokens" or its "bytes".
        masking: of a masked language model; None for every other model.
        alpha: share of the loss that keeps a masked model a language model: 15 % of the tokens of the
            right text hidden, by torch's generator; in [0, 1). Terms of the loss: `cross_entropy`, `mlm`.
        bias: one number per class taken from its score, as calibration finds it; None for none.

    Raises:
        ConfigError: an unknown or impossible value.

    Source: Schick and Schütze 2021 (PET), equations 1 to 4, alpha 1e-4 there.
    """

    reduce: Reduce = "mean"
    norm: Literal["none", "tokens", "bytes"] = "none"
    masking: Masking | None = None
    alpha: float = 0.0
    bias: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "max", "logsumexp"):
            raise ConfigError(
                f"objectives.Cloze: expected reduce mean, max or logsumexp, got {self.reduce!r}."
            )
        if self.norm not in ("none", "tokens", "bytes"):
            raise ConfigError(f"objectives.Cloze: expected norm none, tokens or bytes, got {self.norm!r}.")
        if not 0.0 <= self.alpha < 1.0:
            raise ConfigError(f"objectives.Cloze: expected alpha in [0, 1), got {self.alpha}.")
        if self.alpha and self.masking is None:
            raise ConfigError(
                "objectives.Cloze: alpha needs a masked language model. Give masking, or alpha=0."
            )

    def counts(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Questions; with `alpha`, the tokens that will be hidden too."""
        counts = {"cross_entropy": _counted(batch).sum()}
        if self.alpha:
            hidden = sum(map(_hidden, _gold_spans(batch)))
            counts["mlm"] = _counted(batch).amax() * hidden
        return counts

    def scores(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        """Scores of the classes of each question, float32 [G, K], less the bias; -inf without a word."""
        return self._class_scores(forward(model, batch, masking=self.masking).logprobs_N, batch)

    def __call__(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        """Loss and accuracy.

        Raises:
            ShapeError: a batch of something else than labelled cloze questions.
        """
        extended, scored = batch, len(batch.targets_N)
        if self.alpha:  # one forward for both: what is hidden for itself stands in rows of its own
            extended = _with_hidden(batch)
        logprobs_N = forward(model, extended, masking=self.masking).logprobs_N
        scores_GK = self._class_scores(logprobs_N[:scored], batch)
        counted_G, targets_GK = _counted(batch), _targets(batch, scores_GK)
        logprobs_GK = scores_GK.log_softmax(-1).masked_fill(scores_GK == -math.inf, 0.0)
        losses_G = -(targets_GK * logprobs_GK).sum(-1)
        terms = {"cross_entropy": Mean((1 - self.alpha) * (counted_G * losses_G).sum(), counted_G.sum())}
        if self.alpha:
            own_N = logprobs_N[scored:]
            weight = counted_G.amax()
            terms["mlm"] = Mean(-self.alpha * weight * own_N.sum(), weight * len(own_N))
        right_G = scores_GK.argmax(-1) == targets_GK.argmax(-1)
        accuracy = Mean((counted_G * right_G).sum(), counted_G.sum())
        return LossOutput(terms, {"accuracy": accuracy.detach()})

    def _class_scores(self, logprobs_N: Tensor, batch: PackedBatch) -> Tensor:
        class_C = _extra(batch, "class").long()
        sums_C = logprobs_N.new_zeros(batch.continuations).index_add(0, batch.owner_N, logprobs_N)
        if self.norm == "bytes":
            sums_C = sums_C / _extra(batch, "bytes")
        elif self.norm == "tokens":
            ones_N = torch.ones_like(logprobs_N)
            sizes_C = torch.zeros_like(sums_C).index_add(0, batch.owner_N, ones_N)
            sums_C = sums_C / sizes_C.clamp(min=1)
        groups, classes = len(batch.spans), _classes(self.bias, class_C)
        scores_GK = _reduced(sums_C, _group_of(batch) * classes + class_C, groups * classes, self.reduce)
        scores_GK = scores_GK.view(groups, classes)
        return scores_GK if self.bias is None else scores_GK - scores_GK.new_tensor(self.bias)


def _reduced(values_C: Tensor, cell_C: Tensor, cells: int, reduce: Reduce) -> Tensor:
    """The values of each cell as one number; -inf for a cell without values."""
    empty = values_C.new_full((cells,), -math.inf)
    largest = empty.scatter_reduce(0, cell_C, values_C, "amax")
    if reduce == "max":
        return largest
    if reduce == "mean":
        counts = torch.zeros_like(empty).index_add(0, cell_C, torch.ones_like(values_C))
        means = torch.zeros_like(empty).index_add(0, cell_C, values_C) / counts.clamp(min=1)
        return torch.where(counts > 0, means, empty)
    shift = largest.detach()
    shift = torch.where(shift.isfinite(), shift, torch.zeros_like(shift))
    exps = torch.zeros_like(empty).index_add(0, cell_C, (values_C - shift[cell_C]).exp())
    return torch.where(exps > 0, exps.clamp(min=torch.finfo(exps.dtype).tiny).log() + shift, empty)


def _targets(batch: PackedBatch, scores_GK: Tensor) -> Tensor:
    """What each question's classes should have, [G, K], rows summing to 1."""
    class_C = _extra(batch, "class").long()
    targets_GK = torch.zeros_like(scores_GK)
    if "probability" in batch.extras:
        return targets_GK.index_put((_group_of(batch), class_C), _extra(batch, "probability"))
    if "rank" not in batch.extras:
        raise ShapeError(
            "objectives.Cloze: expected labelled questions, got some without. Give rows a label, or ask for "
            "scores(model, batch)."
        )
    gold_G = class_C[best(batch)]
    return functional.one_hot(gold_G, scores_GK.shape[1]).to(scores_GK)


def _classes(bias: tuple[float, ...] | None, class_C: Tensor) -> int:
    """K, on the host: it decides shapes."""
    found = int(class_C.max()) + 1
    if bias is not None and len(bias) < found:
        raise ShapeError(f"objectives.Cloze: expected a bias per class ({found}), got {len(bias)}.")
    return found if bias is None else len(bias)


def _group_of(batch: PackedBatch) -> Tensor:
    """The group of each continuation, int64 [C]."""
    sizes_G = torch.tensor([len(span.continuations) for span in batch.spans], device=batch.ids_T.device)
    return torch.arange(len(batch.spans), device=batch.ids_T.device).repeat_interleave(sizes_G)


def _counted(batch: PackedBatch) -> Tensor:
    """1 for a question that weighs something, 0 for one that stands for a rank without examples; [G]."""
    weight_G = batch.weights_N.new_zeros(len(batch.spans))
    weight_G = weight_G.index_add(0, _group_of(batch)[batch.owner_N], batch.weights_N)
    return (weight_G > 0).float()


def _extra(batch: PackedBatch, name: str) -> Tensor:
    values_C = batch.extras.get(name)
    if values_C is None or values_C.shape != (batch.continuations,):
        raise ShapeError(
            f"objectives.Cloze: expected extras {name!r} with one number per candidate "
            f"[{batch.continuations}], got {None if values_C is None else tuple(values_C.shape)}. Encode "
            "rows with ftlib.formatters.cloze."
        )
    return values_C


def _gold_spans(batch: PackedBatch) -> list[tuple[Span, int]]:
    """Each group with the place of its right candidate in it."""
    starts, placed = 0, []
    for span, gold in zip(batch.spans, best(batch).tolist(), strict=True):
        placed.append((span, gold - starts))
        starts += len(span.continuations)
    return placed


def _hidden(gold: tuple[Span, int]) -> int:
    """How many tokens of a right text are hidden: a share of those between its first and last one."""
    span, place = gold
    inner = span.prefix + span.continuations[place] - 2
    return max(1, round(MASKED_SHARE * inner)) if inner > 0 else 0


def _with_hidden(batch: PackedBatch) -> PackedBatch:
    """The batch with a copy of each right text, some of whose tokens are targets too."""
    device, start, owner = batch.ids_T.device, batch.tokens, batch.continuations
    ids, positions, spans, rows, targets, owners = [], [], [], [], [], []
    for span, place in _gold_spans(batch):
        before = span.start + span.prefix + sum(span.continuations[:place])
        length = span.continuations[place]
        text_L = torch.cat(
            [batch.ids_T[span.start : span.start + span.prefix], batch.ids_T[before : before + length]]
        )
        drawn = 1 + torch.randperm(max(len(text_L) - 2, 0))[: _hidden((span, place))].to(device)
        ids.append(text_L)
        positions.append(torch.arange(len(text_L), device=device))
        spans.append(Span(start, 0, (len(text_L),)))
        rows.append(start + drawn - 1)
        targets.append(text_L[drawn])
        owners.append(torch.full_like(drawn, owner))
        start, owner = start + len(text_L), owner + 1
    return replace(
        batch,
        ids_T=torch.cat([batch.ids_T, *ids]),
        positions_T=torch.cat([batch.positions_T, *positions]),
        spans=(*batch.spans, *spans),
        rows_N=torch.cat([batch.rows_N, *rows]),
        targets_N=torch.cat([batch.targets_N, *targets]),
        weights_N=torch.cat([batch.weights_N, *(torch.ones(len(row), device=device) for row in rows)]),
        owner_N=torch.cat([batch.owner_N, *owners]),
        extras={},
        token_extras={},
    )
