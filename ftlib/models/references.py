"""References: what the policy was, as log-probabilities of a batch's scored tokens.

| class | computes with | memory |
|---|---|---|
| `AdapterOff` | the policy's base, every adapter inactive | none |
| `Snapshot` | the policy's model with a copy of its trained weights as they were | those weights |
| `FrozenCopy` | a model of its own | that model |
| `Cached` | another reference, each group once | a float per scored token |

Any object with `logprobs(batch)` is one too.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from ftlib.errors import ConfigError
from ftlib.models.adapted import is_identity, why_not_off
from ftlib.models.cached import Cached
from ftlib.models.frozen import AdapterOff, FrozenCopy, Snapshot, scorer_of
from ftlib.models.parts import inner_model, language_task
from ftlib.models.reference_protocol import KeptReference, Reference

__all__ = [
    "AdapterOff",
    "Cached",
    "FrozenCopy",
    "KeptReference",
    "Kind",
    "Reference",
    "Snapshot",
    "make_reference",
]

Kind = Literal["auto", "adapter_off", "snapshot", "copy"]


def make_reference(
    kind: Kind | nn.Module | Reference | None, model: nn.Module, *, temperature: float = 1.0
) -> Reference | None:
    """The reference of a policy, from the weights it has now.

    Args:
        kind: "auto": `AdapterOff` where the adapter changes nothing now and gives the base back when off,
            else `Snapshot`. "adapter_off", "snapshot", "copy" (a deep copy): that one. None: none. A model:
            `FrozenCopy` of it, as it is. An object with `logprobs(batch)`: itself, at its own temperature.
        model: the policy, or accelerate's wrapper around it.
        temperature: divides the logits of a reference made here, > 0.

    Raises:
        CapabilityError: the kind asked for cannot work with this model; the message says why.
        ConfigError: an unknown kind, or a model that shares trained weights, or knows fewer tokens.
    """
    if kind is None:
        return None
    if isinstance(kind, Reference):
        return kind
    if isinstance(kind, nn.Module):
        _require_separate(kind, model)
        return FrozenCopy(kind, temperature=temperature)
    policy = scorer_of(model).model
    if kind == "auto":
        kind = "adapter_off" if why_not_off(policy) is None and is_identity(policy) else "snapshot"
    if kind == "adapter_off":
        return AdapterOff(model, temperature=temperature)
    if kind == "snapshot":
        return Snapshot(model, temperature=temperature)
    if kind == "copy":
        return FrozenCopy.of(model, temperature=temperature)
    raise ConfigError(
        f"reference: expected one of {list(get_args(Kind))}, None, a model, or an object with "
        f"logprobs(batch), got {kind!r}."
    )


def _require_separate(reference: nn.Module, model: nn.Module) -> None:
    theirs, policy = scorer_of(reference).model, scorer_of(model).model
    own = {id(weight) for weight in theirs.parameters()}
    shared = [
        name for name, weight in policy.named_parameters() if weight.requires_grad and id(weight) in own
    ]
    if shared:
        raise ConfigError(
            f"reference: expected a model of its own, got one that shares {shared[0]} among {len(shared)} "
            "trained weights with the policy. Use reference='snapshot' for the policy as it is now."
        )
    tasks = [language_task(each) for each in (theirs, policy)]
    if tasks[0] != tasks[1]:
        raise ConfigError(
            f"reference: expected a model of the policy's kind, {tasks[1]!r}, got one of {tasks[0]!r}, which "
            "would read the policy's prompts and answers as one text. Give a model of the same kind."
        )
    sizes = [
        int(inner_model(each).config.get_text_config(decoder=True).vocab_size) for each in (theirs, policy)
    ]
    if sizes[0] < sizes[1]:
        raise ConfigError(
            f"reference: expected a model with the policy's {sizes[1]} tokens, got one with {sizes[0]}. Load "
            "one of the same tokenizer, or resize its embeddings likewise."
        )
