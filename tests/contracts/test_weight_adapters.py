"""What every adapter of weights promises, on a plain base and on quantised ones.

A new one is tested by a row in `WAYS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from ftlib.adapters import Adapter, attach, ia3, load_adapter, lora, merge, model_capabilities
from ftlib.data.collate import collate
from ftlib.engine import TrainConfig
from ftlib.export.save import save_weights
from ftlib.models import adapters_off, forward
from ftlib.models.checkpointing import enable_checkpointing
from ftlib.models.plan import plan_for
from ftlib.trainers import SFTTrainer
from tests.models_zoo import VOCAB, tiny_model
from tests.quantised_zoo import WIDE, quantised_model
from tests.trainers.preferences import moved
from tests.trainers.runs import Run, assert_same, stop_after
from tests.trainers.tiny import rows, trained

pytest.importorskip("bitsandbytes")

BASES: dict[str, Callable[[], Any]] = {
    "plain": lambda: tiny_model("llama", **WIDE["llama"]),
    "nf4": lambda: quantised_model("nf4"),
    "int8": lambda: quantised_model("int8"),
}
WAYS: dict[str, tuple[str, Callable[[], Adapter]]] = {
    "lora": ("plain", lambda: lora(4)),
    "rslora": ("plain", lambda: lora(4, rslora=True)),
    "dora": ("plain", lambda: lora(4, dora=True)),
    "pissa": ("plain", lambda: lora(4, init="pissa")),
    "olora": ("plain", lambda: lora(4, init="olora")),
    "eva": ("plain", lambda: lora(4, init="eva", data=rows(20))),
    "new tokens": ("plain", lambda: lora(4, new_tokens=list(range(3, VOCAB)))),
    "ia3": ("plain", ia3),
    "qlora nf4": ("nf4", lambda: lora(4)),
    "qlora int8": ("int8", lambda: lora(4)),
}
every = pytest.mark.parametrize("way", WAYS)
IDS_BL = torch.arange(3, 13)[None]


def base(way: str) -> Any:
    return BASES[WAYS[way][0]]()


def fresh(way: str) -> Any:
    torch.manual_seed(0)
    return attach(base(way), WAYS[way][1]())


def logits(model: nn.Module, ids_BL: Tensor = IDS_BL, **arguments: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids_BL, **arguments).logits  # type: ignore[no-any-return]


def memory() -> list[dict[str, Any]]:
    """Eight rows of eight tokens, the last four of which are trained."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (8, 8), generator=generator).tolist()
    return [
        {
            "prefix_ids": row[:4],
            "prefix_weights": [0.0] * 4,
            "continuation_ids": [row[4:]],
            "continuation_weights": [[1.0] * 4],
            "length": 8,
            "source": f"memory:{index}",
        }
        for index, row in enumerate(ids)
    ]


def losses(model: nn.Module, members: list[dict[str, Any]]) -> Tensor:
    return -forward(model, collate(members)).logprobs_N.sum() / 32


@every
def test_a_fresh_one_is_the_identity_and_off_is_the_base_where_declared(way: str) -> None:
    model, expected = fresh(way), logits(base(way))
    assert model_capabilities(model).identity_init
    assert_close(logits(model), expected, rtol=1e-5, atol=2e-5)
    moved(model)
    assert float((logits(model) - expected).abs().max()) > 1e-2
    with adapters_off(model):
        assert torch.equal(logits(model), expected) == model_capabilities(model).off_is_base


@every
def test_two_steps_move_every_trained_weight_and_leave_the_base(way: str) -> None:
    model = fresh(way)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        losses(model.train(), memory()).backward()
        optimizer.step()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) is not weight.requires_grad, name
    assert {x.dtype for x in model.parameters() if x.requires_grad} == {torch.float32}


@every
@pytest.mark.long
def test_it_learns_eight_rows_by_heart(way: str) -> None:
    """60 steps of AdamW: 5 per cent of the loss are left, of IA3 25."""
    model, few = fresh(way), "ia3" in way
    rate = 5e-2 if few else 1e-2
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=rate)
    batch = collate(memory())
    start = float(losses(model, memory()).detach())
    for _ in range(60):
        optimizer.zero_grad()
        (-forward(model.train(), batch).logprobs_N.sum() / 32).backward()
        optimizer.step()
    assert float(losses(model, memory()).detach()) < (0.25 if few else 0.05) * start


@every
def test_padding_and_the_cut_into_micro_batches_change_nothing(way: str) -> None:
    model = moved(fresh(way))
    assert plan_for(model).path == "grouped"
    alone = logits(model)[0]
    pads, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones_like(IDS_BL)
    right = logits(model, torch.cat([IDS_BL, pads], 1), attention_mask=torch.cat([ones, pads], 1))
    positions_BL = torch.cat([pads, torch.arange(10)[None]], 1)
    left = logits(
        model,
        torch.cat([pads, IDS_BL], 1),
        attention_mask=torch.cat([pads, ones], 1),
        position_ids=positions_BL,
    )
    assert_close(right[0, :10], alone, rtol=1e-5, atol=2e-5)
    assert_close(left[0, 3:], alone, rtol=1e-5, atol=2e-5)
    gradients = []
    for size in (8, 4, 1):
        model.zero_grad()
        for first in range(0, 8, size):
            losses(model, memory()[first : first + size]).backward()
        gradients.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
    for others in gradients[1:]:
        assert_close(others, gradients[0], rtol=1e-4, atol=1e-5)


@every
def test_a_stopped_and_resumed_run_is_the_run_that_was_not(way: str, tmp_path: Path) -> None:
    def go(folder: Path | None, *, resume: Any = None, **options: Any) -> Any:
        torch.manual_seed(0)
        config = TrainConfig(
            output_dir=folder, progress="off", learning_rate=1e-2, batch_size=2, max_tokens=20, log_steps=1
        )
        trainer = SFTTrainer(fresh(way), rows(6), config=config, **options)
        result = trainer.train(resume=resume)
        return Run(trainer, trained(trainer), result)

    go(tmp_path, callbacks=[stop_after(2)])
    assert_same(go(tmp_path, resume=True), go(None))


@every
def test_saved_it_loads_in_plain_peft_and_here_and_merges(way: str, tmp_path: Path) -> None:
    model = moved(fresh(way))
    expected = logits(model)
    save_weights(tmp_path, model)
    assert_close(logits(PeftModel.from_pretrained(base(way), str(tmp_path))), expected, rtol=0, atol=2e-5)
    assert_close(logits(load_adapter(base(way), tmp_path)), expected, rtol=0, atol=2e-5)
    assert_close(logits(merge(model)), expected, rtol=1e-5, atol=5e-5)


@every
def test_checkpointed_it_has_the_same_gradients(way: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = moved(fresh(way)).train()
        if checkpointed:
            enable_checkpointing(model)
        losses(model, memory()).backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.requires_grad})
    assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
