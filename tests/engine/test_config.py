"""A configuration that would be misread is refused when it is made."""

from __future__ import annotations

import pickle

import pytest

from ftlib.engine import TrainConfig
from ftlib.errors import ConfigError


def test_an_unknown_option_suggests_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown option 'learning_rat'.*'learning_rate'"):
        TrainConfig(learning_rat=1e-4)


def test_an_option_like_no_other_lists_them_all():
    with pytest.raises(ConfigError, match="There are output_dir, epochs, max_steps"):
        TrainConfig(zzz=1)


OUT_OF_RANGE = {
    "epochs": [0, -1, 1.5, True],
    "max_steps": [0, 2.0],
    "learning_rate": [-1e-4, float("nan"), float("inf")],
    "batch_size": [0, "8"],
    "max_tokens": [0],
    "seed": [-1, 2**32],
    "schedule": ["linaer", None, "reduce_lr_on_plateau"],
    "warmup": [-0.1, float("nan"), float("inf")],
    "weight_decay": [-0.1],
    "betas": [(0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, 0.99, 0.999)],
    "eps": [-1e-8],
    "max_grad_norm": [0, -1, float("nan")],
    "optimizer": ["adam", None],
    "log_steps": [0],
    "eval_steps": [0],
    "eval_batch_size": [0],
    "save_steps": [0],
    "keep_checkpoints": [0],
    "progress": ["loud"],
    "on_nonfinite": ["ignore"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_value_out_of_range_is_named_with_what_was_expected(name, value):
    with pytest.raises(ConfigError, match=rf"^TrainConfig: {name}: expected .*, got ") as caught:
        TrainConfig(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"load_best": True}, "load_best"),
        ({"metric_for_best": "loss"}, "metric_for_best"),
        ({"save_steps": 5}, "save_steps"),
        ({"keep_checkpoints": 5}, "keep_checkpoints"),
        ({"warmup": 0.1, "schedule": print}, "warmup"),
        ({"betas": (0.8, 0.9), "optimizer": print}, "betas"),
        ({"eps": 1e-6, "optimizer": print}, "eps"),
    ],
)
def test_an_option_without_effect_is_refused(options, name):
    with pytest.raises(ConfigError, match=rf"{name} has no effect without"):
        TrainConfig(**options)


def test_a_configuration_does_not_change_and_survives_a_process_boundary():
    config = TrainConfig(output_dir="out", save_steps=5, betas=(0.8, 0.9))
    with pytest.raises(AttributeError):
        config.epochs = 2
    assert pickle.loads(pickle.dumps(config)) == config


def test_identity_holds_what_decides_the_weights_and_nothing_else():
    base = TrainConfig().identity()
    shown = TrainConfig(
        output_dir="out",
        log_steps=1,
        eval_steps=2,
        save_steps=3,
        keep_checkpoints=4,
        run_name="x",
        report_to="none",
    )
    assert shown.identity() == base
    assert TrainConfig(seed=1).identity() != base
    assert TrainConfig(optimizer=print).identity()["optimizer"] == "print"
