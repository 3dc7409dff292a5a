"""The objective of classification: transformers' own loss, class weights, and counts known beforehand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ftlib.data.collate import collate
from ftlib.errors import ConfigError, ShapeError
from ftlib.models import Scored
from ftlib.objectives import Classification
from tests.encoders import TEXTS, encoder, encoder_tokenizer

LABELS = [0, 1, 2, 1, 0, 2, 2, 1]


def rows(several=False):
    tokenizer = encoder_tokenizer()
    made = []
    for text, label in zip(TEXTS, LABELS, strict=True):
        ids = tokenizer(text)["input_ids"]
        numbers = {"label": [float(label)]}
        if several:
            numbers = {f"label_{k}": [float(k != label)] for k in range(3)}
        made.append(
            {
                "prefix_ids": [],
                "prefix_weights": [],
                "continuation_ids": [ids],
                "continuation_weights": [[1.0] * len(ids)],
                "length": len(ids),
                "source": "rows",
                **numbers,
            }
        )
    return made


def loss(objective, model, *batches):
    counts = [objective.counts(batch) for batch in batches]
    whole = {name: sum(count[name] for count in counts) for name in counts[0]}
    return sum(objective(model, batch).loss(whole) for batch in batches)


def scored(*scores):
    scores_CK = torch.tensor(scores)
    return Scored(torch.empty(0), scores_CK=scores_CK)


def batch_of(labels, **extras):
    batch = collate([{**row, "label": [float(label)]} for row, label in zip(rows(), labels, strict=False)])
    return replace(batch, extras={**batch.extras, **{name: torch.tensor(x) for name, x in extras.items()}})


@pytest.mark.parametrize("several", [False, True])
def test_the_loss_is_transformers_own_on_the_same_rows(several):
    model = encoder()
    padded = encoder_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    labels = torch.tensor(LABELS)
    if several:
        labels = (torch.arange(3) != labels[:, None]).float()
    theirs = model(**padded, labels=labels).loss
    assert model.config.problem_type == f"{'multi' if several else 'single'}_label_classification"
    assert_close(loss(Classification(), model, collate(rows(several))), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "objective",
    [Classification(), Classification(class_weights=(0.5, 2.0, 4.0), label_smoothing=0.1)],
    ids=["plain", "weighted"],
)
def test_any_split_has_the_same_loss_and_gradients(several, objective):
    model, data = encoder(), rows(several)

    def gradients(*parts):
        model.zero_grad()
        value = loss(objective, model, *(collate(part) for part in parts))
        value.backward()
        return value.detach(), [
            weight.grad.clone() for weight in model.parameters() if weight.grad is not None
        ]

    whole, expected = gradients(data)
    for parts in ((data[:4], data[4:]), tuple([row] for row in data), (data[5:], data[:5])):
        value, found = gradients(*parts)
        assert_close(value, whole, rtol=1e-5, atol=1e-6)
        size = torch.stack([weight.norm() for weight in expected]).norm()
        for mine, theirs in zip(found, expected, strict=True):
            assert float((mine - theirs).norm()) <= 1e-5 * float(size)


def test_class_weights_are_in_the_numerator_and_the_denominator():
    """Even scores cost log 2 a row, whatever the rows weigh: (3 + 1) log 2 / (3 + 1)."""
    objective, batch = Classification(class_weights=(3.0, 1.0)), batch_of([0, 1])
    even = objective.of(scored([0.0, 0.0], [0.0, 0.0]), batch)
    assert objective.counts(batch) == {"cross_entropy": torch.tensor(4.0)}
    assert_close(even.loss(objective.counts(batch)), torch.tensor(math.log(2)))
    sure = objective.of(scored([math.log(3.0), 0.0], [0.0, 0.0]), batch)
    assert_close(sure.loss(objective.counts(batch)), torch.tensor((3 * math.log(4 / 3) + math.log(2)) / 4))


def test_a_row_without_weight_counts_for_nothing():
    """What a rank computes that has no rows of its own left."""
    objective = Classification(class_weights=(3.0, 1.0))
    weighted = batch_of([0, 1], weight=[1.0, 0.0])
    scores = scored([0.3, -1.0], [9.0, 4.0])
    found, alone = objective.of(scores, weighted), objective.of(scored([0.3, -1.0]), batch_of([0]))
    assert_close(found.terms["cross_entropy"].sum, alone.terms["cross_entropy"].sum)
    assert objective.counts(weighted) == {"cross_entropy": torch.tensor(3.0)}
    nothing = objective.of(scores, batch_of([0, 1], weight=[0.0, 0.0]))
    assert float(nothing.loss({"cross_entropy": 0.0})) == 0.0


def test_accuracy_is_the_share_of_rows_that_are_right():
    single = Classification().of(scored([2.0, 1.0, 0.0], [0.0, 1.0, 2.0]), batch_of([0, 1]))
    assert float(single.metrics["accuracy"].value) == 0.5
    several = collate(rows(several=True)[:2])  # of the first row classes 1 and 2, of the second 0 and 2
    found = Classification().of(scored([-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]), several)
    assert float(found.metrics["accuracy"].value) == 0.5


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="expected extras 'label' or 'label_0'"):
        Classification().counts(replace(batch_of([0]), extras={}))
    with pytest.raises(ShapeError, match=r"scores of all classes, got None"):
        Classification().of(Scored(torch.empty(0)), batch_of([0]))
    with pytest.raises(ShapeError, match=r"scores of 3 classes, got \(8, 2\)"):
        Classification().of(scored(*[[0.0, 0.0]] * 8), collate(rows(several=True)))
    with pytest.raises(ShapeError, match=r"one class weight per class \(3\), got 2"):
        Classification(class_weights=(1.0, 1.0)).of(scored([0.0, 0.0, 0.0]), batch_of([0]))
    for wrong in ({"label_smoothing": 1.0}, {"class_weights": (1.0, 0.0)}, {"class_weights": ()}):
        with pytest.raises(ConfigError, match="expected"):
            Classification(**wrong)
