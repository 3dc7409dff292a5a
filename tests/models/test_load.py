import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlib import adapters
from ftlib.errors import CheckpointError, ConfigError, MissingPackageError
from ftlib.export import CardData, save
from ftlib.models import precision, source
from ftlib.models.load import load
from tests.data.tokenizers_zoo import tiny
from tests.models.tiny_gguf import write_gguf
from tests.models_zoo import tiny_model

# peft asks the model by a name that transformers 5.23 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.tensor([[5, 6, 7, 8, 9]])


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, sentinel):
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return open, (self.sentinel, "w")


@pytest.fixture
def tokenizer():
    return tiny(pad=None)


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer))


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    """A tiny Llama with its tokenizer, as transformers saves them."""
    path = tmp_path / "tiny"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def hub(tmp_path, folder, monkeypatch):
    """The local cache of the hub, holding the tiny Llama under the name org/tiny."""
    cache = tmp_path / "hub"
    commit = cache / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, commit)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return commit


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fast(monkeypatch, answer):
    monkeypatch.setattr(precision, "bf16_is_fast", lambda device: (answer, "the test says so"))


# --- from a folder, the hub, a loaded model ---------------------------------------------------------


def test_a_folder_gives_its_model_and_its_tokenizer_as_they_are(folder, model, tokenizer):
    loaded, found = load(folder)
    assert_close(logits(loaded), logits(model))
    assert not loaded.training
    assert found.pad_token is None
    assert found.get_vocab() == tokenizer.get_vocab()
    assert found.chat_template == tokenizer.chat_template


def test_a_hub_name_is_found_in_the_cache_and_keeps_its_name(hub, model):
    loaded, found = load("org/tiny", local_files_only=True, adapter=adapters.lora(r=2))
    assert loaded.get_base_model().name_or_path == found.name_or_path == "org/tiny"
    assert loaded.peft_config["default"].base_model_name_or_path == "org/tiny"
    assert_close(logits(load("org/tiny", local_files_only=True)[0]), logits(model))


def test_a_hub_model_is_read_offline_although_the_call_allows_the_network(hub, model):
    assert_close(logits(load("org/tiny")[0]), logits(model))


def test_a_loaded_model_gets_the_adapter_and_its_tokenizer_is_found_beside_it(folder):
    plain, _ = load(folder)
    adapted, found = load(plain, adapter=adapters.lora(r=2))
    assert isinstance(adapted, PeftModel)
    assert adapted.get_base_model() is plain
    assert len(found) == plain.config.vocab_size


def test_a_loaded_model_from_nowhere_has_no_tokenizer(model):
    assert load(model) == (model, None)


@pytest.mark.parametrize(
    "options", [{"dtype": "float32"}, {"device": "cpu"}, {"revision": "main"}, {"gguf_file": "x.gguf"}]
)
def test_options_that_come_too_late_for_a_loaded_model_are_refused(model, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} has no effect on a loaded model"):
        load(model, **options)


# --- dtype ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "is_fast", "expected"),
    [
        (adapters.lora(r=2), True, torch.bfloat16),
        (adapters.lora(r=2), False, torch.float32),
        (LoraConfig(r=2, target_modules=["q_proj"]), True, torch.bfloat16),
        (adapters.full(), True, torch.float32),
        (None, True, torch.float32),
    ],
)
def test_auto_halves_frozen_weights_where_that_is_fast_and_says_so(
    folder, monkeypatch, caplog, adapter, is_fast, expected
):
    fast(monkeypatch, is_fast)
    with caplog.at_level(logging.INFO, logger="ftlib"):
        loaded, _ = load(folder, adapter=adapter)
    inner = loaded.get_base_model() if isinstance(loaded, PeftModel) else loaded
    assert inner.get_input_embeddings().weight.dtype == expected
    assert str(expected).removeprefix("torch.") in caplog.text


def test_what_an_adapter_adds_is_float32_and_what_it_copies_keeps_its_dtype(folder, monkeypatch):
    fast(monkeypatch, True)
    loaded, _ = load(folder, adapter=adapters.lora(r=2, dora=True, modules_to_save=["lm_head"]))
    trained = {name: p.dtype for name, p in loaded.named_parameters() if p.requires_grad}
    added = {dtype for name, dtype in trained.items() if "lora_" in name}
    copied = {dtype for name, dtype in trained.items() if "modules_to_save" in name}
    assert (added, copied) == ({torch.float32}, {torch.bfloat16})


def test_a_half_precision_checkpoint_stays_so_where_that_is_fast(tmp_path, model, tokenizer, monkeypatch):
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    for is_fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        fast(monkeypatch, is_fast)
        assert load(tmp_path / "half")[0].dtype == expected


def test_a_dtype_that_is_asked_for_is_taken(folder):
    assert load(folder, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load(folder, dtype=torch.float16, device="cpu")[0].dtype == torch.float16


# --- adapters ---------------------------------------------------------------------------------------


@pytest.fixture
def saved_adapter(tmp_path, folder):
    """A trained adapter's folder, and the logits of base and adapter."""
    adapted, _ = load(folder, adapter=adapters.lora(r=4), dtype="float32")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    path = save(tmp_path / "adapter", adapted, None, card=CardData("tiny"))
    return path, logits(adapted)


def test_a_saved_adapter_is_attached_to_the_base_that_is_named_here(folder, saved_adapter):
    path, expected = saved_adapter
    edit(path / "adapter_config.json", base_model_name_or_path="evil/base")
    loaded, _ = load(folder, adapter=path, dtype="float32")
    assert_close(logits(loaded), expected)
    assert all(p.requires_grad == ("lora_" in name) for name, p in loaded.named_parameters())


def test_a_peft_configuration_is_used_and_not_changed(folder):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    before = config.to_dict()
    loaded, _ = load(folder, adapter=config)
    assert loaded.peft_config["default"].target_modules == {"q_proj"}
    assert config.to_dict() == before


def test_an_adapter_with_values_that_are_not_finite_is_refused_by_its_tensor(folder, saved_adapter):
    path, _ = saved_adapter
    weights = load_file(path / "adapter_model.safetensors")
    name = sorted(weights)[3]
    weights[name][0, 0] = float("nan")
    save_file(weights, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: expected finite values"):
        load(folder, adapter=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**6}, r"r: expected at most \d+, .* got 1000000"),
        ({"rank_pattern": {"q_proj": 10**6}}, r"r: expected at most \d+, .* got 1000000"),
        ({"auto_mapping": {"parent_library": "os.path"}}, r"parent_library: .* got 'os.path'"),
        ({"auto_map": {"AutoModel": "x.Y"}}, r"'auto_map'"),
    ],
)
def test_a_hostile_adapter_is_refused_by_its_key(folder, saved_adapter, changes, message):
    path, _ = saved_adapter
    edit(path / "adapter_config.json", **changes)
    with pytest.raises(ConfigError, match=message):
        load(folder, adapter=path)


def test_a_pickled_adapter_is_refused_unread(folder, saved_adapter, tmp_path):
    path, _ = saved_adapter
    (path / "adapter_model.safetensors").unlink()
    torch.save(Payload(tmp_path / "sentinel"), path / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"expected adapter_model\.safetensors"):
        load(folder, adapter=path)
    assert not (tmp_path / "sentinel").exists()


def test_an_adapter_that_is_no_folder_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no adapter_config.json in .*nowhere"):
        load(folder, adapter=tmp_path / "nowhere")


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "speech"}, r"expected task to be one of .*'reward'.*, got 'speech'"),
        ({"quantize": "nf3"}, "expected quantize None or one of .*, got 'nf3'"),
        ({"num_labels": 3}, "num_labels=3 has no effect on task='causal_lm'"),
        ({"num_labels": 1, "task": "reward"}, "num_labels=1 has no effect on task='reward'"),
        ({"dtype": "int8"}, "got 'int8'"),
        ({"device": "abacus"}, "got 'abacus'"),
        ({"revision": "main"}, "revision='main' has no effect on a folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        load(folder, **options)


@pytest.mark.parametrize(
    "name", ["no/such-model", "./nowhere", "/no/where", "a/b/c", "what is this?", "x.gguf"]
)
def test_a_name_that_leads_nowhere_is_named(hub, name):
    with pytest.raises(ConfigError, match=name.replace("?", r"\?")):
        load(name, local_files_only=True)


def test_a_revision_that_is_not_there_is_named(hub):
    with pytest.raises(ConfigError, match="revision 'v2'"):
        load("org/tiny", revision="v2", local_files_only=True)


@pytest.mark.parametrize("kept", ["model.safetensors", None])
def test_pickled_weights_are_never_read(folder, tmp_path, model, kept):
    sentinel = tmp_path / "sentinel"
    torch.save(Payload(sentinel), folder / "pytorch_model.bin")
    if kept:
        assert_close(logits(load(folder)[0]), logits(model))
    else:
        (folder / "model.safetensors").unlink()
        with pytest.raises(ConfigError, match=r"found pytorch_model.bin, a pickle"):
            load(folder)
        with pytest.raises(ConfigError, match=r"got the file .*pytorch_model.bin"):
            load(folder / "pytorch_model.bin")
    assert not sentinel.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"text_config": {"trust_remote_code": True}},
        {"_attn_implementation": "evil/kernel"},
        {"vision": [{"kernel_config": {"RMSNorm": "evil/kernel"}}]},
    ],
)
def test_settings_that_name_code_are_refused_by_key(folder, file, changes):
    edit(folder / file, **changes)
    with pytest.raises(ConfigError, match=rf"{file}: expected plain settings, got '\w+'"):
        load(folder)


def test_code_of_a_hub_model_is_refused_before_its_weights_are_fetched(hub, monkeypatch):
    edit(hub / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    asked = []
    fetch = source.snapshot_download
    monkeypatch.setattr(source, "snapshot_download", lambda *a, **k: asked.append(k) or fetch(*a, **k))
    with pytest.raises(ConfigError, match="auto_map"):
        load("org/tiny")
    assert [any("safetensors" in pattern for pattern in call["allow_patterns"]) for call in asked] == [False]


def test_code_runs_only_when_the_caller_trusts_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    sentinel = tmp_path / "sentinel"
    (folder / "theirs.py").write_text(
        f"open({str(sentinel)!r}, 'w').close()\n"
        "from transformers import LlamaForCausalLM\nclass Theirs(LlamaForCausalLM): pass\n"
    )
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "theirs.Theirs"})
    with pytest.raises(ConfigError, match="auto_map"):
        load(folder)
    assert not sentinel.exists()
    loaded, _ = load(folder, trust_remote_code=True)
    assert sentinel.exists()
    assert type(loaded).__name__ == "Theirs"


@pytest.mark.parametrize("foreign", ["../outside.safetensors", "/etc/passwd", "a\\b.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(folder, foreign):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": foreign}})
    )
    with pytest.raises(ConfigError, match="expected names of files in its own folder"):
        load(folder)


def test_a_sharded_model_is_whole_or_refused(folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert_close(logits(load(folder)[0]), logits(model))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load(folder)


def test_weights_that_are_missing_are_never_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing 1: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_torn_weights_are_refused(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="expected readable weights"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "[" * 5000])
def test_a_broken_configuration_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json: expected a JSON"):
        load(folder)


def test_a_model_of_another_kind_is_refused(folder):
    edit(folder / "config.json", model_type="vit", architectures=["ViTModel"])
    with pytest.raises(ConfigError, match="expected"):
        load(folder)


def test_a_folder_without_tokenizer_is_named(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"expected a tokenizer .*tiny"):
        load(folder)


def test_a_saved_adapter_in_place_of_a_model_is_told_apart(saved_adapter):
    path, _ = saved_adapter
    with pytest.raises(ConfigError, match=r"got a saved adapter. Load its base with adapter="):
        load(path)


# --- GGUF -------------------------------------------------------------------------------------------


@pytest.fixture
def gguf(tmp_path, model, tokenizer):
    pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, tokenizer)
    return path


def test_a_gguf_file_is_unpacked_into_the_same_model_and_tokenizer(gguf, model, tokenizer):
    loaded, found = load(gguf, dtype="float32")
    assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert type(loaded) is type(model)
    text = "The quick brown fox <|im_end|>"
    assert found(text).input_ids == tokenizer(text).input_ids
    assert found.chat_template == tokenizer.chat_template


def test_a_gguf_file_is_found_by_its_name_in_a_folder(gguf):
    one, two = load(gguf, dtype="float32")[0], load(gguf.parent, gguf_file=gguf.name, dtype="float32")[0]
    assert torch.equal(logits(one), logits(two))


def test_an_unpacked_model_is_saved_as_an_ordinary_one(gguf, tmp_path):
    loaded, found = load(gguf)
    loaded.save_pretrained(tmp_path / "out")
    found.save_pretrained(tmp_path / "out")
    assert "An odd title" not in (tmp_path / "out" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=loaded.dtype)
    assert torch.equal(logits(again), logits(loaded))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == found.get_vocab()


def test_an_adapter_on_an_unpacked_model_trains(gguf):
    loaded, _ = load(gguf, adapter=adapters.lora(r=2), dtype="float32")
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in loaded.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


def test_a_file_that_is_no_gguf_is_refused_by_its_first_bytes(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ConfigError, match=r"starts with b'GGUF', got b'PK"):
        load(tmp_path / "x.gguf")


def test_a_missing_reader_of_gguf_is_named_with_its_extra(gguf, monkeypatch):
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'ftlib\[gguf\]'"):
        load(gguf)


# --- guests -----------------------------------------------------------------------------------------


def test_loading_prints_nothing(folder, gguf, saved_adapter, capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    load(folder, adapter=saved_adapter[0])
    load(gguf)
    assert capsys.readouterr() == ("", "")


def test_a_token_is_not_kept_in_anything_that_is_saved(hub, tmp_path):
    secret = "hf_" + "x" * 30
    loaded, found = load("org/tiny", token=secret, adapter=adapters.lora(r=2))
    save(tmp_path / "out", loaded, found, card=CardData("tiny"))
    assert all(secret.encode() not in path.read_bytes() for path in (tmp_path / "out").iterdir())
