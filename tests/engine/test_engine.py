"""One step is the same for any cut into micro-batches, and an interrupted one leaves nothing behind."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from ftlib.batches import LossOutput, Mean
from ftlib.data import collate
from ftlib.engine import Engine, Stopped, TrainConfig
from ftlib.errors import CapabilityError, ConfigError, NonFiniteError
from ftlib.objectives import SFT
from tests.models_zoo import tiny_model
from tests.trainers.tiny import rows, sft, trained

EXAMPLES = rows(8)
LENGTHS = [row["length"] for row in EXAMPLES]
TOTAL, LONGEST = sum(LENGTHS), max(LENGTHS)
CUTS = {  # name -> max_tokens, the order of the examples
    "8x1": (1, range(8)),  # longer than the budget, hence checkpointed as well
    "uneven": (LONGEST, range(8)),
    "2x4": (TOTAL // 2 + LONGEST, range(8)),
    "whole, shuffled": (TOTAL, (3, 0, 7, 5, 1, 6, 2, 4)),
    "uneven, shuffled": (LONGEST, (3, 0, 7, 5, 1, 6, 2, 4)),
}
RELATIVE = 1e-5  # float32: sums taken in another order


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each tensor within 1e-5 of its largest value; elements that cancel have no digits of their own."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=RELATIVE * float(value.abs().max()), msg=f"{name} differs"
        )


def one_step(adapter: str, max_tokens: int, order) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients before clipping moves them, and the logged row."""
    trainer = sft(adapter=adapter, max_tokens=max_tokens, max_grad_norm=float("inf"))
    seen: dict[str, Tensor] = {}

    def look(*_: object) -> None:
        seen.update({name: w.grad.clone() for name, w in trainer.engine.masters.named.items()})

    trainer.engine.optimizer.register_step_pre_hook(look)
    row = trainer.step([EXAMPLES[index] for index in order])
    return seen, row


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_into_micro_batches_has_the_same_loss_and_gradient(adapter, cut):
    gradient, row = one_step(adapter, TOTAL, range(8))
    cut_gradient, cut_row = one_step(adapter, *CUTS[cut])
    assert cut_row["loss"] == pytest.approx(row["loss"], rel=RELATIVE)
    assert cut_row["grad_norm"] == pytest.approx(row["grad_norm"], rel=RELATIVE)
    assert cut_row["tokens"] == row["tokens"] == TOTAL
    assert_near(cut_gradient, gradient)


@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_gives_the_same_weights_after_three_steps(cut):
    """Gradient descent with momentum: Adam divides rounding by rounding where a gradient is nearly zero."""

    def run(max_tokens, order):
        trainer = sft(max_tokens=max_tokens, optimizer=lambda groups, rate: torch.optim.SGD(groups, 0.1, 0.9))
        for _ in range(3):
            trainer.step([EXAMPLES[index] for index in order])
        return trained(trainer)

    assert_near(run(*CUTS[cut]), run(TOTAL, range(8)))


def test_the_loss_is_the_weighted_mean_over_all_tokens_of_the_step():
    """Derived row by row from the model's own logits: sum(w * nll) / sum(w), no mean of means."""
    trainer = sft(max_tokens=LONGEST)
    total = count = 0.0
    with torch.no_grad():
        for example in EXAMPLES:
            ids = torch.tensor([example["prefix_ids"] + example["continuation_ids"][0]])
            weights = torch.tensor(example["continuation_weights"][0])
            logprobs = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            nll = -logprobs.gather(-1, ids[0, 1:, None])[-len(weights) :, 0]
            total, count = total + float(weights @ nll), count + float(weights.sum())
    assert trainer.step(EXAMPLES)["loss"] == pytest.approx(total / count, rel=RELATIVE)


def test_the_gradient_is_clipped_once_for_the_whole_step():
    trainer = sft(max_tokens=LONGEST, max_grad_norm=0.01)
    norms = []
    trainer.engine.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            torch.stack([w.grad.norm() for w in trainer.engine.masters.named.values()]).norm().item()
        )
    )
    row = trainer.step(EXAMPLES)
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert row["grad_norm"] > 1, "the norm before clipping is logged"


def test_bfloat16_weights_move_with_their_float32_masters():
    """An update of 1e-4 of a weight is below bfloat16's 2 ** -9, and adds up in the master all the same."""
    trainer = sft(adapter="full", dtype=torch.bfloat16, learning_rate=1e-5, schedule="constant")
    before = trainer.engine.masters.copies()
    for _ in range(3):
        trainer.step(EXAMPLES)
    for name, master in trainer.engine.masters.named.items():
        assert master.dtype == torch.float32
        assert torch.equal(trainer.engine.masters.weights[name], master.bfloat16())
    after = trainer.engine.masters.copies()
    moved = [float((after[name] - before[name]).abs().max()) for name in before]
    assert all(0 < step <= 3.1e-5 for step in moved)


class Spoiling:
    """SFT whose `spoil` sees each micro-batch's output: to make it infinite, or to raise."""

    def __init__(self, spoil) -> None:
        self.spoil, self.calls = spoil, 0

    def counts(self, batch):
        return SFT().counts(batch)

    def __call__(self, model, batch):
        self.calls += 1
        return self.spoil(self.calls, SFT()(model, batch))


def nan_loss(call: int, output: LossOutput) -> LossOutput:
    mean = output.terms["nll"]
    return LossOutput({"nll": Mean(mean.sum * float("nan"), mean.count)}) if call == 2 else output


def nan_gradient(call: int, output: LossOutput) -> LossOutput:
    if call == 2:
        output.terms["nll"].sum.register_hook(lambda gradient: gradient * float("nan"))
    return output


@pytest.mark.parametrize("spoil", [nan_loss, nan_gradient])
def test_a_non_finite_micro_batch_changes_nothing_and_names_the_rows(spoil):
    trainer = sft(objective=Spoiling(spoil), max_tokens=LONGEST)
    before = trained(trainer)
    moments = len(trainer.engine.optimizer.state)
    with pytest.raises(NonFiniteError, match="finite loss and gradient") as caught:
        trainer.step(EXAMPLES)
    assert all(row["source"] in str(caught.value) for row in EXAMPLES)
    assert all(torch.equal(value, before[name]) for name, value in trained(trainer).items())
    assert len(trainer.engine.optimizer.state) == moments
    assert trainer.engine.schedule.last_epoch == 0


@pytest.mark.parametrize("spoil", [nan_loss, nan_gradient])
def test_a_skipped_step_changes_nothing_and_shows_the_true_value(spoil, caplog):
    objective = Spoiling(spoil)
    trainer = sft(objective=objective, max_tokens=LONGEST, on_nonfinite="skip", weight_decay=0.1)
    before = trained(trainer)
    row = trainer.step(EXAMPLES)
    assert all(torch.equal(value, before[name]) for name, value in trained(trainer).items())
    assert trainer.engine.skipped == 1
    assert "skipped, 1 of 10" in caplog.text
    assert not (row["loss"] == row["loss"] and row["grad_norm"] == row["grad_norm"]), "one of them is NaN"
    objective.spoil = lambda call, output: output
    assert trainer.step(EXAMPLES)["loss"] > 0
    assert any(not torch.equal(value, before[name]) for name, value in trained(trainer).items())


def test_the_eleventh_skipped_step_raises():
    always = Spoiling(lambda call, output: nan_loss(2, output))
    trainer = sft(objective=always, on_nonfinite="skip")
    for _ in range(10):
        trainer.step(EXAMPLES[:1])
    with pytest.raises(NonFiniteError):
        trainer.step(EXAMPLES[:1])


@pytest.mark.parametrize("failing", [1, 3])
def test_out_of_memory_repeats_the_same_step_in_smaller_micro_batches(failing, caplog):
    """`failing` is the micro-batch that runs out; the third is met after two have added gradients."""

    def run_out(call: int, output: LossOutput) -> LossOutput:
        if call == failing:
            raise torch.OutOfMemoryError("fake")
        return output

    cut = TOTAL // 3
    plain, short = sft(max_tokens=cut), sft(max_tokens=cut, objective=Spoiling(run_out))
    expected, found = plain.step(EXAMPLES), short.step(EXAMPLES)
    assert short.engine.max_tokens == max(cut // 2, LONGEST) < cut
    assert found["loss"] == pytest.approx(expected["loss"], rel=RELATIVE)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=RELATIVE)
    assert found["tokens"] == expected["tokens"]
    assert "repeating the step" in caplog.text


def test_out_of_memory_again_and_again_halves_again():
    def run_out(call: int, output: LossOutput) -> LossOutput:
        if call <= 2:
            raise torch.OutOfMemoryError("fake")
        return output

    trainer = sft(max_tokens=10 * TOTAL, objective=Spoiling(run_out))
    assert trainer.step(EXAMPLES)["loss"] == pytest.approx(sft().step(EXAMPLES)["loss"], rel=RELATIVE)
    assert trainer.engine.max_tokens == TOTAL // 4, "half of what the step has, and half of that"


def test_out_of_memory_with_one_example_says_what_to_do():
    def run_out(call: int, output: LossOutput) -> LossOutput:
        raise torch.OutOfMemoryError("fake")

    trainer = sft(objective=Spoiling(run_out))
    before = trained(trainer)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.step(EXAMPLES)
    [note] = caught.value.__notes__
    assert f"{LONGEST:,} tokens" in note
    assert "gradient_checkpointing=True" in note
    assert trainer.engine.max_tokens == LONGEST
    assert all(torch.equal(value, before[name]) for name, value in trained(trainer).items())


def test_a_step_that_fails_leaves_weights_gradients_and_generators_as_they_were():
    """So the same step may be tried again, with dropout, and gives what it would have given."""

    def fail_once(call: int, output: LossOutput) -> LossOutput:
        random.random()
        torch.rand(1)
        if call == 2:
            raise KeyboardInterrupt
        return output

    plain = sft(adapter="lora dropout", max_tokens=LONGEST, objective=Spoiling(lambda call, output: output))
    failing = sft(adapter="lora dropout", max_tokens=LONGEST, objective=Spoiling(fail_once))
    torch.manual_seed(5)
    before = trained(failing), random.getstate(), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        failing.step(EXAMPLES)
    assert all(torch.equal(value, before[0][name]) for name, value in trained(failing).items())
    assert all(weight.grad is None for weight in failing.model.parameters())
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])

    failing.engine.objective.spoil = lambda call, output: output
    again = failing.step(EXAMPLES)["loss"]
    torch.manual_seed(5)
    assert again == plain.step(EXAMPLES)["loss"]


def test_a_stop_inside_the_step_gives_it_up():
    polls = iter([False, False, True])
    model = tiny_model("llama")
    engine = Engine(model, SFT(), TrainConfig(max_tokens=LONGEST), 1, 1e-3, should_stop=lambda: next(polls))
    before = [weight.detach().clone() for weight in model.parameters()]
    with pytest.raises(Stopped):
        engine.step(EXAMPLES)
    assert all(map(torch.equal, model.parameters(), before))


def test_gradients_that_were_there_before_do_not_count():
    plain, given = sft(), sft()
    for weight in given.engine.masters.named.values():
        weight.grad = torch.ones_like(weight)
    assert given.step(EXAMPLES)["grad_norm"] == plain.step(EXAMPLES)["grad_norm"]


def test_one_micro_batch_is_stepped_as_it_is():
    packed, listed = sft(), sft(max_tokens=TOTAL)
    assert packed.step(collate(EXAMPLES)) == listed.step(EXAMPLES)


def test_a_model_without_trainable_weights_is_refused():
    with pytest.raises(ConfigError, match=r"adapter=ftlib\.adapters\.lora"):
        Engine(tiny_model("llama").requires_grad_(False), SFT(), TrainConfig(), 1, 1e-3)


def test_half_precision_that_needs_loss_scaling_is_refused(monkeypatch):
    engine = sft().engine
    monkeypatch.setattr(type(engine.accelerator), "mixed_precision", "fp16")
    with pytest.raises(CapabilityError, match="mixed_precision bf16"):
        sft()
