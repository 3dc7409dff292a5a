import pytest
import torch

from ftlib.errors import ConfigError
from ftlib.models import precision
from ftlib.models.precision import bf16_is_fast, choose_dtype, parse_dtype

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("stored", "frozen", "fast", "expected"),
    [
        (F32, True, True, BF16),  # what is frozen needs no more
        (F32, True, False, F32),
        (BF16, True, False, F32),
        (BF16, False, True, BF16),
        (BF16, False, False, F32),
        (F16, False, True, BF16),
        (F32, False, True, F32),  # what is trained keeps its precision
        (None, False, True, F32),
    ],
)
def test_auto_is_bfloat16_where_it_is_fast_and_loses_nothing_that_is_trained(
    monkeypatch, stored, frozen, fast, expected
):
    monkeypatch.setattr(precision, "bf16_is_fast", lambda device: (fast, "because"))
    dtype, reason = choose_dtype(stored=stored, frozen=frozen, device=torch.device("cpu"))
    assert dtype == expected
    assert reason


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_a_processor_is_fast_if_it_has_the_instructions(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    found, reason = bf16_is_fast(torch.device("cpu"))
    assert found is fast
    assert "processor has" in reason


def test_a_device_of_unknown_speed_is_not_fast():
    assert bf16_is_fast(torch.device("meta")) == (False, "nothing is known about bfloat16 on meta")


def test_dtypes_are_given_as_names_or_as_they_are():
    assert parse_dtype("float16") == parse_dtype(F16) == F16


@pytest.mark.parametrize("dtype", ["int8", "bf16", torch.int64, None])
def test_what_weights_are_not_trained_in_is_refused(dtype):
    with pytest.raises(ConfigError, match=r"expected dtype 'auto' or one of .* got"):
        parse_dtype(dtype)
