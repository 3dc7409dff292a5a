"""Virtual tokens on encoders: behind [CLS] for a classifier, as peft lays them out everywhere else."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModel

from ftlib.adapters import attach, load_adapter
from ftlib.batches import Group
from ftlib.data.collate import collate
from ftlib.errors import CapabilityError
from ftlib.export.save import save_weights
from ftlib.models import Masking, adapters_off, forward
from tests.encoders import encoder
from tests.models.masked_zoo import MASK, tiny_masked
from tests.trainers.preferences import moved
from tests.virtual import COUNT, SOFT

CLOSE = {"rtol": 1e-5, "atol": 2e-5}
ROWS = [k for k in SOFT if not k.startswith("prefix")]
CACHED = [k for k in SOFT if k.startswith("prefix")]
CLASSIFIERS = [
    *product(("bert", "roberta", "distilbert", "modernbert"), ["prompt"]),
    *product(("bert",), ROWS[1:]),
    *product(("bert", "roberta"), CACHED),
]
FILLERS = [
    *product(("bert", "roberta", "distilbert"), ["prompt"]),
    *product(("bert",), ROWS[1:]),
    *product(("bert", "roberta"), CACHED),
]
HIDDEN = Masking(MASK)


def soft(base: nn.Module, kind: str) -> PeftModel:
    """With an adapter that has learnt something."""
    torch.manual_seed(0)
    model = moved(attach(base, SOFT[kind]()))
    assert isinstance(model, PeftModel)
    return model.eval()


def text(ids: list[int], prefix: int = 0) -> Group:
    """One row, the first tokens of which are its first segment; its last token is trained."""
    own = torch.tensor(ids[prefix:])
    weights = torch.zeros(len(own))
    weights[-1] = 1.0
    return Group(torch.tensor(ids[:prefix]).long(), torch.zeros(prefix), (own,), (weights,))


TEXTS = [text([2, 7, 9, 11, 8, 3]), text([2, 12, 3]), text([2, 10, 3, 6, 9, 5, 8, 7, 3], prefix=3)]


def scores(model: nn.Module, groups: list[Group]) -> Tensor:
    return forward(model, collate(groups, score_all=True), scores=True).scores_CK


def own_scores(model: PeftModel, group: Group) -> Tensor:
    """Of one row, laid out by hand where peft would pool a virtual token; by peft elsewhere."""
    ids_1L = torch.cat([group.prefix_ids, group.continuation_ids[0]])[None]
    inner, more = model.get_base_model(), {}
    if getattr(inner.config, "type_vocab_size", 0) > 1:
        border = len(group.prefix_ids) or ids_1L.shape[1]
        more["token_type_ids"] = (torch.arange(ids_1L.shape[1]) >= border).long()[None]
    if model.active_peft_config.peft_type == "PREFIX_TUNING":
        return model(input_ids=ids_1L, **more).logits
    embeds_1LD, prompt_1nD = inner.get_input_embeddings()(ids_1L), model.get_prompt(1)
    if more:
        more["token_type_ids"] = torch.cat([torch.zeros(1, COUNT).long(), more["token_type_ids"]], 1)
    embeds_1SD = torch.cat([embeds_1LD[:, :1], prompt_1nD, embeds_1LD[:, 1:]], 1)
    return inner(inputs_embeds=embeds_1SD, **more).logits


@pytest.mark.parametrize(("arch", "kind"), CLASSIFIERS)
def test_f3_a_classifier_pools_its_own_first_token_in_any_batch(arch: str, kind: str) -> None:
    model = soft(encoder(arch), kind)
    alone = torch.cat([own_scores(model, group) for group in TEXTS])
    assert_close(scores(model, TEXTS), alone, **CLOSE)
    with adapters_off(model):
        assert torch.equal(scores(model, TEXTS), scores(encoder(arch), TEXTS))
    gap = (scores(encoder(arch), TEXTS) - alone).detach()
    assert float(gap.abs().max()) > 1e-2


@pytest.mark.parametrize(("arch", "kind"), CLASSIFIERS)
def test_a_classifiers_weights_all_have_a_gradient(arch: str, kind: str) -> None:
    model = soft(encoder(arch), kind)
    (scores(model, TEXTS) ** 2).sum().backward()
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("prompt_encoder" in name for name in trained)
    assert all(grad is not None and bool(grad.any()) for grad in trained.values())


@pytest.mark.parametrize(("arch", "kind"), FILLERS)
def test_a_mask_is_read_where_peft_has_it(arch: str, kind: str) -> None:
    """Its column is shifted by n where virtual tokens are columns, and stays where they are a cache."""
    model = soft(tiny_masked(arch), kind)
    alone = []
    for group in TEXTS:
        ids_L = torch.cat([group.prefix_ids, group.continuation_ids[0]])
        target, ids_L[-1] = int(ids_L[-1]), MASK
        logits_SV = model(input_ids=ids_L[None]).logits[0]
        assert len(logits_SV) == len(ids_L) + (0 if kind in CACHED else COUNT)
        alone.append(logits_SV[-1].log_softmax(-1)[target])
    found_N = forward(model, collate(TEXTS), masking=HIDDEN).logprobs_N
    assert_close(found_N, torch.stack(alone), **CLOSE)
    found_N.sum().backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in trained)


@pytest.mark.parametrize("arch", ["distilbert", "modernbert"])
@pytest.mark.parametrize("kind", CACHED)
def test_f11_a_prefix_on_an_encoder_without_a_cache_is_refused(arch: str, kind: str) -> None:
    with pytest.raises(CapabilityError, match="an encoder that takes keys and values for a prefix"):
        attach(encoder(arch), SOFT[kind]())


def test_an_encoder_that_pools_every_token_is_refused() -> None:
    with pytest.raises(CapabilityError, match=r"got ModernBertFor.* with classifier_pooling='mean'"):
        attach(encoder("modernbert", classifier_pooling="mean"), SOFT["prompt"]())


def test_an_encoder_without_a_head_is_refused() -> None:
    with pytest.raises(CapabilityError, match="classifies or fills masks for virtual tokens, got BertModel"):
        attach(encoder(auto=AutoModel), SOFT["prompt"]())


@pytest.mark.parametrize("kind", ROWS)
def test_what_plain_peft_would_pool_it_refuses_by_name(kind: str, tmp_path: Path) -> None:
    model = soft(encoder(), kind)
    save_weights(tmp_path, model)
    with pytest.raises(KeyError, match=r"behind \[CLS\], where peft puts none: load it with ftlib.load"):
        PeftModel.from_pretrained(encoder(), str(tmp_path))
    again = load_adapter(encoder(seed=0), tmp_path)
    assert_close(scores(again.eval(), TEXTS), scores(model, TEXTS), rtol=0, atol=1e-6)


def test_what_plain_peft_pooled_is_refused_by_name(tmp_path: Path) -> None:
    config = SOFT["prompt"]().config
    config.task_type = "SEQ_CLS"
    get_peft_model(encoder(), config).save_pretrained(str(tmp_path))
    with pytest.raises(CapabilityError, match="those of plain peft stand before"):
        load_adapter(encoder(), tmp_path)
