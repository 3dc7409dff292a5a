"""A reference is what the policy was: equal at first, unmoved later, and out of the policy's way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ftlib.adapters import attach, lora
from ftlib.batches import PackedBatch
from ftlib.errors import CapabilityError, CheckpointError, ConfigError
from ftlib.models.checkpointing import enable_checkpointing
from ftlib.models.forward import Scorer, forward
from ftlib.models.references import (
    AdapterOff,
    FrozenCopy,
    KeptReference,
    Reference,
    Snapshot,
    make_reference,
)
from tests.models.policies import BATCH, BESIDE, NAME, POLICIES, gradients, policy, policy_logprobs, train
from tests.models_zoo import ARCHITECTURES, VOCAB, tiny_model

KINDS = ("auto", "snapshot", "copy")
# What changes nothing now and leaves its base alone. So does "dora", but its weights alone do not prove it.
OFF_BY_DEFAULT = {
    "lora",
    "lora gaussian",
    "lora dropout",
    "lora and head",
    "lora on embeddings",
    "rslora",
    "ia3",
}
CANNOT_BE_OFF = {
    "pissa": "'mine' does not declare off_is_base",
    "pissa trained": "'mine' does not declare off_is_base",
    "lora beside pissa": "'other' does not declare off_is_base",
    "lora and norms": "norm.*outside|outside.*norm",
    "full": "no adapter to switch off",
    "full trained": "no adapter to switch off",
}


def made(kind: object, model: nn.Module, **options: float) -> KeptReference:
    reference = make_reference(kind, model, **options)  # type: ignore[arg-type]
    assert isinstance(reference, KeptReference)
    return reference


def facts(model: nn.Module) -> list[object]:
    """What a reference must leave as it is."""
    return [
        torch.get_rng_state().tolist(),
        [module.training for module in model.modules()],
        [(id(weight), weight.requires_grad, weight.sum().item()) for weight in model.parameters()],
        [weight.grad is None for weight in model.parameters()],
        [
            (layer.active_adapter, layer.disable_adapters)
            for layer in model.modules()
            if hasattr(layer, "lora_A")
        ],
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", POLICIES)
def test_at_step_0_it_says_what_the_policy_says(state: str, kind: str) -> None:
    """Bit for bit, though the policy is in training and keeps a graph; dropout aside.

    But for a trained head: with the adapter off it is the base's, which is frozen and takes another path.
    """
    model = policy(state)
    found = made(kind, model).logprobs(BATCH)
    other_path = (state, kind) == ("lora and head", "auto")
    assert_close(found, policy_logprobs(model).detach(), rtol=0, atol=2e-6 if other_path else 0)
    assert found.dtype == torch.float32
    assert not found.requires_grad


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_at_step_0_for_every_architecture(arch: str) -> None:
    model = attach(tiny_model(arch).requires_grad_(False), lora(4), name=NAME).train()
    said = forward(model, BATCH).logprobs_N.detach()
    assert_close(made("auto", model).logprobs(BATCH), said, rtol=0, atol=1e-6)
    train(model)
    for kind in KINDS:
        assert torch.equal(made(kind, model).logprobs(BATCH), forward(model, BATCH).logprobs_N.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", POLICIES)
def test_training_the_policy_does_not_move_it(state: str, kind: str) -> None:
    model = policy(state)
    reference = made(kind, model)
    before = reference.logprobs(BATCH)
    train(model)
    assert torch.equal(reference.logprobs(BATCH), before)
    assert not torch.allclose(policy_logprobs(model), before)


@pytest.mark.parametrize("state", POLICIES)
def test_auto_takes_the_base_where_the_policy_is_still_the_base(state: str) -> None:
    model = policy(state)
    assert isinstance(make_reference("auto", model), AdapterOff if state in OFF_BY_DEFAULT else Snapshot)
    train(model)
    assert isinstance(make_reference("auto", model), Snapshot)


def test_auto_looks_at_the_weights_and_not_at_how_they_were_drawn() -> None:
    model = policy("lora trained")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:  # either factor will do
                weight.zero_()
    assert isinstance(make_reference("auto", model), AdapterOff)


@pytest.mark.parametrize("state", CANNOT_BE_OFF)
def test_a_base_that_off_does_not_give_back_is_refused_with_the_reason(state: str) -> None:
    with pytest.raises(CapabilityError, match=CANNOT_BE_OFF[state]):
        make_reference("adapter_off", policy(state))


def test_off_is_the_base_whatever_the_adapter_has_learnt() -> None:
    reference = made("adapter_off", policy("lora trained"))
    assert torch.equal(reference.logprobs(BATCH), forward(tiny_model(), BATCH).logprobs_N.detach())


@pytest.mark.parametrize("kind", [*KINDS, "given"])
def test_the_policy_and_the_random_state_are_left_alone(kind: str) -> None:
    model = policy("lora dropout")
    given = policy("lora dropout")
    reference = made(given if kind == "given" else kind, model)
    reference.logprobs(BATCH)  # the first call plans the forward
    before = facts(model), facts(given)
    reference.logprobs(BATCH)
    assert (facts(model), facts(given)) == before


@pytest.mark.parametrize("kind", [*KINDS, "adapter_off"])
def test_after_an_error_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy("lora and head")
    reference = made(kind, model)
    before = facts(model)
    broken = torch.full_like(BATCH.ids_T, VOCAB)
    with pytest.raises(IndexError):
        reference.logprobs(PackedBatch(**(vars(BATCH) | {"ids_T": broken})))
    assert facts(model) == before


@pytest.mark.parametrize("state", ["lora dropout", "dora", "full trained"])
@pytest.mark.parametrize("order", list(permutations(["snapshot", "copy", "policy"])))
def test_gradients_are_those_without_references(state: str, order: tuple[str, ...]) -> None:
    """In any order, checkpointing and dropout on: before the forward, or between it and its backward."""
    model, plain = policy(state), policy(state)
    references = {kind: made(kind, model) for kind in ("snapshot", "copy")}
    for each in (model, plain):
        train(each)
        enable_checkpointing(each)
        forward(each, BATCH)
    torch.manual_seed(3)
    forward(plain, BATCH).logprobs_N.sum().backward()
    torch.manual_seed(3)
    for name in order:
        if name == "policy":
            loss = forward(model, BATCH).logprobs_N.sum()
        else:
            references[name].logprobs(BATCH)
    loss.backward()
    assert gradients(model).keys() == gradients(plain).keys()
    assert_close(gradients(model), gradients(plain), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["snapshot", "copy"])
def test_with_two_adapters_it_is_the_one_that_was_active(kind: str) -> None:
    model = policy("lora trained")
    before = policy_logprobs(model).detach()
    reference = made(kind, model)
    attach(model, lora(2, targets=["q_proj", "up_proj"]), name=BESIDE)  # active from now on
    train(model)
    assert torch.equal(reference.logprobs(BATCH), before)
    assert model.active_adapter == BESIDE


def test_an_adapter_switched_off_at_first_is_the_base_for_good() -> None:
    model = policy("lora trained")
    with model.disable_adapter():
        assert isinstance(made("copy", model), FrozenCopy)
        reference = made("copy", model)
    assert torch.equal(reference.logprobs(BATCH), forward(tiny_model(), BATCH).logprobs_N.detach())


@pytest.mark.parametrize("kind", [*KINDS, "adapter_off"])
def test_it_takes_the_policys_own_path(kind: str) -> None:
    scorer = Scorer(policy("lora"), path="padded")
    found = made(kind, scorer).logprobs(BATCH)
    assert torch.equal(found, scorer(BATCH).logprobs_N.detach())
    assert not torch.equal(found, forward(scorer.model, BATCH).logprobs_N.detach())  # by rounding


@pytest.mark.parametrize("kind", [*KINDS, "adapter_off"])
def test_inside_a_distributed_wrapper_it_runs_the_inner_model(kind: str) -> None:
    class Wrapper(nn.Module):
        """As DistributedDataParallel: its forward must not be called without a backward to follow."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: object) -> None:
            raise AssertionError

    scorer = Scorer(policy("lora"))
    assert torch.equal(made(kind, Wrapper(scorer)).logprobs(BATCH), scorer(BATCH).logprobs_N.detach())


@pytest.mark.parametrize("kind", [*KINDS, "adapter_off"])
def test_it_has_the_precision_that_a_launcher_gave_the_scorer(kind: str) -> None:
    """accelerate wraps the forward of the module that it prepares in autocast."""
    scorer = Scorer(policy("lora"))
    exact = scorer(BATCH).logprobs_N.detach()
    scorer.forward = torch.autocast("cpu", torch.bfloat16)(scorer.forward)
    found = made(kind, scorer).logprobs(BATCH)
    assert torch.equal(found, scorer(BATCH).logprobs_N.detach())
    assert not torch.allclose(found, exact)


@pytest.mark.parametrize("kind", [*KINDS, "adapter_off", "given"])
def test_the_temperature_is_the_policys(kind: str) -> None:
    model = policy("lora")
    reference = made(policy("lora") if kind == "given" else kind, model, temperature=0.7)
    assert torch.equal(reference.logprobs(BATCH), forward(model, BATCH, temperature=0.7).logprobs_N.detach())


def test_a_given_model_is_run_as_it_is() -> None:
    given = tiny_model("gpt2", seed=5).train()
    found = made(given, policy("lora")).logprobs(BATCH)
    assert torch.equal(found, forward(given.eval(), BATCH).logprobs_N.detach())


@pytest.mark.parametrize(
    "shared",
    [lambda model: model, Scorer, lambda model: model.get_base_model()],
    ids=["policy", "scorer", "inner"],
)
def test_the_policy_itself_is_no_model_of_its_own(shared: Callable[[nn.Module], nn.Module]) -> None:
    model = policy("lora")
    with pytest.raises(ConfigError, match=r"shares .*lora_A.*snapshot"):
        make_reference(shared(model), model)


def test_the_base_under_a_policys_adapter_of_another_object_is_one() -> None:
    base = tiny_model()
    assert isinstance(make_reference(base, policy("lora")), FrozenCopy)


def test_a_model_with_fewer_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"{VOCAB} tokens, got one with {VOCAB - 1}"):
        make_reference(tiny_model(vocab_size=VOCAB - 1), policy("lora"))
    assert isinstance(make_reference(tiny_model(vocab_size=VOCAB + 1), policy("lora")), FrozenCopy)


def test_anything_with_logprobs_is_a_reference() -> None:
    class Zeros:
        def logprobs(self, batch: PackedBatch) -> Tensor:
            return torch.zeros(len(batch.rows_N))

    reference = Zeros()
    assert isinstance(reference, Reference)
    assert make_reference(reference, policy("lora")) is reference


def test_none_is_none_and_the_rest_is_refused() -> None:
    assert make_reference(None, policy("lora")) is None
    with pytest.raises(ConfigError, match="got 'frozen'"):
        make_reference("frozen", policy("lora"))  # type: ignore[arg-type]


def test_a_model_that_is_not_trained_has_nothing_to_copy() -> None:
    with pytest.raises(ConfigError, match="Attach its adapter first"):
        Snapshot(tiny_model().requires_grad_(requires_grad=False))


def test_a_frozen_adapter_is_copied_since_it_may_be_trained_later() -> None:
    model = policy("lora trained").requires_grad_(requires_grad=False)
    reference = Snapshot(model)
    before = reference.logprobs(BATCH)
    model.set_adapter(NAME)
    train(model)
    assert torch.equal(reference.logprobs(BATCH), before)


def test_weights_that_an_adapter_renamed_are_no_longer_found() -> None:
    model = tiny_model()
    reference = Snapshot(model)
    attach(model, lora(4))
    with pytest.raises(ConfigError, match="Attach adapters first"):
        reference.logprobs(BATCH)


@pytest.mark.parametrize("kind", ["adapter_off", "snapshot"])
def test_weights_that_become_trainable_later_are_refused(kind: str) -> None:
    model = policy("lora")
    reference = made(kind, model)
    model.requires_grad_(requires_grad=True)
    with pytest.raises(ConfigError, match="made trainable after"):
        reference.logprobs(BATCH)


@pytest.mark.parametrize("state", ["lora trained", "full"])
def test_a_moving_reference_goes_its_share_of_the_way(state: str) -> None:
    """Half of the way and then all of it: the mean of old and new weights, then the new ones."""
    model = policy(state)
    reference = Snapshot(model)
    old = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    train(model)
    new = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    reference.follow(0.5)
    assert_close(reference.state_dict(), {name: (old[name] + new[name]) / 2 for name in old})
    reference.follow(1.0)
    assert torch.equal(reference.logprobs(BATCH), policy_logprobs(model).detach())
    with pytest.raises(ConfigError, match=r"\(0, 1\], got 0"):
        reference.follow(0.0)


@pytest.mark.parametrize("kind", ["snapshot", "copy"])
@pytest.mark.parametrize("state", ["lora and head", "dora", "full"])
def test_its_state_makes_another_one_the_same(state: str, kind: str) -> None:
    """A resumed run makes its reference from other weights, then takes the saved state over."""
    model = policy(state)
    reference = made(kind, model)
    resumed = policy(state)
    train(resumed)
    other = made(kind, resumed)
    assert not torch.allclose(other.logprobs(BATCH), reference.logprobs(BATCH))
    assert other.fingerprint() != reference.fingerprint()
    before = other.mark()
    other.load_state_dict({name: value.clone() for name, value in reference.state_dict().items()})
    assert torch.equal(other.logprobs(BATCH), reference.logprobs(BATCH))
    assert other.fingerprint() == reference.fingerprint()
    assert other.mark() != before


@pytest.mark.parametrize("kind", ["adapter_off", "given"])
def test_what_stays_frozen_keeps_nothing(kind: str) -> None:
    reference = made(tiny_model() if kind == "given" else kind, policy("lora"))
    assert reference.state_dict() == {}
    reference.load_state_dict({})


@pytest.mark.parametrize("kind", [*KINDS, "copy"])
def test_a_state_of_another_reference_is_refused_and_changes_nothing(kind: str) -> None:
    reference = made(kind, policy("lora"))
    before = reference.logprobs(BATCH)
    state = {name: value[:1] for name, value in reference.state_dict().items()} or {"weight": torch.ones(1)}
    for wrong in (state, {"weight": torch.ones(1)}):
        with pytest.raises(CheckpointError, match="Make the reference as in the run that was saved"):
            reference.load_state_dict(wrong)
    assert torch.equal(reference.logprobs(BATCH), before)


@pytest.mark.parametrize("kind", [*KINDS, "adapter_off"])
def test_its_mark_changes_with_its_weights_alone(kind: str) -> None:
    model = policy("lora")
    reference = made(kind, model)
    mark, fingerprint = reference.mark(), reference.fingerprint()
    reference.logprobs(BATCH)
    train(model)
    assert (reference.mark(), reference.fingerprint()) == (mark, fingerprint)
    own = reference.scorer.model.get_submodule("base_model.model.model.norm")  # type: ignore[attr-defined]
    with torch.no_grad():
        own.weight.mul_(2)
    assert reference.mark() != mark
    assert reference.fingerprint() != fingerprint
