"""What LoRA starts from: data, the base's own factors, new tokens; and the sum of several."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.testing import assert_close

from ftlib.adapters import attach, load_adapter, lora, merge, model_capabilities
from ftlib.adapters import initial as initial_module
from ftlib.adapters.combine import combine
from ftlib.adapters.initial import InitialFactors
from ftlib.errors import CapabilityError, CheckpointError, ConfigError, DataError
from ftlib.export import CardData, save
from ftlib.export.save import save_weights
from ftlib.models import adapters_off, forward, make_reference, on_same_base
from ftlib.models.load import load
from ftlib.models.references import AdapterOff, Snapshot
from ftlib.trainers import DPOTrainer
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import tiny_model
from tests.packed import random_batch
from tests.seq2seq import START, t5_model
from tests.trainers.ppo_tiny import ppo
from tests.trainers.preferences import PAIRS, moved, preference_run, preference_trainer
from tests.trainers.runs import assert_same, stop_after
from tests.trainers.tiny import rows

IDS_BL = torch.arange(3, 13)[None]
BATCH = random_batch()
ROWS = rows(20)
TAKING = ["pissa", "pissa_niter_4", "olora"]  # what starts from the base's factors


def logits(model: nn.Module, ids_BL: Tensor = IDS_BL) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids_BL).logits  # type: ignore[no-any-return]


def fresh(init: str = "default", *, arch: str = "llama", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return attach(tiny_model(arch), lora(4, init=init, **options))


def layers(model: nn.Module) -> list[Any]:
    return [each for each in model.modules() if isinstance(each, LoraLayer)]


# -- from data ----------------------------------------------------------------------------------------


def test_eva_without_data_is_refused_and_not_plain_lora() -> None:
    with pytest.raises(ConfigError, match="data exactly for init='eva', got init='eva' without data"):
        lora(init="eva")
    for init in ("eva", "lora_ga"):
        with pytest.raises(
            ConfigError, match=f"expected data for init='{init}', got none, which is plain LoRA"
        ):
            attach(tiny_model(), config_of(init))
    with pytest.raises(ConfigError, match="got init='default' with data"):
        lora(data=ROWS)


@pytest.mark.filterwarnings("ignore:.init_lora_weights. is 'eva':UserWarning")
def config_of(init: Any) -> LoraConfig:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    config.init_lora_weights = init
    return config


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_eva_points_its_first_factor_where_the_inputs_vary_most(arch: str) -> None:
    """Orthonormal directions that hold more of the inputs' variance than as many random ones would."""
    model = fresh("eva", arch=arch, data=ROWS)
    seen: dict[int, list[Tensor]] = {}
    for index, layer in enumerate(layers(model)):
        layer.register_forward_pre_hook(lambda _, x, i=index: seen.setdefault(i, []).append(x[0][0]))
    for row in ROWS:
        logits(model, torch.tensor([row["prefix_ids"] + row["continuation_ids"][0]]))
    for index, layer in enumerate(layers(model)):
        a_rI = layer.lora_A["default"].weight.detach()
        inputs_TI = torch.cat(seen[index])
        assert_close(a_rI @ a_rI.T, torch.eye(len(a_rI)), rtol=0, atol=1e-4)
        best_T = torch.linalg.svdvals(inputs_TI - inputs_TI.mean(0))[: len(a_rI)]
        held = (inputs_TI - inputs_TI.mean(0)) @ a_rI.T
        assert float(held.square().sum()) > 0.8 * float(best_T.square().sum())
        assert not bool(layer.lora_B["default"].weight.any())


@pytest.mark.parametrize("long", [0, 7])
def test_eva_shows_each_half_of_an_encoder_decoder_its_own_text(long: int) -> None:
    """Also where prompts and completions of a batch are of one length, as eight tokens each."""
    ids = torch.randint(3, 90, (24, 16), generator=torch.Generator().manual_seed(1)).tolist()
    data = [
        {"prefix_ids": row[: 8 - index % 3], "continuation_ids": [row[8 - long * (index % 2) :]]}
        for index, row in enumerate(ids)
    ]
    torch.manual_seed(0)
    model = attach(t5_model(), lora(4, init="eva", data=data))
    seen: dict[int, list[Tensor]] = {}
    for index, layer in enumerate(layers(model)):
        layer.register_forward_pre_hook(lambda _, x, i=index: seen.setdefault(i, []).append(x[0][0]))
    for row in data:
        read = [START, *row["continuation_ids"][0][:-1]]
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([row["prefix_ids"]]), decoder_input_ids=torch.tensor([read]))
    for index, layer in enumerate(layers(model)):
        a_rI, inputs_TI = layer.lora_A["default"].weight.detach(), torch.cat(seen[index])
        best_T = torch.linalg.svdvals(inputs_TI - inputs_TI.mean(0))[: len(a_rI)]
        held = (inputs_TI - inputs_TI.mean(0)) @ a_rI.T
        assert float(held.square().sum()) > 0.9 * float(best_T.square().sum())
    with pytest.raises(DataError, match="with prompt and completion for an encoder-decoder"):
        attach(t5_model(), lora(4, init="eva", data=[[3, 4, 5]]))


def test_eva_shares_out_the_ranks_and_keeps_their_sum() -> None:
    model = fresh("eva", data=ROWS)
    ranks = [layer.r["default"] for layer in layers(model)]
    assert sum(ranks) == 4 * 14
    assert 1 < max(ranks) <= 8
    assert len(set(ranks)) > 1
    assert {weight.dtype for name, weight in model.named_parameters() if "lora" in name} == {torch.float32}


def test_an_eva_adapter_is_saved_as_a_plain_lora(tmp_path: Path) -> None:
    model = moved(fresh("eva", data=ROWS))
    save_weights(tmp_path, model)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert_close(logits(plain), logits(model), rtol=0, atol=1e-6)


def test_eva_takes_ids_in_several_forms_and_names_what_it_cannot_take() -> None:
    ids = [row["prefix_ids"] + row["continuation_ids"][0] for row in ROWS]
    expected = layers(fresh("eva", data=ROWS))[0].lora_A["default"].weight
    for data in (ids, [{"input_ids": one} for one in ids], [torch.tensor(one) for one in ids]):
        assert torch.equal(layers(fresh("eva", data=data))[0].lora_A["default"].weight, expected)
    with pytest.raises(DataError, match="got 'some text'"):
        fresh("eva", data=["some text"])
    with pytest.raises(DataError, match="at least 8 tokens"):
        fresh("eva", data=[[3, 4, 5]])


def test_eva_leaves_modes_and_generators_alone() -> None:
    model = tiny_model().train()
    state = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        attach(tiny_model(), lora(4))
        after_plain = torch.get_rng_state()
    assert attach(model, lora(4, init="eva", data=ROWS)).training
    assert torch.equal(torch.get_rng_state(), after_plain)
    assert not torch.equal(state, after_plain)


# -- from the base's own factors ----------------------------------------------------------------------


@pytest.mark.parametrize("init", TAKING)
def test_switched_off_it_is_not_the_base_and_declared_so(init: str) -> None:
    base, model = logits(tiny_model()), fresh(init)
    assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    assert not model_capabilities(model).off_is_base
    assert lora(4, init=init).capabilities == model_capabilities(model)
    with adapters_off(model):
        assert float((logits(model) - base).abs().max()) > 1.0


@pytest.mark.parametrize("init", TAKING)
def test_its_reference_is_a_snapshot_and_dpo_starts_at_log_two(init: str) -> None:
    assert isinstance(make_reference("auto", fresh(init)), Snapshot)
    assert isinstance(make_reference("auto", fresh("default")), AdapterOff)
    trainer = preference_trainer(DPOTrainer, adapter=lora(4, init=init), max_tokens=60)
    assert trainer.step(PAIRS[:4])["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_ppo_starts_at_its_reference_too() -> None:
    trainer = ppo(adapter=lora(4, init="pissa"))
    row = trainer.update(trainer.rollout(trainer.train_data))
    assert row["first_ratio_deviation"] < 1e-5
    assert row["kl"] == pytest.approx(0.0, abs=1e-5)


def test_no_other_role_shares_its_base() -> None:
    with pytest.raises(CapabilityError, match="does not declare off_is_base"):
        on_same_base(fresh("pissa"))


@pytest.mark.parametrize(
    ("first", "second"), [("pissa", "pissa"), ("olora", "default"), ("default", "pissa_niter_4")]
)
def test_a_second_adapter_on_its_base_is_refused_and_the_first_stays(first: str, second: str) -> None:
    model = moved(fresh(first))
    before = logits(model)
    with pytest.raises(CapabilityError, match="a base that stays as it is for a second adapter"):
        attach(model, lora(4, init=second), name="second")
    assert torch.equal(logits(model), before)
    assert list(model.peft_config) == ["default"]


def test_a_saved_adapter_is_not_loaded_beside_it(tmp_path: Path) -> None:
    save_weights(tmp_path, moved(fresh("default")))
    with pytest.raises(CapabilityError, match="'default', which changed it"):
        load_adapter(fresh("pissa"), tmp_path, name="second")


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("init", TAKING)
def test_it_is_exported_as_a_lora_of_twice_the_rank_on_the_original_base(
    init: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = moved(fresh(init, **options))
    expected = logits(model)
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    save_weights(tmp_path, model)
    torch.manual_seed(99)
    plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert plain.peft_config["default"].r == 8
    assert_close(logits(plain), expected, rtol=0, atol=2e-5)
    with plain.disable_adapter():
        assert torch.equal(logits(plain), logits(tiny_model()))
    again = load_adapter(tiny_model(), tmp_path)
    assert model_capabilities(again).off_is_base
    assert torch.equal(logits(model), expected)
    assert (
        before.items() <= (model.peft_config["default"].to_dict() | {"base_model_name_or_path": None}).items()
    )
    assert_close(logits(merge(model)), expected, rtol=1e-5, atol=2e-5)


def test_pissa_on_transposed_matrices_is_exported_too(tmp_path: Path) -> None:
    model = moved(fresh("pissa", arch="gpt2"))
    save_weights(tmp_path, model)
    plain = PeftModel.from_pretrained(tiny_model("gpt2"), str(tmp_path))
    assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


def test_olora_on_transposed_matrices_is_refused_by_name() -> None:
    with pytest.raises(CapabilityError, match=r"'olora'.*Take init='pissa'"):
        fresh("olora", arch="gpt2")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_rank_above_that_of_a_matrix_is_refused(init: str) -> None:
    """The keys of the tiny Llama have 16 outputs."""
    with pytest.raises(CapabilityError, match=r"with r=20 directions .* got one with 16"):
        attach(tiny_model(), lora(20, init=init))


def test_a_randomised_start_is_the_same_in_every_process_and_draws_from_nobody() -> None:
    models = []
    for seed in (1, 2):
        model = fresh("pissa_niter_2", seed=seed)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(torch.get_rng_state(), state)
        models.append(model)
    for first, second in zip(*map(layers, models), strict=True):
        assert torch.equal(first.lora_A["default"].weight, second.lora_A["default"].weight)
        assert torch.equal(first.get_base_layer().weight, second.get_base_layer().weight)


def test_a_run_resumed_under_another_random_state_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    def go(folder: Path | None, **options: Any) -> Any:
        model = moved(fresh("pissa_niter_2", seed=torch.seed() % 2**31))
        return preference_run(DPOTrainer, folder, model=model, **options)

    go(tmp_path, callbacks=[stop_after(3)])
    assert_same(go(tmp_path, resume=True), go(None))


def test_a_checkpoint_brings_the_factors_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a decomposition comes out differently, base and factors are set to those of the checkpoint."""
    there = fresh("pissa_niter_1")
    initial = {name: each.clone() for name, each in InitialFactors(there).state_dict().items()}
    expected = logits(moved(there))
    monkeypatch.setattr(initial_module, "_SEED", 1)
    here = fresh("pissa_niter_1")
    here.load_state_dict({name: x for name, x in there.state_dict().items() if "lora_" in name}, strict=False)
    assert float((logits(here) - expected).abs().max()) > 1e-3
    InitialFactors(here).load_state_dict(initial)
    assert_close(logits(here), expected, rtol=0, atol=2e-5)
    assert torch.equal(InitialFactors(here).state_dict()[next(iter(initial))], next(iter(initial.values())))
    with pytest.raises(CheckpointError, match="that differ"):
        InitialFactors(here).load_state_dict({})
    assert not InitialFactors(fresh("default"))


def test_a_randomised_adapter_saved_by_plain_peft_is_refused(tmp_path: Path) -> None:
    fresh("pissa_niter_2").save_pretrained(str(tmp_path))
    with pytest.raises(CapabilityError, match="got 'pissa_niter_2', drawn at random"):
        load_adapter(tiny_model(), tmp_path)


def test_the_users_configuration_is_not_changed() -> None:
    config = LoraConfig(
        r=2, init_lora_weights="pissa", target_modules=["q_proj"], trainable_token_indices=[5]
    )
    before = copy.deepcopy(config.to_dict())
    attach(tiny_model(), config)
    assert config.to_dict() == before


# -- new tokens ---------------------------------------------------------------------------------------


def learned(model: Any) -> Any:
    """A few steps of descent, large enough to be seen."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (-forward(model.train(), BATCH).logprobs_N.mean()).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_train_their_rows_of_both_tables_and_no_others(tied: bool) -> None:
    new = sorted(set(BATCH.ids_T.tolist()))[:2]
    model = attach(tiny_model(tie_word_embeddings=tied), lora(4, new_tokens=new))
    assert_close(logits(model), logits(tiny_model(tie_word_embeddings=tied)), rtol=0, atol=1e-5)
    merged = merge(learned(model))
    plain = tiny_model(tie_word_embeddings=tied)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        changed = (getattr(merged, name)().weight != getattr(plain, name)().weight).any(-1)
        assert changed.nonzero().flatten().tolist() == new


def test_new_tokens_are_saved_for_plain_peft_and_loaded_onto_a_base_without_their_rows(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    model.resize_token_embeddings(99)
    model = learned(attach(model, lora(4, new_tokens=[97, 98])))
    ids = torch.tensor([[5, 97, 98, 6]])
    expected = logits(model, ids)
    save_weights(tmp_path, model)
    wide = tiny_model()
    wide.resize_token_embeddings(99)
    assert_close(logits(PeftModel.from_pretrained(wide, str(tmp_path)), ids), expected, rtol=0, atol=1e-6)
    again = load_adapter(tiny_model(), tmp_path)
    assert_close(logits(again, ids), expected, rtol=0, atol=1e-6)


def test_new_words_are_there_again_after_loading(tmp_path: Path) -> None:
    """The tokenizer is the one saved with the adapter, since the base's does not know them."""
    tokenizer = tiny(pad=None)
    size = len(tokenizer)
    tiny_model(vocab_size=size).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<new>"])
    model, _ = load(tmp_path / "base")
    model.resize_token_embeddings(len(tokenizer))
    model = moved(attach(model, lora(4, new_tokens=[size])))
    save(tmp_path / "adapter", model, tokenizer, card=CardData("tiny"))
    again, words = load(tmp_path / "base", adapter=tmp_path / "adapter", dtype="float32")
    ids = torch.tensor([words("a <new> b")["input_ids"]])
    assert size in ids
    assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-6)


def test_a_configuration_of_pefts_own_trains_both_tables_too() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5])
    model = attach(tiny_model(), config)
    assert model.peft_config["default"].trainable_token_indices == {  # type: ignore[union-attr]
        "model.embed_tokens": [5],
        "lm_head": [5],
    }


def test_new_tokens_without_rows_or_without_ids_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"below 97, .* got 97.*resize_token_embeddings"):
        attach(tiny_model(), lora(4, new_tokens=[97]))
    with pytest.raises(ConfigError, match=r"as ids, got \['<new>'\]"):
        lora(4, new_tokens=["<new>"])  # type: ignore[list-item]


# -- the sum of several -------------------------------------------------------------------------------


def two(**options: Any) -> Any:
    torch.manual_seed(0)
    model = moved(attach(tiny_model(), lora(2, **options), name="red"), seed=1)
    return moved(attach(model, lora(4, **options), name="blue"), seed=2)


def change(model: Any, name: str) -> list[Tensor]:
    return [layer.get_delta_weight(name).detach() for layer in layers(model)]


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"targets": ["q_proj", "v_proj"]}])
def test_stacked_factors_are_the_exact_weighted_sum_of_the_summed_rank(options: dict[str, Any]) -> None:
    model = two(**options)
    expected = [0.3 * a - 2.0 * b for a, b in zip(change(model, "red"), change(model, "blue"), strict=True)]
    assert combine(model, ["red", "blue"], "cat", weights=[0.3, -2.0], name="both") is model
    assert model.active_adapters == ["both"]
    assert model.peft_config["both"].r == 6
    for found, wanted in zip(change(model, "both"), expected, strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_keeps_the_rank_is_called_an_approximation() -> None:
    model = two()
    attach(model, lora(4), name="green")
    expected = torch.cat(
        [(a + b).flatten() for a, b in zip(change(model, "red"), change(model, "blue"), strict=True)]
    )
    combine(model, ["red", "blue"], "approximate_svd")
    found = torch.cat([each.flatten() for each in change(model, "combined")])
    assert 0.05 < float((found - expected).norm() / expected.norm()) < 0.9
    combine(model, ["blue", "green"], "approximate_linear", name="linear")
    with pytest.raises(ConfigError, match=r"one rank for how='approximate_linear', got \[2, 4\]"):
        combine(model, ["red", "blue"], "approximate_linear", name="other")
    with pytest.raises(ConfigError, match="got 'svd'"):
        combine(model, ["red", "blue"], "svd", name="other")  # type: ignore[arg-type]


def test_a_sum_that_is_none_is_refused() -> None:
    model = two(dora=True)
    with pytest.raises(CapabilityError, match=r"got \['red', 'blue'\]: DoRA divides by a norm"):
        combine(model, ["red", "blue"])
    with pytest.raises(ConfigError, match="expected 2 weights, got 1"):
        combine(two(), ["red", "blue"], weights=[1.0])
    with pytest.raises(ConfigError, match=r"names out of \['blue', 'red'\]"):
        combine(two(), ["red", "grey"])
