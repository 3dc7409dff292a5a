"""One optimiser step, exact for any cut into micro-batches and ranks.

    1. the step's examples are dealt to ranks and packed into micro-batches of at most `max_tokens`;
    2. the counts of every loss term are summed over all micro-batches and ranks;
    3. each micro-batch adds its gradient, its sums divided by those counts;
    4. loss and gradient norm are checked, the gradient is clipped, the optimiser moves.

Only this module divides, and only it gathers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, final

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ftlib.batches import LossOutput, Mean, PackedBatch
from ftlib.data.collate import collate
from ftlib.data.sampler import balance, pack
from ftlib.engine.config import TrainConfig
from ftlib.engine.determinism import capture_rng, restore_rng
from ftlib.engine.launch import is_sharding, launched, require_supported
from ftlib.engine.optim import Masters, make_optimizer, make_schedule
from ftlib.errors import ConfigError, NonFiniteError
from ftlib.models import Scorer
from ftlib.models.adapted import own_rates, undecayed
from ftlib.models.checkpointing import disable_checkpointing, enable_checkpointing, is_checkpointable
from ftlib.models.parts import inner_model
from ftlib.models.sharding import shard, whole
from ftlib.objectives import Objective

__all__ = ["Engine", "RandomState", "StepResult", "Stopped"]

logger = logging.getLogger(__name__)
# Default tokens of a micro-batch. 768 came with even filling, when a step went from 4.1 s at 1,024 to 3.5 s
# (GSM8K rows, SmolLM2-135M, LoRA r=16, two cores); neither changes the result.
CPU_TOKENS, DEVICE_TOKENS = 768, 16384
MAX_SKIPPED = 10
Example = Mapping[str, Any]
RandomState = tuple[dict[str, Tensor], dict[str, Any]]  # as `capture_rng` gives it
T = TypeVar("T")


class Stopped(Exception):
    """Raised inside a step when a stop was asked for; weights and optimiser are as before the step."""


@final
@dataclass(frozen=True, eq=False)
class StepResult:
    """What one optimiser step did, read from the device once.

    Args:
        terms: loss term -> its `Mean` over the whole step and all ranks.
        metrics: likewise.
        grad_norm: norm of the gradient before clipping.
        tokens: real tokens of the step, all ranks.
        learning_rate: of this step.
        skipped: the step was non-finite and left out.
    """

    terms: Mapping[str, Mean]
    metrics: Mapping[str, Mean]
    grad_norm: float
    tokens: int
    learning_rate: float
    skipped: bool = False


@final
@dataclass
class Engine:
    """A model, an objective and an optimiser on one device or several ranks.

    Args:
        model: with the weights to train requiring gradients.
        objective: what is minimised.
        config: the run's settings.
        steps: optimiser steps planned, for the schedule.
        learning_rate: peak.
        should_stop: polled at every micro-batch of a single process. Ranks stop together, between
            steps: one that left a step alone would leave the others waiting. See `agreed`.
        value_head: trained beside the model, and part of what is prepared; None for none.
        value_learning_rate: its own peak; None is that of the model.
        before_update: called when the gradient is clipped and found finite, before the optimiser moves.
        after_update: called when it has moved, before gradients are cleared and the schedule moves.

    Raises:
        CapabilityError: a way of launching, or a precision, that is not supported.
        ConfigError: no weights to train, or an optimiser or schedule that cannot be made.
    """

    model: nn.Module
    objective: Objective
    config: TrainConfig
    steps: int
    learning_rate: float
    should_stop: Callable[[], bool] = lambda: False
    value_head: nn.Module | None = None
    value_learning_rate: float | None = None
    before_update: Callable[[], object] = lambda: None
    after_update: Callable[[], object] = lambda: None
    accelerator: Accelerator = field(default_factory=launched)
    skipped: int = 0

    def __post_init__(self) -> None:
        require_supported(self.accelerator)
        if not any(weight.requires_grad for weight in self.model.parameters()):
            raise ConfigError(
                "trainer: expected weights to train, got a model with none. Give an adapter: "
                "adapter=ftlib.adapters.lora(), or ftlib.adapters.full() for all weights."
            )
        if self.config.gradient_checkpointing:
            enable_checkpointing(self.model)
        self.scorer = self._prepared()
        trainable = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        rates = own_rates(self.model) if self.config.learning_rate is None else {}
        if self.value_head is not None:
            head = {f"value_head.{name}": weight for name, weight in self.value_head.named_parameters()}
            trainable |= head
            given = self.value_learning_rate
            rates |= dict.fromkeys(head, self.learning_rate if given is None else given)
        self.masters = Masters(trainable)
        self.optimizer = make_optimizer(
            self.config, self.masters.named, self.learning_rate, rates, undecayed(self.model)
        )
        self.schedule = make_schedule(self.config, self.optimizer, self.steps)
        on_cpu = self.device.type == "cpu"
        self.max_tokens = self.config.max_tokens or (CPU_TOKENS if on_cpu else DEVICE_TOKENS)
        logger.info(
            "training %s weights on %s, micro-batches of at most %s tokens",
            f"{sum(weight.numel() for weight in trainable.values()):,}",
            self.device,
            f"{self.max_tokens:,}",
        )

    def _prepared(self) -> Any:
        """The model behind its one forward, wrapped or sharded as the processes were launched."""
        scorer = Scorer(self.model, value_head=self.value_head)
        if self.sharded:
            shard(scorer, init_device_mesh(self.device.type, (self.accelerator.num_processes,)))
            return scorer
        if self.value_head is not None:
            # a step may train the head alone, and values need no product with the vocabulary
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        return self.accelerator.prepare(scorer)

    @property
    def sharded(self) -> bool:
        """Whether every rank holds a piece of each weight, and of its moments."""
        return is_sharding(self.accelerator)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        device: torch.device = self.accelerator.device
        return device

    def step(self, examples: Sequence[Example] | PackedBatch) -> StepResult:
        """One optimiser step on encoded examples, or on one micro-batch as it is; the same on every rank.

        Out of memory halves `max_tokens` and repeats the same step, in a single process. What the model,
        the objective or the checks raise leaves weights and random states as they were.

        Raises:
            Stopped: a stop was asked for.
            NonFiniteError: loss or gradient is NaN or infinite.
            torch.OutOfMemoryError: with one example per micro-batch too, or on several ranks.
        """
        state = capture_rng()
        while True:
            try:
                return self._step(examples)
            except BaseException as error:
                self._clear_gradients()
                restore_rng(*state)
                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                error.__traceback__ = None  # its frames hold the activations
                if not self._halve(examples):
                    error.add_note(self._out_of_memory(examples))
                    raise
                logger.warning("out of memory: repeating the step with max_tokens=%d", self.max_tokens)

    def _halve(self, examples: Sequence[Example] | PackedBatch) -> bool:
        """Make micro-batches smaller; False where they cannot be, or where other ranks would not know."""
        if isinstance(examples, PackedBatch) or self.accelerator.num_processes > 1:
            return False
        longest = _longest(examples)
        if min(self.max_tokens, _tokens(examples)) <= longest:
            return False
        self.max_tokens = max(min(self.max_tokens, _tokens(examples)) // 2, longest)
        return True

    def _out_of_memory(self, examples: Sequence[Example] | PackedBatch) -> str:
        longest = _tokens(examples) if isinstance(examples, PackedBatch) else _longest(examples)
        count = sum(weight.numel() for weight in self.masters.named.values())
        return (
            f"step: expected the longest example, {longest:,} tokens, to fit in memory. Give the Encoder a "
            f"max_length below {longest:,}; or set gradient_checkpointing=True; or train fewer than these "
            f"{count:,} weights, for which gradients and moments take {12 * count:,} bytes. On several ranks "
            f"also lower max_tokens below {self.max_tokens:,}."
        )

    def agreed(self, flag: bool) -> bool:
        """Whether any rank says so: the same answer on all of them."""
        if self.accelerator.num_processes == 1:
            return flag
        told = torch.tensor(float(flag), device=self.device)
        return bool(self.accelerator.reduce(told, "sum") > 0)

    def from_first_rank(self, value: str) -> str:
        """The first rank's value, on all of them."""
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def from_every_rank(self, own: T) -> list[T]:
        """What each rank holds, in their order, on all of them. Every rank takes part."""
        held: list[T] = gather_object([own])
        return held

    def rng_states(self) -> list[RandomState]:
        """The random states of every rank, in order. Every rank takes part."""
        return self.from_every_rank(capture_rng())

    def _step(self, examples: Sequence[Example] | PackedBatch) -> StepResult:
        # 1. deal to ranks, pack, lay flat
        self._clear_gradients()
        self.masters.follow()
        self.scorer.train()
        batches = self._micro_batches(examples)
        # 2. denominators of the whole step
        counts = self._step_counts(batches)
        # 3. gradients
        total = LossOutput({})
        for index, batch in enumerate(batches):
            self._poll()
            with self._synchronised(last=index == len(batches) - 1), self._long_enough(batch):
                output = self.objective(self.scorer, batch)
                # data-parallel wrappers average over ranks; the counts are already global
                (output.loss(counts) * self.accelerator.num_processes).backward()
            if self.masters.separate:
                self.masters.collect()
            total = _added(total, output)
        # 4. check, clip, move
        total = self._gathered(total)
        grad_norm = self._clip()
        loss = float(total.loss(counts))
        rate = float(self.optimizer.param_groups[0]["lr"])
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not finite:
            self._refuse(loss, grad_norm, examples)
        else:
            self.before_update()
            self.optimizer.step()
            self.masters.publish()
            self.after_update()
            self.schedule.step()
        self._clear_gradients()
        tokens = _tokens(examples)
        return StepResult(total.terms, total.metrics, grad_norm, tokens, rate, skipped=not finite)

    def _poll(self) -> None:
        if self.accelerator.num_processes == 1 and self.should_stop():
            raise Stopped

    def _micro_batches(self, examples: Sequence[Example] | PackedBatch) -> list[PackedBatch]:
        """This rank's micro-batches. Every rank has equally many: the last ones may weigh nothing."""
        if isinstance(examples, PackedBatch):
            return [examples.to(self.device)]
        lengths = [int(example["length"]) for example in examples]
        ranks = balance(lengths, self.accelerator.num_processes)
        packed = [_evenly_packed([lengths[i] for i in members], self.max_tokens) for members in ranks]
        rank = self.accelerator.process_index
        batches = [
            collate([examples[ranks[rank][i]] for i in micro]).to(self.device) for micro in packed[rank]
        ]
        missing = max(map(len, packed)) - len(batches)
        if missing:
            shortest = min(range(len(lengths)), key=lengths.__getitem__)
            batches += [collate([_weightless(examples[shortest])]).to(self.device)] * missing
        return batches

    def _step_counts(self, batches: Sequence[PackedBatch]) -> dict[str, Tensor]:
        counts = [self.objective.counts(batch) for batch in batches]
        names = sorted(counts[0])
        sums = torch.stack([torch.stack([count[name].float() for count in counts]).sum() for name in names])
        return dict(zip(names, self.accelerator.reduce(sums, "sum"), strict=True))

    def _gathered(self, output: LossOutput) -> LossOutput:
        means = {("terms", name): mean for name, mean in output.terms.items()}
        means |= {("metrics", name): mean for name, mean in output.metrics.items()}
        halves = torch.stack([torch.stack([m.sum.float(), m.count.float()]) for m in means.values()])
        halves = self.accelerator.reduce(halves, "sum")
        whole = {key: Mean(*pair) for key, pair in zip(means, halves, strict=True)}
        return LossOutput(
            {name: mean for (kind, name), mean in whole.items() if kind == "terms"},
            {name: mean for (kind, name), mean in whole.items() if kind == "metrics"},
        )

    def _synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        # masters collect after every micro-batch, so then every one must be reduced; gradients that wait for
        # the last one would be whole
        if last or self.masters.separate or self.sharded:
            return nullcontext()
        scope: AbstractContextManager[Any] = self.accelerator.no_sync(self.scorer)
        return scope

    def _long_enough(self, batch: PackedBatch) -> AbstractContextManager[Any]:
        """Checkpointing for an example longer than the budget, which runs alone."""
        if batch.tokens <= self.max_tokens or inner_model(self.model).is_activation_checkpointing:
            return nullcontext()
        if not is_checkpointable(self.model):
            return nullcontext()
        logger.info(
            "%d tokens in one example exceed max_tokens=%d: checkpointed", batch.tokens, self.max_tokens
        )
        return _Checkpointed(self.model)

    def _clip(self) -> float:
        weights = [weight for weight in self.masters.named.values() if weight.grad is not None]
        return float(whole(nn.utils.clip_grad_norm_(weights, self.config.max_grad_norm)))

    def _refuse(self, loss: float, grad_norm: float, examples: Sequence[Example] | PackedBatch) -> None:
        named = [] if isinstance(examples, PackedBatch) else examples
        sources = [str(example.get("source", "?")) for example in named]
        self._clear_gradients()
        message = (
            f"step: expected a finite loss and gradient, got loss {loss} and gradient norm {grad_norm}. "
            f"Rows of the step: {', '.join(sources[:20])}. The weights were not changed. Look at these rows, "
            "lower learning_rate, or set on_nonfinite='skip'."
        )
        self.skipped += 1
        if self.config.on_nonfinite == "raise" or self.skipped > MAX_SKIPPED:
            raise NonFiniteError(message)
        logger.warning("%s (skipped, %d of %d)", message, self.skipped, MAX_SKIPPED)

    def _clear_gradients(self) -> None:
        for weight in (*self.masters.weights.values(), *self.masters.named.values()):
            weight.grad = None

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> LossOutput:
        """Terms and metrics over all examples and ranks, without gradients.

        Raises:
            Stopped: a stop was asked for.
        """
        self.scorer.eval()
        total = LossOutput({})
        limit = self.config.eval_batch_size
        for start in range(0, len(examples), limit or len(examples)):
            for batch in self._micro_batches(examples[start : start + (limit or len(examples))]):
                self._poll()
                total = _added(total, self.objective(self.scorer, batch))
        return self._gathered(total)


class _Checkpointed(AbstractContextManager[None]):
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        enable_checkpointing(self.model)

    def __exit__(self, *error: object) -> None:
        disable_checkpointing(self.model)


def _added(total: LossOutput, output: LossOutput) -> LossOutput:
    """Two outputs as one, without gradient."""
    return LossOutput(_summed(total.terms, output.terms), _summed(total.metrics, output.metrics))


def _summed(means: Mapping[str, Mean], more: Mapping[str, Mean]) -> dict[str, Mean]:
    detached = {name: mean.detach() for name, mean in more.items()}
    return {**means, **{name: means[name] + m if name in means else m for name, m in detached.items()}}


def _tokens(examples: Sequence[Example] | PackedBatch) -> int:
    if isinstance(examples, PackedBatch):
        return examples.tokens
    return sum(int(example["length"]) for example in examples)


def _evenly_packed(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """As few micro-batches as `pack` needs, of nearly equal size: the largest decides peak memory."""
    packed = pack(lengths, max_tokens)
    even = balance(lengths, max(1, len(packed)))
    fits = all(sum(lengths[i] for i in micro) <= max_tokens for micro in even)
    return even if packed and fits else packed


def _longest(examples: Sequence[Example]) -> int:
    return max(int(example["length"]) for example in examples)


def _weightless(example: Example) -> dict[str, Any]:
    """The example with all loss weights zero: a rank that has nothing left still takes part."""
    return {
        **example,
        **({"weight": [0.0] * len(example["continuation_ids"])} if "weight" in example else {}),
        "prefix_weights": [0.0] * len(example["prefix_ids"]),
        "continuation_weights": [[0.0] * len(ids) for ids in example["continuation_ids"]],
    }
