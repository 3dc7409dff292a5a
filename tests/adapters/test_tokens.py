"""New tokens beside any adapter: read and written, saved for plain peft, resumed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ftlib.adapters import Adapter, attach, ia3, load_adapter, lora, merge, p_tuning, prefix, prompt
from ftlib.data.collate import collate
from ftlib.engine import TrainConfig
from ftlib.errors import CheckpointError, ConfigError
from ftlib.export import CardData, save
from ftlib.export.save import save_weights
from ftlib.models import adapters_off, forward
from ftlib.models.fingerprints import config_settings
from ftlib.models.load import load
from ftlib.trainers import SFTTrainer
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import tiny_model
from tests.packed import random_batch
from tests.trainers.preferences import moved
from tests.trainers.runs import Run, assert_same, stop_after
from tests.trainers.tiny import rows, trained

BATCH = random_batch()
NEW = sorted(set(BATCH.ids_T.tolist()))[:2]
WIDE = 99  # rows of a base with two new tokens
ADDED = [97, 98]
IDS_1L = torch.tensor([[5, 97, 98, 6]])
KINDS: dict[str, Callable[..., Adapter]] = {
    "ia3": ia3,
    "prompt": partial(prompt, 4),
    "p-tuning": partial(p_tuning, 4, encoder="mlp"),
    "prefix": partial(prefix, 4),
}
every = pytest.mark.parametrize("kind", KINDS)
tied_or_not = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")


def fresh(kind: str, ids: list[int] = NEW, **changes: Any) -> Any:
    torch.manual_seed(0)
    return attach(tiny_model(**changes), KINDS[kind](new_tokens=ids))


def wide() -> Any:
    model = tiny_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(WIDE)
    return model


def widened(kind: str) -> Any:
    torch.manual_seed(0)
    return moved(attach(wide(), KINDS[kind](new_tokens=ADDED)))


def tables(model: Any) -> list[Tensor]:
    return [table.weight.detach() for table in (model.get_input_embeddings(), model.get_output_embeddings())]


def logits(model: nn.Module, ids_1L: Tensor = IDS_1L) -> Tensor:
    """Of the text, less the rows of virtual tokens."""
    with torch.no_grad():
        return model.eval()(input_ids=ids_1L).logits[:, -ids_1L.shape[1] :]  # type: ignore[no-any-return]


@tied_or_not
@every
@pytest.mark.parametrize("tied", [False, True])
def test_their_rows_of_both_tables_are_trained_and_no_others(kind: str, tied: bool) -> None:
    model = fresh(kind, tie_word_embeddings=tied)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    (-forward(model.train(), BATCH).logprobs_N.mean()).backward()
    optimizer.step()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) is not weight.requires_grad, name
    base = tiny_model(tie_word_embeddings=tied)
    for found, plain in zip(tables(model.get_base_model()), tables(base), strict=True):
        assert (found != plain).any(-1).nonzero().flatten().tolist() == NEW
    with adapters_off(model), torch.no_grad():
        off_N, base_N = (forward(each, BATCH, path="padded").logprobs_N for each in (model, base))
    assert torch.equal(off_N, base_N)


@every
def test_pefts_own_forward_reads_them_as_this_one_does(kind: str) -> None:
    """peft keeps the table that virtual tokens stand before, from before the rows were put around it."""
    model = widened(kind)
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().token_adapter.trainable_tokens_delta["default"].mul_(20)
    text = {"prefix_ids": [5], "continuation_ids": [[97, 98, 6]], "continuation_weights": [[1.0] * 3]}
    example = {**rows(1)[0], **text, "prefix_weights": [0.0], "length": 4}
    with torch.no_grad():
        found_N = forward(model.eval(), collate([example])).logprobs_N
    expected_LV = logits(model)[0, :-1].log_softmax(-1)
    assert_close(found_N, expected_LV[torch.arange(3), torch.tensor([97, 98, 6])], rtol=1e-5, atol=1e-5)


@every
def test_saved_they_are_an_adapter_of_their_own_that_plain_peft_loads_first(
    kind: str, tmp_path: Path
) -> None:
    model = widened(kind)
    expected = logits(model)
    save_weights(tmp_path, model)
    assert not any("token_adapter" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(model), expected)
    base = PeftModel.from_pretrained(wide(), str(tmp_path), subfolder="new_tokens").merge_and_unload()
    plain = PeftModel.from_pretrained(base, str(tmp_path))
    assert_close(logits(plain), expected, rtol=0, atol=1e-6)
    again = load_adapter(tiny_model(), tmp_path)  # which has no rows for them
    assert_close(logits(again), expected, rtol=0, atol=1e-6)
    assert {name for name, weight in again.named_parameters() if weight.requires_grad} >= {
        name for name, weight in model.named_parameters() if "token_adapter" in name and weight.requires_grad
    }
    frozen = load_adapter(wide(), tmp_path, trainable=False)
    assert not any(weight.requires_grad for weight in frozen.parameters())


@tied_or_not
def test_tied_tables_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    model = moved(fresh("prompt", tie_word_embeddings=True))
    expected = logits(model, torch.tensor([NEW]))
    save_weights(tmp_path, model)
    assert len(load_file(tmp_path / "new_tokens" / "adapter_model.safetensors")) == 1
    again = load_adapter(tiny_model(tie_word_embeddings=True), tmp_path)
    assert_close(logits(again, torch.tensor([NEW])), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["ia3", "prompt"])
def test_a_stopped_and_resumed_run_is_the_run_that_was_not(kind: str, tmp_path: Path) -> None:
    def go(folder: Path | None, *, resume: Any = None, **options: Any) -> Any:
        config = TrainConfig(output_dir=folder, progress="off", learning_rate=1e-2, batch_size=2, log_steps=1)
        trainer = SFTTrainer(fresh(kind, [9, 10, 11, 12]), rows(6), config=config, **options)
        return Run(trainer, trained(trainer), trainer.train(resume=resume))

    stopped = go(tmp_path, callbacks=[stop_after(2)])
    (checkpoint,) = set(tmp_path.glob("**/new_tokens.safetensors"))
    loaded = load_adapter(tiny_model(), checkpoint.parent)
    ids_1L = torch.tensor([[9, 10, 11]])
    assert_close(logits(loaded, ids_1L), logits(stopped.trainer.model, ids_1L), rtol=0, atol=1e-6)
    assert_same(go(tmp_path, resume=True), go(None))


def test_a_run_with_other_tokens_is_another_run() -> None:
    """peft's own dictionary of the settings has no place for them."""
    one, other = (config_settings(fresh("ia3", ids).peft_config["default"]) for ids in ([9], [10]))
    assert one != other


def test_scales_and_rows_merge_into_a_plain_model() -> None:
    model = widened("ia3")
    expected = logits(model)
    assert_close(logits(merge(model)), expected, rtol=1e-5, atol=2e-5)


def test_a_second_adapter_without_new_tokens_reads_the_bases_rows() -> None:
    model = attach(widened("prompt"), prompt(3), name="second")
    base = attach(wide(), prompt(3))
    with torch.no_grad():
        base.prompt_encoder["default"].embedding.weight.copy_(model.prompt_encoder["second"].embedding.weight)
    assert_close(logits(model), logits(base), rtol=0, atol=1e-6)


def test_a_folder_and_its_tokenizer_give_the_words_back(tmp_path: Path) -> None:
    """And a later adapter saved there, without new tokens, leaves none behind."""
    tokenizer = tiny(pad=None)
    size = len(tokenizer)
    tiny_model(vocab_size=size).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<new>"])
    model, _ = load(tmp_path / "base")
    model.resize_token_embeddings(len(tokenizer))
    model = moved(attach(model, prompt(4, new_tokens=[size])))
    for _ in range(2):  # over itself, too
        save(tmp_path / "adapter", model, tokenizer, card=CardData("tiny"))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'subfolder="new_tokens").merge_and_unload()' in card
    again, words = load(tmp_path / "base", adapter=tmp_path / "adapter", dtype="float32")
    ids_1L = torch.tensor([words("a <new> b")["input_ids"]])
    assert size in ids_1L
    assert_close(logits(again, ids_1L), logits(model, ids_1L), rtol=0, atol=1e-6)
    other, _ = load(tmp_path / "base", adapter=prompt(4))
    save(tmp_path / "adapter", other, tokenizer, card=CardData("tiny"))
    assert not (tmp_path / "adapter" / "new_tokens").exists()
    assert "new_tokens" not in (tmp_path / "adapter" / "README.md").read_text()


def test_rows_of_another_base_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path, widened("ia3"))
    path = tmp_path / "new_tokens" / "adapter_model.safetensors"
    saved = load_file(path)
    save_file({name: value[:1].clone() for name, value in saved.items()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="expected rows of the tables of this base"):
        load_adapter(wide(), tmp_path)


@pytest.mark.parametrize("kind", [*KINDS, "lora"])
def test_what_are_no_ids_is_refused(kind: str) -> None:
    make = {**KINDS, "lora": lora}[kind]
    with pytest.raises(ConfigError, match=r"as ids, got \['<new>'\]"):
        make(new_tokens=["<new>"])
    with pytest.raises(ConfigError, match=r"below 97, .* got 97.*resize_token_embeddings"):
        attach(tiny_model(), make(new_tokens=[97]))
