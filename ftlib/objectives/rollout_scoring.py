"""What policy, reference and critic say of rollouts before an update: the numbers that stay fixed in it.

All come from `models.forward`, the path of the loss itself, so the first minibatch has ratio 1. Completions
of one prompt that stand next to each other share its computation, as they do in the loss.

Shapes: N scored rows of a micro-batch, L tokens of one completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ftlib.batches import Group, Mean, Rollout
from ftlib.data.collate import collate
from ftlib.data.sampler import pack
from ftlib.models import Scored, forward
from ftlib.models.modes import no_dropout
from ftlib.models.references import Reference
from ftlib.objectives.rollout_rows import of_one_prompt

__all__ = ["read_rollouts"]


@torch.no_grad()
def read_rollouts(
    rollouts: Sequence[Rollout],
    policy: nn.Module,
    *,
    critic: nn.Module | None,
    reference: Reference | None,
    temperature: float,
    max_tokens: int,
    device: torch.device,
) -> tuple[list[Rollout], Mean]:
    """Rollouts with log-probabilities under policy and reference, and values.

    What a rollout carries already stays as it is.

    Args:
        rollouts: as a sampler and a reward made them.
        policy: as it is now; a `Scorer` or what wraps one.
        critic: what gives values, `policy` itself where its own head does; None for no values.
        reference: at the same temperature; None leaves its log-probabilities out.
        temperature: of the sampling.
        max_tokens: of one forward.
        device: where to compute.

    Returns:
        The rollouts, and the entropy of the sampled tokens' distributions.
    """
    prompts = [rollout.prompt_ids.tolist() for rollout in rollouts]
    groups = list(of_one_prompt(prompts, [len(rollout.completion_ids) for rollout in rollouts], max_tokens))
    read: list[Rollout] = list(rollouts)
    entropy = Mean(torch.zeros(()), torch.zeros(()))
    own = critic is policy
    for some in pack([_tokens(rollouts, members) for members in groups], max_tokens):
        batch = collate([_group([rollouts[index] for index in groups[k]]) for k in some]).to(device)
        with no_dropout(policy):
            scored = forward(policy, batch, temperature=temperature, entropy=True, values=own)
        valued = scored
        if critic is not None and not own:
            with no_dropout(critic):
                valued = forward(critic, batch, logprobs=False, values=True)
        reference_N = None if reference is None else reference.logprobs(batch)
        entropy = entropy + Mean(_summed(scored.entropy_N), torch.tensor(float(len(batch.rows_N))))
        for place, index in enumerate(index for k in some for index in groups[k]):
            of_row = batch.owner_N == place
            read[index] = _with(read[index], scored, valued, reference_N, of_row, place)
    return read, entropy


def _group(rollouts: Sequence[Rollout]) -> Group:
    """Completions of one prompt, which is computed once."""
    prompt = rollouts[0].prompt_ids
    completions = tuple(rollout.completion_ids for rollout in rollouts)
    return Group(
        prompt, torch.zeros(len(prompt)), completions, tuple(rollout.mask.float() for rollout in rollouts)
    )


def _tokens(rollouts: Sequence[Rollout], members: Sequence[int]) -> int:
    """Of these rollouts of one prompt, computed together."""
    return len(rollouts[members[0]].prompt_ids) + sum(len(rollouts[k].completion_ids) for k in members)


def _with(
    rollout: Rollout,
    scored: Scored,
    valued: Scored,
    reference_N: Tensor | None,
    of_row: Tensor,
    place: int,
) -> Rollout:
    found: dict[str, Any] = {"old_logprobs": scored.logprobs_N, "ref_logprobs": reference_N}
    found["values"] = valued.values_N
    new: dict[str, Any] = {
        name: _spread(values_N[of_row], rollout)
        for name, values_N in found.items()
        if values_N is not None and getattr(rollout, name) is None
    }
    if valued.end_values_C is not None and rollout.end_value is None:
        new["end_value"] = float(valued.end_values_C[place])
    return replace(rollout, **new)


def _spread(values_N: Tensor, rollout: Rollout) -> Tensor:
    """Numbers of the sampled tokens as a vector over the completion [L]; NaN where nothing was sampled."""
    vector_L = torch.full((len(rollout.completion_ids),), torch.nan)
    vector_L[rollout.mask] = values_N.float().cpu()
    return vector_L


def _summed(entropy_N: Tensor | None) -> Tensor:
    return torch.zeros(()) if entropy_N is None else entropy_N.float().sum().cpu()
