"""TRL's DPOTrainer and RewardTrainer, unmodified, as second opinions: the same numbers, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from ftlib.adapters import attach, full, lora
from ftlib.engine.files import load_state, save_state
from ftlib.models import as_reward_model
from ftlib.trainers import DPOTrainer, RewardTrainer
from tests.models_zoo import EOS, PAD, VOCAB, tiny_model
from tests.trainers.preferences import pairs, preference_trainer
from tests.trainers.processes import start

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

STEPS, BATCH, RATE = 20, 4, 1e-3
ROWS = pairs(20)  # four epochs of five batches
RELATIVE = 1e-5  # float32: padded on one side, flat on the other
ABSOLUTE = 1e-5  # of differences of log-probabilities, nats
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {},
    "hinge": {},
    "robust": {"label_smoothing": 0.1},
}
CASES = [(name, way) for name in [*LOSSES, "reward"] for way in ("full", "lora")]
# ours: theirs. With ipo, our rewards are those of means per token, which its loss sees.
DPO_NAMES = {
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "margin": "rewards/margins",
    "logp_chosen": "logps/chosen",
    "logp_rejected": "logps/rejected",
}
REWARD_NAMES = {"margin": "margin", "accuracy": "accuracy"}


def words() -> PreTrainedTokenizerFast:
    """A word per id, of which none is a part of another."""
    backend = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(VOCAB)}, unk_token="<3>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=f"<{PAD}>", eos_token=f"<{EOS}>")


def text(ids: list[int]) -> str:
    return "".join(f"<{token}> " for token in ids)


def initial(name: str, way: str) -> Any:
    """The model that both train, drawn once from a seed."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    made = as_reward_model(model) if name == "reward" else model
    return attach(made, lora(4) if way == "lora" else full())


def train_with_trl(folder: Path, log: Path) -> None:
    """All cases, each on the same rows in the same order, from what is saved in `folder`."""
    save_state(log, {f"{name} {way}": _train_one(name, way, folder / f"{name}-{way}") for name, way in CASES})


def _train_one(name: str, way: str, folder: Path) -> list[dict[str, Any]]:
    import trl
    from peft import PeftModel

    auto = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if way == "lora":
        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    options: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    sides = [
        {
            "prompt": text(row["prefix_ids"]),
            "chosen": text(row["continuation_ids"][0]).strip(),
            "rejected": text(row["continuation_ids"][1]).strip(),
        }
        for row in ROWS
    ]
    data = Dataset.from_list(sides)
    if name == "reward":
        config = trl.RewardConfig(**options)
        trainer = trl.RewardTrainer(model, args=config, train_dataset=data, processing_class=words())
        found = [[row["chosen_ids"], row["rejected_ids"]] for row in trainer.train_dataset]
    else:
        config = trl.DPOConfig(**options, loss_type=[name], beta=0.1, **LOSSES[name])
        trainer = trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=words())
        found = [
            [row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]]
            for row in trainer.train_dataset
        ]
    ours = [[row["prefix_ids"] + answer for answer in row["continuation_ids"]] for row in ROWS]
    assert found == ours, "the same ids"
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Their rows of a case, once they are asked for; TRL trains meanwhile."""
    folder = tmp_path_factory.mktemp("trl")
    for name, way in CASES:
        model, target = initial(name, way), folder / f"{name}-{way}"
        if way == "lora":
            model.save_pretrained(str(target / "adapter"))
            model = model.unload()
        model.save_pretrained(target)
    log, errors = folder / "log.json", folder / "errors"
    process = start(train_with_trl, folder, log, errors=errors)

    def of(name: str, way: str) -> list[dict[str, Any]]:
        process.join(timeout=200)
        assert process.exitcode == 0, errors.read_text() if errors.exists() else "it hung"
        rows: list[dict[str, Any]] = load_state(log)[f"{name} {way}"]
        return rows

    yield of
    process.kill()


@pytest.mark.parametrize(("name", "way"), CASES, ids=[f"{name}-{way}" for name, way in CASES])
def test_losses_gradient_norms_and_rewards_are_those_of_trl(name: str, way: str, theirs: Any) -> None:
    own: dict[str, Any] = {} if name == "reward" else {"loss": name, "beta": 0.1, **LOSSES[name]}
    trainer = preference_trainer(
        RewardTrainer if name == "reward" else DPOTrainer,
        adapter=None,
        model=initial(name, way),
        data=ROWS,
        shuffle=False,
        max_steps=STEPS,
        batch_size=BATCH,
        learning_rate=RATE,
        max_tokens=80,
        **own,
    )
    history, expected = trainer.train().history, theirs(name, way)
    assert len(history) == len(expected) == STEPS
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [row[key] for row in history] == pytest.approx([row[key] for row in expected], rel=RELATIVE), (
            key
        )
    names = REWARD_NAMES if name == "reward" else DPO_NAMES
    for key, their_name in names.items():
        if name == "ipo" and not key.startswith("logp"):
            continue
        found, wanted = [row[key] for row in history], [row[their_name] for row in expected]
        assert found == pytest.approx(wanted, rel=RELATIVE, abs=ABSOLUTE), key
    same_batch = len(ROWS) // BATCH - 1, -1  # in the first epoch and in the last
    before, after = (expected[step]["loss"] for step in same_batch)
    assert after < before - 0.02, "something was learned"
