"""The least work of one training step, and how long a machine needs for it.

    t_floor = max(FLOPs / rate of a dense matrix product, bytes / rate of a large copy)

Per step, T real tokens in documents of s_i tokens, N of them trained; W weights in the matrices of the
body, A in the adapter, Hd = hidden width x vocabulary in the head:

    FLOPs = T (4 W + 6 A) + 3.5 F_att + 4 Hd N,   F_att = 2 layers (heads x head_dim) sum s_i^2
    bytes = 4 (W + Hd) + T x (bytes of activations moved per token)

A frozen matrix is used twice (forward, gradient of its input), an adapter three times, attention with a
causal mask in the forward and two and a half times that in the backward, the head for trained rows only.
The bytes are those of one pass over bfloat16 weights per direction and of perfectly fused activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["floor_seconds", "training_bytes", "training_flops"]

# Reads and writes of one hidden vector per layer, forward and backward, everything elementwise fused:
# counted for a Llama block, 2.6 MB per token for 30 layers of width 576.
VECTORS_PER_LAYER = 75
BFLOAT16 = 2  # bytes


def training_flops(sizes: Mapping[str, int], lengths: Sequence[int], trained_tokens: int) -> float:
    """Of a step on documents of these lengths.

    Args:
        sizes: `body`, `head`, `adapter` weights; `layers`; `attention` = heads x head_dim.
        lengths: tokens of each document.
        trained_tokens: rows the head is needed for.
    """
    attention = 2 * sizes["layers"] * sizes["attention"] * sum(length**2 for length in lengths)
    body = sum(lengths) * (4 * sizes["body"] + 6 * sizes["adapter"])
    return body + 3.5 * attention + 4.0 * sizes["head"] * trained_tokens


def training_bytes(sizes: Mapping[str, int], lengths: Sequence[int]) -> float:
    """Moved by a step that is one micro-batch. `sizes` also holds the `hidden` width."""
    per_token = VECTORS_PER_LAYER * sizes["layers"] * sizes["hidden"] * BFLOAT16
    return 2 * BFLOAT16 * (sizes["body"] + sizes["head"]) + float(per_token * sum(lengths))


def floor_seconds(flops: float, moved: float, *, matmul_flops: float, copy_bytes: float) -> float:
    """The floor of one step on a machine with these rates."""
    return max(flops / matmul_flops, moved / copy_bytes)
