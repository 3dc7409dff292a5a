"""What the outputs of a classifier stand for: class names, one of them or any set, and a temperature.

A model's own config holds them, in transformers' fields. An adapter's configuration has no such fields, so a
file beside the adapter's own tells them, and `load_adapter` gives them back to the model.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from peft import PeftModel
from torch import nn

from ftlib.adapters.vetting import read_json
from ftlib.errors import ConfigError

__all__ = ["CLASSES", "Classes", "classes_of", "read_classes", "set_classes", "write_classes"]

CLASSES = "classes.json"  # beside an adapter's own files
_KINDS = {False: "single_label_classification", True: "multi_label_classification"}  # transformers' words
_TEMPERATURE = "calibration_temperature"


@final
@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Args:
        names: one per output.
        several: a row may have any set of them, instead of exactly one.
        temperature: probabilities are those of the scores divided by it, > 0; 1 leaves them alone.

    Raises:
        ConfigError: no temperature, or no names.
    """

    names: tuple[str, ...]
    several: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf or not self.names:
            raise ConfigError(f"classes: expected names and a finite temperature > 0, got {self}.")


def classes_of(model: nn.Module) -> Classes | None:
    """Those that `set_classes` wrote, or that a saved classifier declares; None of any other model."""
    config = _config(model)
    kind = getattr(config, "problem_type", None)
    if kind not in _KINDS.values():
        return None
    names = tuple(str(config.id2label[k]) for k in range(config.num_labels))
    return Classes(names, kind == _KINDS[True], float(vars(config).get(_TEMPERATURE, 1.0)))


def set_classes(model: nn.Module, classes: Classes) -> None:
    """Write them into the config of a classifier with that many outputs."""
    config = _config(model)
    config.id2label = dict(enumerate(classes.names))
    config.label2id = {name: k for k, name in enumerate(classes.names)}
    config.problem_type = _KINDS[classes.several]
    vars(config).pop(_TEMPERATURE, None)
    if classes.temperature != 1.0:
        vars(config)[_TEMPERATURE] = classes.temperature


def write_classes(folder: Path, model: nn.Module) -> None:
    """Write the file beside a classifier's adapter; of any other model, none."""
    classes = classes_of(model)
    if classes is not None:
        text = json.dumps(asdict(classes), indent=2, ensure_ascii=False)
        (folder / CLASSES).write_text(text + "\n", encoding="utf-8")


def read_classes(folder: Path) -> Classes | None:
    """Those of a saved adapter; None where its folder holds none.

    Raises:
        ConfigError: a file that does not hold them.
    """
    path = folder / CLASSES
    if not path.is_file():
        return None
    held = read_json(path)
    try:
        names, several, temperature = (held[name] for name in ("names", "several", "temperature"))
        if not all(isinstance(name, str) for name in names) or not isinstance(several, bool):
            raise TypeError("names of another kind")
        return Classes(tuple(names), several, float(temperature))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f'{path}: expected {{"names": [...], "several": true or false, "temperature": number}}, got '
            f"{held!r:.80}. Take the file out and give num_labels=."
        ) from error


def _config(model: nn.Module) -> Any:
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.config
