"""Grouped causal attention: every document, prefix and continuation alone, in one flat row.

Registered under its own name through transformers' attention interface; the model is not patched.
No mask is built for that name, so attention costs the sum of squared lengths instead of their square.
On CPU forward and backward are our own: batched products per tile, with the query heads of one key
head folded into rows. At lengths up to about a thousand tokens that is faster than
`scaled_dot_product_attention` there, its backward by two to four times. Other devices and attention
dropout use `attend_plain`, to which it is equal, and which alone can be differentiated twice.

Left out: attention sinks and learned position biases; a model that passes one is refused here and
runs on the padded path.

Shapes: T tokens, H query heads, K key heads, G = H / K, D head width, n rows and m keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

from ftlib.errors import CapabilityError
from ftlib.models.layout import GroupLayout, Tile, causal_mask, tile_mask

__all__ = ["NAME", "attend", "attend_plain", "grouped_attention", "grouped_scope"]

NAME = "ftlib_grouped"
BLOCK = 256  # query rows of a tile: above it the causal half that is skipped pays for the extra calls
KEPT = 256  # keys up to which a tile's probabilities are kept for the backward, heads x 512 bytes per row
MERGED = (
    128  # rows up to which short neighbouring groups share a tile: one call costs more than its masked half
)
UNSUPPORTED = ("position_bias", "s_aux", "sinks", "indices", "block_indices", "head_mask", "alibi", "cache")


def grouped_attention(
    module: nn.Module,  # noqa: ARG001  transformers passes it to every attention function
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    groups: GroupLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function transformers' attention layers call under the name `NAME`.

    Args:
        module: the attention layer; not read.
        query: [1, H, T, D].
        key: [1, K, T, D].
        value: [1, K, T, D].
        attention_mask: must be None, as transformers builds none for an unknown name.
        groups: the batch's layout, passed to the model as a forward keyword.
        scaling: factor on the scores; None means D ** -0.5.
        dropout: on the probabilities.
        sliding_window: tokens a query sees, itself included.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        **options: what else a layer passes; anything that would change scores is refused.

    Returns:
        Output [1, T, H, D], and None for the attention weights.

    Raises:
        CapabilityError: no layout arrived, or the layer passes something that cannot be honoured.
    """
    refused = [name for name in UNSUPPORTED if options.get(name) is not None]
    refused += ["is_causal=False"] if options.get("is_causal") is False else []
    if groups is None or attention_mask is not None or refused:
        found = refused or ("an attention mask" if attention_mask is not None else "no `groups`")
        raise CapabilityError(
            f"grouped attention: expected a flat row with the forward keyword `groups` and nothing else that "
            f"changes scores, got {found}. Use the padded path (ftlib.models.forward(..., path='padded'))."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout or query.device.type != "cpu":
        output = attend_plain(query[0], key[0], value[0], groups, scale, sliding_window, softcap, dropout)
    else:
        output = attend(query[0], key[0], value[0], groups, scale, sliding_window, softcap)
    return output[None], None


AttentionInterface.register(NAME, grouped_attention)


@contextmanager
def grouped_scope(config: PreTrainedConfig) -> Iterator[None]:
    """Make `NAME` the attention of a model while the scope lasts, then restore what was there.

    A padded forward or `generate` under that name would get no mask, hence the scope.
    """
    before = [(part, part._attn_implementation) for part in _with_parts(config)]
    config._attn_implementation = NAME  # transformers sets it on the parts too
    try:
        yield
    finally:
        for part, name in before:
            part._attn_implementation = name


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration, then those inside it, each after the one it lies in."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _with_parts(part)


def attend_plain(
    q_HTD: Tensor,
    k_KTD: Tensor,
    v_KTD: Tensor,
    groups: GroupLayout,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention tile by tile with torch's own differentiation: any device, dropout, double backward.

    Returns:
        [T, H, D].
    """
    parts = []
    for tile in groups.tiles(window=window):
        q, k, v = q_HTD[:, tile.queries], _rows(k_KTD, tile), _rows(v_KTD, tile)
        parts.append(_tile_output(q, k, v, tile, scale, window, softcap, dropout).transpose(0, 1))
    return torch.cat(parts)  # tiles of whole runs come in the order of their rows


def _tile_output(
    q_HnD: Tensor,
    k_KmD: Tensor,
    v_KmD: Tensor,
    tile: Tile,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """[H, n, D] of one tile."""
    grouped = q_HnD.shape[0] != k_KmD.shape[0]
    square = tile.offset == 0 and tile.rows == tile.columns and (window is None or window >= tile.rows)
    if softcap is None and square:  # the kernel skips the upper triangle only when no mask is passed
        return scaled_dot_product_attention(
            q_HnD[None],
            k_KmD[None],
            v_KmD[None],
            dropout_p=dropout,
            is_causal=True,
            scale=scale,
            enable_gqa=grouped,
        )[0]
    mask = causal_mask(tile.rows, tile.columns, tile.offset, window, q_HnD.dtype, q_HnD.device)
    if softcap is None:
        return scaled_dot_product_attention(
            q_HnD[None], k_KmD[None], v_KmD[None], mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )[0]
    groups_per_key = q_HnD.shape[0] // k_KmD.shape[0]
    k, v = (x.repeat_interleave(groups_per_key, 0) for x in (k_KmD, v_KmD))
    scores = torch.tanh(q_HnD @ k.transpose(1, 2) * (scale / softcap)) * softcap + mask
    probs = torch.softmax(scores, -1, dtype=torch.promote_types(q_HnD.dtype, torch.float32))
    return drop(probs.to(v.dtype), dropout) @ v


def _rows(x_KTD: Tensor, tile: Tile) -> Tensor:
    parts = [x_KTD[:, part] for part in tile.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def attend(
    q_HTD: Tensor,
    k_KTD: Tensor,
    v_KTD: Tensor,
    groups: GroupLayout,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same as `attend_plain` without dropout, by batched products on the CPU. Returns [T, H, D]."""
    if torch.is_autocast_enabled("cpu"):  # float32 rotations meet values in low precision
        low = torch.get_autocast_dtype("cpu")
        q_HTD, k_KTD, v_KTD = (x.to(low) for x in (q_HTD, k_KTD, v_KTD))
    output: Tensor = _Attend.apply(q_HTD, k_KTD, v_KTD, groups, scale, window, softcap)
    return output


class _Attend(torch.autograd.Function):
    """Attention by batched products over tiles of at most `BLOCK` query rows.

    With P = softmax(S), S = scale q k' (soft-capped and masked), o = P v:

        dv = P' do,   dS = P * (do v' - rowsum(do * o)),   dq = scale dS k,   dk = scale dS' q

    The probabilities of short tiles are kept for the backward, those of longer ones built again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        groups: GroupLayout,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        heads, tokens, _ = q_HTD.shape
        out_THD = q_HTD.new_empty(tokens, heads, v_KTD.shape[-1])
        kept: list[Tensor] = []
        for tile in groups.tiles(window=window, block=BLOCK, merge=MERGED):
            probs, capped = _tile_probs(q_HTD, k_KTD, tile, scale, window, softcap)
            out_THD[tile.queries] = _unfold(torch.bmm(probs, _rows(v_KTD, tile)), heads)
            if any(ctx.needs_input_grad) and tile.columns <= KEPT and capped is None:
                kept.append(probs)
        ctx.save_for_backward(q_HTD, k_KTD, v_KTD, out_THD, *kept)
        ctx.groups, ctx.scale, ctx.window, ctx.softcap = groups, scale, window, softcap
        return out_THD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_HTD, k_KTD, v_KTD, out_THD, *kept = ctx.saved_tensors
        groups, scale, window, softcap = ctx.groups, ctx.scale, ctx.window, ctx.softcap
        heads, tokens, width = q_HTD.shape
        delta_TH1 = torch.einsum("thd,thd->th", dout_THD, out_THD).unsqueeze(-1)
        dq_THD = q_HTD.new_empty(tokens, heads, width)
        # keys of a prefix gather from every tile that sees them: summed in at least float32
        wide = torch.promote_types(k_KTD.dtype, torch.float32)
        dk_TKD = k_KTD.new_zeros((tokens, len(k_KTD), width), dtype=wide)
        dv_TKD = v_KTD.new_zeros((tokens, len(v_KTD), v_KTD.shape[-1]), dtype=wide)
        saved = iter(kept)
        for tile in groups.tiles(window=window, block=BLOCK, merge=MERGED):
            capped = None
            if tile.columns <= KEPT and softcap is None:
                probs = next(saved)
            else:
                probs, capped = _tile_probs(q_HTD, k_KTD, tile, scale, window, softcap)
            dout = _fold(dout_THD[tile.queries].transpose(0, 1), len(k_KTD))
            delta = _fold(delta_TH1[tile.queries].transpose(0, 1), len(k_KTD))
            dscores = torch.bmm(dout, _rows(v_KTD, tile).transpose(1, 2)).sub_(delta).mul_(probs)
            if capped is not None:
                dscores.mul_(1 - capped.square())
            dq_THD[tile.queries] = _unfold(torch.bmm(dscores, _rows(k_KTD, tile)), heads).mul_(scale)
            queries = _fold(q_HTD[:, tile.queries] * scale, len(k_KTD))
            _add_rows(dk_TKD, tile, torch.bmm(dscores.transpose(1, 2), queries))
            _add_rows(dv_TKD, tile, torch.bmm(probs.transpose(1, 2), dout))
        return (
            dq_THD.transpose(0, 1),
            dk_TKD.to(k_KTD.dtype).transpose(0, 1),
            dv_TKD.to(v_KTD.dtype).transpose(0, 1),
            *[None] * 4,
        )


def _tile_probs(
    q_HTD: Tensor, k_KTD: Tensor, tile: Tile, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Probabilities [K, G n, m] of one tile; and tanh(scores / softcap) where there is a soft cap."""
    queries = _fold(q_HTD[:, tile.queries] * scale, len(k_KTD))
    scores = torch.bmm(queries, _rows(k_KTD, tile).transpose(1, 2))
    capped = None
    if softcap is not None:
        capped = scores.div_(softcap).tanh_()
        scores = capped * softcap
    n, m = tile.rows, tile.columns
    visible = scores.view(len(k_KTD), -1, n, m)
    if window is None and not tile.groups:  # the keys before the tile's own rows are all seen
        triangle = causal_mask(BLOCK, BLOCK, 0, None, scores.dtype, scores.device)
        visible[..., tile.offset :].add_(triangle[:n, :n])
    else:
        visible.add_(tile_mask(tile, window, scores.dtype, scores.device))
    return torch.softmax(scores, -1), capped


def _fold(x_HnD: Tensor, key_heads: int) -> Tensor:
    """[H, n, D] to [K, G n, D]: the query heads of one key head become rows."""
    return x_HnD.reshape(key_heads, -1, x_HnD.shape[-1])


def _unfold(x_KnD: Tensor, heads: int) -> Tensor:
    """[K, G n, D] to [n, H, D]."""
    return x_KnD.view(heads, -1, x_KnD.shape[-1]).transpose(0, 1)


def _add_rows(total_TKD: Tensor, tile: Tile, x_KmD: Tensor) -> None:
    """Add the gradient of a tile's keys to the rows they came from."""
    pieces = x_KmD.split([part.stop - part.start for part in tile.keys], 1)
    for part, piece in zip(tile.keys, pieces, strict=True):
        total_TKD[part] += piece.transpose(0, 1)
