"""Classification of texts, over encoders and causal language models.

The loss is `objectives.Classification`, the formulas `losses.cross_entropy` and
`losses.binary_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, final

import numpy as np
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ftlib.adapters.attach import AnyModel
from ftlib.adapters.classes import Classes, classes_of, set_classes
from ftlib.batches import PackedBatch
from ftlib.data.collate import collate
from ftlib.data.encode import Encoder
from ftlib.data.labelled import LabelledEncoder, labelled_records, labels_in
from ftlib.data.labels import Labels, label_shares
from ftlib.data.sampler import pack
from ftlib.engine.config import TrainConfig
from ftlib.errors import ConfigError, DataError
from ftlib.evaluation.calibration import fit_temperature, probabilities
from ftlib.evaluation.outcomes import Outcomes, classification_metrics
from ftlib.models import forward
from ftlib.models.classifiers import as_classifier, named
from ftlib.models.load import load
from ftlib.objectives import Classification, Objective
from ftlib.trainers.base import Trainer
from ftlib.trainers.inputs import AnyAdapter, check_ids, context_length, encode, is_encoded
from ftlib.trainers.options import refuse_without_effect
from ftlib.trainers.result import TrainResult
from ftlib.trainers.scores import seen_scores
from ftlib.trainers.trained import Examples

__all__ = ["ClassWeights", "ClassificationTrainer"]

Floats = NDArray[np.float64]
ClassWeights = Literal["balanced"] | Sequence[float] | Mapping[str, float]


@final
class ClassificationTrainer(Trainer):
    """Trains a model to tell the class of a text, or of a pair of texts; or any set of classes of it.

    Takes rows with ``text``, or ``text_a`` and ``text_b``, and ``label``: a class name, its number, a list of
    names, or one 0 or 1 per class. An encoder classifies by its architecture's own head, a language model by
    a score head on its last token; either is always trained and always saved, whatever the adapter. What is
    saved loads in plain transformers as `AutoModelForSequenceClassification`, with equal logits.

    Args:
        model: see `Trainer`; a classifier, or a causal language model, which gets a head.
        train_dataset: see `Trainer`.
        eval_dataset: see `Trainer`.
        tokenizer: see `Trainer`.
        adapter: see `Trainer`.
        config: see `Trainer`.
        callbacks: see `Trainer`.
        objective: see `Trainer`.
        encoder: see `Trainer`; a `LabelledEncoder`, to cut or leave out long rows.
        labels: all classes, in the order of the model's outputs; None takes those of the training rows,
            sorted, or the model's own where it knows them all.
        class_weights: one per class, by position or by name; "balanced" weighs each class by one over its
            number of rows.
        label_smoothing: share of a row that is spread over all classes, in [0, 1).
        beta: of the F-beta that evaluations report; above 1 recall weighs more than precision.

    Example:
        >>> trainer = ClassificationTrainer("bert-base-uncased", rows)  # doctest: +SKIP
        >>> trainer.train(), trainer.predict(["What a day!"])[0]["label"]  # doctest: +SKIP
    """

    task: ClassVar[str] = "classification"
    no_generation: ClassVar[str | None] = (
        "expected a trainer whose model writes text, got a classifier. Use predict()."
    )

    def __init__(
        self,
        model: AnyModel | str | Path,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter: AnyAdapter | None = None,
        config: TrainConfig | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        objective: Objective | None = None,
        encoder: LabelledEncoder | None = None,
        labels: Sequence[str] | None = None,
        class_weights: ClassWeights | None = None,
        label_smoothing: float = 0.0,
        beta: float = 1.0,
    ) -> None:
        options = {"class_weights": (class_weights, None), "label_smoothing": (label_smoothing, 0.0)}
        refuse_without_effect(objective, options)
        if not beta > 0:
            raise ConfigError(f"ClassificationTrainer: expected beta > 0, got {beta}.")
        self._class_weights, self._label_smoothing, self._beta = class_weights, label_smoothing, beta
        # 1. the classes, which the head needs
        train_dataset = _records(train_dataset)
        given = labels if encoder is None or encoder.labels is None else encoder.labels.names
        if labels is not None and given is not None and tuple(given) != tuple(labels):
            raise ConfigError(
                "ClassificationTrainer: labels differ from those of the encoder. Give one of the two."
            )
        self._labels = _classes(train_dataset, given, None if isinstance(model, str | Path) else model)
        # 2. the model, if it is a name: with a head of that size
        if isinstance(model, str | Path):
            model, found = load(model, task=self.task, num_labels=len(self._labels), adapter=adapter)
            tokenizer, adapter = tokenizer or found, None
        self._labelled = encoder
        super().__init__(
            model,
            train_dataset,
            eval_dataset,
            tokenizer=tokenizer,
            adapter=adapter,
            config=config,
            callbacks=callbacks,
            objective=objective,
        )

    def prepare_model(self, model: AnyModel, tokenizer: PreTrainedTokenizerBase | None) -> AnyModel:
        """A classifier with the names of the classes in its config."""
        return as_classifier(model, Classes(self._labels.names, self._labels.several), tokenizer)

    def default_objective(self) -> Objective:
        """`objectives.Classification`."""
        return Classification(class_weights=self._weights(), label_smoothing=self._label_smoothing)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of the model's outputs."""
        return self._labels.names

    @property
    def encoder(self) -> LabelledEncoder:  # type: ignore[override]  # rows of another kind
        """How this trainer encodes rows.

        Raises:
            ConfigError: there is no tokenizer.
        """
        if self._labelled is None:
            self._labelled = LabelledEncoder(self._needed_tokenizer())
        self._labelled.labels = self._labels
        return self._labelled

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Loss, and `evaluation.classification_metrics`: accuracy, precision, recall, areas, calibration."""
        data = self._evaluated(dataset)
        with seen_scores(self.engine, data) as seen:
            metrics = super().evaluate(seen.rows)
        said_BK = self._probabilities(np.asarray([scores_K for (scores_K,) in seen.by_row()], np.float64))
        more = classification_metrics(self._outcomes(data, said_BK), beta=self._beta)
        return metrics | {f"eval_{name}": value for name, value in more.items()}

    def outcomes(self, dataset: Any = None) -> Outcomes:
        """Truth and probabilities of labelled rows: what `plots.roc`, `plots.confusion`, `class_report` take.

        Args:
            dataset: as for `evaluate`.
        """
        data = self._evaluated(dataset)
        said = [row["probabilities"] for row in self.predict(data)]
        return self._outcomes(data, np.asarray(said))

    def predict(self, dataset: Any) -> list[dict[str, Any]]:
        """What the model says of each row, in order.

        Args:
            dataset: texts, rows with or without a label, or encoded rows.

        Returns:
            ``{"label", "probabilities", "scores"}`` of each: the likeliest class (or a list of those above
            one half), and one number per class of `labels`; scores are the model's own.
        """
        return super().predict(dataset)

    def predictions(self, data: Examples) -> list[dict[str, Any]]:
        """See `predict`."""
        rows: list[dict[str, Any]] = [{} for _ in data]
        for members in pack([int(row["length"]) for row in data], self.engine.max_tokens):
            batch = collate([data[index] for index in members]).to(self.engine.device)
            scores_BK = cast(Tensor, forward(self.engine.scorer, batch, scores=True).scores_CK).cpu().numpy()
            said_BK = self._probabilities(scores_BK)
            for index, scores_K, said_K in zip(members, scores_BK, said_BK, strict=True):
                above = [name for name, share in zip(self.labels, said_K, strict=True) if share > 0.5]
                rows[index] = {
                    "label": above if self._labels.several else self.labels[int(said_K.argmax())],
                    "probabilities": said_K.tolist(),
                    "scores": scores_K.tolist(),
                }
        return rows

    def calibrate(self, dataset: Any = None) -> float:
        """Fit the temperature that makes probabilities right on these rows; which class is likeliest stays.

        Saved with the weights, and forgotten when training goes on. It enters probabilities alone: no loss,
        and no score.

        Args:
            dataset: labelled rows that were not trained on; None takes the trainer's `eval_dataset`.

        Returns:
            The temperature: above 1 the model was too sure.
        """
        data = self._evaluated(dataset)
        scores_BK = np.asarray([row["scores"] for row in self.predict(data)])
        temperature = fit_temperature(scores_BK, self._truth(data), several=self._labels.several)
        self._set_temperature(temperature)
        return temperature

    def train(
        self, resume: bool | str | Path | None = None, *, allow_changes: Sequence[str] = ()
    ) -> TrainResult:
        """See `Trainer.train`."""
        self._set_temperature(1.0)
        return super().train(resume, allow_changes=allow_changes)

    def step(self, batch: PackedBatch | Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """See `Trainer.step`."""
        self._set_temperature(1.0)
        return super().step(batch)

    def _probabilities(self, scores_BK: Floats) -> Floats:
        """At the fitted temperature, if there is one."""
        classes = cast(Classes, classes_of(self.model))
        return probabilities(scores_BK, several=classes.several, temperature=classes.temperature)

    def _outcomes(self, data: Examples, said_BK: Floats) -> Outcomes:
        return Outcomes(self.labels, self._truth(data), said_BK, self._labels.several)

    def _set_temperature(self, temperature: float) -> None:
        classes = cast(Classes, classes_of(self.model))
        set_classes(self.model, replace(classes, temperature=temperature))

    def _encoded(self, data: Any, name: str) -> Any:
        encoder = cast(Encoder, self.encoder) if not is_encoded(data := _records(data)) else None
        encoded = encode(data, lambda: cast(Encoder, encoder), context_length(self.model), name=name)
        check_ids(encoded, self.model, name)
        missing = [column for column in self._labels.columns if column not in encoded[0]]
        if missing and name != "predict":
            raise DataError(
                f"{name}: expected rows with a label ({'a list' if self._labels.several else 'one class'} of "
                f"{list(self.labels)}), got {'another kind' if 'label' in encoded[0] else 'none'}.",
                code="missing_column",
                column="label",
            )
        if encoder is None and not missing and not self._labels.several:
            unknown = sorted({int(row["label"][0]) for row in encoded} - set(range(len(self._labels))))
            if unknown:
                raise DataError(
                    f"{name}: expected label numbers below {len(self._labels)}, got {unknown}.",
                    code="unknown_label",
                    column="label",
                )
        return encoded

    def _truth(self, data: Examples) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[B, K], 1 where the row has the class."""
        numbers = np.asarray([[row[name][0] for name in self._labels.columns] for row in data], np.int64)
        return numbers if self._labels.several else np.eye(len(self._labels), dtype=np.int64)[numbers[:, 0]]

    def _weights(self) -> tuple[float, ...] | None:
        """One per class, from what the caller gave."""
        given, names = self._class_weights, self.labels
        if given is None:
            return None
        if isinstance(given, str):
            if given != "balanced":
                raise ConfigError(
                    f'ClassificationTrainer: expected class_weights "balanced" or numbers, got {given!r}.'
                )
            columns = {name: [row[name] for row in self.train_data] for name in self._labels.columns}
            shares = label_shares(columns, self._labels)
            if 0 in shares:
                raise ConfigError(
                    f'ClassificationTrainer: expected a row of every class for class_weights="balanced", got '
                    f"none of {names[shares.index(0)]!r}. Give weights by name."
                )
            return tuple(len(self.train_data) / (len(names) * share) for share in shares)
        if isinstance(given, Mapping):
            if set(given) != set(names):
                raise ConfigError(
                    f"ClassificationTrainer: expected class_weights of {list(names)}, got {sorted(given)}."
                )
            return tuple(float(given[name]) for name in names)
        if len(given) != len(names):
            raise ConfigError(
                f"ClassificationTrainer: expected a class weight for each of {list(names)}, got {len(given)}."
            )
        return tuple(map(float, given))


def _records(data: Any) -> Any:
    """Labelled records; encoded data and streams as they are."""
    return data if isinstance(data, IterableDataset) or is_encoded(data) else labelled_records(data)


def _classes(data: Any, given: Sequence[str] | None, model: AnyModel | None) -> Labels:
    """The classes: as given, as a model knows them, or as the rows name them."""
    own = None if model is None else classes_of(model)
    if isinstance(data, IterableDataset):
        raise ConfigError(
            "train_dataset: expected data with a length, got an IterableDataset. "
            "Take what you train on: Dataset.from_list(list(stream.take(n)))."
        )
    if is_encoded(data):
        several = "label" not in data[0]
        if given is not None:
            return Labels(tuple(given), several)
        if own is not None:
            return Labels(own.names, several)
        count = sum(name.startswith("label_") for name in data[0])
        if not several:
            count = 1 + max(int(row["label"][0]) for row in data)
        return Labels(named(count).names, several)
    if given is not None:
        several = any(isinstance(cell, list) for cell in _cells(data))
        return Labels(tuple(given), several)
    found = labels_in(data)
    knows = own is not None and set(found.names) <= set(own.names) and found.several == own.several
    return Labels(own.names, own.several) if own is not None and knows else found


def _cells(records: Dataset) -> Sequence[Any]:
    return cast(Sequence[Any], records["label"]) if "label" in records.column_names else ()
