"""One forward for every objective: log-probabilities of a packed batch's targets, or scores.

Which path a model takes is planned once, from declared capabilities and a start-up check (`plan.py`);
what the paths compute is in `scoring.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast, get_args

from torch import nn

from ftlib.adapters.encoder_head import is_encoder_classifier
from ftlib.batches import PackedBatch
from ftlib.errors import CapabilityError, ConfigError
from ftlib.models.encoders import encoder_scores, require_scores_alone
from ftlib.models.head import Entropy
from ftlib.models.masked import Masking, fills_masks, masked_logprobs
from ftlib.models.parts import Path, inner_model
from ftlib.models.plan import plan_for
from ftlib.models.scoring import Scored, score

__all__ = ["Scorer", "forward"]


class Scorer(nn.Module):
    """A model behind the one forward, as a module: what accelerate prepares and wraps.

    Calling the inner model's body from outside would skip the gradient synchronisation of a
    distributed wrapper; inside this module's forward it does not.
    """

    def __init__(
        self, model: nn.Module, *, path: Path | None = None, value_head: nn.Module | None = None
    ) -> None:
        super().__init__()
        if path not in (None, *get_args(Path)):
            raise ConfigError(f"Scorer: expected path None or one of {list(get_args(Path))}, got {path!r}.")
        self.model = model
        self.path = path
        self.value_head = value_head

    def forward(
        self,
        batch: PackedBatch,
        *,
        temperature: float = 1.0,
        entropy: Entropy = False,
        hidden: bool = False,
        scores: bool = False,
        logprobs: bool = True,
        values: bool = False,
        detach_values: bool = False,
        masking: Masking | None = None,
    ) -> Scored:
        """See `forward`."""
        if values and self.value_head is None:
            raise CapabilityError(
                "forward: expected a model with a value head for values=True, got one without. Wrap it: "
                "Scorer(model, value_head=new_value_head(width))."
            )
        if is_encoder_classifier(self.model):
            beside = {
                "hidden": hidden,
                "values": values,
                "entropy": bool(entropy),
                "temperature": temperature != 1,
            }
            require_scores_alone(
                self.model, [name for name, asked in beside.items() if asked], scores, self.path
            )
            scores_CK = encoder_scores(self.model, batch)
            return Scored(scores_CK.new_empty(0), scores_CK=scores_CK)
        if fills_masks(self.model) or masking is not None:
            _require_masks(
                self.model, masking, beside=bool(entropy or hidden or scores or values) or temperature != 1
            )
            return Scored(masked_logprobs(self.model, batch, cast(Masking, masking)))
        plan = plan_for(self.model)
        if self.path == "grouped":
            plan.require_grouped()
        plan = plan if self.path is None else replace(plan, path=self.path)
        return score(
            plan,
            batch,
            value_head=self.value_head if values else None,
            temperature=temperature,
            entropy=entropy,
            hidden=hidden,
            scores=scores,
            logprobs=logprobs,
            detach_values=detach_values,
        )


def forward(
    model: nn.Module,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    entropy: Entropy = False,
    hidden: bool = False,
    scores: bool = False,
    logprobs: bool = True,
    values: bool = False,
    detach_values: bool = False,
    masking: Masking | None = None,
    path: Path | None = None,
) -> Scored:
    """Log-probabilities of the batch's targets under a language model, or the scores of a reward model.

    Args:
        model: a transformers or peft causal model, or one for sequence classification; a `Scorer`, or a
            wrapper accelerate put around one.
        batch: on the model's device.
        temperature: divides the logits, > 0.
        entropy: also return the entropy of each scored row; "gradient" makes it differentiable.
        hidden: also return the hidden state of each continuation's last token.
        scores: return the scores of each continuation, read at its last token, instead of
            log-probabilities: what a model with a score head has, and must be asked for.
        logprobs: False leaves them out, and the product with the vocabulary: for values alone, which a
            model with a score head can give too.
        values: also return the value of the state before each target and after each continuation, for a
            `Scorer` with a value head.
        detach_values: no gradient of the values reaches the model under the value head.
        masking: how a masked language model has its targets hidden; it needs one, and no other model does.
        path: force one path; None takes the planned one.

    Raises:
        CapabilityError: the model cannot take the path asked for, or its head is of the other kind.
        ConfigError: an unknown path, one for a `Scorer`, which has its own, or an option of
            log-probabilities where there are none.
    """
    wrapped = isinstance(getattr(model, "module", model), Scorer)
    if wrapped and path is not None:
        raise ConfigError(
            f"forward: expected a Scorer to keep its own path, got path={path!r}. Give it to Scorer()."
        )
    scorer = model if wrapped else Scorer(model, path=path)
    scored: Scored = scorer(
        batch,
        temperature=temperature,
        entropy=entropy,
        hidden=hidden,
        scores=scores,
        logprobs=logprobs,
        values=values,
        detach_values=detach_values,
        masking=masking,
    )
    return scored


def _require_masks(model: nn.Module, masking: Masking | None, *, beside: bool) -> None:
    """Raise `CapabilityError` unless a masked language model is asked for what it can give."""
    if not fills_masks(model):
        raise CapabilityError(
            f"forward: expected no masking for {type(inner_model(model)).__name__}, which reads from left to "
            "right. Leave it out."
        )
    if masking is None or beside:
        raise CapabilityError(
            f"forward: expected masking and no other option for {type(inner_model(model)).__name__}, which "
            "reads both sides of a token and says what stands behind a mask alone. Give "
            "masking=Masking(tokenizer.mask_token_id)."
        )
