"""Tasks of a few tokens whose best policy is known exactly, and policies small enough to reach it.

With Q the value of a token and ref the reference, the policy that maximises E[score] - beta KL is

    pi*(a | s) = ref(a | s) exp((Q(s, a) - V*(s)) / beta)
    V*(s)      = beta log sum_a ref(a | s) exp(Q(s, a) / beta)

and Q is the score where a token ends the completion, V* of the next state elsewhere. The reference is
uniform: every policy starts with an output head of zeros. Everything is summed over all completions, so
nothing here depends on samples.

Shapes: V vocabulary, B rows, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, GPT2Config, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from ftlib.batches import Group, Sampling
from ftlib.data.collate import collate
from ftlib.engine.ppo_config import PPOConfig
from ftlib.models import forward
from ftlib.rollouts import FunctionSampler
from ftlib.rollouts.draw import draw, uniforms
from ftlib.trainers.ppo import PPOTrainer

__all__ = [
    "COPY",
    "CRITIC_ONLY",
    "FOUR_TOKENS",
    "MATCH",
    "ONE_TOKEN",
    "STOPPING",
    "TASKS",
    "Best",
    "IdPrompts",
    "Task",
    "assert_best",
    "best",
    "critic_error",
    "far",
    "objective",
    "probabilities",
    "table",
    "trainer",
    "transformer",
    "values",
]

State = tuple[int, ...]  # a prompt and the tokens written after it
Policy = Callable[[State], Tensor]  # probabilities of the next token, [V]


@dataclass(frozen=True)
class Task:
    """What completions earn.

    Args:
        vocabulary: V.
        length: most tokens of a completion.
        beta: of the KL per sequence.
        score: of (prompt, completion).
        prompts: token ids.
        stop: the token that ends a completion early; None for none.
    """

    vocabulary: int
    length: int
    beta: float
    score: Callable[[State, State], float]
    prompts: tuple[State, ...] = ((0,),)
    stop: int | None = None

    def ends(self, completion: State) -> bool:
        """Whether nothing follows these tokens."""
        return len(completion) == self.length or (self.stop is not None and completion[-1:] == (self.stop,))

    def states(self, prompt: State) -> Iterator[State]:
        """The completions of a prompt that go on, the empty one first."""
        waiting: list[State] = [()]
        while waiting:
            state = waiting.pop(0)
            yield state
            following = [(*state, token) for token in range(self.vocabulary)]
            waiting += [completion for completion in following if not self.ends(completion)]

    def completions(self, prompt: State) -> list[State]:
        """All of a prompt that have ended."""
        found = [(*state, token) for state in self.states(prompt) for token in range(self.vocabulary)]
        return [completion for completion in found if self.ends(completion)]


def _distinct(prompt: State, completion: State) -> float:
    """Half the number of different tokens before the stop; nothing without a stop."""
    return len(set(completion[:-1])) / 2 if completion[-1] == 2 else 0.0


ONE_TOKEN = Task(8, 1, 0.2, lambda prompt, written: written[0] / 7)
FOUR_TOKENS = Task(8, 4, 0.1, lambda prompt, written: written.count(3) / 4)
MATCH = Task(4, 2, 0.25, lambda prompt, written: float(written[0] == written[1]))
STOPPING = Task(3, 4, 0.2, _distinct, stop=2)
COPY = Task(
    6,
    1,
    0.2,
    lambda prompt, written: float(written[0] == prompt[0]),
    prompts=tuple((token,) * (token + 1) for token in range(6)),
)
CRITIC_ONLY = Task(4, 2, 0.0, lambda prompt, written: (written[0] + (written[0] == written[1])) / 4)
TASKS = {
    "one token": ONE_TOKEN,
    "four tokens": FOUR_TOKENS,
    "match": MATCH,
    "stopping": STOPPING,
    "copy": COPY,
}


# -- exact numbers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Best:
    """The best policy of a task: its objective, and per state its probabilities and value."""

    objective: float
    probabilities: Mapping[State, Tensor]
    values: Mapping[State, float]


def best(task: Task) -> Best:
    """By recursion from the ends, for `beta` > 0; states are prompts with what was written after them."""
    policy: dict[State, Tensor] = {}
    value: dict[State, float] = {}
    for prompt in task.prompts:
        for state in sorted(task.states(prompt), key=len, reverse=True):
            q_V = torch.tensor(
                [
                    task.score(prompt, written) if task.ends(written) else value[prompt + written]
                    for written in ((*state, token) for token in range(task.vocabulary))
                ],
                dtype=torch.float64,
            )
            logits_V = q_V / task.beta - math.log(task.vocabulary)
            value[prompt + state] = task.beta * float(logits_V.logsumexp(0))
            policy[prompt + state] = logits_V.softmax(0)
    mean = sum(value[prompt] for prompt in task.prompts) / len(task.prompts)
    return Best(mean, policy, value)


def objective(task: Task, policy: Mapping[State, Tensor], *, kl: bool = True) -> float:
    """E[score] - beta KL of a policy, by summing over all completions; without `kl`, E[score]."""
    total = 0.0
    for prompt in task.prompts:
        for written, chance in _chances(task, policy, prompt).items():
            cost = math.log(chance) + len(written) * math.log(task.vocabulary) if kl and chance > 0 else 0.0
            total += chance * (task.score(prompt, written) - task.beta * cost)
    return total / len(task.prompts)


def _chances(task: Task, policy: Mapping[State, Tensor], prompt: State) -> dict[State, float]:
    return {
        written: math.prod(
            float(policy[prompt + written[:place]][token]) for place, token in enumerate(written)
        )
        for written in task.completions(prompt)
    }


def far(task: Task, policy: Mapping[State, Tensor], other: Mapping[State, Tensor]) -> float:
    """Total variation between the completions of two policies, of the prompt where it is largest."""
    found = []
    for prompt in task.prompts:
        ours, theirs = _chances(task, policy, prompt), _chances(task, other, prompt)
        found.append(sum(abs(ours[written] - theirs[written]) for written in ours) / 2)
    return max(found)


@torch.no_grad()
def probabilities(task: Task, model: nn.Module) -> dict[State, Tensor]:
    """What a model says next in every state of a task, from a plain forward of each."""
    found = {}
    for prompt in task.prompts:
        by_length: dict[int, list[State]] = {}
        for state in task.states(prompt):
            by_length.setdefault(len(state), []).append(prompt + state)
        for states in by_length.values():
            ids_BL = torch.tensor(states)
            logits_BV = model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).logits[:, -1]
            found |= dict(zip(states, logits_BV.double().softmax(-1), strict=True))
    return found


@torch.no_grad()
def values(task: Task, scorer: nn.Module) -> dict[State, float]:
    """What a critic says of every state of a task."""
    found: dict[State, float] = {}
    for prompt in task.prompts:
        for written in task.completions(prompt):
            ids_L = torch.tensor(written)
            group = Group(torch.tensor(prompt), torch.zeros(len(prompt)), (ids_L,), (torch.ones(len(ids_L)),))
            values_L = forward(scorer, collate([group]), values=True).values_N
            assert values_L is not None
            found |= {prompt + written[:place]: value for place, value in enumerate(values_L.tolist())}
    return found


def critic_error(task: Task, found: Mapping[State, float], optimum: Best, *, seen: float = 0.1) -> float:
    """Largest error of a value among the states that the best policy comes to at least this often."""
    chance = dict.fromkeys(task.prompts, 1.0)
    for prompt in task.prompts:
        for state in task.states(prompt):
            if state:
                before = prompt + state[:-1]
                chance[prompt + state] = chance[before] * float(optimum.probabilities[before][state[-1]])
    often = [state for state, share in chance.items() if share >= seen]
    return max(abs(found[state] - optimum.values[state]) for state in often)


# -- policies ------------------------------------------------------------------------------------------


def transformer(task: Task, *, seed: int = 0) -> GPT2LMHeadModel:
    """Two layers of width 48 with absolute positions; uniform at first."""
    config = GPT2Config(
        vocab_size=task.vocabulary,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=task.stop,
        pad_token_id=task.stop,  # padding looks like the stop token
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    nn.init.zeros_(model.lm_head.weight)
    return model


class TableConfig(PretrainedConfig):
    """Of `Table`: `states` lists the sequences that have a row of their own."""

    model_type = "ftlib-tests-table"

    def __init__(self, vocab_size: int = 2, states: Sequence[State] = (), **options: Any) -> None:
        self.vocab_size, self.states, self.hidden_size = vocab_size, list(states), 1 + len(states)
        super().__init__(tie_word_embeddings=False, **options)


class TableBody(PreTrainedModel):
    """The state of a position is a vector that names the tokens up to there; unknown ones share the first."""

    config_class = TableConfig
    base_model_prefix = "model"

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)  # tells dtype and device
        self.places = {tuple(state): place for place, state in enumerate(config.states, start=1)}
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        rows_BL = torch.tensor(
            [
                [self.places.get(tuple(ids[: last + 1]), 0) for last in range(len(ids))]
                for ids in input_ids.tolist()
            ]
        )
        hidden_BLD = nn.functional.one_hot(rows_BL, self.config.hidden_size).to(self.anchor.dtype)
        return BaseModelOutput(last_hidden_state=hidden_BLD)


class Table(PreTrainedModel, GenerationMixin):
    """A lookup table: the logits of a sequence are weights of its own, zero at first."""

    config_class = TableConfig
    base_model_prefix = "model"

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.model = TableBody(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        nn.init.zeros_(self.lm_head.weight)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, **options: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, **options).last_hidden_state))


def table(task: Task, *, seed: int = 0) -> Table:
    """A table with a row for every state of the task; `seed` draws nothing."""
    states = [prompt + state for prompt in task.prompts for state in task.states(prompt)]
    return Table(TableConfig(task.vocabulary, states, eos_token_id=task.stop))


def table_sampler(model: nn.Module) -> FunctionSampler:
    """Draws from whole forwards: a table keeps no keys and values."""

    @torch.no_grad()
    def complete(
        prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[int]]:
        rows = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            streams_BL = torch.stack(
                [uniforms(seed, sample, sampling.max_new_tokens) for sample in range(sampling.n)]
            )
            ids_BL = torch.tensor([list(prompt)] * sampling.n)
            for uniform_B in streams_BL.T:
                tokens_B, _ = draw(model(input_ids=ids_BL).logits[:, -1], sampling, uniform_B)
                ids_BL = torch.cat([ids_BL, tokens_B[:, None]], 1)
            rows += [_cut(row, sampling.stop_ids) for row in ids_BL[:, len(prompt) :].tolist()]
        return rows

    return FunctionSampler(complete)


def _cut(ids: list[int], stops: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in stops]
    return ids[: ends[0] + 1] if ends else ids


# -- training ------------------------------------------------------------------------------------------


class IdPrompts:
    """An encoder of prompts that are token ids already."""

    stop_ids: tuple[int, ...] = ()
    task = "causal_lm"

    def encode_prompt(self, row: Mapping[str, Any]) -> list[int]:
        return list(row["prompt"])


RATES = {transformer: (1e-3, 2e-3), table: (0.05, 0.1)}


def trainer(
    task: Task,
    *,
    policy: Callable[..., Any] = transformer,
    seed: int = 0,
    rollouts: int = 150,
    rows: int = 192,
    score: Callable[[State, State], float] | None = None,
    **options: Any,
) -> PPOTrainer:
    """A trainer of a task; `options` are those of `PPOConfig`, and those of the trainer it names first."""
    model = policy(task, seed=seed)
    own = {name: options.pop(name) for name in ("critic", "reference", "sampler") if name in options}
    if policy is table:
        own.setdefault("sampler", table_sampler(model))
    earned = score or task.score
    rate, value_rate = RATES[policy]
    minibatches = options.get("minibatches", 4)

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        pairs = zip(columns["prompt_ids"], columns["completion_ids"], strict=True)
        return [earned(tuple(prompt), tuple(written)) for prompt, written in pairs]

    defaults: dict[str, Any] = {
        "progress": "off",
        "max_steps": rollouts,
        "log_steps": rollouts,
        "seed": seed,
        "batch_size": rows // minibatches,
        "minibatches": minibatches,
        "samples_per_prompt": math.gcd(rows // len(task.prompts), rows // minibatches),
        "max_new_tokens": task.length,
        "stop": [] if task.stop is None else [task.stop],
        "kl_coef": task.beta,
        "learning_rate": rate,
        "value_learning_rate": value_rate,
        "value_coef": 1.0,
        "critic_warmup": 0,
        "missing_stop_penalty": 0.0,
    }
    prompts = [list(prompt) for prompt in task.prompts for _ in range(4)]
    return PPOTrainer(
        model, prompts, reward=reward, encoder=IdPrompts(), config=PPOConfig(**(defaults | options)), **own
    )


def assert_best(task: Task, made: PPOTrainer, *, critic: bool = True) -> None:
    """Within the bands: J within .01, total variation of completions and error of values at most .05."""
    optimum, found = best(task), probabilities(task, made.model)
    assert abs(objective(task, found) - optimum.objective) <= 0.01
    assert far(task, found, optimum.probabilities) <= 0.05
    if critic:
        assert critic_error(task, values(task, made.engine.scorer), optimum) <= 0.05
