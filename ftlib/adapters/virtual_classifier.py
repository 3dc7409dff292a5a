"""A classifier with virtual tokens as embeddings, called as any other: rows in, scores out.

    encoder    [first token][virtual][text][pads]      the first token is pooled
    decoder    [pads][virtual][text]                   the last one is

peft's forward puts virtual tokens before all columns. An encoder then pools one of them, and a decoder reads
them before its pads and pools the last column of all, whatever it holds. What is saved, and how layers are
trained, stays peft's.

Shapes: B rows, L columns, n virtual tokens, S = n + L, D width of the embeddings.
"""

from __future__ import annotations

import inspect
from typing import Any, cast, final

import torch
from peft import PeftModel
from peft.peft_model import PeftModelForSequenceClassification
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftlib.adapters.encoder_head import is_encoder_classifier
from ftlib.errors import ConfigError

__all__ = ["VirtualClassifier", "place_virtual_tokens"]


def place_virtual_tokens(model: PeftModel) -> None:
    """Let a classifier that peft made put virtual embeddings in their place; any other is left alone."""
    if type(model) is PeftModelForSequenceClassification and model.peft_type in (
        PeftType.PROMPT_TUNING,
        PeftType.P_TUNING,
    ):
        model.__class__ = VirtualClassifier


@final
class VirtualClassifier(PeftModelForSequenceClassification):
    """peft's classifier with another forward."""

    def forward(  # type: ignore[override]  # the other options by name only
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As of the model without adapters, which pads on either side; positions are computed here.

        Raises:
            ConfigError: neither or both of ids and embeddings, or positions.
        """
        if (input_ids is None) is (inputs_embeds is None) or options.get("position_ids") is not None:
            raise ConfigError(
                "forward: expected input_ids or inputs_embeds, and no position_ids, which virtual tokens "
                "move. Leave them out; attention_mask says where the text is."
            )
        inner = cast(PreTrainedModel, self.get_base_model())
        table: nn.Module = inner.get_input_embeddings()
        embeds_BLD = table(input_ids) if inputs_embeds is None else inputs_embeds
        mask_BL = embeds_BLD.new_ones(embeds_BLD.shape[:2]) if attention_mask is None else attention_mask
        prompt_BnD = self.get_prompt(len(embeds_BLD)).to(embeds_BLD.dtype)
        count, mask_BL = prompt_BnD.shape[1], mask_BL.long()
        mask_BS = nn.functional.pad(mask_BL, (count, 0), value=1)
        if is_encoder_classifier(inner):
            embeds_BSD = torch.cat([embeds_BLD[:, :1], prompt_BnD, embeds_BLD[:, 1:]], 1)
            if options.get("token_type_ids") is not None:
                options["token_type_ids"] = nn.functional.pad(options["token_type_ids"], (count, 0))
        else:  # stable: what is no pad keeps its order
            order_BS = mask_BS.argsort(dim=1, stable=True)
            embeds_BSD = torch.cat([prompt_BnD, embeds_BLD], 1)
            embeds_BSD = embeds_BSD.gather(1, order_BS[..., None].expand_as(embeds_BSD))
            mask_BS = mask_BS.gather(1, order_BS)
            if "position_ids" in inspect.signature(inner.base_model.forward).parameters:
                options["position_ids"] = (mask_BS.cumsum(1) - 1).clamp(min=0)
        return inner(inputs_embeds=embeds_BSD, attention_mask=mask_BS, labels=labels, **options)
