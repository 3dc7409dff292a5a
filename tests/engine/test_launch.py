"""What processes are launched with and the engine would not follow is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from ftlib.engine.launch import launched, require_supported
from ftlib.errors import CapabilityError


def accelerator(plugin: Any = None, *, precision: str = "no") -> Any:
    """As accelerate tells it; plain data parallelism without a plugin."""
    state = SimpleNamespace(**({} if plugin is None else {"fsdp_plugin": plugin}))
    return SimpleNamespace(
        state=state,
        distributed_type=DistributedType.MULTI_CPU if plugin is None else DistributedType.FSDP,
        device=SimpleNamespace(type="cpu"),
        mixed_precision=precision,
    )


def plugin(**options: Any) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False} | options)


def test_deepspeed_is_refused_before_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(CapabilityError, match=r"DeepSpeed.*--use_fsdp --fsdp_version 2"):
        launched()


def test_fsdp_asked_for_and_not_given_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_supported(accelerator())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(CapabilityError, match="expected FSDP, as was asked for, got MULTI_CPU on cpu"):
        require_supported(accelerator())


@pytest.mark.parametrize(
    "option",
    [
        {"reshard_after_forward": False},
        {"cpu_offload": True},
        {"activation_checkpointing": True},
        {"ignored_modules": "head"},
    ],
)
def test_an_option_that_would_be_ignored_is_refused(option: dict[str, Any]) -> None:
    require_supported(accelerator(plugin()))
    with pytest.raises(CapabilityError, match="engine: expected fsdp_"):
        require_supported(accelerator(plugin(**option)))


def test_mixed_precision_is_refused_under_fsdp_alone() -> None:
    require_supported(accelerator(precision="bf16"))
    with pytest.raises(CapabilityError, match="Load the model in bfloat16"):
        require_supported(accelerator(plugin(), precision="bf16"))
