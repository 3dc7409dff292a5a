"""Tensors and plain values come back from disk as they were."""

from __future__ import annotations

import math

import pytest
import torch

from ftlib.engine.files import load_state, load_tensors, save_state, save_tensors
from ftlib.errors import CheckpointError

NAN_WITH_PAYLOAD = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
        torch.arange(5, dtype=torch.uint8),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor([math.inf, -0.0, math.nan]),
        NAN_WITH_PAYLOAD,
    ],
)
def test_tensor_round_trips_bit_for_bit(tmp_path, tensor):
    save_tensors(tmp_path / "x.safetensors", {"t": tensor})
    back = load_tensors(tmp_path / "x.safetensors")["t"]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(bits(back), bits(tensor))


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def test_aliases_are_written_as_separate_tensors(tmp_path):
    base = torch.arange(4.0)
    save_tensors(tmp_path / "x.safetensors", {"a": base, "b": base, "tail": base[2:]})
    back = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(back["a"], base)
    assert torch.equal(back["b"], base)
    assert torch.equal(back["tail"], base[2:])


@pytest.mark.parametrize("content", [None, b"", b"garbage of more than eight bytes", b"\x80\x04K\x01."])
def test_file_that_is_not_safetensors_is_named(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: expected a safetensors file"):
        load_tensors(path)


def test_state_round_trips_with_tuples_as_lists(tmp_path):
    state = {"loss": 0.1 + 0.2, "big": 2**200, "text": 'é\n"\ud800', "none": None, "nested": {"a": [1, True]}}
    save_state(tmp_path / "state.json", state | {"betas": (0.9, 0.999), "inf": math.inf})
    assert load_state(tmp_path / "state.json") == state | {"betas": [0.9, 0.999], "inf": math.inf}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": [torch.ones(1)]}}, r"state\.json\.a\.b\[0\].*Tensor.*safetensors"),
        ({1: "x"}, "string keys, got 1"),
        ({"when": object()}, r"state\.json\.when: expected plain JSON values, got object"),
    ],
)
def test_value_that_json_would_change_is_refused_with_its_place(tmp_path, value, message):
    with pytest.raises(CheckpointError, match=message):
        save_state(tmp_path / "state.json", value)
    assert not (tmp_path / "state.json").exists()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff"])
def test_file_that_is_not_a_json_object_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.json: expected a JSON"):
        load_state(tmp_path / "state.json")
