"""How one model runs a packed batch: flat with grouped attention, or padded. Decided once, logged.

The decision reads declarations (transformers' attention-backend flag, the adapter's capabilities, the
config) and then proves itself on one small batch: the chosen path must give the model's own logits.
That check catches what no declaration says, such as a head with a scale of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ftlib.adapters.attach import model_capabilities
from ftlib.batches import PackedBatch, Span
from ftlib.errors import CapabilityError
from ftlib.models.parts import Path, Plan, inner_model, make_plan
from ftlib.models.scoring import score

__all__ = ["plan_for"]

logger = logging.getLogger(__name__)
STATEFUL = ("mamba", "linear_attention", "conv", "recurrent")  # layer types that carry a state along the row


_verdicts: WeakKeyDictionary[nn.Module, tuple[Path, str]] = WeakKeyDictionary()


def plan_for(model: nn.Module) -> Plan:
    """The plan of a causal language model; the first call for a model runs the start-up check.

    Raises:
        CapabilityError: not a causal model, or its logits are not a head on the body's last state.
    """
    if model not in _verdicts:
        _verdicts[model] = _decide(model)
        path, reason = _verdicts[model]
        logger.info("%s takes the %s path: %s", type(inner_model(model)).__name__, path, reason)
    return make_plan(model, *_verdicts[model])


def _decide(model: nn.Module) -> tuple[Path, str]:
    against = _declared_against_grouping(model)
    if against is None:
        difference = _difference(model, make_plan(model, "grouped", "check"))
        if difference is None:
            return "grouped", "declared, and equal to the model's own logits at start-up"
        against = f"the start-up check differs from the model's own logits by {difference:.2g}"
    difference = _difference(model, make_plan(model, "padded", against))
    if difference is not None:
        raise CapabilityError(
            f"models.forward: expected logits that are a linear head on the last hidden state, got "
            f"{type(inner_model(model)).__name__}, whose own logits differ by {difference:.2g}. "
            "Compute log-probabilities from its logits with ftlib.losses.token_logprobs."
        )
    return "padded", against


def _declared_against_grouping(model: nn.Module) -> str | None:
    inner = inner_model(model)
    text = inner.config.get_text_config(decoder=True)
    if not inner._supports_attention_backend:
        return "its attention bypasses transformers' attention interface"
    layers = set(getattr(text, "layer_types", None) or ())
    if layers & set(STATEFUL):
        return f"its layers {sorted(layers & set(STATEFUL))} carry a state along the row"
    if not model_capabilities(model).groupable:  # type: ignore[arg-type]
        return "its adapter does not share a row between documents"
    if not make_plan(model, "grouped", "").takes_positions:
        return "it takes no explicit positions"
    return None


def _difference(model: nn.Module, plan: Plan) -> float | None:
    """Largest error of the plan's log-probabilities on a prefix with two continuations, if over tolerance."""
    inner = inner_model(model)
    device = plan.body.get_input_embeddings().weight.device
    vocabulary = inner.config.get_text_config(decoder=True).vocab_size
    ids_2L = (torch.arange(8, device=device).view(2, 4) * 7 + 5) % vocabulary
    ids_2L[1, :2] = ids_2L[0, :2]  # the shared prefix
    batch = PackedBatch(
        ids_T=torch.cat([ids_2L[0], ids_2L[1, 2:]]),
        positions_T=torch.tensor([0, 1, 2, 3, 2, 3], device=device),
        spans=(Span(0, 2, (2, 2)),),
        rows_N=torch.tensor([1, 2, 1, 4], device=device),
        targets_N=torch.cat([ids_2L[0, 2:], ids_2L[1, 2:]]),
        weights_N=torch.ones(4, device=device),
        owner_N=torch.tensor([0, 0, 1, 1], device=device),
    )
    with _quiet_evaluation(model), torch.no_grad():
        logits_2LV = inner(input_ids=ids_2L, use_cache=False).logits.float()
        own_N = logits_2LV[:, 1:3].log_softmax(-1).gather(-1, ids_2L[:, 2:, None]).reshape(-1)
        ours_N = score(plan, batch).logprobs_N.float()
    precise = logits_2LV.new_tensor(torch.finfo(plan.body.dtype).eps)
    tolerance = 40 * precise * (1 + logits_2LV.abs().max())
    worst = (own_N - ours_N).abs().max()
    return None if bool(worst <= tolerance) else float(worst)


@contextmanager
def _quiet_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the scope; every module's own mode comes back after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
