"""A cached reference says what the live one says, computes each group once, and notices new weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ftlib.adapters import attach, lora
from ftlib.batches import Group, PackedBatch
from ftlib.data.collate import collate
from ftlib.errors import CapabilityError, ConfigError
from ftlib.models.cached import Cached
from ftlib.models.forward import Scorer, forward
from ftlib.models.references import KeptReference, Snapshot, make_reference
from tests.models.policies import BATCH, policy, policy_logprobs, train
from tests.models_zoo import tiny_model
from tests.packed import MIXED, random_groups

GROUPS = random_groups(MIXED)


class Counting:
    """A reference that notes how many groups each of its forwards had."""

    def __init__(self, reference: KeptReference) -> None:
        self.reference = reference
        self.forwards: list[int] = []

    def logprobs(self, batch: PackedBatch) -> Tensor:
        self.forwards.append(len(batch.spans))
        return self.reference.logprobs(batch)

    def mark(self) -> Hashable:
        return self.reference.mark()

    def fingerprint(self) -> str:
        return self.reference.fingerprint()

    def state_dict(self) -> dict[str, Any]:
        return self.reference.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.reference.load_state_dict(state)


def counted(model: nn.Module, *, kind: str = "snapshot", temperature: float = 1.0) -> Counting:
    reference = make_reference(kind, model, temperature=temperature)  # type: ignore[arg-type]
    assert isinstance(reference, KeptReference)
    return Counting(reference)


def packed(*numbers: int) -> PackedBatch:
    """Some of `GROUPS`, in that order."""
    return collate([GROUPS[number] for number in numbers], score_all=True)


ALL = packed(*range(len(GROUPS)))


def test_the_first_values_are_the_live_ones_bit_for_bit_and_the_second_too() -> None:
    model = policy("lora trained")
    cached = Cached(counted(model))
    live = policy_logprobs(model).detach()
    for _ in range(3):
        found = cached.logprobs(BATCH)
        assert torch.equal(found, live)
        assert found.dtype == torch.float32
    assert cached.reference.forwards == [len(BATCH.spans)]  # type: ignore[attr-defined]


def test_only_the_unknown_groups_are_computed() -> None:
    live = counted(policy("lora trained"))
    cached = Cached(live)
    asked = [(1, 3), (0, 3, 2), (3, 1, 0), (4, 2, 1), (4,)]
    computed = [2, 2, 1]
    for numbers in asked:
        batch = packed(*numbers)
        assert_close(cached.logprobs(batch), live.reference.logprobs(batch), rtol=0, atol=1e-5)
    assert live.forwards == computed


def test_every_mixture_of_known_and_unknown_is_in_its_place() -> None:
    live = counted(policy("lora trained"))
    numbers = (1, 2, 4)
    expected_N = live.reference.logprobs(packed(*numbers))
    for known in range(2 ** len(numbers)):
        cached = Cached(live)
        for bit, number in enumerate(numbers):
            if known >> bit & 1:
                cached.logprobs(packed(number))
        assert_close(cached.logprobs(packed(*numbers)), expected_N, rtol=0, atol=1e-5)


def test_scored_rows_may_stand_in_any_order() -> None:
    live = counted(policy("lora trained"))
    order = torch.randperm(len(ALL.rows_N), generator=torch.Generator().manual_seed(0))
    names = ("rows_N", "targets_N", "weights_N", "owner_N")
    shuffled = replace(ALL, **{name: getattr(ALL, name)[order] for name in names})
    cached = Cached(live)
    cached.logprobs(packed(2))
    assert_close(cached.logprobs(shuffled), live.reference.logprobs(ALL)[order], rtol=0, atol=1e-5)


def test_a_group_twice_in_a_batch_is_known_twice() -> None:
    live = counted(policy("lora trained"))
    cached = Cached(live)
    cached.logprobs(packed(1))
    for _ in range(2):
        found = cached.logprobs(packed(2, 1, 2))
        assert_close(found, live.reference.logprobs(packed(2, 1, 2)), rtol=0, atol=1e-5)
    assert live.forwards == [1, 2]


def other_token(group: Group) -> PackedBatch:
    first = group.continuation_ids[0].clone()
    first[0] = first[0] % 90 + 3
    return collate([replace(group, continuation_ids=(first, *group.continuation_ids[1:]))], score_all=True)


def prefix_moved(group: Group) -> PackedBatch:
    """The same tokens in a row, cut elsewhere between prefix and continuation."""
    whole = torch.cat([group.prefix_ids, group.continuation_ids[0]])
    cut = len(group.prefix_ids) - 1
    ids, weights = whole[cut:], torch.ones(len(whole) - cut)
    return collate([Group(whole[:cut], torch.zeros(cut), (ids,), (weights,))], score_all=True)


def fewer_scored(group: Group) -> PackedBatch:
    weights = group.continuation_weights[0].clone()
    weights[0] = 0
    return collate([replace(group, continuation_weights=(weights, *group.continuation_weights[1:]))])


def later_positions(group: Group) -> PackedBatch:
    batch = collate([group], score_all=True)
    return replace(batch, positions_T=2 * batch.positions_T)


def other_target(group: Group) -> PackedBatch:
    batch = collate([group], score_all=True)
    return replace(batch, targets_N=batch.targets_N % 90 + 3)


@pytest.mark.parametrize("change", [other_token, prefix_moved, fewer_scored, later_positions, other_target])
def test_other_content_is_another_group(change: Callable[[Group], PackedBatch]) -> None:
    live = counted(policy("lora trained"))
    cached = Cached(live)
    cached.logprobs(packed(1))
    batch = change(GROUPS[1])
    assert torch.equal(cached.logprobs(batch), live.reference.logprobs(batch))
    assert live.forwards == [1, 1]


def test_which_of_two_equal_tokens_is_scored_is_content() -> None:
    live = counted(policy("lora trained"))
    cached = Cached(live)
    ids = torch.tensor([7, 7])
    for weights in ([1.0, 0.0], [0.0, 1.0]):
        batch = collate([Group(torch.tensor([5]), torch.zeros(1), (ids,), (torch.tensor(weights),))])
        assert torch.equal(cached.logprobs(batch), live.reference.logprobs(batch))
    assert live.forwards == [1, 1]


def test_where_continuations_begin_is_content() -> None:
    """The same tokens at the same positions, one of them in another continuation."""
    live = counted(policy("lora trained"))
    cached = Cached(live)
    batch = packed(4)
    [span] = batch.spans
    first, second, *rest = span.continuations
    for lengths in (span.continuations, (first + 1, second - 1, *rest)):
        cut = replace(batch, spans=(replace(span, continuations=lengths),))
        assert torch.equal(cached.logprobs(cut), live.reference.logprobs(cut))
    assert live.forwards == [1, 1]


def test_loss_weights_and_extras_are_not_content() -> None:
    live = counted(policy("lora trained"))
    cached = Cached(live)
    cached.logprobs(ALL)
    cached.logprobs(replace(ALL, weights_N=2 * ALL.weights_N, extras={"rank": torch.ones(ALL.continuations)}))
    assert len(live.forwards) == 1


def test_the_unknown_groups_are_laid_out_as_if_they_were_alone() -> None:
    class Noting(Counting):
        def logprobs(self, batch: PackedBatch) -> Tensor:
            self.batch = batch
            return super().logprobs(batch)

    live = Noting(counted(policy("lora")).reference)
    cached = Cached(live)
    cached.logprobs(packed(0, 2))
    cached.logprobs(ALL)
    expected = packed(1, 3, 4)
    assert live.batch.spans == expected.spans
    for name in ("ids_T", "positions_T", "rows_N", "targets_N", "weights_N", "owner_N"):
        assert torch.equal(getattr(live.batch, name), getattr(expected, name))


def test_another_precision_is_another_value() -> None:
    live = counted(policy("lora trained"))
    cached = Cached(live)
    exact = cached.logprobs(ALL)
    with torch.autocast("cpu", torch.bfloat16):
        rough = cached.logprobs(ALL)
        assert torch.equal(cached.logprobs(ALL), rough)
    assert torch.equal(cached.logprobs(ALL), exact)
    assert not torch.allclose(rough, exact)
    assert len(live.forwards) == 2


@pytest.mark.parametrize("kind", ["adapter_off", "snapshot", "copy"])
def test_training_the_policy_drops_nothing_and_a_change_of_the_reference_all(kind: str) -> None:
    model = policy("lora")
    live = counted(model, kind=kind)
    cached = Cached(live)
    before = cached.logprobs(ALL)
    train(model)
    assert torch.equal(cached.logprobs(ALL), before)
    assert len(live.forwards) == 1
    with torch.no_grad():
        live.reference.scorer.model.get_base_model().model.norm.weight.mul_(2)  # type: ignore[attr-defined]
    assert not torch.allclose(cached.logprobs(ALL), before)
    assert torch.equal(cached.logprobs(ALL), live.reference.logprobs(ALL))
    assert len(live.forwards) == 2


def test_a_moving_reference_is_followed() -> None:
    model = policy("lora trained")
    live = Counting(Snapshot(model))
    cached = Cached(live)
    before = cached.logprobs(ALL)
    train(model)
    live.reference.follow(0.5)  # type: ignore[attr-defined]
    assert torch.equal(cached.logprobs(ALL), live.reference.logprobs(ALL))
    assert not torch.allclose(cached.logprobs(ALL), before)


def test_memory_is_bounded_and_the_least_recently_used_go_first() -> None:
    live = counted(policy("lora trained"))
    one = 1024 + 4 * len(packed(0).rows_N)
    cached = Cached(live, max_bytes=3 * one)
    small = [replace(packed(0), ids_T=packed(0).ids_T.roll(shift)) for shift in range(4)]
    for batch in (small[0], small[1], small[2], small[0], small[3]):  # the second is the oldest then
        cached.logprobs(batch)
    assert len(live.forwards) == 4
    for batch in (small[0], small[2], small[3]):
        cached.logprobs(batch)
    assert len(live.forwards) == 4
    cached.logprobs(small[1])
    assert len(live.forwards) == 5


def test_a_batch_that_does_not_fit_is_still_answered() -> None:
    live = counted(policy("lora trained"))
    cached = Cached(live, max_bytes=1)
    for _ in range(2):
        assert torch.equal(cached.logprobs(ALL), live.reference.logprobs(ALL))
    assert len(live.forwards) == 2
    with pytest.raises(ConfigError, match="max_bytes >= 1"):
        Cached(live, max_bytes=0)


def test_a_reference_that_cannot_tell_its_weights_is_refused() -> None:
    class Zeros:
        def logprobs(self, batch: PackedBatch) -> Tensor:
            return torch.zeros(len(batch.rows_N))

    with pytest.raises(CapabilityError, match="could outlive its weights"):
        Cached(Zeros())  # type: ignore[arg-type]


# --- in a folder ---------------------------------------------------------------------------------


def test_another_process_finds_the_values_in_the_folder(tmp_path: Path) -> None:
    first = Cached(counted(policy("lora trained")), tmp_path / "new" / "folder")
    values = [first.logprobs(packed(1, 3)), first.logprobs(packed(0, 1))]
    live = counted(policy("lora trained"))
    second = Cached(live, tmp_path / "new" / "folder")
    assert torch.equal(second.logprobs(packed(1, 3)), values[0])
    assert torch.equal(second.logprobs(packed(0, 1)), values[1])
    assert live.forwards == []


def base_changed(model: nn.Module) -> Counting:
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] += 1
    return counted(model)


def reference_changed(model: nn.Module) -> Counting:
    with torch.no_grad():
        next(weight for weight in model.parameters() if weight.requires_grad)[0, 0] += 1
    return counted(model)


def other_dtype(model: nn.Module) -> Counting:
    return counted(model.bfloat16())


def other_epsilon(model: nn.Module) -> Counting:
    model.get_base_model().config.rms_norm_eps *= 2
    return counted(model)


def other_scale(model: nn.Module) -> Counting:
    model.peft_config["mine"].lora_alpha *= 2
    return counted(model)


KEY_PARTS: dict[str, Callable[[nn.Module], Counting]] = {
    "base weights": base_changed,
    "reference weights": reference_changed,
    "dtype": other_dtype,
    "model's configuration": other_epsilon,
    "adapter's configuration": other_scale,
    "temperature": lambda model: counted(model, temperature=0.5),
    "path": lambda model: counted(Scorer(model, path="padded")),
    "adapter": lambda model: counted(model, kind="adapter_off"),
}


@pytest.mark.parametrize("part", KEY_PARTS)
def test_a_change_of_any_part_of_the_key_misses(part: str, tmp_path: Path) -> None:
    same, changed = counted(policy("lora trained")), KEY_PARTS[part](policy("lora trained"))
    Cached(counted(policy("lora trained")), tmp_path).logprobs(ALL)
    assert torch.equal(Cached(changed, tmp_path).logprobs(ALL), changed.reference.logprobs(ALL))
    Cached(same, tmp_path).logprobs(ALL)
    assert (len(changed.forwards), len(same.forwards)) == (1, 0)


def test_another_context_misses(tmp_path: Path) -> None:
    """As another tokenizer or template is."""
    Cached(counted(policy("lora trained")), tmp_path, context="template 1").logprobs(ALL)
    for context, forwards in (("template 2", 1), ("", 1), ("template 1", 0)):
        live = counted(policy("lora trained"))
        Cached(live, tmp_path, context=context).logprobs(ALL)
        assert len(live.forwards) == forwards


def test_the_key_is_the_same_for_a_model_that_was_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    references = [
        counted(attach(each.requires_grad_(False), lora(4)), kind="adapter_off") for each in (model, loaded)
    ]
    assert references[0].fingerprint() == references[1].fingerprint()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def bit_flipped(path: Path) -> None:
    """In the last value: the file's structure is whole."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def rewritten(path: Path) -> None:
    """By something else, with the right name and other numbers."""
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path)


def of_another_key(path: Path) -> None:
    """The file of another reference under the name of this one."""
    folder = path.parent / "other"
    Cached(counted(policy("lora trained"), temperature=0.5), folder).logprobs(ALL)
    [other] = folder.iterdir()
    other.replace(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncated, bit_flipped, emptied, rewritten, of_another_key, a_folder])
def test_a_damaged_or_wrong_file_is_a_miss(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = Cached(counted(policy("lora trained")), tmp_path).logprobs(ALL)
    [path] = tmp_path.iterdir()
    damage(path)
    live = counted(policy("lora trained"))
    assert torch.equal(Cached(live, tmp_path).logprobs(ALL), expected)
    assert len(live.forwards) == 1
    assert f"{path}: passed over" in caplog.text


def test_a_folder_that_takes_no_files_is_said_once_and_memory_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("text")
    live = counted(policy("lora trained"))
    cached = Cached(live, in_the_way)
    for numbers in ((0,), (1,), (0, 1)):
        cached.logprobs(packed(*numbers))
    assert live.forwards == [1, 1]
    assert caplog.text.count("kept in memory only") == 1
    assert in_the_way.read_text() == "text"


# --- in a checkpoint -----------------------------------------------------------------------------


def through_files(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """As a checkpoint does: tensors in safetensors, the rest as it is."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    save_file({name: value.detach().clone() for name, value in tensors.items()}, folder / "state.safetensors")
    return {**state, **load_file(folder / "state.safetensors")}


def test_its_state_brings_back_the_very_bits(tmp_path: Path) -> None:
    """Values from batches of other groups, which another forward would round otherwise."""
    model = policy("lora trained")
    cached = Cached(counted(model))
    for numbers in ((1,), (0, 2), (4, 3)):
        cached.logprobs(packed(*numbers))
    values = cached.logprobs(ALL)
    state = through_files(cached.state_dict(), tmp_path)

    resumed = policy("lora trained")
    train(resumed)
    live = counted(resumed)
    again = Cached(live)
    again.logprobs(ALL)  # of other weights
    again.load_state_dict(state)
    assert torch.equal(again.logprobs(ALL), values)
    assert live.forwards == [len(GROUPS)]
    assert not torch.equal(values, live.reference.logprobs(ALL))  # the bits do tell
    found, expected = again.state_dict(), cached.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in ("digests", "lengths", "values"))


def test_an_empty_state_is_one(tmp_path: Path) -> None:
    live = counted(policy("lora"), kind="adapter_off")
    cached = Cached(live)
    cached.load_state_dict(
        through_files(Cached(counted(policy("lora"), kind="adapter_off")).state_dict(), tmp_path)
    )
    cached.logprobs(ALL)
    assert len(live.forwards) == 1


def test_values_of_another_base_are_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    cached = Cached(counted(policy("lora"), kind="adapter_off"))
    cached.logprobs(ALL)
    other = policy("lora")
    with torch.no_grad():
        other.get_base_model().model.norm.weight.mul_(2)
    live = counted(other, kind="adapter_off")
    resumed = Cached(live)
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(cached.state_dict())
    assert "computed again" in caplog.text
    assert torch.equal(resumed.logprobs(ALL), live.reference.logprobs(ALL))
    assert len(live.forwards) == 1


def test_at_step_0_the_difference_is_zero_cached_and_live(tmp_path: Path) -> None:
    """So a preference loss starts at log 2; from the folder too."""
    model = policy("lora trained")
    for folder in (None, tmp_path, tmp_path):
        cached = Cached(counted(model), folder)
        for _ in range(2):
            difference_N = forward(model, ALL).logprobs_N.detach() - cached.logprobs(ALL)
            assert torch.equal(difference_N, torch.zeros_like(difference_N))
