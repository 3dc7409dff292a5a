"""DPOTrainer: where it starts, what it minimises, what its reference costs, and what it refuses."""

from __future__ import annotations

import math
import os
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftlib.adapters import attach, full, lora
from ftlib.data.collate import collate
from ftlib.engine.files import load_state, save_state
from ftlib.errors import CapabilityError, ConfigError, DataError
from ftlib.models import AdapterOff, Cached, Snapshot, forward, frozen
from ftlib.objectives import DPO, SFT, weighted
from ftlib.trainers import DPOTrainer, RewardTrainer
from tests.data.tokenizers_zoo import tiny as tiny_tokenizer
from tests.models_zoo import tiny_model
from tests.trainers.preferences import PAIRS, UNSEEN, moved, pairs, preference_trainer
from tests.trainers.processes import start
from tests.trainers.tiny import sft, trained, without_clock

LN_2 = math.log(2)
EXACT = 1e-6  # of the first loss, and of the margin in nats
RELATIVE = 1e-5  # float32: sums taken in another order
dpo = partial(preference_trainer, DPOTrainer)


def everything() -> Any:
    return attach(tiny_model(), full())


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    return attach(tiny_model(), lora(4, **options))


POLICIES = {
    "full": everything,
    "full, trained": lambda: moved(everything()),
    "full, with dropout": lambda: attach(tiny_model(attention_dropout=0.3), full()),
    "lora": adapted,
    "lora, trained": lambda: moved(adapted()),
    "lora, trained with dropout": lambda: moved(adapted(dropout=0.3)),
    "dora": lambda: moved(adapted(dora=True)),
    "pissa": lambda: adapted(init="pissa"),
}
GRADIENT = {  # one step of plain gradient descent: the weights move by the gradient
    "optimizer": lambda groups, rate: torch.optim.SGD(groups, 1.0),
    "max_grad_norm": 1e9,
    "schedule": "constant",
}


@pytest.fixture
def reference_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Groups of every forward that any reference makes."""
    calls: list[int] = []
    run = frozen._logprobs

    def counted(scorer: nn.Module, batch: Any, temperature: float) -> Tensor:
        calls.append(len(batch.spans))
        return run(scorer, batch, temperature)

    monkeypatch.setattr(frozen, "_logprobs", counted)
    return calls


def said(model: nn.Module) -> Tensor:
    """Log-probabilities of the pairs, without dropout."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        logprobs_N = forward(model.eval(), collate(PAIRS)).logprobs_N
    for module, mode in modes.items():
        module.training = mode
    return logprobs_N


def moves(trainer: Any, data: Any) -> dict[str, Tensor]:
    """What one step does to the trained weights."""
    before = trained(trainer)
    trainer.step(data)
    return {name: value - before[name] for name, value in trained(trainer).items() if "weight" in name}


def assert_close_to_their_size(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    size = torch.stack([value.norm() for value in expected.values()]).norm()
    assert float(size) > 1e-3
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= RELATIVE * float(size), name


# -- where it starts -------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "live"])
@pytest.mark.parametrize("reference", ["auto", "snapshot", "copy", "a model"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_loss_is_ln_2_and_every_margin_0(policy: str, reference: Any, cache: bool) -> None:
    """D2; for every adapter in `tests/matrix`."""
    model = POLICIES[policy]()
    given = deepcopy(model).requires_grad_(False) if reference == "a model" else reference
    trainer = dpo(adapter=None, model=model, reference=given, reference_cache=cache, max_tokens=60)
    assert all(
        reward == pytest.approx(0, abs=EXACT) for row in trainer.predict(PAIRS) for reward in row["rewards"]
    )
    row = trainer.step(PAIRS)
    assert row["loss"] == pytest.approx(LN_2, abs=EXACT)
    assert row["margin"] == pytest.approx(0, abs=EXACT)
    assert row["grad_norm"] > 1e-3
    assert trainer.step(PAIRS)["loss"] < LN_2 - 1e-4, "and then it falls"


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "live"])
def test_with_the_adapter_off_too(cache: bool) -> None:
    trainer = dpo(reference="adapter_off", reference_cache=cache)
    assert trainer.step(PAIRS)["loss"] == pytest.approx(LN_2, abs=EXACT)


def test_dropout_comes_back_after_a_step() -> None:
    model = POLICIES["lora, trained with dropout"]()
    shares = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert max(shares) == 0.3
    dpo(adapter=None, model=model).step(PAIRS)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == shares


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_after_sft_in_the_same_process_the_reference_is_what_sft_made(adapter: str) -> None:
    """D2."""
    base = said(tiny_model())
    first = sft(adapter=adapter, epochs=2, learning_rate=1e-2)
    first.train()
    policy = said(first.model)
    assert not torch.allclose(policy, base, atol=0.1)
    trainer = dpo(adapter=None, model=first.model, max_steps=3)
    history = trainer.train().history
    assert history[0]["loss"] == pytest.approx(LN_2, abs=EXACT)
    assert isinstance(trainer.engine.objective.reference.reference, Snapshot)
    assert torch.equal(trainer.engine.objective.reference.reference.logprobs(collate(PAIRS)), policy)
    assert not torch.equal(said(first.model), policy)


def test_a_new_adapter_on_a_model_trained_whole_has_that_model_as_its_reference() -> None:
    first = sft(adapter="full", epochs=2, learning_rate=1e-2)
    first.train()
    policy = said(first.model)
    trainer = dpo(model=first.model, adapter="lora")
    assert trainer.step(PAIRS)["loss"] == pytest.approx(LN_2, abs=EXACT)
    assert isinstance(trainer.engine.objective.reference.reference, AdapterOff)
    assert torch.equal(trainer.engine.objective.reference.reference.logprobs(collate(PAIRS)), policy)


def test_a_second_trainer_of_the_same_model_starts_where_the_first_one_ended() -> None:
    model = adapted()
    first = dpo(adapter=None, model=model, epochs=2, learning_rate=1e-2)
    assert first.train().history[-1]["loss"] < LN_2 - 0.01
    second = dpo(adapter=None, model=model, max_steps=1)
    assert second.train().history[0]["loss"] == pytest.approx(LN_2, abs=EXACT)
    assert first.evaluate(PAIRS)["eval_margin"] > 0.01, "the first one's reference stayed"


def start_in_half_precision(folder: Path) -> None:
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    found = {}
    for kind in ("auto", "copy"):
        for adapter in ("full", "lora"):
            trainer = dpo(adapter=adapter, reference=kind)
            first = trainer.evaluate(PAIRS)["eval_loss"]
            moved(trainer.model)
            found[f"{kind} {adapter}"] = [first, trainer.evaluate(PAIRS)["eval_loss"]]
    save_state(folder / "losses.json", found)


def test_a_launchers_mixed_precision_is_the_references_too(tmp_path: Path) -> None:
    """accelerate wraps the forward of what it prepares; the reference takes the same one."""
    process = start(start_in_half_precision, tmp_path, errors=tmp_path / "errors")
    process.join(timeout=120)
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    for name, (first, second) in load_state(tmp_path / "losses.json").items():
        assert first == pytest.approx(LN_2, abs=EXACT), name
        assert abs(second - LN_2) > 1e-3, f"{name}: it does not follow the policy"


# -- a policy that does not start at its reference ---------------------------------------------------


@pytest.mark.parametrize("call", ["train", "resume", "step"])
def test_weights_changed_after_the_trainer_was_made_are_noticed(call: str, tmp_path: Path) -> None:
    """D2."""
    trainer = dpo(output_dir=tmp_path)
    moved(trainer.model)
    before = trained(trainer)
    run = {
        "train": trainer.train,
        "resume": partial(trainer.train, resume=True),  # of nothing: a fresh start
        "step": partial(trainer.step, PAIRS),
    }[call]
    with pytest.raises(
        ConfigError, match=r"a policy that starts at its reference, got a log-ratio of"
    ) as caught:
        run()
    assert "allow_initial_kl=True" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in trained(trainer).items())


def test_a_given_reference_that_differs_is_allowed_by_name() -> None:
    other = tiny_model(seed=1)
    with pytest.raises(ConfigError, match="allow_initial_kl=True"):
        dpo(reference=other).step(PAIRS)
    row = dpo(reference=other, allow_initial_kl=True).step(PAIRS)
    assert abs(row["loss"] - LN_2) > 1e-3


def test_without_a_reference_there_is_no_start_to_compare() -> None:
    row = dpo(reference=None).step(PAIRS)
    assert row["reward_chosen"] == pytest.approx(0.1 * row["logp_chosen"], rel=RELATIVE)
    assert "kl" not in row


# -- what is minimised -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 60], ids=["no prefix", "one token", "far longer"])
@pytest.mark.parametrize("answers", [2, 8])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_sharing_the_prefix_changes_neither_log_probabilities_nor_gradients(
    adapter: str, answers: int, prefix: int
) -> None:
    data = pairs(4, prefix=prefix, answers=answers)
    options = {"data": data, "reference": tiny_model(seed=1), "allow_initial_kl": True, **GRADIENT}
    model = {"full": everything, "lora": lambda: moved(adapted())}[adapter]
    shared, alone = (dpo(adapter=None, model=model(), **options) for _ in range(2))
    alone.engine.scorer.path = "padded"  # one row per answer, each with its own copy of the prefix
    single = pairs(3, prefix=prefix, answers=1)
    for rows in (data, single):
        for found, expected in zip(shared.predict(rows), alone.predict(rows), strict=True):
            assert found["logps"] == pytest.approx(expected["logps"], rel=RELATIVE)
    assert_close_to_their_size(moves(shared, data), moves(alone, data))


def test_log_probabilities_and_rewards_are_those_of_the_models_own_logits() -> None:
    other = tiny_model(seed=1)
    trainer = dpo(adapter="full", reference=other, beta=0.3, allow_initial_kl=True)

    def own(model: Any, row: Any, answer: list[int]) -> float:
        ids = torch.tensor([row["prefix_ids"] + answer])
        with torch.no_grad():
            logprobs_LV = model(ids).logits[0].log_softmax(-1)
        first = len(row["prefix_ids"])
        return sum(float(logprobs_LV[first + i - 1, token]) for i, token in enumerate(answer))

    for found, row in zip(trainer.predict(UNSEEN), UNSEEN, strict=True):
        logps = [own(trainer.model, row, answer) for answer in row["continuation_ids"]]
        theirs = [own(other, row, answer) for answer in row["continuation_ids"]]
        assert found["logps"] == pytest.approx(logps, rel=RELATIVE)
        ratios = [0.3 * (logp - reference) for logp, reference in zip(logps, theirs, strict=True)]
        assert found["rewards"] == pytest.approx(ratios, rel=1e-4, abs=1e-4)


def test_an_evaluation_is_the_mean_over_its_pairs() -> None:
    trainer = dpo(adapter="full", reference=tiny_model(seed=1), allow_initial_kl=True, eval_data=UNSEEN)
    rewards = [row["rewards"] for row in trainer.predict(UNSEEN)]
    margins = [chosen - rejected for chosen, rejected in rewards]
    expected = {
        "eval_loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / 3,
        "eval_margin": sum(margins) / 3,
        "eval_accuracy": sum(margin > 0 for margin in margins) / 3,
        "eval_reward_chosen": sum(chosen for chosen, _ in rewards) / 3,
    }
    found = trainer.evaluate()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_steps_by_hand_are_a_training_run() -> None:
    by_hand, whole = (dpo(epochs=2) for _ in range(2))
    rows = []
    while len(rows) < by_hand.steps:
        rows.append(by_hand.step([PAIRS[index] for index in by_hand.sampler.next_batch()]))
    history = without_clock(whole.train().history)
    assert [row["loss"] for row in rows] == [row["loss"] for row in history]
    for name, value in trained(whole).items():
        assert torch.equal(trained(by_hand)[name], value), name


def test_rpo_is_the_sum_of_its_parts_from_one_forward_per_micro_batch() -> None:
    """DPO and a tenth of the chosen answers' likelihood: weighted({DPO(): 1.0, SFT(): 0.1})."""

    both, first, second = (
        dpo(adapter="full", objective=objective, max_tokens=60, allow_initial_kl=True, **GRADIENT)
        for objective in (weighted({DPO(): 1.0, SFT(): 0.1}), DPO(), SFT())
    )
    start_at = trained(both)
    both.evaluate(PAIRS)  # the reference is known from now on
    bodies: list[int] = []
    both.model.model.register_forward_hook(lambda *_: bodies.append(1))
    row = both.step(PAIRS)
    assert len(bodies) == len(both.engine._micro_batches(PAIRS)) > 2
    expected = first.step(PAIRS)["loss"] + 0.1 * second.step(PAIRS)["loss"]
    assert row["loss"] == pytest.approx(expected, rel=RELATIVE)
    assert row["nll"] == pytest.approx(10 * (row["loss"] - row["dpo"]), rel=1e-4)
    parts = [
        {name: value - start_at[name] for name, value in trained(each).items() if "weight" in name}
        for each in (both, first, second)
    ]
    assert_close_to_their_size(parts[0], {name: parts[1][name] + 0.1 * parts[2][name] for name in parts[0]})


# -- what the reference costs ------------------------------------------------------------------------


def test_the_second_epoch_asks_the_reference_nothing(reference_forwards: list[int]) -> None:
    trainer = dpo(epochs=1, max_steps=3, allow_initial_kl=True)  # the check of the start asks it too
    trainer.train()
    assert sum(reference_forwards) == len(PAIRS), "each pair once"
    second = dpo(epochs=3, allow_initial_kl=True)
    reference_forwards.clear()
    second.train()
    assert sum(reference_forwards) == len(PAIRS)


def test_uncached_it_is_asked_in_every_step(reference_forwards: list[int]) -> None:
    dpo(epochs=3, reference_cache=False, allow_initial_kl=True).train()
    assert sum(reference_forwards) == 3 * len(PAIRS)


def test_cached_is_live() -> None:
    """D3."""
    cached, live = (dpo(adapter="full", epochs=2, reference_cache=cache) for cache in (True, False))
    for found, expected in zip(cached.train().history, live.train().history, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=EXACT)


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 0.3},
        {"seed": 7},
        {"loss": "ipo"},
        {"batch_size": 3},
        {"max_tokens": 60},
        {"learning_rate": 1e-2},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_folder_keeps_it_for_runs_with_other_settings(
    adapter: str, change: dict[str, Any], tmp_path: Path, reference_forwards: list[int]
) -> None:
    dpo(adapter=adapter, reference_cache=tmp_path).train()
    reference_forwards.clear()
    dpo(adapter=adapter, reference_cache=tmp_path, allow_initial_kl=True, **change).train()
    assert reference_forwards == []


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_other_base_weights_are_another_reference(
    adapter: str, tmp_path: Path, reference_forwards: list[int]
) -> None:
    """D3."""
    dpo(adapter=adapter, reference_cache=tmp_path).train()
    reference_forwards.clear()
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    changed = dpo(adapter=adapter, reference_cache=tmp_path, model=model, allow_initial_kl=True)
    row = changed.train().history[0]
    assert sum(reference_forwards) == len(PAIRS)
    assert row["loss"] == pytest.approx(LN_2, abs=EXACT)


# -- what is refused ---------------------------------------------------------------------------------


class Zeros:
    """A reference of the caller's own."""

    def logprobs(self, batch: Any) -> Tensor:
        return torch.zeros(len(batch.targets_N))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.2, "loss": "ipo"}, "beta, loss has no effect beside an objective of your own"),
        ({"reference": "copy"}, "reference has no effect"),
        ({"reference": None}, "reference has no effect"),
        ({"label_smoothing": 0.1}, "label_smoothing has no effect"),
        ({"ipo_reduction": "sum"}, "ipo_reduction has no effect"),
    ],
)
def test_options_beside_an_objective_of_ones_own_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dpo(objective=DPO(), **options)


@pytest.mark.parametrize("options", [{"objective": SFT()}, {"reference": None}, {"reference": Zeros()}])
def test_a_folder_that_would_stay_empty_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reference_cache='.*' has no effect on this objective"):
        dpo(reference_cache=tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta: expected a finite number > 0"),
        ({"loss": "kto"}, "expected a loss of"),
        ({"label_smoothing": 0.1, "loss": "hinge"}, "hinge: expected label_smoothing=0"),
        ({"reference": "frozen"}, "got 'frozen'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dpo(model=object(), **options)


def test_a_base_that_the_adapter_changed_cannot_be_switched_back_to() -> None:
    with pytest.raises(CapabilityError, match="does not declare off_is_base"):
        dpo(adapter=None, model=POLICIES["pissa"](), reference="adapter_off")


QUESTION = [{"role": "user", "content": "yes?"}]
ANSWER = [{"role": "assistant", "content": "yes."}]


@pytest.mark.parametrize("kind", [DPOTrainer, RewardTrainer])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "yes?", "chosen": " yes.", "rejected": " yes."}, r"expected answers that differ"),
        (
            {
                "chosen": [*QUESTION, *ANSWER],
                "rejected": [{"role": "user", "content": "no?"}, {"role": "assistant", "content": "no."}],
            },
            "expected chosen and rejected to answer one prompt",
        ),
    ],
)
def test_rows_that_compare_nothing_are_named_and_refused(
    kind: Any, row: dict[str, Any], message: str
) -> None:
    tokenizer = tiny_tokenizer(template="chatml")
    model = tiny_model(vocab_size=len(tokenizer))
    good = {"prompt": "no?", "chosen": " yes.", "rejected": " no."}
    if "prompt" not in row:
        good = {
            "chosen": [*QUESTION, *ANSWER],
            "rejected": [*QUESTION, {"role": "assistant", "content": "no."}],
        }
    with pytest.raises(DataError, match=message) as caught:
        kind(model, [good, row], tokenizer=tokenizer, adapter=lora(4))
    assert ":2" in str(caught.value), "the row is named"


def test_predictions_leave_the_cache_to_the_training_steps():
    """Those of another batch composition differ in the last bits: in bfloat16 more than a first margin."""
    trainer = preference_trainer(DPOTrainer)
    trainer.predict(trainer.train_data)
    cached = trainer.engine.objective.reference
    assert isinstance(cached, Cached)
    assert not cached._known


def test_a_reference_that_takes_the_policys_place_every_step_starts_every_step_at_ln_2():
    trainer = dpo(model=adapted(), adapter=None, follow_every=1, follow_share=1.0)
    losses = [trainer.step(PAIRS)["loss"] for _ in range(3)]
    assert losses == pytest.approx([LN_2] * 3, abs=EXACT)
    assert dpo(model=adapted(), adapter=None).step(PAIRS)["loss"] == pytest.approx(LN_2, abs=EXACT)


def test_a_reference_moves_by_its_share_and_only_when_it_is_time():
    trainer = dpo(model=adapted(), adapter=None, follow_every=2, follow_share=0.25)
    weights = trainer.engine.objective.reference.weights
    start = {name: weight.clone() for name, weight in weights.items()}
    trainer.step(PAIRS)
    assert all(torch.equal(weight, start[name]) for name, weight in weights.items())
    trainer.step(PAIRS)
    policy = dict(trainer.model.named_parameters())
    for name, weight in weights.items():
        torch.testing.assert_close(weight, start[name] + 0.25 * (policy[name].detach() - start[name]))
    assert any(not torch.equal(weight, start[name]) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"follow_share": 0.5}, "without follow_every"),
        ({"follow_every": 0}, "follow_every: expected a whole number >= 1"),
        ({"follow_every": 2, "follow_share": 0.0}, "follow_share: expected a number > 0 and <= 1"),
        ({"follow_every": 2, "reference": "adapter_off"}, "a snapshot of the policy"),
        ({"follow_every": 2, "objective": DPO()}, "a snapshot of the policy"),
        ({"follow_every": 2, "reference_cache": "folder"}, "a reference that moves"),
    ],
)
def test_a_moving_reference_that_makes_no_sense_is_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        dpo(model=adapted(), adapter=None, **options)


def test_margins_in_the_data_are_said_to_have_no_effect(caplog):
    rows = [{"prompt": "a ", "chosen": "b", "rejected": "c", "margin": 1.0}] * 2
    tokenizer = tiny_tokenizer()
    DPOTrainer(tiny_model(vocab_size=len(tokenizer)), rows, tokenizer=tokenizer, adapter=lora(4))
    assert "margins are not used" in caplog.text
