"""Every adapter under every trainer: it works as promised, or is refused by name when the trainer is made.

A new adapter is a record in `rows.py`, a new trainer one in `columns.py`. What works is in the page that
`python -m tests.matrix.table` writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from ftlib.adapters import attach, load_adapter, lora, merge, model_capabilities
from ftlib.adapters.encoder_head import is_encoder_classifier
from ftlib.adapters.vetting import BENEATH
from ftlib.batches import Group
from ftlib.data.collate import collate
from ftlib.errors import CapabilityError
from ftlib.export.save import save_weights
from ftlib.models import adapters_off, as_reward_model, forward, on_same_base
from tests.matrix import bases
from tests.matrix.answers import CELLS, REFUSED, answer
from tests.matrix.columns import Column
from tests.matrix.examples import MEMORY
from tests.matrix.rows import ROWS, Row
from tests.matrix.table import PAGE, page
from tests.trainers.preferences import moved
from tests.trainers.runs import stop_after
from tests.trainers.tiny import one_thread, without_clock

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")

IDS_1L = torch.arange(7, 16)[None]
# one step of plain gradient descent: the weights move by the gradient
GRADIENT: dict[str, Any] = {
    "optimizer": lambda groups, rate: torch.optim.SGD(groups, 1.0),
    "max_grad_norm": 1e9,
}
SHORT = 4  # steps of a run that is stopped after one
every = pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=() if row.short else pytest.mark.long, id=cell.replace(" ", "_"))
        for cell, (row, _) in CELLS.items()
    ],
)


@pytest.fixture(scope="module", autouse=True)
def single() -> Iterator[None]:
    with one_thread():
        yield


def works(cell: str) -> tuple[Row, Column]:
    """The records of a cell; skips the test where the cell is refused."""
    if answer(cell).sign == REFUSED:
        pytest.skip("refused, as the page says")
    return CELLS[cell]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def logits(model: nn.Module) -> Tensor:
    """By the model's own forward, of one unpadded row."""
    ids = {"input_ids": IDS_1L}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = IDS_1L[:, :4]
    with torch.no_grad():
        return model.eval()(**ids).logits


def step(trainer: Any) -> dict[str, Tensor]:
    """What one step does to the trained weights."""
    before = trainer.engine.masters.copies()
    trainer.learn([trainer.train_data[index] for index in range(len(trainer.train_data))])
    return {name: weight - before[name] for name, weight in trainer.engine.masters.copies().items()}


def assert_close_to_their_size(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    size = float(torch.stack([value.norm() for value in expected.values()]).norm())
    assert size > 1e-4
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-5 * size, name


# -- the table -----------------------------------------------------------------------------------------


def test_the_page_says_what_the_library_answers() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.matrix.table"


def test_a_refusal_names_what_was_expected_what_was_found_and_another_way() -> None:
    reasons = {answer(cell).reason for cell in CELLS if answer(cell).sign == REFUSED}
    assert reasons
    for reason in reasons:
        assert re.fullmatch(r"\w+: expected .+, got .+\. (Take|Load|Give) .+\.", reason), reason


# -- what every cell that works promises ---------------------------------------------------------------


@every
def test_a_fresh_one_is_the_identity_and_off_is_the_base_where_declared(cell: str) -> None:
    """D2, with the DPO cells of every adapter."""
    row, column = works(cell)
    expected = column.read(column.plain(row), column.probed, path="padded")
    model = column.make(row).model
    capable = model_capabilities(model)
    if capable.identity_init:
        assert_close(column.read(model, column.probed, path="padded"), expected, rtol=1e-5, atol=2e-5)
    moved(model)
    assert float((column.read(model, column.probed, path="padded") - expected).abs().max()) > 1e-3
    with adapters_off(model):
        found = column.read(model, column.probed, path="padded")
    assert torch.equal(found, expected) == capable.off_is_base


@every
def test_it_learns_and_leaves_the_base_as_it_was(cell: str) -> None:
    row, column = works(cell)
    trainer = column.make(row, max_steps=column.steps)
    before = weights(trainer.model)
    history = trainer.train().history
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, before[name]) is not weight.requires_grad, name
    column.learned(row, trainer, history)


@every
def test_a_batch_says_what_single_rows_say(cell: str) -> None:
    """R2, with the reward cells of every adapter."""
    row, column = works(cell)
    model = column.trained(row)
    alone = torch.cat([column.read(model, [one]) for one in column.probed])
    assert_close(column.read(model, column.probed), alone, rtol=1e-5, atol=2e-5)


@every
def test_any_cut_into_micro_batches_has_the_same_gradients(cell: str) -> None:
    """D4, with the DPO cells of every adapter."""
    row, column = works(cell)
    whole, *cut = (
        step(column.make(row, model=column.trained(row), max_tokens=tokens, **GRADIENT))
        for tokens in (10_000, 30, 1)
    )
    for found in cut:
        assert_close_to_their_size(found, whole)


@every
def test_a_stopped_and_resumed_run_is_the_run_that_was_not(cell: str, tmp_path: Path) -> None:
    """The one resumed starts from other weights, which the checkpoint replaces."""
    row, column = works(cell)

    def run(folder: Path | None, *, seed: int = 0, resume: Any = None, callbacks: Any = ()) -> Any:
        model = column.trained(row, seed=seed)
        trainer = column.make(row, model=model, max_steps=SHORT, output_dir=folder, callbacks=callbacks)
        history = trainer.train(resume=resume).history
        return without_clock(history), trainer.engine.masters.copies()

    history, copies = run(None)
    run(tmp_path, callbacks=[stop_after(1)])
    found = run(tmp_path, seed=1, resume=True)
    assert found[0] == history
    assert all(torch.equal(found[1][name], weight) for name, weight in copies.items())


@every
def test_saved_it_loads_in_plain_libraries_and_merges(cell: str, tmp_path: Path) -> None:
    row, column = works(cell)
    model = column.trained(row)
    expected = logits(model)
    save_weights(tmp_path, model)
    if not isinstance(model, PeftModel):
        attention = model.config._attn_implementation  # else transformers takes another one
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=attention)
        assert_close(logits(loaded), expected, rtol=0, atol=1e-6)
        return
    if is_encoder_classifier(model) and model_capabilities(model).adds_positions:  # which peft would pool
        with pytest.raises(KeyError, match=r"load it with ftlib\.load"):
            PeftModel.from_pretrained(column.plain(row, seed=5), str(tmp_path))
        loaded = load_adapter(column.plain(row, seed=5), tmp_path)
        assert_close(column.read(loaded, column.probed), column.read(model, column.probed), rtol=0, atol=1e-6)
    else:
        base = column.plain(row, seed=5)
        if (tmp_path / BENEATH).is_dir():
            base = PeftModel.from_pretrained(base, str(tmp_path), subfolder=BENEATH).get_base_model()
        plain = PeftModel.from_pretrained(base, str(tmp_path))
        assert_close(logits(plain), expected, rtol=0, atol=2e-5)
    if model_capabilities(model).mergeable:
        merged = logits(merge(model))
        assert float((merged - expected).norm()) <= 1e-4 * float(expected.norm())  # two products into one
    else:
        with pytest.raises(CapabilityError, match="merge: expected"):
            merge(model)


@every
def test_checkpointed_it_has_the_same_gradients_or_is_refused(cell: str) -> None:
    row, column = works(cell)
    if not model_capabilities(column.trained(row)).checkpointable:
        with pytest.raises(CapabilityError, match="an adapter that declares checkpointable"):
            column.make(row, gradient_checkpointing=True)
        return
    plain, checkpointed = (
        step(column.make(row, model=column.trained(row), gradient_checkpointing=on, **GRADIENT))
        for on in (False, True)
    )
    assert_close_to_their_size(checkpointed, plain)


# -- across trainers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "_"))
def test_a_policys_step_leaves_the_scores_of_another_role(row: Row) -> None:
    policy = attach(bases.decoder(row.held), lora(4))
    role = as_reward_model(on_same_base(policy))
    if answer(f"{row.name}, role on a shared base").sign == REFUSED:
        with pytest.raises(CapabilityError, match="give the role a model of its own"):
            attach(role, row.make(MEMORY))
        return
    judge = moved(attach(role, row.make(MEMORY)))

    def scores() -> Tensor:
        with torch.no_grad():
            return forward(judge.eval(), collate(MEMORY), scores=True).scores_CK

    before = scores()
    CELLS["LoRA, SFT"][1].make(row, model=policy).train()
    assert torch.equal(scores(), before)


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "_"))
def test_exact_gradients_reach_the_best_policy_of_a_bandit(row: Row) -> None:
    """Eight arms on the base's own distribution: J* = beta log sum_a ref(a) exp(score(a) / beta)."""
    beta, arms, score_A = 0.5, 8, torch.linspace(0, 1, 8)
    base = bases.decoder(row.held, vocab_size=arms)
    ids = [tuple(x.split(1)) for x in (torch.arange(arms), torch.ones(arms))]
    batch = collate([Group(torch.tensor([3, 4]), torch.zeros(2), *ids)], score_all=True)
    with torch.no_grad():
        ref_A = forward(base, batch).logprobs_N
    best = float(beta * torch.logsumexp(ref_A + score_A / beta, 0))
    model = attach(base, row.make([list(range(arms)), [5, 2, 7, 1]]))
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], row.rate / 2)
    for _ in range(200):
        logp_A = forward(model, batch).logprobs_N
        found = (logp_A.exp() * (score_A - beta * (logp_A - ref_A))).sum()
        optimizer.zero_grad()
        (-found).backward()
        optimizer.step()
    assert best - 0.01 < float(found.detach()) <= best + 1e-5
