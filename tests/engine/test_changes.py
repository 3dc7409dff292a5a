"""Configurations are compared by name, and what differs is shown."""

from __future__ import annotations

import json

import pytest

from ftlib.engine.changes import differences, refuse_changes
from ftlib.errors import CheckpointError, ConfigError

SAVED = {"seed": 0, "betas": (0.9, 0.999), "adapter": {"r": 16, "dropout": 0.0}, "extra": {}}


def test_configuration_equals_itself_after_a_round_trip_through_json():
    assert differences(json.loads(json.dumps(SAVED)), SAVED) == ""
    refuse_changes(json.loads(json.dumps(SAVED)), SAVED)


def test_table_names_each_difference_with_both_values():
    now = {"seed": 1, "betas": (0.9, 0.95), "adapter": {"r": 16}, "extra": {}, "new": "x"}
    assert differences(SAVED, now).splitlines() == [
        "option           checkpoint    now",
        "adapter.dropout  0.0           (absent)",
        "betas            [0.9, 0.999]  [0.9, 0.95]",
        'new              (absent)      "x"',
        "seed             0             1",
    ]


def test_long_value_is_cut_in_the_table_but_not_in_the_comparison():
    saved, now = {"text": "x" * 100 + "a"}, {"text": "x" * 100 + "b"}
    assert max(map(len, differences(saved, now).splitlines())) < 120
    assert "…" in differences(saved, now)


def test_unequal_types_differ():
    assert differences({"x": 1}, {"x": True}) != ""
    assert differences({"x": 1}, {"x": "1"}) != ""


def test_change_is_refused_with_the_table_and_the_way_out():
    with pytest.raises(CheckpointError) as caught:
        refuse_changes(SAVED, SAVED | {"seed": 1}, where="out/checkpoint-00000002")
    message = str(caught.value)
    assert message.startswith("out/checkpoint-00000002: ")
    assert differences(SAVED, SAVED | {"seed": 1}) in message
    assert "allow_changes=['seed']" in message


def test_named_changes_are_accepted_and_others_still_refused():
    now = SAVED | {"seed": 1, "adapter": {"r": 8, "dropout": 0.1}}
    refuse_changes(SAVED, now, allow_changes=["seed", "adapter"])
    refuse_changes(SAVED, now, allow_changes=["seed", "adapter.r", "adapter.dropout"])
    with pytest.raises(CheckpointError, match=r"allow_changes=\['adapter\.dropout'\]"):
        refuse_changes(SAVED, now, allow_changes=["seed", "adapter.r"])


def test_misspelt_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"got 'sed'\. Did you mean 'seed'"):
        refuse_changes(SAVED, SAVED, allow_changes=["sed"])
