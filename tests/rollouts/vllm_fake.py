"""A vLLM server in this process: trl's client by its signatures, a tiny model behind it.

Calls are bound to the signatures of the real client, so that an argument it does not know fails here.
"""

from __future__ import annotations

import inspect
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trl.generation.vllm_client import VLLMClient

from ftlib.batches import Sampling
from ftlib.rollouts import TransformersSampler
from tests.data.tokenizers_zoo import tiny

__all__ = ["TOKENIZER", "FakeServer"]

TOKENIZER = tiny()


class FakeServer:
    """What `VLLMSampler` uses of trl's client. `loaded` are the adapters it holds."""

    def __init__(self, model: Any, *, logprobs_mode: str = "processed_logprobs", refuses: str = "") -> None:
        self.base_url = "http://fake:8000"
        self.session = SimpleNamespace(post=self._post)
        self.loaded: dict[str, str] = {}
        self.requests: list[dict[str, Any]] = []
        self._mode, self._refuses = logprobs_mode, refuses
        self._sampler, self._lock = TransformersSampler(model, TOKENIZER), threading.Lock()

    def get_server_info(self) -> dict[str, Any]:
        inspect.signature(VLLMClient.get_server_info).bind(self)
        return {"model_config": {"logprobs_mode": self._mode}}

    def generate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = inspect.signature(VLLMClient.generate).bind(self, *args, **kwargs)
        bound.apply_defaults()
        asked = bound.arguments
        extra = asked["generation_kwargs"]
        assert extra["model"] in self.loaded, "a request for an adapter that is not loaded"
        assert extra["ignore_eos"]
        self.requests.append(dict(asked))
        sampling = Sampling(
            temperature=asked["temperature"],
            top_p=asked["top_p"],
            top_k=asked["top_k"],
            max_new_tokens=asked["max_tokens"],
            stop_ids=tuple(extra["stop_token_ids"]),
            n=asked["n"],
            stop_strings=tuple(extra["stop"]),
        )
        with self._lock:  # requests come from several threads
            rows = self._sampler.generate(asked["prompts"], sampling, [extra["seed"]])
        logprobs = [[0.0] * len(row.ids) if row.logprobs is None else row.logprobs.tolist() for row in rows]
        return {
            "prompt_ids": asked["prompts"],
            "completion_ids": [row.ids.tolist() for row in rows],
            "logprobs": [[[number] for number in row] for row in logprobs],
            "logprob_token_ids": [[[token] for token in row.ids.tolist()] for row in rows],
        }

    def _post(self, url: str, *, json: dict[str, str]) -> SimpleNamespace:
        endpoint = url.removeprefix(f"{self.base_url}/v1/")
        if endpoint == self._refuses:
            return SimpleNamespace(status_code=400, text="LoRA rank 64 is greater than max_lora_rank 16.")
        if endpoint == "load_lora_adapter":
            assert json["lora_name"] not in self.loaded
            assert (Path(json["lora_path"]) / "adapter_config.json").is_file()
            self.loaded[json["lora_name"]] = json["lora_path"]
        elif endpoint == "unload_lora_adapter":
            del self.loaded[json["lora_name"]]
        else:
            return SimpleNamespace(status_code=404, text="Not Found")
        return SimpleNamespace(status_code=200, text="Success")
