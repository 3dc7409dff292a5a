"""The fused projection equals peft's, runs where it is exact, and leaves the rest to peft.

Shapes: T rows, I input width, O output width, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ftlib.adapters import attach, lora
from ftlib.adapters import fused as fused_module
from ftlib.adapters.fused import FusedLoraLinear, _LoraProjection
from ftlib.models import forward
from ftlib.models.precision import bf16_is_fast
from tests.models_zoo import WEIGHT_STD, tiny_model
from tests.packed import random_batch

I, O, R = 6, 5, 2  # noqa: E741
CONFIG: dict[str, Any] = {"r": R, "lora_alpha": 3, "target_modules": ["0"]}


def pair(
    *, bias: bool = True, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[PeftModel, PeftModel]:
    """The same layer with the same adapter, through ftlib and through peft alone."""

    def build(wrap: Callable[[nn.Module, LoraConfig], PeftModel]) -> PeftModel:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(I, O, bias=bias)).to(dtype)
        model = wrap(base, LoraConfig(**(CONFIG | options)))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight)
        return model

    return build(attach), build(get_peft_model)  # type: ignore[arg-type]


def output_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(1)  # of dropout
    output = model(x)
    coefficients = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output.float() * coefficients).sum().backward()
    assert x.grad is not None
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"output": output.detach(), "input": x.grad} | gradients


@pytest.fixture
def no_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the fused form ran")

    monkeypatch.setattr(fused_module._LoraProjection, "apply", refuse)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


INPUTS = {
    "rows": random(7, I),
    "batch": random(2, 3, I),
    "not contiguous": random(I, 3, 2).transpose(0, 2),
    "one row": random(I),
    "no rows": random(0, I),
}


@pytest.mark.parametrize("shape", list(INPUTS))
@pytest.mark.parametrize("options", [{"bias": True}, {"bias": False}, {"use_rslora": True}], ids=str)
def test_equals_pefts_forward_and_gradients_in_float32(shape: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(**options)
    assert type(ours.base_model.model[0]) is FusedLoraLinear
    assert type(theirs.base_model.model[0]) is PeftLoraLinear
    found, expected = (output_and_gradients(model, INPUTS[shape]) for model in (ours, theirs))
    assert found.keys() == expected.keys()
    assert {"output", "input"} < found.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-6 * float(value.norm()), name


def test_gradients_are_those_of_finite_differences() -> None:
    sizes = {"x": (3, I), "w": (O, I), "b": (O,), "A": (R, I), "B": (O, R)}
    x, w, b, a, big = (torch.randn(size, dtype=torch.float64) for size in sizes.values())
    inputs = [tensor.requires_grad_() for tensor in (x, a, big)]
    assert torch.autograd.gradcheck(lambda x, a, big: _LoraProjection.apply(x, w, b, a, big, 1.5), inputs)


def add_second(model: PeftModel) -> None:
    torch.manual_seed(3)
    model.add_adapter("second", LoraConfig(**CONFIG, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def add_dora(model: PeftModel) -> None:
    torch.manual_seed(3)
    model.add_adapter("second", LoraConfig(**CONFIG, init_lora_weights=False, use_dora=True))
    model.set_adapter("second")


def hook(model: PeftModel) -> None:
    base = model.base_model.model[0].get_base_layer()
    base.register_forward_hook(lambda _module, _inputs, output: output * 3)


FALLBACKS: dict[str, tuple[dict[str, Any], Callable[[PeftModel], object]]] = {
    "dropout in training": ({"lora_dropout": 0.5}, lambda model: model.train()),
    "DoRA": ({"use_dora": True}, lambda model: model.train()),
    "DoRA beside plain LoRA": ({}, add_dora),
    "a bias in the adapter": ({"lora_bias": True}, lambda model: model.train()),
    "merged": ({}, lambda model: model.merge_adapter()),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "two active": ({}, add_second),
    "a trained base": ({}, lambda model: model.requires_grad_(True)),
    "a hooked base": ({}, hook),
}


@pytest.mark.usefixtures("no_fusion")
@pytest.mark.parametrize("case", list(FALLBACKS))
def test_what_is_not_covered_runs_pefts_forward(case: str) -> None:
    options, change = FALLBACKS[case]
    results = []
    for model in pair(**options):
        change(model)
        results.append(output_and_gradients(model, INPUTS["rows"]))
    assert_close(results[0], results[1], rtol=0, atol=0)


def test_dropout_is_fused_in_evaluation() -> None:
    ours, theirs = pair(lora_dropout=0.5)
    found, expected = (output_and_gradients(model.eval(), INPUTS["rows"]) for model in (ours, theirs))
    assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("no_fusion")
def test_autocast_is_left_to_peft() -> None:
    results = []
    for model in pair():
        with torch.autocast("cpu", torch.bfloat16):
            results.append(model(INPUTS["rows"]))
    assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_quantised_subclass_of_linear_is_left_to_peft() -> None:
    class Packed(nn.Linear):
        """As bitsandbytes' layers are: a Linear by inheritance, with weights of another form."""

    model = attach(nn.Sequential(Packed(I, O)), LoraConfig(**CONFIG))  # type: ignore[arg-type]
    assert type(model.base_model.model[0]) is PeftLoraLinear


@torch.no_grad()
def lora_model(attach_it: Callable[..., PeftModel], dtype: torch.dtype, std: float) -> PeftModel:
    """A llama wide enough for statistics, its weights of deviation `std` and exact in bf16."""
    model = tiny_model(hidden_size=128, intermediate_size=256, head_dim=32)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.mul_(std / WEIGHT_STD)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = attach_it(model.bfloat16().to(dtype), config)
    for number, (name, weight) in enumerate(model.named_parameters()):
        if "lora_" in name:
            generator = torch.Generator().manual_seed(number)
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return model.train()


def adapter_gradients(model: nn.Module) -> Tensor:
    batch = random_batch()
    (forward(model, batch).logprobs_N * batch.weights_N).sum().backward()
    return torch.cat(
        [weight.grad.flatten().float() for weight in model.parameters() if weight.grad is not None]
    )


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("std", [0.02, 0.1], ids=["usual weights", "weights that amplify rounding"])
def test_bf16_adapter_gradients_are_pefts_and_no_further_from_float32(std: float) -> None:
    """Rounding turns both away from the float32 gradient; ours by no more than a tenth above peft's angle.

    That holds of products in hardware, where `ftlib.load` takes bfloat16. Emulated ones round otherwise, by
    up to a fifth of peft's angle.
    """
    ours, theirs, exact = (
        adapter_gradients(lora_model(attach_it, dtype, std))
        for attach_it, dtype in (
            (attach, torch.bfloat16),
            (get_peft_model, torch.bfloat16),
            (attach, torch.float32),
        )
    )
    assert cosine(ours, theirs) >= (0.9999 if std == 0.02 else 0.999)
    if bf16_is_fast(torch.device("cpu"))[0]:
        assert math.acos(cosine(ours, exact)) <= 1.1 * math.acos(cosine(theirs, exact))


class Products(TorchDispatchMode):
    """The dtypes of every matrix product, those with an inner width of one left out (rotary angles)."""

    NAMES = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul")

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.NAMES:
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            if left.shape[-1] > 1:
                self.dtypes += [left.dtype, right.dtype]
        return output


@pytest.mark.parametrize("arch", ["llama", "gemma2", "opt"])
def test_a_bf16_step_has_no_float32_matrix_product(arch: str) -> None:
    model = attach(tiny_model(arch).to(torch.bfloat16), lora(r=4)).train()
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    forward(model, random_batch())  # plans
    with Products() as products:
        gradients = adapter_gradients(model)
    assert len(products.dtypes) > 100
    assert set(products.dtypes) == {torch.bfloat16}
    assert float(gradients.norm()) > 0
