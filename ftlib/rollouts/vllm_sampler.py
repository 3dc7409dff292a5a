"""Sampling from a vLLM server, which gets the policy's adapter whenever it changes.

The adapter travels, never merged weights: it is small, and the server adds it as the trainer does. Start
the server with

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_SERVER_DEV_MODE=1 vllm serve BASE
        --enable-lora --max-lora-rank R --logprobs-mode processed_logprobs --max-logprobs -1

trl's client speaks with it. Left out: full fine-tuning, whose weights would have to be broadcast between
devices.
"""

from __future__ import annotations

import importlib.util
import secrets
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, cast, final

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ftlib.adapters.attach import AnyModel, model_capabilities
from ftlib.batches import Sampling
from ftlib.errors import CapabilityError, CheckpointError, ConfigError, MissingPackageError, ShapeError
from ftlib.models.parts import inner_model
from ftlib.models.quiet import quiet
from ftlib.rollouts.sampler import Sampled, seeds_of

__all__ = ["VLLMClient", "VLLMSampler"]

_SERVE = (
    "Start it with: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_SERVER_DEV_MODE=1 vllm serve BASE "
    "--enable-lora --max-lora-rank R --logprobs-mode processed_logprobs --max-logprobs -1"
)


class VLLMClient(Protocol):
    """What is used of trl's `VLLMClient`."""

    base_url: str
    session: Any

    def generate(self, prompts: list[list[int]], **options: Any) -> Mapping[str, Any]:
        """Completions and their log-probabilities."""

    def get_server_info(self) -> Mapping[str, Any]:
        """The server's configuration."""


@final
class VLLMSampler:
    """Draws completions from a vLLM server that holds the base, with the policy's adapter on it.

    Args:
        server: address of the server, or a client like trl's.
        policy: a model with an adapter; pushed at once.
        folder: where adapters are written for the server to read: on a disk both see, the same on every
            rank.
        tokenizer: for stop strings; not needed without them.
        concurrency: prompts asked for at once, >= 1.

    Raises:
        MissingPackageError: an address, without the packages that the client needs.
        CapabilityError: a model without an adapter, or one that changed the base.
        ConfigError: a server that reports other log-probabilities than those it draws from, or that does
            not take adapters.

    Example:
        >>> sampler = VLLMSampler("http://localhost:8000", model, "run/adapters")  # doctest: +SKIP
        >>> sampler.generate([[5, 6, 7]], Sampling(stop_ids=(2,), n=4), seed=0)  # doctest: +SKIP
    """

    def __init__(
        self,
        server: str | VLLMClient,
        policy: nn.Module,
        folder: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        concurrency: int = 64,
    ) -> None:
        if concurrency < 1:
            raise ConfigError(f"VLLMSampler: expected concurrency >= 1, got {concurrency}.")
        self._client = _connected(server) if isinstance(server, str) else server
        self._tokenizer, self._concurrency = tokenizer, concurrency
        self._folder = Path(folder).expanduser().resolve()
        mode = self._client.get_server_info()["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise ConfigError(
                f"VLLMSampler: expected a server that reports the log-probabilities it draws from "
                f"(--logprobs-mode processed_logprobs), got {mode!r}. {_SERVE}"
            )
        self._run = _shared_name(inner_model(policy).device)
        self._served: str | None = None
        self.sync(policy, 0)

    def sync(self, policy: nn.Module, version: int) -> None:
        """See `Sampler.sync`. Rank 0 pushes, the others wait for it.

        Raises:
            CapabilityError: a model without an adapter, or one that changed the base.
            CheckpointError: the server does not load the adapter.
        """
        _check_adapter(policy)
        # a new name each time: the server keeps computed prompts by the name of their adapter
        name = f"{self._run}-{version}"
        if _rank() == 0:
            folder = _written(policy, self._folder / name)
            self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            if self._served is not None:
                self._post("unload_lora_adapter", {"lora_name": self._served})
                shutil.rmtree(self._folder / self._served, ignore_errors=True)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self._served, self._version = name, version

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int | Sequence[int]
    ) -> list[Sampled]:
        """See `Sampler.generate`.

        Raises:
            ConfigError: stop strings without a tokenizer.
            ShapeError: an answer that is not `sampling.n` completions with a log-probability per token.
            Exception: what the client raises, for a prompt that is too long, say.
        """
        if sampling.stop_strings and self._tokenizer is None:
            raise ConfigError(
                f"VLLMSampler: expected a tokenizer for stop strings {list(sampling.stop_strings)}, got "
                "none. Give it one: VLLMSampler(..., tokenizer=tokenizer)."
            )
        seeds = seeds_of(seed, len(prompt_ids))
        with ThreadPoolExecutor(self._concurrency) as pool:
            drawn = pool.map(lambda ids, own: self._completed(list(ids), own, sampling), prompt_ids, seeds)
            return [row for rows in drawn for row in rows]

    def _completed(self, ids: list[int], seed: int, sampling: Sampling) -> list[Sampled]:
        """The completions of one prompt: a seed belongs to a request, and each has its own."""
        answer = self._client.generate(
            [ids],
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,  # of the token drawn alone
            generation_kwargs={
                "model": self._served,
                "seed": seed,
                "stop_token_ids": list(sampling.stop_ids),
                "stop": list(sampling.stop_strings),
                "ignore_eos": True,  # else the model's own stop ids end completions too
                "skip_special_tokens": False,
            },
        )
        rows, logprobs, tokens = (answer[key] for key in ("completion_ids", "logprobs", "logprob_token_ids"))
        if logprobs is None or not len(rows) == len(logprobs) == len(tokens) == sampling.n:
            raise ShapeError(
                f"VLLMSampler: expected {sampling.n} completions with log-probabilities, got {len(rows)} and "
                f"{'none' if logprobs is None else len(logprobs)}."
            )
        return [self._sampled(*row, sampling) for row in zip(rows, logprobs, tokens, strict=True)]

    def _sampled(
        self, ids: list[int], logprobs: list[list[float | None]], tokens: list[list[int]], sampling: Sampling
    ) -> Sampled:
        """One completion; of the likeliest tokens at each place, the one that was drawn."""
        drawn = [
            own[among.index(token)] if token in among else None
            for token, own, among in zip(ids, logprobs, tokens, strict=True)
        ]
        if any(logprob is None for logprob in drawn):
            raise ShapeError(
                "VLLMSampler: expected a log-probability of every token drawn, got none for some."
            )
        text = self._tokenizer.decode(ids) if self._tokenizer and sampling.stop_strings else ""
        return Sampled.of(
            ids,
            sampling,
            stop_string=any(stop in text for stop in sampling.stop_strings),
            logprobs=None if sampling.greedy else torch.tensor(cast(list[float], drawn)),
            version=self._version,
        )

    def _post(self, endpoint: str, payload: dict[str, str]) -> None:
        response = self._client.session.post(f"{self._client.base_url}/v1/{endpoint}", json=payload)
        if response.status_code != 200:
            raise CheckpointError(
                f"VLLMSampler: expected the server to answer {endpoint} of {payload['lora_name']}, got "
                f"{response.status_code}: {response.text}. {_SERVE}"
            )


def _connected(address: str) -> VLLMClient:
    missing = [name for name in ("vllm", "requests") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"VLLMSampler: the client needs {' and '.join(missing)}: pip install 'ftlib[vllm]'. "
            "TransformersSampler needs neither."
        )
    from trl.generation.vllm_client import VLLMClient as TrlClient

    return cast(VLLMClient, TrlClient(base_url=address))


def _check_adapter(policy: nn.Module) -> None:
    """The server holds the base as published, and gets what the adapter adds to it."""
    if policy is inner_model(policy):
        raise CapabilityError(
            "VLLMSampler: expected a model with an adapter, got a plain one, whose weights would have to "
            "travel whole. Train with ftlib.adapters.lora(), or sample with TransformersSampler."
        )
    if model_capabilities(cast(AnyModel, policy)).virtual_tokens:
        raise CapabilityError(
            "VLLMSampler: expected an adapter that adapts weights, got one with virtual tokens, which the "
            "server does not take. Sample with TransformersSampler, or train with ftlib.adapters.lora()."
        )
    if not model_capabilities(cast(AnyModel, policy)).off_is_base:
        raise CapabilityError(
            "VLLMSampler: expected an adapter that leaves the base as it is, got one that changed it (pissa, "
            "olora, ...), so that the server's base is another. Take lora(init='default')."
        )


def _written(policy: nn.Module, folder: Path) -> Path:
    """The active adapter in peft's format; returns where its files lie."""
    model = cast(Any, policy)
    name = model.active_adapter
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():  # peft would ask the hub whether the embeddings were resized
        model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    return folder if name == "default" else folder / str(name)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _shared_name(device: torch.device) -> str:
    """A name of this run's own on the server, the same on every rank."""
    number = torch.tensor(secrets.randbits(62), device=device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(number, src=0)
    return f"ftlib-{int(number):016x}"
