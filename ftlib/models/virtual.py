"""Virtual tokens in a forward: what a soft prompt puts before the text, as embeddings or as keys and values.

The first n positions are theirs, in every row, so the text goes on at position n:

    embeddings         [virtual][text]           one copy in the prefix of each group, or of each padded row
    keys and values    cache [virtual], [text]   the cache of every padded row starts with them

An encoder that pools its first token keeps it there, [first][virtual][rest]; one that fills masks reads
[virtual][text], as peft does. Their keys and values stand before both.

A row that is padded on the left is [pads][virtual][text], or cache [virtual], [pads][text]; positions count
what is no pad. The rows of virtual tokens are never scored.

Shapes: n virtual tokens, T tokens of a batch, S = T + G n with G groups, R padded rows, L their columns,
D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from ftlib.adapters.attach import model_capabilities
from ftlib.batches import PackedBatch, Span
from ftlib.errors import CapabilityError, ShapeError

__all__ = ["LeftPadded", "VirtualTokens", "virtual_tokens"]


@final
@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """Those of a model's active adapter. What they are is computed when asked for, with its gradient.

    Args:
        model: whose adapter it is.
        count: n.
        cached: keys and values instead of embeddings.
    """

    model: PeftModel
    count: int
    cached: bool

    @property
    def columns(self) -> int:
        """How many columns of a row they take."""
        return 0 if self.cached else self.count

    def spans(self, spans: Sequence[Span]) -> tuple[Span, ...]:
        """Where groups lie once each prefix holds the virtual tokens; as they lay, if these are cached."""
        return tuple(
            replace(span, start=span.start + group * self.columns, prefix=span.prefix + self.columns)
            for group, span in enumerate(spans)
        )

    def require_room(self, config: PreTrainedConfig, spans: Sequence[Span]) -> None:
        """Raise `ShapeError` where a sequence is too long for its position with the virtual tokens."""
        limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest = max(span.prefix + max(span.continuations) for span in spans)
        if limit is not None and longest + self.count > limit:
            raise ShapeError(
                f"forward: expected {self.count} virtual tokens and the text within the model's context of "
                f"{limit} tokens, got {self.count} + {longest}. Shorten the text, or take fewer of them."
            )

    def require_cache(self, body: PreTrainedModel) -> None:
        """Raise `CapabilityError` where the model would drop the cache that holds the virtual tokens."""
        if body.training and body.is_activation_checkpointing:
            raise CapabilityError(
                "forward: expected a model that keeps its activations for a prefix, got one with activation "
                "checkpointing, which drops the cache that holds it. Turn it off: "
                "model.activation_checkpointing_disable(); or take ftlib.adapters.prompt()."
            )

    def cache(self, rows: int) -> DynamicCache:
        """A cache that begins every row with the virtual tokens' keys and values."""
        cache: Any = self.model.get_prompt(1)
        cache.batch_repeat_interleave(rows)
        return cast(DynamicCache, cache)

    def embed(self, body: PreTrainedModel, batch: PackedBatch) -> tuple[PackedBatch, Tensor]:
        """The batch with virtual tokens in every prefix, laid out as `spans` says; its embeddings [S, D]."""
        device, count, tokens = batch.ids_T.device, self.count, batch.tokens
        virtual = torch.arange(tokens, tokens + count, device=device)
        runs = [torch.arange(span.start, span.stop, device=device) for span in batch.spans]
        source_S = torch.cat([part for run in runs for part in (virtual, run)])
        moved_T = torch.cat([run + (group + 1) * count for group, run in enumerate(runs)])
        embeds_TD = _embedding(body)(batch.ids_T)
        embeds_SD = torch.cat([embeds_TD, self._embeddings().to(embeds_TD.dtype)])[source_S]
        no_ids, first = batch.ids_T.new_zeros(count), torch.arange(count, device=device)
        grown = replace(
            batch,
            ids_T=torch.cat([batch.ids_T, no_ids])[source_S],
            positions_T=torch.cat([batch.positions_T + count, first])[source_S],
            spans=self.spans(batch.spans),
            rows_N=moved_T[batch.rows_N],
        )
        return grown, embeds_SD

    def _embeddings(self) -> Tensor:
        """[n, D]."""
        prompt_1nD: Tensor = self.model.get_prompt(1)
        return prompt_1nD[0]

    def before_text(self, encoder: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor]:
        """What an encoder reads of rows that are padded on the right: [virtual][text][pads]."""
        embeds_BLD = _embedding(encoder)(ids_BL)
        prompt_BnD = self._embeddings().to(embeds_BLD.dtype).expand(len(ids_BL), -1, -1)
        mask_BS = torch.cat([mask_BL.new_ones(len(ids_BL), self.count), mask_BL], 1)
        return {"inputs_embeds": torch.cat([prompt_BnD, embeds_BLD], 1), "attention_mask": mask_BS}

    def of_encoder(
        self, inner: PreTrainedModel, arguments: dict[str, Tensor], *, first: int = 0
    ) -> dict[str, Any]:
        """What an encoder reads, instead of these arguments of its forward.

        Args:
            inner: the model, with its head.
            arguments: of rows that are padded on the right.
            first: how many columns stay before the virtual tokens.
        """
        ids_RL, mask_RL = arguments["input_ids"], arguments["attention_mask"]
        mask_RS = nn.functional.pad(mask_RL, (self.count, 0), value=1)
        embeds_RLD = _embedding(inner)(ids_RL)
        if self.cached:
            self.require_cache(inner)
            cache = self.cache(len(ids_RL))
            mask = create_bidirectional_mask(  # an encoder's own counts no cache
                inner.config, embeds_RLD, mask_RS, past_key_values=cache
            )
            return {**arguments, "attention_mask": mask, "past_key_values": cache}
        prompt_RnD = self._embeddings().to(embeds_RLD.dtype).expand(len(ids_RL), -1, -1)
        embeds_RSD = torch.cat([embeds_RLD[:, :first], prompt_RnD, embeds_RLD[:, first:]], 1)
        read = {"inputs_embeds": embeds_RSD, "attention_mask": mask_RS}
        if "token_type_ids" in arguments:  # virtual tokens are of the first segment, as the first token is
            read["token_type_ids"] = nn.functional.pad(arguments["token_type_ids"], (self.count, 0))
        return read

    def unpadded(self, inner: PreTrainedModel) -> bool:
        """Whether rows of different lengths cannot share a batch: a sliding window would count the pads that
        come between the virtual tokens in the cache and the text.
        """
        layers = getattr(inner.config.get_text_config(decoder=True), "layer_types", None)
        window = getattr(inner.config.get_text_config(decoder=True), "sliding_window", None)
        return self.cached and window is not None and (layers is None or "sliding_attention" in layers)

    def left_padded(
        self, model: PreTrainedModel, ids_RL: Tensor, mask_RL: Tensor, *, copies: int = 1
    ) -> LeftPadded:
        """Rows that are padded on the left, with their virtual tokens.

        Args:
            model: whose embedding reads them, or its body.
            ids_RL: int64 [R, L].
            mask_RL: int64 [R, L], 1 where there is a token.
            copies: of each row that the cache is for, as beam search takes them.
        """
        rows, ones_Rn = len(ids_RL), mask_RL.new_ones(len(ids_RL), self.count)
        if self.cached:
            return LeftPadded(ids_RL, torch.cat([ones_Rn, mask_RL], 1), cache=self.cache(rows * copies))
        pads_R1 = ids_RL.shape[1] - mask_RL.sum(1, keepdim=True)
        columns = torch.arange(ids_RL.shape[1] + self.count, device=ids_RL.device)[None]
        # column of the text before it moved left by n; that of virtual token i is L + i
        source_RL = torch.where(columns < pads_R1, columns, columns - self.count)
        virtual_RL = (columns >= pads_R1) & (columns < pads_R1 + self.count)
        source_RL = torch.where(virtual_RL, ids_RL.shape[1] + columns - pads_R1, source_RL)
        embeds_RLD = _embedding(model)(ids_RL)
        prompt_RnD = self._embeddings().to(embeds_RLD.dtype).expand(rows, -1, -1)
        index_RL1 = source_RL[..., None].expand(-1, -1, embeds_RLD.shape[-1])
        return LeftPadded(
            torch.cat([ids_RL, torch.zeros_like(ones_Rn)], 1).gather(1, source_RL),
            torch.cat([mask_RL, ones_Rn], 1).gather(1, source_RL),
            embeds_RLD=torch.cat([embeds_RLD, prompt_RnD], 1).gather(1, index_RL1),
        )


@final
@dataclass(frozen=True, eq=False)
class LeftPadded:
    """Rows to begin decoding with.

    Args:
        ids_RL: int64; any id stands for a virtual token.
        mask_RL: int64, over the cache and the columns of `ids_RL`: 1 where there is a token, virtual or not.
        embeds_RLD: what to read in place of the ids; None reads the ids.
        cache: holds what stands before them; None for an empty one.
    """

    ids_RL: Tensor
    mask_RL: Tensor
    embeds_RLD: Tensor | None = None
    cache: DynamicCache | None = None

    @property
    def read(self) -> dict[str, Tensor]:
        """What the body reads, by the name of its argument."""
        if self.embeds_RLD is None:
            return {"input_ids": self.ids_RL}
        return {"inputs_embeds": self.embeds_RLD}

    @property
    def positions_RL(self) -> Tensor:
        """Of the columns of `ids_RL`: how many tokens stand before each; of a pad, any."""
        return (self.mask_RL.cumsum(-1) - 1).clamp(min=0)[:, -self.ids_RL.shape[1] :]


def virtual_tokens(model: nn.Module) -> VirtualTokens | None:
    """The virtual tokens that a forward of the model has now; None while they are switched off, too."""
    if not isinstance(model, PeftModel) or model._adapters_disabled:
        return None
    capabilities = model_capabilities(model)
    if not capabilities.virtual_tokens:
        return None
    return VirtualTokens(model, capabilities.virtual_tokens, capabilities.needs_cache)


def _embedding(model: PreTrainedModel) -> nn.Module:
    return model.get_input_embeddings()
