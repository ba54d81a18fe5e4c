"""What a benchmark draws in place of a data set, a tokenizer, a solved problem and trained weights.

Everything comes from the config's seed: prompts of one length, a length for each response, which responses count as
correct, and, where ``model.path`` has only a ``config.json``, the weights. The engines draw real tokens; the verifier
judges real text; only its word is replaced by the outcome that was drawn.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_oreal.actor.batch import TrainSequence
from megatron_oreal.algorithm import Kept, request_seed, select
from megatron_oreal.bench.options import DEFAULT_PROMPT_TOKENS, BenchOptions
from megatron_oreal.config import Config
from megatron_oreal.data.lengths import LengthDistribution, parse_lengths
from megatron_oreal.data.packing import PackItem
from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError
from megatron_oreal.layout import ModelSpec
from megatron_oreal.layout.blocks import Rect, Shape, rect_size
from megatron_oreal.layout.families import hf_tensors
from megatron_oreal.verifier import Verifier
from megatron_oreal.verifier.verdict import Judgement, Verdict

GOLD_ANSWER = "42"
_SENTENCE = "Then both sides are equal, and so is what follows. "
_CHARS_PER_TOKEN = 4  # of English text, about
_ANSWER = f"The answer is \\boxed{{{GOLD_ANSWER}}}."
_TABLE = 1_048_573
"""Random numbers that weights are cut from; a prime, so that the rows of a matrix do not repeat."""
_STD = 0.02


@dataclass(frozen=True)
class Workload:
    """One step's work. ``lengths`` int64 and ``correct`` bool are [prompts, prompt_repeat_k], the same in every step.

    ``prompts`` counts ``rollout.oversample_prompts`` too.
    """

    config: Config
    spec: ModelSpec
    distribution: LengthDistribution
    prompt_tokens: int
    lengths: NDArray[np.int64]
    correct: NDArray[np.bool_]

    @classmethod
    def draw(cls, config: Config, spec: ModelSpec, options: BenchOptions) -> Workload:
        """Draw lengths and outcomes. Raises ``UserError`` for lengths that do not fit, or when nothing is kept."""
        rollout = config.rollout
        room = rollout.gen_max_length - 1
        prompt_tokens = options.prompt_tokens
        if prompt_tokens is None:
            prompt_tokens = min(DEFAULT_PROMPT_TOKENS, max(1, rollout.gen_max_length - rollout.gen_max_new))
        if prompt_tokens > room:
            raise UserError(
                f"--prompt-tokens={prompt_tokens} leaves no room for a response within rollout.gen_max_length="
                f"{rollout.gen_max_length}: lower it"
            )
        most = min(rollout.gen_max_new, rollout.gen_max_length - prompt_tokens)
        distribution = parse_lengths(options.lengths, most)
        shape = (rollout.prompts_per_step + rollout.oversample_prompts, rollout.prompt_repeat_k)
        lengths = distribution.draw(shape[0] * shape[1], config.seed).reshape(shape)
        correct = np.random.default_rng((config.seed, 1)).random(shape) < options.solve_rate
        workload = cls(config, spec, distribution, prompt_tokens, lengths, correct)
        if not workload.kept(workload.first_step):
            raise UserError(
                f"--solve-rate={options.solve_rate:g}: none of the {shape[0]} groups of {shape[1]} has correct and "
                "wrong responses: bring it nearer to 0.5, or raise rollout.prompts_per_step"
            )
        return workload

    @property
    def num_prompts(self) -> int:
        """Prompts that are drawn for, those of over-sampling left out."""
        return self.config.rollout.prompts_per_step

    @property
    def first_step(self) -> int:
        """The first step in which the policy learns: measured steps count from it."""
        return self.config.algorithm.actor_freeze_steps

    def kept(self, step: int) -> list[Kept]:
        """What OREAL keeps of a step with these outcomes (``algorithm.select``)."""
        algorithm, correct = self.config.algorithm, self.correct[: self.num_prompts]
        rewards = np.where(correct, 1, -1).astype(np.int8)
        shaping = algorithm.reward_shaping_type
        return select(rewards, filter=algorithm.filter, shaping=shaping, run_seed=self.config.seed, step=step)

    def kept_lengths(self, step: int) -> list[int]:
        """Prompt and response tokens of each kept sequence."""
        return [self.prompt_tokens + int(self.lengths[item.group, item.sample]) for item in self.kept(step)]

    def sequences(self, step: int) -> list[TrainSequence]:
        """The kept sequences of random tokens, the same on every rank."""
        return [
            TrainSequence(
                PackItem(self.prompt_ids(item.group), self._tokens(int(self.lengths[item.group, item.sample]), i, 2)),
                item.reward,
                item.advantage,
                item.pass_rate,
            )
            for i, item in enumerate(self.kept(step))
        ]

    def prompt_ids(self, number: int) -> NDArray[np.int32]:
        """Tokens int32 [P] of the prompt with this number; other numbers give other prompts."""
        return self._tokens(self.prompt_tokens, number, 3)

    def prompts(self, count: int) -> list[Prompt]:
        """Prompts for a step's order; the question is the number that ``SyntheticChat`` encodes."""
        return [Prompt(f"synthetic-{i}", str(i), GOLD_ANSWER) for i in range(count)]

    def limits(self, step: int) -> dict[int, int]:
        """New tokens of every response of a step, by its request's seed (``SamplingParams.new_tokens_by_seed``)."""
        seed = self.config.seed
        return {request_seed(seed, step, g, k): int(length) for (g, k), length in np.ndenumerate(self.lengths)}

    def describe(self) -> dict[str, Any]:
        """What stands in the JSON."""
        lengths = self.lengths[: self.num_prompts]
        return {
            "prompts": lengths.shape[0],
            "samples_per_prompt": lengths.shape[1],
            "prompt_tokens": self.prompt_tokens,
            "response_lengths": str(self.distribution),
            "most_new_tokens": self.distribution.maximum,
            "response_tokens": int(lengths.sum()),
            "response_tokens_mean": float(lengths.mean()),
            "response_tokens_median": float(np.median(lengths)),
            "response_tokens_longest": int(lengths.max()),
            "kept_sequences": len(self.kept(self.first_step)),
            "kept_tokens": sum(self.kept_lengths(self.first_step)),
        }

    def _tokens(self, count: int, number: int, stream: int) -> NDArray[np.int32]:
        generator = np.random.default_rng((self.config.seed, stream, number))
        return generator.integers(0, self.spec.vocab_size, count, dtype=np.int32)


class SyntheticChat:
    """In a tokenizer's place (``data.chat.ChatTemplate``): a question is a prompt's number, a response becomes text.

    The text has four characters a token and ends with the gold answer, so that the verifier has its real work.
    """

    stop_token_id = None

    def __init__(self, workload: Workload):
        self._workload = workload

    def encode_prompt(self, question: str) -> NDArray[np.int32]:
        """Return the prompt's tokens, int32 [P]."""
        return self._workload.prompt_ids(int(question))

    def decode(self, ids: Sequence[int] | NDArray[np.integer], *, skip_special_tokens: bool = False) -> str:
        """Return a text for this many tokens."""
        size = _CHARS_PER_TOKEN * len(ids)
        return (_SENTENCE * (size // len(_SENTENCE) + 1))[:size] + _ANSWER


class DrawnOutcomes:
    """A verifier that does all its work and then says what was drawn: ``correct`` [prompts, samples]."""

    def __init__(self, verifier: Verifier, correct: NDArray[np.bool_]):
        self._verifier, self._correct = verifier, correct

    def __len__(self) -> int:
        """Items that are not handed back yet."""
        return len(self._verifier)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._verifier, name)

    def drain(self, timeout_s: float = 0) -> list[tuple[Hashable, Judgement]]:
        """As ``Verifier.drain``, with the drawn outcomes."""
        return list(self._replaced(self._verifier.drain(timeout_s)))

    def results(self) -> Iterator[tuple[Hashable, Judgement]]:
        """As ``Verifier.results``, with the drawn outcomes."""
        return self._replaced(self._verifier.results())

    def _replaced(self, items: Iterable[tuple[Hashable, Judgement]]) -> Iterator[tuple[Hashable, Judgement]]:
        for key, _ in items:
            group, sample = cast(tuple[int, int], key)
            verdict = Verdict.CORRECT if self._correct[group, sample] else Verdict.WRONG
            yield key, Judgement(verdict, "drawn for a benchmark")


class RandomWeights:
    """A checkpoint (``layout.hf.TensorSource``) of normal weights, std 0.02, norms 1: equal rectangles, equal bits.

    A rectangle is a window of one table of random numbers, placed by its name and origin; reading costs a copy.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int):
        self._shapes = hf_tensors(spec)
        numbers = torch.randn(_TABLE, generator=torch.Generator().manual_seed(seed))
        self._table = (numbers * _STD).to(dtype).to(device)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self) -> list[str]:
        """Return every tensor's name."""
        return list(self._shapes)

    def shape(self, name: str) -> Shape:
        """Return a tensor's shape."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of all."""
        return self._table.dtype

    def check(self, name: str, shape: Shape) -> None:
        """Both sides have the shape from the same table."""
        assert self._shapes[name] == shape, (name, shape)

    def cost(self, wanted: Iterable[tuple[str, Rect]]) -> int:
        """Nothing is read from files."""
        return 0

    def read(self, name: str, rect: Rect) -> Tensor:
        """Return the rectangle, on the device."""
        shape = [stop - start for start, stop in rect]
        if "norm" in name:
            return torch.ones(shape, dtype=self._table.dtype, device=self._table.device)
        count = rect_size(rect)
        place = sum(ord(letter) * 31**i for i, letter in enumerate(name)) + sum(start * 7919 for start, _ in rect)
        offset = place % _TABLE
        return self._table.repeat(-(-(offset + count) // _TABLE))[offset : offset + count].view(shape)


def has_weights(config: Config) -> bool:
    """Whether there is anything to load: a file of weights, or an index that names some."""
    files = Path(config.model.path).glob("*.safetensors*")
    return config.model.megatron_checkpoint is not None or any(files)
