"""Generators, signals and modes are borrowed and given back."""

from __future__ import annotations

import json
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

from ftlib.engine.determinism import (
    capture_rng,
    forked_rng,
    modes,
    restore_rng,
    rng_scope,
    row_seed,
    stop_signals,
)
from ftlib.engine.files import load_tensors, save_tensors
from ftlib.errors import CheckpointError
from tests.engine.forked import in_child


def draws() -> list[float]:
    """From every generator, normals too: they keep a second value back for the next draw."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002
        float(np.random.randn()),  # noqa: NPY002
        float(torch.rand(())),
        float(torch.randn(())),
    ]


# --- random numbers --------------------------------------------------------------------------------


def test_captured_state_repeats_the_draws_bit_for_bit_through_files(tmp_path):
    draws()  # leaves Python and NumPy with half a pair of normals
    tensors, scalars = capture_rng()
    save_tensors(tmp_path / "rng.safetensors", tensors)
    text = json.dumps(scalars)
    expected = draws() + draws()
    restore_rng(load_tensors(tmp_path / "rng.safetensors"), json.loads(text))
    assert draws() + draws() == expected


@pytest.mark.parametrize("part", ["python", "numpy", "numpy_keys", "torch_cpu"])
def test_missing_part_is_refused_by_name(part):
    tensors, scalars = capture_rng()
    tensors.pop(part, None)
    scalars.pop(part, None)
    before = draws_without_effect()
    with pytest.raises(CheckpointError, match=part):
        restore_rng(tensors, scalars)
    assert draws_without_effect() == before


def draw_and_fail() -> None:
    draws()
    random.seed(5)
    raise ZeroDivisionError


def draws_without_effect() -> list[float]:
    with forked_rng():
        return draws()


@pytest.mark.parametrize("index", range(6))
def test_each_generator_left_out_of_a_restore_would_show(index):
    """The negative control: one generator not put back gives another draw."""
    tensors, scalars = capture_rng()
    expected = draws()
    moved = draws()
    assert moved[index] != expected[index]
    restore_rng(tensors, scalars)
    assert draws()[index] == expected[index]


def test_forked_scope_leaves_no_trace_even_after_an_error():
    expected = draws_without_effect()
    with pytest.raises(ZeroDivisionError), forked_rng():
        draw_and_fail()
    assert draws() == expected


def test_seeded_scope_repeats_and_gives_the_callers_state_back():
    expected = draws_without_effect()
    with rng_scope(3):
        first = draws()
    with rng_scope(3):
        second = draws()
    with rng_scope(4):
        third = draws()
    assert first == second
    assert all(a != b for a, b in zip(first, third, strict=True))
    assert draws() == expected


def test_seeded_scope_gives_the_callers_state_back_after_an_error():
    expected = draws_without_effect()
    with pytest.raises(ZeroDivisionError), rng_scope(3):
        raise ZeroDivisionError
    assert draws() == expected


def test_seeded_scope_is_what_the_libraries_themselves_seed():
    with rng_scope(3):
        inside = draws()
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    assert draws() == inside


def test_states_of_cuda_devices_that_are_not_there_are_reported(caplog):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA devices")
    tensors, scalars = capture_rng()
    restore_rng(tensors | {"cuda_0": torch.zeros(16, dtype=torch.uint8)}, scalars)
    assert "1 CUDA devices and this machine has 0" in caplog.text


@pytest.mark.gpu
def test_cuda_draws_repeat_too():
    torch.zeros(1, device="cuda")
    tensors, scalars = capture_rng()
    expected = torch.rand(4, device="cuda")
    restore_rng(tensors, json.loads(json.dumps(scalars)))
    assert torch.equal(torch.rand(4, device="cuda"), expected)
    with rng_scope(1):
        first = torch.rand(4, device="cuda")
    with rng_scope(1):
        assert torch.equal(torch.rand(4, device="cuda"), first)


def test_reading_generators_starts_no_cuda():
    with forked_rng(), rng_scope(0):
        assert not torch.cuda.is_initialized()


def test_row_seed_depends_on_every_part_and_on_nothing_else():
    triples = [(s, e, i) for s in range(3) for e in range(3) for i in (0, 1, 11, "0", "1", "1:1")]
    seeds = {row_seed(*triple) for triple in triples}
    assert len(seeds) == len(triples)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(1, 1, 1) == row_seed(1, 1, np.int64(1))
    torch.Generator().manual_seed(max(seeds))


def test_row_seed_is_the_same_in_every_process():
    """A pinned value: a change would silently change every resumed run."""
    assert row_seed(0, 0, 0) == 5847049036369296478


# --- signals ---------------------------------------------------------------------------------------


HANDLED = (signal.SIGTERM, signal.SIGINT)


def default_handlers() -> list:
    """Python's own, whatever the test runner installed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return handlers()


def handlers() -> list:
    return [signal.getsignal(number) for number in HANDLED]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)])
def test_first_signal_sets_the_flag_and_later_ones_act_as_before(number, status):
    def child(say):
        before = default_handlers()
        with stop_signals() as stop:
            say(stop.stopped_by)
            os.kill(os.getpid(), number)
            say(stop.stopped_by)
        say(handlers() == before)
        os.kill(os.getpid(), number)
        say("not reached")

    ended = in_child(child)
    assert ended.said[:3] == ["None", number.name, "True"]
    assert "not reached" not in ended.said
    assert ended.status == status  # killed, or ended by KeyboardInterrupt


@pytest.mark.parametrize(
    ("first", "second", "raised", "status"),
    [
        (signal.SIGTERM, signal.SIGTERM, SystemExit, 143),
        (signal.SIGINT, signal.SIGINT, KeyboardInterrupt, None),
        (signal.SIGTERM, signal.SIGINT, KeyboardInterrupt, None),
        (signal.SIGINT, signal.SIGTERM, SystemExit, 143),
    ],
)
def test_second_signal_raises_at_once_and_handlers_come_back(first, second, raised, status):
    def child(say):
        before = default_handlers()
        try:
            with stop_signals() as stop:
                os.kill(os.getpid(), first)
                os.kill(os.getpid(), second)
                say("not reached")
        except raised as error:
            say(f"{stop.stopped_by} {getattr(error, 'code', None)} {handlers() == before}")

    assert in_child(child) == (0, [f"{first.name} {status} True"])


def test_ignored_signal_stays_ignored():
    def child(say):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with stop_signals() as stop:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        say(f"{stop.stopped_by} {signal.getsignal(signal.SIGINT) is signal.SIG_IGN}")

    assert in_child(child) == (0, ["None True"])


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)

    def fail():
        assert signal.getsignal(signal.SIGTERM) is not before
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), stop_signals():
        fail()
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_thread_gets_a_flag_and_installs_nothing():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with stop_signals() as stop:
            stop.stopped_by = "trainer.stop()"
            seen.extend([stop.stopped_by, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["trainer.stop()", before]


def test_nested_scopes_restore_the_outer_handler():
    with stop_signals() as outer:
        handler = signal.getsignal(signal.SIGTERM)
        with stop_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert (outer.stopped_by, inner.stopped_by) == (None, "SIGTERM")


# --- modes -----------------------------------------------------------------------------------------


def mixed_model() -> nn.Module:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    model.train()
    model[1].training = False  # a parent whose children are in another mode
    model[1][1].training = True
    model[1][0].bias.requires_grad_(False)
    return model


def modes_of(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_each_module_and_parameter_gets_its_own_mode_back(error):
    model = mixed_model()
    before = modes_of(model)
    assert len(set(before[0])) == 2
    try:
        with modes(model):
            model.eval().requires_grad_(True)
            assert modes_of(model) != before
            if error:
                raise error
    except ZeroDivisionError:
        pass
    assert modes_of(model) == before


def test_what_is_added_inside_is_left_alone():
    model = mixed_model()
    with modes(model):
        model.append(nn.Linear(2, 2).eval().requires_grad_(False))
    assert model[2].training is False
    assert model[2].weight.requires_grad is False
