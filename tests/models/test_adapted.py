"""Weights that a forward does not read, seen from the adapters in a model."""

from __future__ import annotations

import pytest

from ftlib.adapters import attach, lora
from ftlib.models.adapted import idle_weights
from tests.models_zoo import tiny_model


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
@pytest.mark.parametrize(
    ("tied", "idle"), [(False, {"lm_head"}), (True, set())], ids=["own head", "tied head"]
)
def test_a_module_trained_whole_leaves_its_original_idle_unless_another_reads_it(
    tied: bool, idle: set[str]
) -> None:
    model = attach(tiny_model(tie_word_embeddings=tied), lora(2, modules_to_save=["lm_head"]))
    named = {id(weight): name for name, weight in model.named_parameters()}
    found = {named[each] for each in idle_weights(model)}
    assert found == {f"base_model.model.{name}.original_module.weight" for name in idle}
    with model.disable_adapter():
        assert not idle_weights(model), "the original is read again"


def test_of_a_plain_model_every_weight_is_read() -> None:
    assert not idle_weights(tiny_model())
