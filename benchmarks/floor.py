"""The least work of one training step, and how long a machine needs for it.

    t_floor = max(FLOPs / rate of a dense matrix product, bytes / rate of a large copy)

Per step, on T real tokens of which N are scored by the head; W weights in the matrices of the body, A in
the adapter, Hd = hidden width x vocabulary in the head (the width alone for a score head):

    training FLOPs = T (4 W + 6 A) + 3.5 F_att + 4 Hd N
    forward FLOPs  = 2 W T + F_att + 2 Hd N,    F_att = 2 layers (heads x head_dim) S
    bytes = 4 (W + Hd) + T x (bytes of activations moved per token)

An example is a prefix of P tokens and continuations of C_i tokens, which share it:

    T = sum P + sum C_i,    S = sum P^2 + sum (2 P C_i + C_i^2)

A frozen matrix is used twice (forward, gradient of its input), an adapter three times, attention with a
causal mask in the forward and two and a half times that in the backward, the head for scored rows only.
The bytes are those of one pass over bfloat16 weights per direction and of perfectly fused activations.
A frozen reference adds one forward, once for every example, however many epochs follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["floor_seconds", "forward_bytes", "forward_flops", "training_bytes", "training_flops"]

# Reads and writes of one hidden vector per layer, forward and backward, everything elementwise fused:
# counted for a Llama block, 2.6 MB per token for 30 layers of width 576.
VECTORS_PER_LAYER = 75
BFLOAT16 = 2  # bytes

Sizes = Mapping[str, int]
Lengths = Sequence[int]  # of one example: its prefix, then each continuation


def training_flops(sizes: Sizes, examples: Sequence[Lengths], scored: int) -> float:
    """Of a step on these examples.

    Args:
        sizes: `body`, `head`, `adapter` weights; `layers`; `attention` = heads x head_dim.
        examples: tokens of the prefix and of each continuation.
        scored: rows the head is needed for.
    """
    body = _tokens(examples) * (4 * sizes["body"] + 6 * sizes["adapter"])
    return body + 3.5 * _attention(sizes, examples) + 4.0 * sizes["head"] * scored


def forward_flops(sizes: Sizes, examples: Sequence[Lengths], scored: int) -> float:
    """Of one pass without adapter or gradient, such as a reference's."""
    body = 2.0 * _tokens(examples) * sizes["body"]
    return body + _attention(sizes, examples) + 2.0 * sizes["head"] * scored


def training_bytes(sizes: Sizes, examples: Sequence[Lengths]) -> float:
    """Moved by a step that is one micro-batch. `sizes` also holds the `hidden` width."""
    per_token = VECTORS_PER_LAYER * sizes["layers"] * sizes["hidden"] * BFLOAT16
    return 2 * forward_bytes(sizes) + float(per_token * _tokens(examples))


def forward_bytes(sizes: Sizes) -> float:
    """The weights, read once."""
    return float(BFLOAT16 * (sizes["body"] + sizes["head"]))


def floor_seconds(flops: float, moved: float, *, matmul_flops: float, copy_bytes: float) -> float:
    """The floor of one step on a machine with these rates."""
    return max(flops / matmul_flops, moved / copy_bytes)


def _tokens(examples: Sequence[Lengths]) -> int:
    return sum(sum(lengths) for lengths in examples)


def _attention(sizes: Sizes, examples: Sequence[Lengths]) -> int:
    """Of one forward: causal in the prefix and in each continuation, whose rows all see the prefix."""
    squares = sum(
        prefix**2 + sum(2 * prefix * rest + rest**2 for rest in continuations)
        for prefix, *continuations in examples
    )
    return 2 * sizes["layers"] * sizes["attention"] * squares
