"""Evaluation: completions of prompts, and numbers made from losses."""

from ftlib.evaluation.generation import decode, generate
from ftlib.evaluation.perplexity import perplexity

__all__ = ["decode", "generate", "perplexity"]
