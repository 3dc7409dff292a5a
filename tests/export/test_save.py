import json
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close

from ftlib import adapters
from ftlib.errors import CheckpointError, ConfigError
from ftlib.export import CardData, save
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import tiny_model

# peft asks the model by a name that transformers 5.23 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CARD = CardData("tiny", metrics={"eval_loss": 1.5})
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
ADAPTERS = {
    "lora": adapters.lora(r=4),
    "dora": adapters.lora(r=4, dora=True),
    "rslora": adapters.lora(r=4, rslora=True),
    "with_head": adapters.lora(r=4, modules_to_save=["lm_head"]),
    "pissa": adapters.lora(r=4, init="pissa"),
    "olora": adapters.lora(r=4, init="olora"),
}
PLAIN_LOADER = """
    import sys, warnings
    sys.modules["ftlib"] = None  # an import of it would fail
    warnings.filterwarnings("ignore")
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids, found = torch.tensor([[5, 6, 7, 8, 9, 10]]), {}
    root, names = sys.argv[1], sys.argv[2:]
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(f"{root}/{'full' if name == 'full' else 'base'}")
        if name != "full":
            model = PeftModel.from_pretrained(model, f"{root}/{name}")
        with torch.no_grad():
            found[name] = model.eval()(input_ids=ids).logits
    tokenizer = AutoTokenizer.from_pretrained(f"{root}/{names[0]}")
    found["tokens"] = torch.tensor(tokenizer("The quick fox").input_ids)
    save_file(found, f"{root}/found.safetensors")
"""


def changed(model):
    """The model with every trainable weight moved, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def small_adapter(name="default"):
    return changed(adapters.attach(tiny_model(), adapters.lora(r=2), name=name))


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Logits in this process, and those that a fresh one with plain peft and transformers finds."""
    root = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(root / "base")
    here = {}
    for name, adapter in ADAPTERS.items():
        model = changed(adapters.attach(tiny_model(), adapter))
        save(root / name, model, tiny(), card=CARD)
        here[name] = logits(model)
    model = changed(adapters.attach(tiny_model(), adapters.full()))
    save(root / "full", model, tiny(), card=CARD)
    here["full"] = logits(model)
    here["tokens"] = torch.tensor(tiny()("The quick fox").input_ids)
    program = [sys.executable, "-I", "-c", textwrap.dedent(PLAIN_LOADER)]
    subprocess.run([*program, root, *ADAPTERS, "full"], cwd=root, check=True)
    return here, load_file(root / "found.safetensors")


@pytest.mark.parametrize("name", [*ADAPTERS, "full"])
def test_plain_peft_and_transformers_find_the_same_logits(reloaded, name):
    here, there = reloaded
    assert_close(there[name], here[name], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(there[name], logits(tiny_model()), atol=1e-2)  # training did change them


def test_the_tokenizer_is_saved_as_it_is(reloaded):
    here, there = reloaded
    assert torch.equal(here["tokens"], there["tokens"])


def test_a_named_adapter_lies_in_the_folder_itself(tmp_path):
    model = small_adapter("french")
    save(tmp_path / "out", model, None, card=CARD)
    assert_close(logits(PeftModel.from_pretrained(tiny_model(), str(tmp_path / "out"))), logits(model))
    assert not (tmp_path / "out" / "french").exists()


def test_of_several_adapters_the_active_one_is_saved(tmp_path):
    model = small_adapter("first")
    adapters.attach(model, adapters.lora(r=3), name="second")
    save(tmp_path / "out", model, None, card=CARD)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3


@pytest.mark.parametrize(
    ("loaded_from", "written"),
    [
        ("org/model", "org/model"),
        ("/home/ann/models/base", "/home/ann/models/base"),  # plain peft needs it to find the base
        ("/home/ann/.cache/huggingface/hub/models--org--model/snapshots/0a1b", "org/model"),
        ("", None),
    ],
)
def test_the_base_is_named_as_a_reader_can_find_it(tmp_path, loaded_from, written):
    base = tiny_model()
    base.name_or_path = base.config.name_or_path = loaded_from
    save(tmp_path / "out", adapters.attach(base, adapters.lora(r=2)), None, card=CARD)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == written
    assert "/home/ann" not in (tmp_path / "out" / "README.md").read_text()


def test_a_saved_model_says_nothing_of_where_it_was_loaded(tmp_path):
    model = tiny_model()
    model.name_or_path = model.config.name_or_path = "/home/ann/models/base"
    save(tmp_path / "out", model, tiny(), card=CARD)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "README.md"):
        assert "/home/ann" not in (tmp_path / "out" / file).read_text()


def test_other_files_of_an_existing_folder_stay_and_old_ones_are_replaced(tmp_path):
    out = tmp_path / "out"
    save(out, tiny_model(seed=0), tiny(), card=CARD)
    (out / "notes.txt").write_text("mine")
    save(out, tiny_model(seed=1), tiny(), card=CARD)
    assert (out / "notes.txt").read_text() == "mine"
    assert torch.equal(
        load_file(out / "model.safetensors")["lm_head.weight"], tiny_model(seed=1).lm_head.weight
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_of_an_earlier_save_are_not_read_in_place_of_the_new_weights(tmp_path):
    out = tmp_path / "out"
    tiny_model(seed=0).save_pretrained(out, max_shard_size="20KB")
    assert (out / "model.safetensors.index.json").exists()
    save(out, tiny_model(seed=1), None, card=CARD)
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("broken")])
def test_a_failed_save_leaves_nothing_half_written(tmp_path, monkeypatch, error, existing):
    out, tokenizer = tmp_path / "out", tiny()
    if existing:
        save(out, small_adapter(), tiny(), card=CARD)
    before = {path.name: path.read_bytes() for path in out.glob("*")}

    def fails(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(tokenizer, "save_pretrained", fails)
    expected = CheckpointError if isinstance(error, OSError) else ValueError
    with pytest.raises(expected, match=r"No space left|broken"):
        save(out, changed(small_adapter()), tokenizer, card=CARD)
    assert {path.name: path.read_bytes() for path in out.glob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])


def test_an_adapter_and_a_whole_model_are_not_mixed_in_one_folder(tmp_path):
    save(tmp_path / "model", tiny_model(), None, card=CARD)
    save(tmp_path / "adapter", small_adapter(), None, card=CARD)
    with pytest.raises(ConfigError, match="choose another folder"):
        save(tmp_path / "model", small_adapter(), None, card=CARD)
    with pytest.raises(ConfigError, match="choose another folder"):
        save(tmp_path / "adapter", tiny_model(), None, card=CARD)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="got the file"):
        save(tmp_path / "out", tiny_model(), None, card=CARD)
    assert (tmp_path / "out").read_text() == "mine"


def test_saving_draws_no_progress_bars(tmp_path, capsys):
    save(tmp_path / "out", tiny_model(), tiny(), card=CARD)
    assert capsys.readouterr() == ("", "")
