"""Divergence of the policy from its reference: per sampled token, exact, and where each may stand.

With l = log pi(a) - log ref(a) of a token a that the policy sampled, and means over such tokens:

    kind      value                    mean gradient as a loss        in the reward   in the loss
    k1        l                        zero                           allowed         refused
    k2        l^2 / 2                  that of KL(pi || ref)          refused         allowed
    k3        e^-l - 1 + l             that of KL(ref || pi)          refused         refused
    k3_plus   as k3                    as k2                          refused         allowed
    abs       |l|                      that of no KL                  refused         refused
    exact     sum over the vocabulary  that of KL(pi || ref)          refused         allowed

k1 and k3 estimate KL(pi || ref) without bias; k3 is never negative, which makes it the one to watch.

A penalty in the reward holds the policy near its reference only if it grows with l everywhere: the
others also punish tokens that have become *less* likely, and push these to zero.

A penalty in the loss sees the KL of the token at hand, not that of what follows, so its optimum is
another one where completions have several tokens. After the first epoch on the same samples it needs
the factor `policy_ratio(...).detach()`.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ftlib.errors import ConfigError, ShapeError
from ftlib.losses.masks import check_masked, masked, wide

__all__ = ["check_kl_placement", "kl_estimate", "kl_exact"]

_MAX_EXPONENT = 20.0  # e^20 is finite in float32; beyond, k3 grows with l only


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, kind: str, mask: Tensor | None = None) -> Tensor:
    """Estimate of KL(policy || reference) from each sampled token, with l = logprobs - ref_logprobs.

        k1 = l      k2 = l^2 / 2      k3 = e^-l - 1 + l      abs = |l|
        k3_plus: the value of k3 with the gradient of k2

    Args:
        logprobs: log-probabilities of sampled tokens under the policy, float of any shape, nats.
        ref_logprobs: under the reference, same shape and the same sampling temperature.
        kind: "k1", "k2", "k3", "k3_plus" or "abs"; `check_kl_placement` says which fits where.
        mask: bool, same shape; zero where False. None counts everything.

    Returns:
        float32 (float64 for float64) of the same shape, nats. The exponent of k3 stops at 20.

    Raises:
        ShapeError: shapes that differ, or a mask that is not bool.
        ConfigError: an unknown kind, or "exact", which takes whole distributions: see `kl_exact`.

    Source: Schulman 2020, "Approximating KL divergence".

    Example:
        >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), kind="k3")
        tensor([0.1065])
    """
    if kind not in _ESTIMATORS:
        also = " kl_exact takes whole distributions." if kind == "exact" else ""
        raise ConfigError(f"kl_estimate: expected a kind among {sorted(_ESTIMATORS)}, got {kind!r}.{also}")
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    check_masked("kl_estimate", mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    return _ESTIMATORS[kind](masked(logprobs, mask) - masked(ref_logprobs, mask))


def kl_exact(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) of the next token, summed over the vocabulary.

        KL = sum_v p_v (log p_v - log q_v),   p = softmax(logits), q = softmax(ref_logits)

    Args:
        logits: of the policy, float [..., V], divided by the sampling temperature; -inf means impossible.
        ref_logits: of the reference, same shape.

    Returns:
        float32 (float64 for float64) [...], nats, >= 0; infinite where the policy can sample what the
        reference cannot.

    Raises:
        ShapeError: shapes that differ, or scalars.

    Source: Kullback & Leibler 1951, "On information and sufficiency".

    Example:
        >>> kl_exact(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log())  # log(4/3) / 2
        tensor(0.1438)
    """
    if logits.ndim == 0 or logits.shape != ref_logits.shape:
        raise ShapeError(
            f"kl_exact: expected two tensors of logits [..., V], got {tuple(logits.shape)} and "
            f"{tuple(ref_logits.shape)}."
        )
    logp, logq = wide(logits).log_softmax(-1), wide(ref_logits).log_softmax(-1)
    p = logp.exp()
    # 0 log 0 = 0, also where both are impossible and the difference of the logs is not a number.
    return (p * torch.where(p > 0, logp - logq, torch.zeros_like(p))).sum(-1)


def check_kl_placement(kind: str, place: str) -> None:
    """Refuse an estimator where training with it would end somewhere else than at the KL penalty's optimum.

    Args:
        kind: an estimator of `kl_estimate`, or "exact" for `kl_exact`.
        place: "reward", as part of what each token earns, or "loss", as a term to descend.

    Raises:
        ConfigError: with the reason and the kinds that fit.

    Example:
        >>> check_kl_placement("k1", "reward")
        >>> check_kl_placement("k3", "loss")
        Traceback (most recent call last):
        ftlib.errors.ConfigError: KL 'k3' in the loss: its gradient is that of KL(reference || policy). ...
    """
    if place not in _REFUSED:
        raise ConfigError(f"check_kl_placement: expected the place 'reward' or 'loss', got {place!r}.")
    kinds = [*sorted(_ESTIMATORS), "exact"]
    if kind not in kinds:
        raise ConfigError(f"check_kl_placement: expected a kind among {kinds}, got {kind!r}.")
    refused = _REFUSED[place]
    if kind in refused:
        fitting = ", ".join(repr(each) for each in kinds if each not in refused)
        raise ConfigError(f"KL {kind!r} in the {place}: {refused[kind]}. Use {fitting}.")


def _k1(l: Tensor) -> Tensor:  # noqa: E741  the symbol of the formula
    return l


def _k3(l: Tensor) -> Tensor:  # noqa: E741
    return torch.expm1((-l).clamp(max=_MAX_EXPONENT)) + l


def _k2(l: Tensor) -> Tensor:  # noqa: E741
    return l.square() / 2


def _k3_plus(l: Tensor) -> Tensor:  # noqa: E741
    k2 = _k2(l)
    return _k3(l).detach() + (k2 - k2.detach())


_ESTIMATORS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "k1": _k1,
    "k2": _k2,
    "k3": _k3,
    "k3_plus": _k3_plus,
}
_PUSHES = "it does not grow with the log-ratio everywhere, so rare tokens are pushed towards zero"
_REFUSED: Mapping[str, Mapping[str, str]] = {
    "reward": {
        "abs": _PUSHES,
        "k2": _PUSHES,
        "k3": _PUSHES,
        "k3_plus": _PUSHES,
        "exact": "it is the same for every token that could be sampled, so it has no gradient",
    },
    "loss": {
        "abs": "its gradient depends on the sign of the log-ratio only and is that of no KL",
        "k1": "its mean gradient is zero, so nothing holds the policy near its reference",
        "k3": "its gradient is that of KL(reference || policy)",
    },
}
