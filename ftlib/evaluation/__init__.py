"""Evaluation: completions of prompts, numbers made from losses and scores, pictures of both."""

from ftlib.evaluation import plots
from ftlib.evaluation.generation import decode, generate
from ftlib.evaluation.pairs import ScoredAnswers, pair_metrics
from ftlib.evaluation.perplexity import perplexity

__all__ = ["ScoredAnswers", "decode", "generate", "pair_metrics", "perplexity", "plots"]
