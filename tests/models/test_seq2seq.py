"""Encoder-decoders through the one forward: equal to the model itself, each prompt encoded once."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from transformers import BartConfig, LongT5Config, MT5Config, PretrainedConfig, PreTrainedModel, UMT5Config

import ftlib as ft
from ftlib.adapters import attach, lora
from ftlib.batches import Group
from ftlib.data.collate import collate
from ftlib.errors import CapabilityError, ConfigError, DataError
from ftlib.losses import nll
from ftlib.models.checkpointing import enable_checkpointing
from ftlib.models.forward import Scorer, forward
from ftlib.models.heads import as_reward_model
from ftlib.models.plan import plan_for
from ftlib.objectives import SFT
from ftlib.rollouts import TransformersSampler
from tests.models_zoo import PAD, VOCAB, tiny_model
from tests.packed import random_batch, random_groups
from tests.seq2seq import SHAPES, SMALL, START, own_states, t5_config, t5_model, t5_tokenizer

GROUPS, BATCH = random_groups(SHAPES), random_batch(SHAPES)
SINGLE = tuple((prompt, lengths[:1]) for prompt, lengths in SHAPES)
BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
    "max_position_embeddings": 64,
}
KINDS: dict[str, PretrainedConfig] = {
    "t5": t5_config(),
    "t5 v1.1": t5_config(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "mt5": MT5Config(**SMALL),
    "longt5": LongT5Config(**SMALL, local_radius=4),
    "bart": BartConfig(**BART),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_says_what_the_model_itself_says(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = t5_model(config=KINDS[kind])
    with caplog.at_level(logging.INFO, logger="ftlib.models.plan"), torch.no_grad():
        scored = forward(model, BATCH, entropy=True, hidden=True, temperature=0.7)
        own = own_states(model, GROUPS, temperature=0.7)
    assert_close(scored.logprobs_N, own.logprobs_N, rtol=1e-5, atol=2e-5)
    assert_close(scored.entropy_N, own.entropy_N, rtol=1e-5, atol=2e-5)
    assert_close(scored.last_CD, own.last_CD, rtol=1e-5, atol=2e-5)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        f"{type(model).__name__} takes the padded path: an encoder reads each prompt once, and a decoder "
        "each continuation of it"
    )


def test_t5_scales_states_before_a_head_that_is_its_embedding() -> None:
    """32 ** -0.5 where the two are one matrix, 1 in version 1.1."""
    assert plan_for(t5_model()).head.scale == 32**-0.5
    assert plan_for(t5_model(tie_word_embeddings=False)).head.scale == 1.0


def padded(groups: list[Group], *, side: str) -> dict[str, Tensor]:
    """What transformers' own collator makes of one continuation per prompt: labels padded with -100."""
    prompts = [member.prefix_ids for member in groups]
    return {
        "input_ids": pad_sequence(prompts, batch_first=True, padding_value=PAD, padding_side=side),
        "attention_mask": pad_sequence(
            [torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side=side
        ),
        "labels": pad_sequence(
            [member.continuation_ids[0] for member in groups], batch_first=True, padding_value=-100
        ),
    }


def unweighted(shapes: Any) -> list[Group]:
    return [
        Group(
            member.prefix_ids,
            member.prefix_weights,
            member.continuation_ids,
            tuple(torch.ones_like(weights) for weights in member.continuation_weights),
        )
        for member in random_groups(shapes)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["t5", "t5 v1.1"])
def test_the_loss_and_its_gradient_are_those_of_transformers(kind: str, side: str) -> None:
    model, groups = t5_model(config=KINDS[kind]), unweighted(SINGLE)
    own = model(**padded(groups, side=side)).loss
    expected = torch.autograd.grad(own, list(model.parameters()))
    batch = collate(groups)
    loss = SFT()(model, batch).loss(SFT().counts(batch))
    assert_close(loss, own, rtol=1e-5, atol=0)
    for found, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.norm()))


@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 2, 3, 4)], ids=["two by two", "one by one"])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(cuts: tuple[int, ...]) -> None:
    model = attach(t5_model(), lora(4))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def gradients(groups: list[Group]) -> tuple[float, tuple[Tensor, ...]]:
        batch = collate(groups)
        loss = (batch.weights_N * nll(forward(model, batch).logprobs_N)).sum()
        return loss.item(), torch.autograd.grad(loss, weights)

    loss, whole = gradients(GROUPS)
    parts = [gradients(GROUPS[start:stop]) for start, stop in pairwise(cuts)]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-5)
    for index, wanted in enumerate(whole):
        assert wanted.any()
        found = torch.stack([grads[index] for _, grads in parts]).sum(0)
        assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.norm()))


class Reads:
    """Ids that encoder and decoder were given."""

    def __init__(self, model: nn.Module) -> None:
        self.encoder: list[Tensor] = []
        self.decoder: list[Tensor] = []
        for part, seen in ((model.get_encoder(), self.encoder), (model.get_decoder(), self.decoder)):
            part.register_forward_pre_hook(
                lambda _, __, named, seen=seen: seen.append(named["input_ids"]), with_kwargs=True
            )


@pytest.fixture
def reads() -> tuple[nn.Module, Reads]:
    model = t5_model()
    plan_for(model)  # the check at the start reads too
    return model, Reads(model)


def test_a_prompt_is_encoded_once_however_many_continuations_share_it(
    reads: tuple[nn.Module, Reads],
) -> None:
    model, seen = reads
    forward(model, BATCH)
    (prompts_GP,), (read_CL,) = seen.encoder, seen.decoder
    assert prompts_GP.shape == (len(SHAPES), 13)
    assert read_CL.shape == (sum(len(lengths) for _, lengths in SHAPES), 9)


def test_the_decoder_starts_once_and_reads_each_target_but_the_last(
    reads: tuple[nn.Module, Reads],
) -> None:
    model, seen = reads
    forward(model, BATCH)
    rows = seen.decoder[0].tolist()
    answers = [ids.tolist() for member in GROUPS for ids in member.continuation_ids]
    assert [row[: len(answer)] for row, answer in zip(rows, answers, strict=True)] == [
        [START, *answer[:-1]] for answer in answers
    ]


def test_a_target_that_is_the_pad_id_counts() -> None:
    """Its log-probability is the model's own, and leaving it out would change the loss."""
    model, ids = t5_model(), torch.tensor([7, PAD, 9])
    member = Group(torch.tensor([5, PAD, 6]), torch.zeros(3), (ids,), (torch.ones(3),))
    with torch.no_grad():
        scored, own = forward(model, collate([member])), own_states(model, [member])
    assert len(scored.logprobs_N) == 3
    assert_close(scored.logprobs_N, own.logprobs_N, rtol=1e-5, atol=1e-5)


def test_values_are_of_the_states_before_each_target_and_after_the_last() -> None:
    model, head = t5_model(), nn.Linear(32, 1)
    with torch.no_grad():
        scored = forward(Scorer(model, value_head=head), BATCH, values=True)
        alone = forward(Scorer(model, value_head=head), collate(GROUPS[-1:], score_all=True), values=True)
        own = own_states(model, GROUPS)
        assert_close(scored.end_values_C, head(own.last_CD)[:, 0], rtol=1e-5, atol=1e-5)
    assert scored.values_N.shape == BATCH.targets_N.shape
    assert_close(scored.values_N[-len(alone.values_N) :], alone.values_N, rtol=1e-5, atol=1e-5)


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointed in (False, True):
        model = attach(t5_model(), lora(4, init="gaussian")).train()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        if checkpointed:
            enable_checkpointing(model)
        forward(model, BATCH).logprobs_N.sum().backward()
        found.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    for one, other in zip(*found, strict=True):
        assert one.any()
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_check_at_the_start(dtype: torch.dtype) -> None:
    assert plan_for(t5_model().to(dtype)).path == "padded"


# -- what is refused -------------------------------------------------------------------------------


def test_a_group_without_a_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="a prompt in every group for an encoder-decoder, got 1 without one"):
        forward(t5_model(), random_batch(((0, (4,)), (3, (2,)))))


def test_a_prompt_with_a_loss_weight_is_refused() -> None:
    ids = torch.tensor([4, 5])
    batch = collate([Group(ids, torch.ones(2), (ids,), (torch.ones(2),))])
    with pytest.raises(DataError, match="prompts to be read only, got loss weights on their tokens"):
        forward(t5_model(), batch)


def test_the_grouped_path_is_refused_with_its_reason() -> None:
    with pytest.raises(
        CapabilityError, match=r"got T5Stack: an encoder reads each prompt once.* Leave `path`"
    ):
        forward(t5_model(), BATCH, path="grouped")


def test_a_config_without_a_start_token_is_refused() -> None:
    model = t5_model()
    model.config.decoder_start_token_id = None
    with pytest.raises(CapabilityError, match="names a decoder_start_token_id, got T5ForConditional"):
        forward(model, BATCH)


def test_a_scale_that_no_setting_declares_is_refused() -> None:
    """UMT5 scales like T5 and has no setting that says so."""
    model = t5_model(config=UMT5Config(**SMALL))
    with pytest.raises(CapabilityError, match="linear head on the decoder's last hidden state, got UMT5"):
        forward(model, BATCH)


def test_reward_models_and_samplers_want_a_decoder() -> None:
    for make in (as_reward_model, TransformersSampler):
        with pytest.raises(CapabilityError, match="expected a decoder, got the encoder-decoder T5For"):
            make(t5_model())


# -- loading ---------------------------------------------------------------------------------------


def of_version_1_1() -> PreTrainedModel:
    """Embeddings and head are two matrices, as in Flan-T5."""
    model = t5_model(tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    of_version_1_1().save_pretrained(tmp_path)
    t5_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("adapter", [None, "lora", "full"])
def test_an_encoder_decoder_loads_as_it_was_saved(folder: Path, adapter: str | None) -> None:
    given = None if adapter is None else getattr(ft.adapters, adapter)()
    model, _ = ft.load(folder, task="seq2seq_lm", adapter=given, dtype="float32")
    saved = of_version_1_1()
    with torch.no_grad():
        assert torch.equal(forward(model, BATCH).logprobs_N, forward(saved, BATCH).logprobs_N)
    assert plan_for(model).head.scale == 1.0
    if adapter == "lora":
        assert model.active_peft_config.task_type == "SEQ_2_SEQ_LM"


def test_the_task_must_be_that_of_the_model(folder: Path, tmp_path: Path) -> None:
    for task in ("causal_lm", "reward"):
        with pytest.raises(
            ConfigError, match=f"task='seq2seq_lm' for the encoder-decoder .* got task='{task}'"
        ):
            ft.load(folder, task=task)
        with pytest.raises(ConfigError, match="for the encoder-decoder T5ForConditionalGeneration"):
            ft.load(t5_model(), task=task)
    with pytest.raises(ConfigError, match="an encoder-decoder for task='seq2seq_lm', got LlamaForCausalLM"):
        ft.load(tiny_model("llama"), task="seq2seq_lm")
