"""Evaluation: completions of prompts, numbers made from losses and scores, pictures of both."""

from ftlib.evaluation import plots
from ftlib.evaluation.calibration import fit_temperature, probabilities
from ftlib.evaluation.cloze import ClozeClassifier, ClozeEnsemble, find_words
from ftlib.evaluation.comparison import Comparison, compare
from ftlib.evaluation.generation import decode, generate
from ftlib.evaluation.outcomes import Outcomes, class_report, classification_metrics
from ftlib.evaluation.pairs import ScoredAnswers, pair_metrics
from ftlib.evaluation.perplexity import perplexity

__all__ = [
    "ClozeClassifier",
    "ClozeEnsemble",
    "Comparison",
    "Outcomes",
    "ScoredAnswers",
    "class_report",
    "classification_metrics",
    "compare",
    "decode",
    "find_words",
    "fit_temperature",
    "generate",
    "pair_metrics",
    "perplexity",
    "plots",
    "probabilities",
]
