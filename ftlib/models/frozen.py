"""References that run a model: the policy's own in an earlier role, or another one.

Each runs the same forward as the policy, on the same path, without gradients and in evaluation mode, so
without dropout; the policy's modes, switches and random state are left alone. None is ever read from a path:
the weights in memory may differ from those on disk.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any, final

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlib.batches import PackedBatch
from ftlib.errors import CapabilityError, CheckpointError, ConfigError
from ftlib.models.adapted import active_adapters, parameters_in_use, why_not_off
from ftlib.models.fingerprints import adapter_settings, config_settings, hash_settings, hash_tensors
from ftlib.models.forward import Scorer, forward
from ftlib.models.modes import evaluation_mode
from ftlib.models.parts import inner_model
from ftlib.models.plan import plan_for
from ftlib.models.roles import adapters_active, adapters_off, swapped_weights
from ftlib.models.sharding import is_sharded

__all__ = ["AdapterOff", "FrozenCopy", "Snapshot", "scorer_of"]


@final
class AdapterOff:
    """The base under the policy's adapters, which may be trained meanwhile.

    Args:
        model: the policy: a peft model, a `Scorer`, or accelerate's wrapper around one.
        temperature: divides the logits, > 0.

    Raises:
        CapabilityError: switched off, its adapters do not give a base that stays as it is.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        self.scorer = scorer_of(model)
        self.temperature = temperature
        reason = why_not_off(self.scorer.model)
        if reason is not None:
            raise CapabilityError(
                f"AdapterOff: expected a model whose adapters can be switched off to give its base, got one "
                f"that cannot: {reason}. Use Snapshot(model), or reference='snapshot'."
            )

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """See `Reference`."""
        _require_frozen(self._weights())
        with adapters_off(self.scorer):
            return _logprobs(self.scorer, batch, self.temperature)

    def mark(self) -> Hashable:
        """See `KeptReference`."""
        return _mark(self._weights())

    def fingerprint(self) -> str:
        """See `KeptReference`."""
        return _fingerprint(self.scorer, (), self._weights(), self.temperature)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the base is frozen."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take nothing over."""
        _restore({}, state)

    def _weights(self) -> dict[str, nn.Parameter]:
        return parameters_in_use(self.scorer.model, ())


@final
class Snapshot:
    """The policy as it is now: a copy of the weights that are trained, beside those that are frozen.

    The copy takes the place of the policy's weights for the reference's forward; nothing is moved.

    Args:
        model: the policy, plain or with adapters; a `Scorer`, or accelerate's wrapper around one.
        temperature: divides the logits, > 0.

    Raises:
        CapabilityError: the policy is sharded.
        ConfigError: no weights to copy.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        self.scorer = scorer_of(model)
        _require_whole(self.scorer, "Snapshot")
        self.temperature = temperature
        self.adapters = active_adapters(self.scorer.model)
        of_the_base = parameters_in_use(self.scorer.model, ())
        self.weights = {  # those of an adapter that is frozen now may be trained later
            name: weight.detach().clone()
            for name, weight in parameters_in_use(self.scorer.model, self.adapters).items()
            if weight.requires_grad or name not in of_the_base
        }
        if not self.weights:
            raise ConfigError(
                "Snapshot: expected a model with weights to train, got one with none. Attach its "
                "adapter first: ftlib.adapters.attach(model, adapter); a model that stays "
                "as it is needs FrozenCopy(model)."
            )

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """See `Reference`."""
        _require_frozen(self._computing())
        model = self.scorer.model
        with adapters_active(model, self.adapters), swapped_weights(model, self.weights):
            return _logprobs(self.scorer, batch, self.temperature)

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """Move towards the policy's present weights: ``ref <- share * policy + (1 - share) * ref``.

        In the weights' own dtype: a small share of a bfloat16 weight may move nothing.

        Args:
            share: in (0, 1]; 1 takes a new snapshot.

        Raises:
            ConfigError: out of range.
        """
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"Snapshot.follow: expected a share in (0, 1], got {share}.")
        present = parameters_in_use(self.scorer.model, self.adapters)
        for name, weight in self.weights.items():
            self.weights[name] = weight.to(present[name].device).lerp_(present[name], share)

    def mark(self) -> Hashable:
        """See `KeptReference`."""
        return _mark(self._computing())

    def fingerprint(self) -> str:
        """See `KeptReference`."""
        return _fingerprint(self.scorer, self.adapters, self._computing(), self.temperature)

    def state_dict(self) -> dict[str, Any]:
        """The copied weights, by name."""
        return dict(self.weights)

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take the weights of another snapshot over."""
        _restore(self.weights, state)

    def _computing(self) -> dict[str, Tensor]:
        """What the forward reads, the copies on the devices of what they stand in for."""
        present = parameters_in_use(self.scorer.model, self.adapters)
        if not present.keys() >= self.weights.keys():
            raise ConfigError(
                "Snapshot: expected the weights of the model under the names they had, got others: an "
                "adapter was attached or deleted since. Attach adapters first, then take the snapshot."
            )
        for name, weight in self.weights.items():
            self.weights[name] = weight.to(present[name].device)
        return {**present, **self.weights}


@final
class FrozenCopy:
    """A model of its own, run as it is and left as it is: nobody may train it meanwhile.

    Args:
        model: with the policy's tokens; plain or with adapters; on any device.
        temperature: divides the logits, > 0.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        self.scorer = scorer_of(model)
        self.temperature = temperature
        self.adapters = active_adapters(self.scorer.model)
        self._own: dict[str, nn.Parameter] | None = None  # of a copy: what the policy trains in it

    @classmethod
    def of(cls, model: nn.Module, *, temperature: float = 1.0) -> FrozenCopy:
        """A deep copy of a policy as it is now. The weights that are trained in it go into checkpoints.

        Raises:
            CapabilityError: the policy is sharded.
        """
        _require_whole(scorer_of(model), "FrozenCopy")
        copy = deepcopy(scorer_of(model)).eval()
        reference = cls(copy, temperature=temperature)
        reference._own = {
            name: weight
            for name, weight in parameters_in_use(copy.model, reference.adapters).items()
            if weight.requires_grad
        }
        copy.requires_grad_(False)
        return reference

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """See `Reference`."""
        device = batch.ids_T.device
        inner = inner_model(self.scorer.model)
        if self._own is not None and inner.device != device:
            self.scorer.to(device)  # it follows the policy; a given model stays where it was put
        with adapters_active(self.scorer.model, self.adapters):
            return _logprobs(self.scorer, batch.to(inner.device), self.temperature).to(device)

    def mark(self) -> Hashable:
        """See `KeptReference`."""
        return _mark(self._weights())

    def fingerprint(self) -> str:
        """See `KeptReference`."""
        return _fingerprint(self.scorer, self.adapters, self._weights(), self.temperature)

    def state_dict(self) -> dict[str, Any]:
        """Of a copy, the weights that the policy trains; of a given model, nothing."""
        return {name: weight.detach() for name, weight in (self._own or {}).items()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take them over."""
        _restore(self._own or {}, state)

    def _weights(self) -> dict[str, nn.Parameter]:
        return parameters_in_use(self.scorer.model, self.adapters)


def scorer_of(model: nn.Module) -> Scorer:
    """The scorer inside accelerate's wrapper, whose forward keeps its precision; or one around a model."""
    inner = getattr(model, "module", model)
    return inner if isinstance(inner, Scorer) else Scorer(model)


def _logprobs(scorer: Scorer, batch: PackedBatch, temperature: float) -> Tensor:
    with evaluation_mode(scorer), torch.no_grad():
        return forward(scorer, batch, temperature=temperature).logprobs_N.float()


def _require_whole(scorer: Scorer, name: str) -> None:
    if is_sharded(scorer):
        raise CapabilityError(
            f"{name}: expected a policy that lies whole on every rank, got one sharded by FSDP. Train a "
            "fresh adapter against its base, reference='adapter_off', or give the reference as a model of "
            "its own."
        )


def _require_frozen(weights: Mapping[str, Tensor]) -> None:
    trained = [name for name, weight in weights.items() if weight.requires_grad]
    if trained:
        raise ConfigError(
            f"reference: expected weights that stay as they are, got {trained[0]} among {len(trained)} made "
            "trainable after the reference was made. Choose what is trained first."
        )


def _mark(weights: Mapping[str, Tensor]) -> Hashable:
    """Where each tensor, or this rank's piece of it, lies and how often it was written to."""
    own = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights.values()]
    return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in own)


def _fingerprint(
    scorer: Scorer, adapters: Sequence[str], weights: Mapping[str, Tensor], temperature: float
) -> str:
    model = scorer.model
    inner = inner_model(model)
    held: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        held = {name: adapter_settings(model, name) for name in adapters if name in model.peft_config}
    settings = {
        "model": type(inner).__qualname__,
        "config": config_settings(inner.config),
        "adapters": held,
        "path": scorer.path or plan_for(model).path,
        "temperature": temperature,
        "weights": {name: [str(weight.dtype), list(weight.shape)] for name, weight in weights.items()},
        "bytes": hash_tensors(weights.items()),
        "buffers": hash_tensors(inner.named_buffers()),
    }
    return hash_settings(settings)


def _restore(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Copy a state into tensors of the same names and shapes, or change nothing."""
    wrong = sorted(set(own) ^ set(state)) or [
        name
        for name, weight in own.items()
        if not isinstance(state[name], Tensor) or state[name].shape != weight.shape
    ]
    if wrong:
        raise CheckpointError(
            f"reference: expected a state with this reference's weights ({len(own)}), got one of "
            f"{len(state)} that differs in {wrong[0]!r}. Make the reference as in the run that was saved."
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(state[name])
