"""Classifiers made of language models: scoring, calibration, ensembles, words."""

from __future__ import annotations

from ftlib.evaluation.cloze.classifier import ClozeClassifier
from ftlib.evaluation.cloze.ensemble import ClozeEnsemble
from ftlib.evaluation.cloze.words import find_words

__all__ = ["ClozeClassifier", "ClozeEnsemble", "find_words"]
