"""What the settings of `objectives.PPO` must be; `PPOConfig` wants the same of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ftlib.checks import SWITCH, TEXT, Wanted, number, one_of

__all__ = ["WANTED", "KLPlace", "Truncation"]

Truncation = Literal["terminal", "bootstrap", "mask"]
KLPlace = Literal["reward", "loss"]

_SHARE = number(0, most=1)
_POSITIVE = number(above=0)
WANTED: Mapping[str, Wanted] = {
    **dict.fromkeys(("value_coef", "entropy_coef", "ptx_coef", "missing_stop_penalty"), number(0)),
    "temperature": _POSITIVE,
    **dict.fromkeys(("gamma", "lam"), _SHARE),
    "lam_value": _SHARE.or_none,
    "clip": Wanted(
        "a number > 0, or a tuple (low, high) of two",
        lambda value: (
            _POSITIVE.holds(value)
            or (isinstance(value, tuple) and len(value) == 2 and all(map(_POSITIVE.holds, value)))
        ),
    ),
    "dual": number(above=1).or_none,
    **dict.fromkeys(("value_clip", "score_clip"), _POSITIVE.or_none),
    "missing_stop_score": number().or_none,
    **dict.fromkeys(("whiten_advantages", "whiten_rewards"), SWITCH),
    "kl_place": one_of(KLPlace),
    "kl_kind": TEXT.or_none,  # which ones there are, the loss says
    "truncation": one_of(Truncation),
}
