"""Reward models and critics of PPO: what they say, what they share with the policy, what moves them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftlib as ft
from ftlib.adapters import attach, full, lora
from ftlib.errors import CapabilityError, ConfigError, DataError, ShapeError
from ftlib.models import on_same_base
from ftlib.objectives import PPO
from ftlib.rollouts.rewards import RewardOut, ensemble, reward_model
from ftlib.trainers import PPOTrainer, RewardTrainer, SFTTrainer
from tests.data.tokenizers_zoo import tiny
from tests.models.policies import train as move
from tests.models_zoo import tiny_model
from tests.trainers.tiny import At, without_clock

# peft 0.21 reads a property of models by the name it had before transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOKENIZER = tiny(pad="</s>")
WORDS = ("fox", "file", "answer", "capital", "tool", "user", "system", "dog")
PROMPTS = [f"What does the {word} do?" for word in WORDS]
PAIRS = [
    {"prompt": prompt, "chosen": " It copies a file.", "rejected": " yes" * (index + 1)}
    for index, prompt in enumerate(PROMPTS)
]
ADAPTERS: dict[str, Any] = {"lora": lambda: lora(4), "dora": lambda: lora(4, dora=True)}


@pytest.fixture(autouse=True)
def alone(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Warnings of health are not what is looked at here."""
    with caplog.at_level(logging.ERROR, logger="ftlib.trainers.ppo_health"):
        yield


def language_model(**changes: Any) -> Any:
    eos = TOKENIZER.eos_token_id
    return tiny_model(vocab_size=len(TOKENIZER), eos_token_id=eos, pad_token_id=eos, **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    language_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def trained_reward(base: Path, folder: Path, adapter: Any, *, seed: int = 0) -> RewardTrainer:
    """A reward model trained on the base, whose adapter is saved in the folder."""
    torch.manual_seed(seed)
    config = ft.TrainConfig(max_steps=4, learning_rate=1e-2, progress="off", seed=seed)
    trainer = RewardTrainer(base, PAIRS, adapter=adapter, config=config)
    trainer.train()
    trainer.save(folder)
    return trainer


@pytest.fixture(scope="module")
def reward_folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    trained_reward(base, folder, lora(4))
    return folder


def evenness(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """The share of even ids."""
    return [sum(index % 2 == 0 for index in ids) / len(ids) for ids in columns["completion_ids"]]


def ppo(base: Path, *, policy: Any = None, reward: Any = evenness, **options: Any) -> PPOTrainer:
    """A trainer of the base under LoRA, the same at every call; `options` are its own and the config's."""
    torch.manual_seed(1)
    own = {name: options.pop(name) for name in list(options) if name not in ft.PPOConfig.__dataclass_fields__}
    defaults = {
        "progress": "off",
        "log_steps": 1,
        "max_steps": 3,
        "batch_size": 8,
        "max_new_tokens": 6,
        "epochs_per_rollout": 2,
        "learning_rate": 1e-3,
        "critic_warmup": 1,
    }
    return PPOTrainer(
        ft.load(base, adapter=lora(4))[0] if policy is None else policy,
        own.pop("prompts", PROMPTS),
        tokenizer=TOKENIZER,
        reward=reward,
        config=ft.PPOConfig(**(defaults | options)),
        **own,
    )


def weights(model: nn.Module, *, trained: bool) -> dict[str, Tensor]:
    """Copies of those that are trained, or of those that are not."""
    return {
        name: weight.detach().clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad is trained
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def storages(model: nn.Module) -> set[int]:
    return {weight.data_ptr() for weight in model.parameters()}


def scores(trainer: PPOTrainer) -> list[float | None]:
    return [rollout.score for rollout in trainer.rollout(PROMPTS)]


def scored_alone(trainer: PPOTrainer, model: nn.Module) -> list[float]:
    """Scores of the rollouts that the trainer makes, from a reward model by itself."""
    rollouts = trainer.rollout(PROMPTS)
    ids = [rollout.completion_ids.tolist() for rollout in rollouts]
    prompt_ids = [rollout.prompt_ids.tolist() for rollout in rollouts]
    return reward_model(model, TOKENIZER)(PROMPTS, ids, prompt_ids=prompt_ids, completion_ids=ids)


# --- the reward model on the policy's base ----------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_folder_scores_as_the_reward_model_loaded_alone(base: Path, tmp_path: Path, adapter: str) -> None:
    made = trained_reward(base, tmp_path, ADAPTERS[adapter]())
    made.fit_normalisation(PROMPTS, [row["chosen"] for row in PAIRS])
    made.save(tmp_path / "normalised")
    for folder in (tmp_path, tmp_path / "normalised"):
        trainer = ppo(base, reward=folder)
        loaded, _ = ft.load(base, task="reward", adapter=folder)
        assert scores(trainer) == scored_alone(trainer, loaded)
        assert len(set(scores(trainer))) > 1
    plain, normalised = (scores(ppo(base, reward=folder)) for folder in (tmp_path, tmp_path / "normalised"))
    assert plain != normalised


def test_a_trained_policy_changes_nothing_in_the_scores(base: Path, reward_folder: Path) -> None:
    trainer = ppo(base, reward=reward_folder)
    loaded, _ = ft.load(base, task="reward", adapter=reward_folder)
    trainer.train()
    assert scores(trainer) == scored_alone(trainer, loaded)


def test_the_text_scores_as_in_the_trainer_that_made_it(base: Path, tmp_path: Path) -> None:
    made = trained_reward(base, tmp_path, lora(4))
    answers = [row["chosen"] for row in PAIRS]
    reward: Any = ppo(base, reward=tmp_path).reward
    assert reward(PROMPTS, answers) == made.score(PROMPTS, answers)


def test_reward_and_critic_compute_with_the_memory_of_the_policys_base(
    base: Path, reward_folder: Path
) -> None:
    trainer = ppo(base, reward=reward_folder, critic="adapter")
    reward: Any = trainer.reward
    critic = trainer.critic.engine.model  # type: ignore[union-attr]
    frozen = {w.data_ptr() for w in trainer.model.parameters() if not w.requires_grad}
    body = {w.data_ptr() for w in trainer.model.get_base_model().base_model.parameters()} & frozen
    assert body < storages(reward.model)
    assert frozen < storages(critic)
    own = storages(reward.model) - frozen, storages(critic) - frozen, storages(trainer.model) - frozen
    assert all(a.isdisjoint(b) for a, b in zip(own, own[1:] + own[:1], strict=True))


def test_a_run_moves_neither_base_nor_reward(base: Path, reward_folder: Path) -> None:
    trainer = ppo(base, reward=reward_folder, critic="adapter", gamma=0.99)
    reward: Any = trainer.reward
    frozen, said = weights(trainer.model, trained=False), weights(reward.model, trained=False)
    assert not weights(reward.model, trained=True)
    trainer.train()
    assert same(weights(trainer.model, trained=False), frozen)
    assert same(weights(reward.model, trained=False), said)
    assert all(weight.grad is None for weight in reward.model.parameters())


def test_a_reward_model_of_its_own_is_left_as_it_is(base: Path, reward_folder: Path) -> None:
    given, _ = ft.load(base, task="reward", adapter=reward_folder)
    given.train()
    before = {name: (weight.requires_grad, weight.clone()) for name, weight in given.named_parameters()}
    trainer = ppo(base, reward=given)
    assert scores(trainer) == scores(ppo(base, reward=reward_folder))
    trainer.train()
    assert given.training
    for name, weight in given.named_parameters():
        assert weight.requires_grad is before[name][0]
        assert torch.equal(weight, before[name][1])


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("adapter", [full, lora])
def test_a_policy_that_shares_layers_with_its_reward_model_is_refused(adapter: Any) -> None:
    """`RewardTrainer` puts its head, and its adapter, on the body of the model it is given."""
    model = language_model()
    config = ft.TrainConfig(max_steps=1, progress="off")
    rewarding = RewardTrainer(model, PAIRS, tokenizer=TOKENIZER, adapter=adapter(), config=config).model
    with pytest.raises(ConfigError, match=r"reward model that stays as it is, got one of which the run"):
        ppo(Path(), policy=attach(model, adapter()), reward=rewarding)


def test_a_reward_model_that_reads_other_ids_is_refused(base: Path, tmp_path: Path) -> None:
    other = tiny("metaspace_first")
    language_model().save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    given, own = ft.load(tmp_path, task="reward")
    with pytest.raises(ConfigError, match=r"with the policy's tokenizer, .* retokenise=True"):
        ppo(base, reward=given)
    assert len(scores(ppo(base, reward=reward_model(given, own, retokenise=True)))) == len(PROMPTS)


def test_a_folder_needs_a_base_that_stays(base: Path, reward_folder: Path) -> None:
    with pytest.raises(CapabilityError, match=r"it has no adapter to switch off.*model of its own"):
        ppo(base, policy=attach(language_model(), full()), reward=reward_folder)


def test_a_folder_of_another_kind_is_refused_by_what_to_do(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward=ftlib\.load\(folder, task='reward'\)\[0\]"):
        ppo(base, reward=base)
    config = ft.TrainConfig(max_steps=1, progress="off")
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    SFTTrainer(base, rows, adapter=lora(4), config=config).save(tmp_path)
    with pytest.raises(CapabilityError, match="expected an adapter saved with its score head"):
        ppo(base, reward=tmp_path)


def test_something_that_is_no_reward_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="reward as a function, a reward model or a folder, got 3"):
        ppo(base, reward=3)


# --- rewards of other kinds -------------------------------------------------------------------------


def test_an_ensemble_of_models_on_one_base_is_reduced_and_logged_apart(base: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        trained_reward(base, tmp_path / str(seed), lora(4), seed=seed)
    policy, _ = ft.load(base, adapter=lora(4))
    members = {
        f"model_{seed}": reward_model(
            ft.load(on_same_base(policy), task="reward", adapter=tmp_path / str(seed))[0], TOKENIZER
        )
        for seed in (0, 1)
    }
    trainer = ppo(base, policy=policy, reward=ensemble(members, reduce="min"))
    alone = [scored_alone(trainer, member.model) for member in members.values()]
    assert scores(trainer) == pytest.approx([min(pair) for pair in zip(*alone, strict=True)])
    row = trainer.update(trainer.rollout(PROMPTS))
    for name, expected in zip(members, alone, strict=True):
        assert row[f"reward/{name}"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert row["reward/model_0"] != pytest.approx(row["reward/model_1"])


def test_an_async_reward_trains_as_a_plain_one(base: Path) -> None:
    async def slow(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return evenness(prompts, completions, **columns)

    plain, later = ppo(base), ppo(base, reward=slow)
    assert without_clock(plain.train().history) == without_clock(later.train().history)
    assert same(weights(plain.model, trained=True), weights(later.model, trained=True))


def test_rows_without_a_reward_are_left_out_and_counted(base: Path) -> None:
    asked = []

    def sometimes(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        asked.append(len(prompts))
        given = evenness(prompts, completions, **columns)
        return [None if index in (2, 5) else 0.0 if index == 3 else each for index, each in enumerate(given)]

    trainer = ppo(base, reward=sometimes, max_drop_frac=0.25)
    rollouts = trainer.rollout(PROMPTS)
    assert (asked, len(rollouts)) == ([8], 6)
    assert rollouts[2].score == 0.0
    assert [r.prompt_ids.tolist() for r in rollouts] == [
        trainer.encoder.encode_prompt(prompt) for index, prompt in enumerate(PROMPTS) if index not in (2, 5)
    ]
    assert trainer.update(rollouts)["dropped"] == 2 / 8
    with pytest.raises(DataError, match="2 of 8"):
        ppo(base, reward=sometimes, max_drop_frac=0.2).train()


def test_no_reward_at_all_is_an_error_where_every_row_may_go(base: Path) -> None:
    trainer = ppo(base, reward=lambda prompts, completions, **_: [None] * len(prompts), max_drop_frac=1.0)
    with pytest.raises(ShapeError, match="at least one rollout"):
        trainer.train()


def test_columns_of_the_prompts_reach_the_reward(base: Path) -> None:
    def right(prompts: Any, completions: Any, *, answer: list[int], **_: Any) -> list[RewardOut]:
        return [RewardOut(float(number), info={"asked": number}) for number in answer]

    rows = [{"prompt": prompt, "answer": index} for index, prompt in enumerate(PROMPTS)]
    trainer = ppo(base, prompts=rows, reward=right)
    rollouts = trainer.rollout(rows)
    assert [rollout.score for rollout in rollouts] == [float(index) for index in range(8)]
    assert trainer.update(rollouts)["reward/asked"] == 3.5


# --- critics ----------------------------------------------------------------------------------------


def a_reward_model(base: Path, folder: Path) -> Any:
    model, _ = ft.load(base, task="reward", adapter=folder)
    return model


@pytest.fixture(params=["adapter", "model", "adapted model", "reward model", "full reward model"])
def critic(request: pytest.FixtureRequest, base: Path, reward_folder: Path) -> Any:
    made = {
        "adapter": lambda: "adapter",
        "model": lambda: language_model(seed=3),
        "adapted model": lambda: attach(language_model(seed=3), lora(2)),
        "reward model": lambda: a_reward_model(base, reward_folder),
        "full reward model": lambda: ft.load(base, task="reward")[0],
    }
    return made[request.param]()


def test_a_critic_of_its_own_learns_without_the_policy(base: Path, critic: Any) -> None:
    """On the rollouts of a policy that stands still, its error falls below that of no critic."""
    trainer = ppo(base, critic=critic, critic_warmup=100, value_learning_rate=1e-2, value_clip=None)
    policy = weights(trainer.model, trained=True)
    rollouts = trainer.rollout(PROMPTS)
    first = trainer.update(rollouts)
    assert first["value"] == 0.0
    for _ in range(7):
        last = trainer.update(rollouts)
    assert last["loss"] < 0.5 * first["loss"]
    assert last["explained_variance"] > 0.0 >= first["explained_variance"]
    assert same(weights(trainer.model, trained=True), policy)
    assert all(weight.grad is None for weight in trainer.model.parameters())


def test_a_critic_of_its_own_and_the_policy_move_the_base_by_nothing(base: Path, critic: Any) -> None:
    trainer = ppo(base, critic=critic)
    frozen = weights(trainer.model, trained=False)
    policy, values = (weights(model, trained=True) for model in (trainer.model, critic_of(trainer)))
    trainer.train()
    assert same(weights(trainer.model, trained=False), frozen)
    assert not same(weights(trainer.model, trained=True), policy)
    assert not same(weights(critic_of(trainer), trained=True), values)


def critic_of(trainer: PPOTrainer) -> nn.Module:
    assert trainer.critic is not None
    return trainer.critic.engine.model


def test_the_numbers_of_a_critic_are_not_mixed_into_the_policys(base: Path, critic: Any) -> None:
    trainer = ppo(base, critic=critic, epochs_per_rollout=1)
    warming, learning = (trainer.update(trainer.rollout(PROMPTS)) for _ in range(2))
    for name in ("approx_kl", "clip_fraction", "ratio_deviation", "first_ratio_deviation"):
        assert warming[name] == 0.0
        assert abs(learning[name]) < 1e-5  # one step only, and its ratios are one
    assert "loss_policy" not in warming
    assert learning["loss"] == pytest.approx(learning["loss_policy"] + learning["loss_value"])
    assert (warming["grad_norm"], warming["learning_rate"]) == (0.0, trainer.learning_rate)
    assert learning["grad_norm"] > 0.0
    assert warming["grad_norm_critic"] > 0.0
    assert learning["grad_norm_critic"] > 0.0


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_both_schedules_end_at_zero_whatever_the_warm_up(base: Path, kind: Any) -> None:
    trainer = ppo(base, critic=kind, critic_warmup=2, max_steps=4)
    trainer.train()
    engines = [trainer.engine] if trainer.critic is None else [trainer.engine, trainer.critic.engine]
    assert [group["lr"] for engine in engines for group in engine.optimizer.param_groups] == [0.0] * sum(
        len(engine.optimizer.param_groups) for engine in engines
    )


def test_a_run_that_is_all_warm_up_leaves_the_policy_where_it_was(base: Path) -> None:
    trainer = ppo(base, critic="adapter", critic_warmup=9)
    before = weights(trainer.model, trained=True)
    trainer.train()
    assert same(weights(trainer.model, trained=True), before)


def test_a_critic_of_its_own_takes_no_part_in_the_policys_step(base: Path) -> None:
    """Values are fixed during an update, so a critic that learns faster moves the policy no other way."""
    moved = []
    for rate in (0.0, 1e-1):
        trainer = ppo(base, critic="adapter", critic_warmup=0, value_learning_rate=rate)
        trainer.update(trainer.rollout(PROMPTS))
        moved.append(weights(trainer.model, trained=True))
    assert same(*moved)


def test_a_head_on_the_trunk_does_take_part(base: Path) -> None:
    moved = []
    for coefficient in (0.0, 1.0):
        trainer = ppo(base, critic_warmup=0, value_coef=coefficient)
        with torch.no_grad():  # from zeros no gradient reaches the trunk
            trainer.engine.value_head.weight.fill_(0.1)  # type: ignore[union-attr]
        trainer.update(trainer.rollout(PROMPTS))
        moved.append(weights(trainer.model, trained=True))
    assert not same(*moved)


def test_a_head_starts_at_zero_and_warms_up_alone(base: Path) -> None:
    trainer = ppo(base, value_learning_rate=1e-2)
    before, head = weights(trainer.model, trained=True), trainer.engine.value_head
    row = trainer.update(trainer.rollout(PROMPTS))
    assert (row["value"], row["explained_variance"]) == (0.0, 0.0)
    assert same(weights(trainer.model, trained=True), before)
    assert head is not None
    assert bool(head.weight.any())
    trainer.update(trainer.rollout(PROMPTS))
    assert not same(weights(trainer.model, trained=True), before)


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_a_learning_rate_of_zero_keeps_every_value_at_zero(base: Path, kind: Any) -> None:
    trainer = ppo(base, critic=kind, value_learning_rate=0.0)
    assert [row["value"] for row in trainer.train().history] == [0.0, 0.0, 0.0]


def test_an_objective_of_ones_own_does_not_ask_the_policy_for_values(base: Path) -> None:
    trainer = ppo(base, critic="adapter", objective=PPO(clip=0.1))
    assert trainer.train().history[-1]["loss_value"] > 0
    assert trainer.engine.value_head is None


def test_a_run_without_any_critic_has_no_values(base: Path) -> None:
    row = ppo(base, objective=PPO(critic=False)).train().history[-1]
    assert row["value"] == 0.0
    assert row["loss"] != 0.0


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_resumed_equals_uninterrupted_with_a_critic_of_its_own(base: Path, tmp_path: Path, kind: str) -> None:
    def trainer(folder: str, **options: Any) -> PPOTrainer:
        critic: Any = kind if kind == "adapter" else language_model(seed=3)
        return ppo(base, critic=critic, output_dir=tmp_path / folder, max_steps=4, **options)

    whole = trainer("whole")
    expected = whole.train().history
    stop = At("on_step_end", 2, lambda control: setattr(control, "should_training_stop", True))
    trainer("cut", callbacks=[stop]).train()
    resumed = trainer("cut")
    move(resumed.model)  # what it was made with does not matter
    move(critic_of(resumed))
    assert without_clock(resumed.train(resume=True).history) == without_clock(expected)
    for a, b in ((resumed.model, whole.model), (critic_of(resumed), critic_of(whole))):
        assert same(weights(a, trained=True), weights(b, trained=True))


def test_text_of_pre_training_is_not_the_critics_matter(base: Path) -> None:
    rows = [{"text": "The quick brown fox says yes."}] * 4
    trainer = ppo(base, critic="adapter", ptx_coef=1.0, ptx_dataset=rows, critic_warmup=0)
    engine: Any = trainer.critic.engine  # type: ignore[union-attr]
    step, seen = engine.step, []
    engine.step = lambda batch: seen.append(len(batch)) or step(batch)
    assert trainer.update(trainer.rollout(PROMPTS))["loss_ptx"] > 0
    assert seen == [8, 8]


# --- critics that are refused -----------------------------------------------------------------------


def test_the_policy_itself_is_no_critic(base: Path) -> None:
    policy, _ = ft.load(base, adapter=lora(4))
    with pytest.raises(ConfigError, match=r"a critic with weights of its own.*critic='adapter'"):
        ppo(base, policy=policy, critic=policy)


def test_a_critic_that_trains_the_shared_base_is_refused(base: Path) -> None:
    policy, _ = ft.load(base, adapter=lora(4))
    critic = on_same_base(policy).requires_grad_(True)
    with pytest.raises(ConfigError, match="a critic with weights of its own"):
        ppo(base, policy=policy, critic=critic)


def test_one_model_is_not_both_reward_and_critic(base: Path) -> None:
    both, _ = ft.load(base, task="reward")
    with pytest.raises(ConfigError, match="a reward model that stays as it is"):
        ppo(base, reward=both, critic=both)
    assert ppo(base, reward=deepcopy(both).requires_grad_(False), critic=both).critic is not None


def test_an_adapter_needs_a_base_that_stays(base: Path) -> None:
    with pytest.raises(CapabilityError, match="it has no adapter to switch off"):
        ppo(base, policy=attach(language_model(), full()), critic="adapter")
    assert ppo(base, policy=attach(language_model(), full()), critic="head").critic is None


def test_a_critic_of_another_kind_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="critic 'head', 'adapter' or a model, got 'heads'"):
        ppo(base, critic="heads")
