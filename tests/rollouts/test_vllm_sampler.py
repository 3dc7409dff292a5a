import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from ftlib import adapters
from ftlib.batches import Sampling
from ftlib.errors import CapabilityError, CheckpointError, ConfigError, MissingPackageError, ShapeError
from ftlib.rollouts import VLLMSampler
from tests.models_zoo import tiny_model
from tests.rollouts.vllm_fake import FakeServer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def policy(name="default", **options):
    return adapters.attach(tiny_model(), adapters.lora(r=2, **options), name=name)


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    return model


@pytest.mark.parametrize("name", ["default", "writer"])
def test_the_server_gets_the_adapter_and_nothing_else(tmp_path, name):
    model = policy(name)
    server = FakeServer(model)
    VLLMSampler(server, model, tmp_path)
    ((_, folder),) = server.loaded.items()
    saved = load_file(f"{folder}/adapter_model.safetensors")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(tensor.numel() for tensor in saved.values()) == sum(parameter.numel() for parameter in trained)
    assert all("lora_" in key for key in saved)


def test_a_sync_brings_a_new_adapter_under_a_new_name_and_takes_the_old_one_away(tmp_path):
    model = policy()
    server = FakeServer(model)
    sampler = VLLMSampler(server, model, tmp_path)
    ((first, _),) = server.loaded.items()
    sampler.sync(changed(model), 1)
    ((second, folder),) = server.loaded.items()
    assert first != second
    assert [path.name for path in tmp_path.iterdir()] == [second]
    saved = load_file(f"{folder}/adapter_model.safetensors")
    own = {key.replace(".default", ""): value for key, value in model.state_dict().items() if "lora_" in key}
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[key], own[key]) for key in saved)


def test_runs_on_one_server_keep_apart(tmp_path):
    model = policy()
    server = FakeServer(model)
    VLLMSampler(server, model, tmp_path)
    VLLMSampler(server, model, tmp_path)
    assert len(server.loaded) == 2


def test_every_setting_is_sent_so_that_the_servers_defaults_never_act(tmp_path):
    model = policy()
    server = FakeServer(model)
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=3, stop_ids=(7,), n=2)
    VLLMSampler(server, model, tmp_path).generate([[5], [6]], sampling, [11, 12])
    sent = sorted(server.requests, key=lambda request: request["prompts"])
    assert [request["generation_kwargs"]["seed"] for request in sent] == [11, 12]
    for request in sent:
        told = {key: request[key] for key in ("temperature", "top_p", "top_k", "max_tokens", "n", "logprobs")}
        assert told == {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 3, "n": 2, "logprobs": 0}
        assert request["generation_kwargs"]["stop_token_ids"] == [7]
        assert (request["repetition_penalty"], request["min_p"]) == (1.0, 0.0)


def test_log_probabilities_of_other_tokens_are_told_apart(tmp_path):
    """A server may report the likeliest tokens as well, in order of probability."""
    model = policy()

    class Talkative(FakeServer):
        def generate(self, *args, **kwargs):
            answer = super().generate(*args, **kwargs)
            answer["logprobs"] = [[[9.0, *own] for own in row] for row in answer["logprobs"]]
            answer["logprob_token_ids"] = [[[-1, *own] for own in row] for row in answer["logprob_token_ids"]]
            return answer

    plain = VLLMSampler(FakeServer(model), model, tmp_path).generate([[5]], Sampling(), 0)
    talkative = VLLMSampler(Talkative(model), model, tmp_path).generate([[5]], Sampling(), 0)
    assert torch.equal(plain[0].logprobs, talkative[0].logprobs)


@pytest.mark.parametrize("lacks", ["logprobs", "a row", "a token"])
def test_an_answer_that_lacks_something_is_refused(tmp_path, lacks):
    model = policy()

    class Forgetful(FakeServer):
        def generate(self, *args, **kwargs):
            answer = super().generate(*args, **kwargs)
            if lacks == "logprobs":
                answer["logprobs"] = answer["logprob_token_ids"] = None
            elif lacks == "a row":
                answer = {key: value[:1] for key, value in answer.items()}
            else:
                answer["logprob_token_ids"][0][0] = [-1]
            return answer

    with pytest.raises(ShapeError, match="VLLMSampler: expected"):
        VLLMSampler(Forgetful(model), model, tmp_path).generate([[5]], Sampling(n=2), 0)


def test_a_server_that_reports_raw_log_probabilities_is_refused(tmp_path):
    model = policy()
    with pytest.raises(ConfigError, match=r"got 'raw_logprobs'\. Start it with: .*processed_logprobs"):
        VLLMSampler(FakeServer(model, logprobs_mode="raw_logprobs"), model, tmp_path)


def test_a_server_that_refuses_the_adapter_is_quoted(tmp_path):
    model = policy()
    with pytest.raises(CheckpointError, match=r"400: LoRA rank 64 is greater .*--max-lora-rank"):
        VLLMSampler(FakeServer(model, refuses="load_lora_adapter"), model, tmp_path)


def test_a_plain_model_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(CapabilityError, match="expected a model with an adapter"):
        VLLMSampler(FakeServer(model), model, tmp_path)


def test_an_adapter_that_changed_the_base_is_refused(tmp_path):
    model = policy(init="pissa")
    with pytest.raises(CapabilityError, match="leaves the base as it is"):
        VLLMSampler(FakeServer(model), model, tmp_path)


def test_stop_strings_need_a_tokenizer(tmp_path):
    model = policy()
    sampler = VLLMSampler(FakeServer(model), model, tmp_path)
    with pytest.raises(ConfigError, match="expected a tokenizer for stop strings"):
        sampler.generate([[5]], Sampling(stop_strings=("end",)), 0)


def test_a_concurrency_below_one_is_refused(tmp_path):
    model = policy()
    with pytest.raises(ConfigError, match="concurrency >= 1, got 0"):
        VLLMSampler(FakeServer(model), model, tmp_path, concurrency=0)


def test_without_vllm_an_address_names_the_install_command(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    with pytest.raises(MissingPackageError, match=r"needs vllm: pip install 'ftlib\[vllm\]'"):
        VLLMSampler("http://localhost:8000", policy(), tmp_path)
