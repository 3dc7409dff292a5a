"""The log-probability head: values, gradients, precision and memory.

Shapes: N scored rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import entropy, token_logprobs
from ftlib.models import head as head_module
from ftlib.models import linear_head
from ftlib.models.head import Entropy, Head, head_logprobs

N, D, V = 7, 5, 11
ROWS_OF_A_CHUNK = 3  # three chunks, the last of one row


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (head_module, linear_head):
        monkeypatch.setattr(module, "CHUNK", ROWS_OF_A_CHUNK)


class TwoLayers(nn.Module):
    """A head that is not one matrix, as an adapter on the output embedding makes it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(D, D), nn.Linear(D, V, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.outer(self.inner(hidden).tanh())


def reference(head: Head, hidden_ND: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of all logits at once, left to autograd."""
    logits_NV = head.module(hidden_ND) * head.scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    logprobs_N = token_logprobs(logits_NV, targets_N, temperature=temperature)
    return logprobs_N, entropy(logits_NV / temperature)


def problem(
    kind: str, *, bias: bool, softcap: float | None, scale: float, dtype: torch.dtype = torch.float64
) -> tuple[Head, Tensor, Tensor]:
    module = TwoLayers(bias) if kind == "module" else nn.Linear(D, V, bias=bias)
    module = module.to(dtype).requires_grad_(kind != "frozen")
    return Head(module, softcap, scale), torch.randn(N, D, dtype=dtype), targets()


def targets() -> Tensor:
    return torch.randint(V, (N,))


ENTROPIES: tuple[Entropy, ...] = (False, True, "gradient")
GRID = [
    pytest.param(kind, bias, softcap, scale, temperature, id=f"{kind}-{name}")
    for kind in ("frozen", "trainable", "module")
    for name, bias, softcap, scale, temperature in (
        ("plain", False, None, 1.0, 1.0),
        ("tempered", False, None, 1.0, 0.7),
        ("bias", True, None, 1.0, 1.0),
        ("softcap", False, 0.8, 1.0, 1.0),
        ("scale", False, None, 0.3, 1.0),
        ("all", True, 0.8, 1.7, 1.3),
    )
]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("kind", "bias", "softcap", "scale", "temperature"), GRID)
def test_equals_the_log_softmax_of_the_logits(
    kind: str, bias: bool, softcap: float | None, scale: float, temperature: float
) -> None:
    head, hidden_ND, targets_N = problem(kind, bias=bias, softcap=softcap, scale=scale)
    logprobs_N, entropy_N = reference(head, hidden_ND.requires_grad_(), targets_N, temperature)
    output = head_logprobs(head, hidden_ND, targets_N, temperature=temperature, entropy=True)
    assert_close(output.logprobs_N, logprobs_N)
    assert_close(output.entropy_N, entropy_N)
    assert output.logprobs_N.requires_grad
    assert output.entropy_N is not None
    assert not output.entropy_N.requires_grad


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("kind", "bias", "softcap", "scale", "temperature"), GRID)
def test_gradients_are_those_of_finite_differences_under_any_coefficients(
    kind: str, bias: bool, softcap: float | None, scale: float, temperature: float
) -> None:
    head, hidden_ND, targets_N = problem(kind, bias=bias, softcap=softcap, scale=scale)
    coefficients_N = torch.randn(N, dtype=torch.float64)
    weights = [weight for weight in head.module.parameters() if weight.requires_grad]

    def loss(hidden_ND: Tensor, *_: Tensor) -> Tensor:
        logprobs_N = head_logprobs(head, hidden_ND, targets_N, temperature=temperature).logprobs_N
        return (coefficients_N * logprobs_N).sum() + (logprobs_N**2).sum()

    assert torch.autograd.gradcheck(loss, (hidden_ND.requires_grad_(), *weights))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("kind", "bias", "softcap", "scale", "temperature"), GRID)
def test_gradients_of_the_entropy_too_are_those_of_finite_differences(
    kind: str, bias: bool, softcap: float | None, scale: float, temperature: float
) -> None:
    head, hidden_ND, targets_N = problem(kind, bias=bias, softcap=softcap, scale=scale)
    weights = [weight for weight in head.module.parameters() if weight.requires_grad]

    def outputs(hidden_ND: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        output = head_logprobs(head, hidden_ND, targets_N, temperature=temperature, entropy="gradient")
        assert output.entropy_N is not None
        return output.logprobs_N, output.entropy_N

    assert torch.autograd.gradcheck(outputs, (hidden_ND.requires_grad_(), *weights))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("kind", "bias", "softcap", "scale", "temperature"), GRID)
def test_both_gradients_together_are_those_of_autograd_through_the_logits(
    kind: str, bias: bool, softcap: float | None, scale: float, temperature: float
) -> None:
    head, hidden_ND, targets_N = problem(kind, bias=bias, softcap=softcap, scale=scale)
    wanted = [hidden_ND.requires_grad_(), *(x for x in head.module.parameters() if x.requires_grad)]
    upstream = torch.randn(N, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    output = head_logprobs(head, hidden_ND, targets_N, temperature=temperature, entropy="gradient")
    assert output.entropy_N is not None
    found = torch.autograd.grad((output.logprobs_N, output.entropy_N), wanted, upstream)
    expected = torch.autograd.grad(reference(head, hidden_ND, targets_N, temperature), wanted, upstream)
    assert_close(found, expected)


@pytest.mark.parametrize("kind", ["frozen", "trainable", "module"])
def test_a_gradient_of_the_log_probabilities_alone_is_the_same_with_or_without_one_of_the_entropy(
    kind: str,
) -> None:
    head, hidden_ND, targets_N = problem(kind, bias=True, softcap=None, scale=1.0)
    wanted = [hidden_ND.requires_grad_(), *(x for x in head.module.parameters() if x.requires_grad)]
    plain, both = (
        torch.autograd.grad(head_logprobs(head, hidden_ND, targets_N, entropy=asked).logprobs_N.sum(), wanted)
        for asked in ENTROPIES[::2]
    )
    assert_close(plain, both)


@pytest.mark.parametrize("kind", ["frozen", "trainable", "module"])
def test_an_impossible_token_adds_no_entropy_and_no_gradient(kind: str) -> None:
    head, hidden_ND, _ = problem(kind, bias=True, softcap=None, scale=1.0)
    last = head.module.outer if isinstance(head.module, TwoLayers) else head.module
    with torch.no_grad():
        last.bias[-1] = -torch.inf
    targets_N = torch.randint(V - 1, (N,))
    output = head_logprobs(head, hidden_ND.requires_grad_(), targets_N, entropy="gradient")
    _, entropy_N = reference(head, hidden_ND, targets_N, 1.0)
    assert output.entropy_N is not None
    assert_close(output.entropy_N, entropy_N)
    (found_ND,) = torch.autograd.grad(output.entropy_N.sum(), hidden_ND)
    assert_close(found_ND, torch.autograd.grad(entropy_N.sum(), hidden_ND)[0])


class Products(TorchDispatchMode):
    """How many matrix products ran."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize(
    ("kind", "products"),
    [
        ("frozen", (2, 2, 3)),  # logits and one gradient; the entropy's is another
        ("trainable", (4, 4, 4)),  # logits, logits again, gradients of the states and of the weight
        ("module", (4, 4, 4)),
    ],
)
def test_only_the_gradient_of_the_entropy_of_a_frozen_head_costs_another_product(
    kind: str, products: tuple[int, int, int], softcap: float | None
) -> None:
    matrix = nn.Linear(D, V).requires_grad_(kind != "frozen")
    head = Head(nn.Sequential(matrix) if kind == "module" else matrix, softcap)
    counted = []
    for asked in ENTROPIES:
        with Products() as run:
            output = head_logprobs(head, torch.randn(N, D, requires_grad=True), targets(), entropy=asked)
            total = output.logprobs_N.sum()
            if asked == "gradient":
                assert output.entropy_N is not None
                total = total + output.entropy_N.sum()
            total.backward()
        counted.append(run.count)
    assert tuple(counted) == products


@pytest.mark.parametrize("kind", ["frozen", "trainable", "module"])
def test_without_gradients_the_logits_are_the_only_product(kind: str) -> None:
    matrix = nn.Linear(D, V).requires_grad_(kind != "frozen")
    head = Head(nn.Sequential(matrix) if kind == "module" else matrix, 0.8)
    hidden_ND = torch.randn(N, D, requires_grad=True)
    with torch.no_grad(), Products() as run:
        output = head_logprobs(head, hidden_ND, targets(), entropy="gradient")
    assert run.count == 1
    assert output.entropy_N is not None
    assert not output.entropy_N.requires_grad


def test_no_rows_give_no_log_probabilities_and_a_zero_gradient() -> None:
    head, hidden_ND, targets_N = problem("trainable", bias=True, softcap=None, scale=1.0)
    empty_0D = hidden_ND[:0].requires_grad_()
    output = head_logprobs(head, empty_0D, targets_N[:0], entropy="gradient")
    assert output.entropy_N is not None
    (output.logprobs_N.sum() + output.entropy_N.sum()).backward()
    assert output.logprobs_N.shape == output.entropy_N.shape == (0,)
    assert_close(head.module.weight.grad, torch.zeros(V, D, dtype=torch.float64))


def test_entropy_comes_only_where_asked_for() -> None:
    head, hidden_ND, targets_N = problem("frozen", bias=False, softcap=None, scale=1.0)
    assert head_logprobs(head, hidden_ND, targets_N).entropy_N is None


def wide_problem(std: float) -> tuple[Head, Head, Tensor, Tensor]:
    """The same head in bf16 and float32, and states that bf16 holds exactly."""
    rough = nn.Linear(64, 512, bias=False).bfloat16().requires_grad_(False)
    exact = nn.Linear(64, 512, bias=False).requires_grad_(False)
    exact.load_state_dict(rough.state_dict())
    return Head(rough), Head(exact), (std * torch.randn(40, 64)).bfloat16(), torch.randint(512, (40,))


@pytest.mark.parametrize("std", [1.0, 30.0])
def test_bf16_errs_by_the_rounding_of_its_logits_alone(std: float) -> None:
    """The target's logit is exact. Each z is rounded, z - max again, exp and the sums once more, by 2 ** -9.

    So logsumexp errs by at most 2 ** -9 (|z| + |z - max| + 2) <= 2 ** -9 (3 Z + 2), Z the largest |z|.
    """
    rough, exact, hidden_ND, targets_N = wide_problem(std)
    ours_N = head_logprobs(rough, hidden_ND, targets_N).logprobs_N
    expected_N = head_logprobs(exact, hidden_ND.float(), targets_N).logprobs_N
    largest = float(exact.logits(hidden_ND.float()).abs().max())
    assert ours_N.dtype == torch.float32
    assert float((ours_N - expected_N).abs().max()) <= 2**-9 * (3 * largest + 2)


def test_in_bf16_two_tokens_of_a_row_differ_by_their_exact_logits() -> None:
    """logsumexp cancels, but for the exact logit of either token in it: its share p times 2 ** -9 |z|."""
    rough, exact, hidden_ND, _ = wide_problem(0.3)
    row_VD = hidden_ND[:1].expand(512, -1)
    ours_V = head_logprobs(rough, row_VD, torch.arange(512)).logprobs_N
    logits_V = exact.logits(hidden_ND[:1].float())[0]
    largest, share = float(logits_V.abs().max()), float(logits_V.softmax(-1).max())
    assert share < 0.01
    bound = 2 * share * 2**-9 * largest + 1e-5
    assert_close(ours_V - ours_V[0], logits_V - logits_V[0], rtol=0, atol=bound)


def test_no_log_probability_exceeds_zero_in_bf16() -> None:
    """A certain token: its exact logit lies above its rounded one for half of such rows."""
    rough, _, hidden_ND, _ = wide_problem(300.0)
    targets_N = rough.logits(hidden_ND).argmax(-1)
    logprobs_N = head_logprobs(rough, hidden_ND, targets_N).logprobs_N
    assert bool((logprobs_N <= 0).all())
    assert bool((logprobs_N > -1e-3).any())


def test_bf16_gradients_point_where_those_of_float32_do() -> None:
    rough, exact, hidden_ND, targets_N = wide_problem(1.0)
    found_ND, expected_ND = hidden_ND.requires_grad_(), hidden_ND.detach().float().requires_grad_()
    head_logprobs(rough, found_ND, targets_N).logprobs_N.sum().backward()
    head_logprobs(exact, expected_ND, targets_N).logprobs_N.sum().backward()
    assert found_ND.grad is not None
    assert cosine(found_ND.grad, expected_ND.grad) > 0.9999


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0))


@pytest.mark.parametrize("std", [1.0, 30.0])
def test_the_entropy_in_bf16_errs_by_the_rounding_of_its_logits_alone(std: float) -> None:
    """dH = -sum p (log p + H) dz and sum p |log p + H| <= 2 H <= 2 log V, with dz as for logsumexp above."""
    rough, exact, hidden_ND, targets_N = wide_problem(std)
    ours_N = head_logprobs(rough, hidden_ND, targets_N, entropy=True).entropy_N
    expected_N = head_logprobs(exact, hidden_ND.float(), targets_N, entropy=True).entropy_N
    largest = float(exact.logits(hidden_ND.float()).abs().max())
    assert ours_N is not None
    assert expected_N is not None
    assert ours_N.dtype == torch.float32
    assert float((ours_N - expected_N).abs().max()) <= 2**-9 * (3 * largest + 2) * 2 * float(expected_N.max())


def test_the_entropy_of_a_certain_token_in_bf16_is_zero() -> None:
    """Its exact logit lies above its rounded one for half of such rows, and so its weight above one."""
    rough, exact, hidden_ND, _ = wide_problem(3000.0)
    logits_NV = exact.logits(hidden_ND.float())
    best_N2 = logits_NV.topk(2).values
    certain_N = best_N2[:, 0] - best_N2[:, 1] > 2 * 2**-8 * logits_NV.abs().amax(-1) + 20
    assert int(certain_N.sum()) > 10
    output = head_logprobs(rough, hidden_ND[certain_N], logits_NV.argmax(-1)[certain_N], entropy=True)
    assert output.entropy_N is not None
    assert_close(output.entropy_N, torch.zeros_like(output.entropy_N), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trainable", [False, True])
def test_bf16_gradients_of_the_entropy_point_where_those_of_float32_do(trainable: bool) -> None:
    rough, exact, hidden_ND, targets_N = wide_problem(1.0)
    gradients = []
    for head, states_ND in ((rough, hidden_ND), (exact, hidden_ND.float())):
        head.module.requires_grad_(trainable)
        states_ND.requires_grad_()
        entropy_N = head_logprobs(head, states_ND, targets_N, entropy="gradient").entropy_N
        assert entropy_N is not None
        wanted = [states_ND, *head.module.parameters()] if trainable else [states_ND]
        gradients.append(torch.autograd.grad(entropy_N.sum(), wanted))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == torch.bfloat16
        assert cosine(found, expected) > 0.9999


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return output


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["frozen", "trainable", "module"])
def test_memory_does_not_grow_with_rows_times_vocabulary(kind: str) -> None:
    """The largest tensor is a chunk of logits, the weight or the states; never the logits of all rows."""
    rows, width, vocabulary = 400, 4, 64
    module: nn.Module = nn.Linear(width, vocabulary)
    module = nn.Sequential(module) if kind == "module" else module
    module.requires_grad_(kind != "frozen")
    hidden_ND, targets_N = torch.randn(rows, width, requires_grad=True), torch.randint(vocabulary, (rows,))
    with LargestTensor() as largest:
        output = head_logprobs(Head(module, softcap=2.0), hidden_ND, targets_N, entropy="gradient")
        assert output.entropy_N is not None
        (output.logprobs_N.sum() + output.entropy_N.sum()).backward()
    bound = max(ROWS_OF_A_CHUNK * vocabulary, vocabulary * width, rows * width)
    assert bound < rows * vocabulary / 10
    assert 0 < largest.elements <= bound


@pytest.fixture
def saved() -> Iterator[list[Tensor]]:
    """Everything that any operation of the test saves for a backward."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("kind", ["frozen", "trainable", "module"])
def test_nothing_is_saved_without_gradients(kind: str, saved: list[Tensor]) -> None:
    head, hidden_ND, targets_N = problem(kind, bias=True, softcap=None, scale=1.0)
    with torch.no_grad():
        output = head_logprobs(head, hidden_ND.requires_grad_(), targets_N)
    assert not output.logprobs_N.requires_grad
    assert saved == []


@pytest.mark.parametrize(("asked", "vectors"), [(False, 1), (True, 1), ("gradient", 2)])
def test_a_frozen_head_saves_one_vector_per_row_and_gradient(
    asked: Entropy, vectors: int, saved: list[Tensor]
) -> None:
    head, hidden_ND, targets_N = problem("frozen", bias=True, softcap=0.8, scale=1.0)
    head_logprobs(head, hidden_ND.requires_grad_(), targets_N, entropy=asked)
    assert [tuple(tensor.shape) for tensor in saved] == vectors * [(N, D)]


def test_shapes_temperatures_and_words_that_do_not_fit_are_refused() -> None:
    head, hidden_ND, targets_N = problem("frozen", bias=False, softcap=None, scale=1.0)
    with pytest.raises(ShapeError, match=r"got \(7, 5\) and \(6,\)"):
        head_logprobs(head, hidden_ND, targets_N[1:])
    with pytest.raises(ShapeError, match=r"got \(1, 7, 5\)"):
        head_logprobs(head, hidden_ND[None], targets_N)
    with pytest.raises(ConfigError, match=r"temperature > 0, got 0\.0"):
        head_logprobs(head, hidden_ND, targets_N, temperature=0.0)
    with pytest.raises(ConfigError, match=r"False, True or 'gradient', got 'grad'"):
        head_logprobs(head, hidden_ND, targets_N, entropy="grad")  # type: ignore[arg-type]
