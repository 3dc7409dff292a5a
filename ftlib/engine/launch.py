"""How the processes of a run were started, and whether the engine can train that way.

accelerate reads it from what `accelerate launch` or `torchrun` left in the environment. Where it cannot give
what was asked for it may give less without a word, such as plain data parallelism for FSDP on a CPU: that is
refused here.
"""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy

from ftlib.errors import CapabilityError

__all__ = ["is_sharding", "launched", "refuse_sharding", "require_supported"]

_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_FSDP2 = (
    "accelerate launch --use_fsdp --fsdp_version 2 --fsdp_reshard_after_forward true "
    "--fsdp_cpu_ram_efficient_loading false"
)


def launched() -> Accelerator:
    """Accelerate's view of this process.

    Raises:
        CapabilityError: DeepSpeed was asked for.
    """
    if _asked_for("ACCELERATE_USE_DEEPSPEED"):  # before accelerate looks for the package
        raise CapabilityError(
            "engine: expected data parallelism or FSDP2, got DeepSpeed, whose engine keeps optimiser, "
            f"clipping and gradients to itself. FSDP2 shards the same: {_FSDP2}."
        )
    return Accelerator()


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether FSDP was asked for, and accelerate gives it.

    The second accelerator of a process forgets that type, but keeps the plugin it was given for.
    """
    return vars(accelerator.state).get("fsdp_plugin") is not None


def require_supported(accelerator: Accelerator) -> None:
    """Raise `CapabilityError` for a way of launching, or a precision, that the engine cannot train with."""
    kind, sharding = accelerator.distributed_type, is_sharding(accelerator)
    if sharding:
        _require_fsdp2(accelerator.state.fsdp_plugin)
    elif kind not in _DATA_PARALLEL:
        raise CapabilityError(
            f"engine: expected one process, data parallelism or FSDP2, got {kind.value}. Launch with a plain "
            f"`accelerate launch --multi_gpu` or `torchrun`, or {_FSDP2}."
        )
    elif _asked_for("ACCELERATE_USE_FSDP"):
        raise CapabilityError(
            f"engine: expected FSDP, as was asked for, got {kind.value} on {accelerator.device.type}: "
            "accelerate shards over several GPUs only. Launch on those, or without --use_fsdp."
        )
    expected = ("no",) if sharding else ("no", "bf16")
    if accelerator.mixed_precision not in expected:
        raise CapabilityError(
            f"engine: expected mixed precision {' or '.join(map(repr, expected))}, got "
            f"{accelerator.mixed_precision!r}. Load the model in bfloat16, whose trained weights have "
            f"float32 masters, and launch with --mixed_precision {expected[-1]}."
        )


def refuse_sharding(who: str, reason: str) -> None:
    """Raise `CapabilityError` where these processes were launched for FSDP, which `who` does not take."""
    if is_sharding(launched()):
        raise CapabilityError(
            f"{who}: expected a model that lies whole on every rank, got FSDP: {reason}. Launch with "
            "`accelerate launch --multi_gpu` or `torchrun`."
        )


def _require_fsdp2(plugin: FullyShardedDataParallelPlugin) -> None:
    """Of the plugin's options those that the engine would not follow are refused."""
    refused = {
        "fsdp_version": (plugin.fsdp_version, 2),
        "fsdp_reshard_after_forward": (plugin.reshard_after_forward, True),
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, False),
        "fsdp_offload_params": (isinstance(plugin.cpu_offload, CPUOffloadPolicy), False),
        "fsdp_activation_checkpointing": (plugin.activation_checkpointing, False),
        "fsdp_transformer_layer_cls_to_wrap": (plugin.transformer_cls_names_to_wrap, None),
        "fsdp_min_num_params": (plugin.min_num_params, None),
        "fsdp_ignored_modules": (plugin.ignored_modules, None),
    }
    for option, (found, expected) in refused.items():
        if found != expected:
            raise CapabilityError(
                f"engine: expected {option}={str(expected).lower()}, got {str(found).lower()}: layers are "
                "sharded one by one, and checkpointed by TrainConfig(gradient_checkpointing=True). "
                f"Launch with {_FSDP2}."
            )


def _asked_for(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
