"""How one model runs a packed batch: flat with grouped attention, or padded. Decided once, logged.

The decision reads declarations (transformers' attention-backend flag, the adapter's capabilities, the
config) and then proves itself on one small batch: the chosen path must give the model's own logits, or
its own scores. That check catches what no declaration says, such as a head with a scale of its own.

Shapes: B = 2 sequences of L = 4 tokens, N scored rows, D hidden width, V vocabulary, K scores.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ftlib.adapters.attach import model_capabilities
from ftlib.batches import PackedBatch, Span
from ftlib.errors import CapabilityError
from ftlib.models.head import Head
from ftlib.models.layout import GroupLayout
from ftlib.models.modes import evaluation_mode
from ftlib.models.parts import Path, Plan, Reader, ScoreHead, inner_model, make_plan
from ftlib.models.scoring import hidden_states

__all__ = ["plan_for"]

logger = logging.getLogger(__name__)
GROUPABLE = {"full_attention", "sliding_attention"}  # of transformers' layer types, those a flat row can hold

_verdicts: WeakKeyDictionary[nn.Module, tuple[Path, str]] = WeakKeyDictionary()


def plan_for(model: nn.Module) -> Plan:
    """The plan of a decoder with either head, or of an encoder-decoder.

    The first call for a model runs the start-up check.

    Raises:
        CapabilityError: no such model, or its output is not the head on the body's last state.
    """
    if model not in _verdicts:
        _verdicts[model] = _decide(model)
        path, reason = _verdicts[model]
        logger.info("%s takes the %s path: %s", type(inner_model(model)).__name__, path, reason)
    return make_plan(model, *_verdicts[model])


def _decide(model: nn.Module) -> tuple[Path, str]:
    inner = inner_model(model)
    padded = make_plan(model, "padded", "check")
    ids_BL, batch = _sample(inner.config.get_text_config(decoder=True).vocab_size, padded.body.device)
    exact = torch.autocast(padded.body.device.type, enabled=False)
    if padded.reader is not None:
        with evaluation_mode(model), torch.no_grad(), exact:
            _check_encoder_decoder(model, padded, ids_BL, batch)
        return "padded", "an encoder reads each prompt once, and a decoder each continuation of it"
    with evaluation_mode(model), torch.no_grad(), exact:
        states_BLD = padded.body(input_ids=ids_BL, use_cache=False).last_hidden_state
        if isinstance(padded.head, ScoreHead):
            _check_scores(inner, padded.head, ids_BL)
        else:
            _check_logits(inner, padded.head, ids_BL, states_BLD)
        if padded.virtual is not None:
            states_BLD = _own_states(model, padded.head, ids_BL)
        own_ND = states_BLD[:, 1:3].flatten(0, 1)
        against = _declared_against_grouping(model) or _seen_against_grouping(model, batch, own_ND)
        if against is None:
            return "grouped", "declared, and equal to the model's own logits at start-up"
        states_ND, _ = hidden_states(padded, batch, GroupLayout(padded.spans(batch)))
        if not _error(states_ND, own_ND) <= torch.finfo(own_ND.dtype).eps ** 0.5:
            raise CapabilityError(
                f"models.forward: expected rows that depend on earlier tokens alone, got "
                f"{type(inner).__name__}, whose states change when positions and lengths are explicit."
            )
    return "padded", against


class _ReachedError(Exception):
    """Ends a forward at the head."""


def _own_states(model: nn.Module, head: Head | ScoreHead, ids_BL: Tensor) -> Tensor:
    """[B, L, D] under virtual tokens: what reaches the head when peft runs one unpadded row at a time."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, states: tuple[Tensor, ...]) -> None:
        seen.append(states[0])
        raise _ReachedError

    handle = head.module.register_forward_pre_hook(keep)
    try:
        for ids_L in ids_BL:
            with suppress(_ReachedError):
                model(input_ids=ids_L[None])
    finally:
        handle.remove()
    return torch.cat(seen)[:, -ids_BL.shape[1] :]


def _check_logits(inner: PreTrainedModel, head: Head, ids_BL: Tensor, states_BLD: Tensor) -> None:
    own_BLV = inner(input_ids=ids_BL, use_cache=False).logits
    # seen in any dtype: the head repeats one product, where the paths repeat every layer
    error = _error(head.logits(states_BLD), own_BLV)
    if not error <= 8 * torch.finfo(states_BLD.dtype).eps:
        raise CapabilityError(
            f"models.forward: expected logits that are a linear head on the last hidden state, got "
            f"{type(inner).__name__}, whose own logits differ by {error:.2g} of their size. "
            "Compute log-probabilities from its logits with ftlib.losses.token_logprobs."
        )


def _check_encoder_decoder(model: nn.Module, plan: Plan, ids_BL: Tensor, batch: PackedBatch) -> None:
    """On one prompt of two tokens with two continuations, against the model's own forward on two rows."""
    own = model if plan.virtual is not None else inner_model(model)  # peft adds virtual tokens
    head, start_id = cast(Head, plan.head), cast(Reader, plan.reader).start_id
    states_ND, _ = hidden_states(plan, batch, GroupLayout(batch.spans))
    read_BL = torch.stack([torch.full_like(ids_BL[:, 0], start_id), ids_BL[:, 2]], dim=1)
    own_BLV = own(input_ids=ids_BL[:, :2], decoder_input_ids=read_BL, use_cache=False).logits
    error = _error(head.logits(states_ND), own_BLV.flatten(0, 1))
    if not error <= torch.finfo(states_ND.dtype).eps ** 0.5:
        raise CapabilityError(
            f"models.forward: expected logits that are a linear head on the decoder's last hidden state, got "
            f"{type(inner_model(model)).__name__}, whose own logits differ by {error:.2g} of their size. "
            "Compute log-probabilities from its logits with ftlib.losses.token_logprobs."
        )


def _check_scores(inner: PreTrainedModel, head: ScoreHead, ids_BL: Tensor) -> None:
    """On one row, which transformers pools without a pad id, unless the row ends in that id."""
    pad = inner.config.get_text_config(decoder=True).pad_token_id
    ids_1L = ids_BL[1:] if int(ids_BL[0, -1]) == pad else ids_BL[:1]
    scores_LK = head.scores(inner.base_model(input_ids=ids_1L, use_cache=False).last_hidden_state[0])
    with _taking_any_dtype(head):
        own_K = inner(input_ids=ids_1L, use_cache=False).logits[0]
    error = float((scores_LK[-1] - own_K).norm())
    if not error <= 8 * torch.finfo(head.dtype).eps * float(scores_LK.norm()):
        raise CapabilityError(
            f"models.forward: expected scores that are a linear head on the last token's state, got "
            f"{type(inner).__name__}, whose own scores differ by {error:.2g}. Take the scores it gives."
        )


@contextmanager
def _taking_any_dtype(head: ScoreHead) -> Iterator[None]:
    """A head that casts its input, as ours does: transformers gives a float32 head the body's bf16 states."""
    handle = head.module.register_forward_pre_hook(lambda _, states: (states[0].to(head.dtype),))
    try:
        yield
    finally:
        handle.remove()


def _declared_against_grouping(model: nn.Module) -> str | None:
    inner = inner_model(model)
    if not inner._supports_attention_backend:
        return "its attention bypasses transformers' attention interface"
    layers = set(getattr(inner.config.get_text_config(decoder=True), "layer_types", None) or ()) - GROUPABLE
    if layers:
        return f"its layers {sorted(layers)} are more than attention to earlier tokens"
    if not model_capabilities(model).groupable:  # type: ignore[arg-type]
        return "its adapter does not share a row between documents"
    if not make_plan(model, "grouped", "").takes_positions:
        return "it takes no explicit positions"
    return None


def _seen_against_grouping(model: nn.Module, batch: PackedBatch, own_ND: Tensor) -> str | None:
    """What a flat row shows: another result, something refused, or a window that never reached attention."""
    plan = make_plan(model, "grouped", "check")
    layout = GroupLayout(plan.spans(batch))
    try:
        states_ND, _ = hidden_states(plan, batch, layout)
    except CapabilityError as refusal:
        return str(refusal)
    error = _error(states_ND, own_ND)
    if not error <= torch.finfo(own_ND.dtype).eps ** 0.5:
        return f"on a flat row its hidden states differ by {error:.2g} of their size"
    unseen = _declared_windows(plan.body.config.get_text_config(decoder=True)) - layout.windows
    if unseen:
        return f"its layers do not hand their sliding window {sorted(unseen)} to the attention function"
    return None


def _declared_windows(text: PreTrainedConfig) -> set[int]:
    window, layers = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    slides = "sliding_attention" in layers if layers else getattr(text, "use_sliding_window", True)
    return {int(window)} if window and slides else set()


def _sample(vocabulary: int, device: torch.device) -> tuple[Tensor, PackedBatch]:
    """Two sequences with a shared prefix of two tokens, padded [B, L] and as one group."""
    ids_BL = (torch.arange(8, device=device).view(2, 4) * 7 + 5) % vocabulary
    ids_BL[1, :2] = ids_BL[0, :2]
    batch = PackedBatch(
        ids_T=torch.cat([ids_BL[0], ids_BL[1, 2:]]),
        positions_T=torch.tensor([0, 1, 2, 3, 2, 3], device=device),
        spans=(Span(0, 2, (2, 2)),),
        rows_N=torch.tensor([1, 2, 1, 4], device=device),
        targets_N=ids_BL[:, 2:].flatten(),
        weights_N=torch.ones(4, device=device),
        owner_N=torch.tensor([0, 0, 1, 1], device=device),
    )
    return ids_BL, batch


def _error(ours: Tensor, own: Tensor) -> float:
    """Largest relative error of a row [..., D], by its Euclidean norm."""
    wide = torch.promote_types(own.dtype, torch.float32)
    ours, own = ours.to(wide), own.to(wide)
    size = own.norm(dim=-1).clamp(min=torch.finfo(wide).tiny)  # a head of zeros gives logits of none
    return float(((ours - own).norm(dim=-1) / size).max())
