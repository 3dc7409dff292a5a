"""The dtype of a model's weights: bfloat16 where the device multiplies it fast, float32 where it does not.

A processor without bfloat16 instructions emulates them 44 to 499 times slower (pytorch#146508), so the
choice asks for the instructions rather than for the dtype.
"""

from __future__ import annotations

import torch

from ftlib.errors import ConfigError

__all__ = ["bf16_is_fast", "choose_dtype", "parse_dtype"]

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_FEATURES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86, then Arm


def choose_dtype(
    *, stored: torch.dtype | None, frozen: bool, device: torch.device | None
) -> tuple[torch.dtype, str]:
    """The dtype that ``"auto"`` stands for, and the reason in words.

    Args:
        stored: the checkpoint's own dtype; None where it does not say.
        frozen: the weights are not trained, since an adapter is.
        device: where the model will compute; None is the accelerator if there is one, else the CPU.
    """
    fast, reason = bf16_is_fast(device or torch.accelerator.current_accelerator() or torch.device("cpu"))
    if not frozen and stored not in (torch.bfloat16, torch.float16):
        return torch.float32, "the checkpoint's own"
    if not fast:
        return torch.float32, reason
    return torch.bfloat16, f"{'frozen' if frozen else 'half precision in the checkpoint'}, and {reason}"


def bf16_is_fast(device: torch.device) -> tuple[bool, str]:
    """Whether the device multiplies bfloat16 in hardware, and how that is known."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return fast, f"{'this' if fast else 'no'} CUDA device computes bfloat16"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        found = [name for name in _CPU_FEATURES if capabilities.get(name)]
        if found:
            return True, f"the processor has {found[0]}"
        return False, "the processor has neither avx512_bf16 nor amx_bf16, so bfloat16 would be slower"
    return False, f"nothing is known about bfloat16 on {device.type}"


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from itself or its name.

    Raises:
        ConfigError: not a floating dtype that weights are trained in.
    """
    parsed = _FLOATS.get(dtype) if isinstance(dtype, str) else dtype
    if parsed is None or parsed not in _FLOATS.values():
        raise ConfigError(f"load: expected dtype 'auto' or one of {sorted(_FLOATS)}, got {dtype!r}.")
    return parsed
