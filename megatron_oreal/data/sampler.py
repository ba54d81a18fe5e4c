"""Which prompts are drawn, how often and in which order: resampling by pass rate, and a resumable shuffled order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TypedDict

from megatron_oreal.algorithm import Stream, mix_seed
from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError

Bucket = tuple[float, float, int]


def resample_by_pass_rate(prompts: Sequence[Prompt], buckets: Sequence[Bucket]) -> list[Prompt]:
    """Repeat each prompt as often as the first bucket ``(low, high, repeats)`` with low <= pass_rate < high says.

    Prompts in no bucket are dropped; prompts without a pass rate are kept once (algorithm.md, "Prompts"). Copies stand
    next to each other, in the order of ``prompts``; ``PromptOrder`` shuffles them.

    Raises ``UserError`` for a malformed bucket, and when nothing is left.
    """
    for low, high, repeats in buckets:
        if not low < high or repeats < 0:
            raise UserError(
                f"data.pass_rate_buckets: [{low}, {high}, {repeats}] must be [low, high, repeats] with low < high and "
                "repeats >= 0"
            )
    resampled = [prompt for prompt in prompts for _ in range(_repeats(prompt, buckets))]
    if not resampled:
        shown = ", ".join(f"[{low}, {high}) x{repeats}" for low, high, repeats in buckets) or "none"
        raise UserError(
            f"data.pass_rate_buckets: none of the {len(prompts)} prompts has a pass_rate in a bucket that keeps it "
            f"(buckets: {shown}): change them or set data.resample_by_pass_rate=false"
        )
    return resampled


def _repeats(prompt: Prompt, buckets: Sequence[Bucket]) -> int:
    if prompt.pass_rate is None:
        return 1
    return next((repeats for low, high, repeats in buckets if low <= prompt.pass_rate < high), 0)


class OrderState(TypedDict):
    """Position of a ``PromptOrder``: plain data that JSON can hold."""

    seed: int
    epoch: int
    position: int
    num_prompts: int
    fingerprint: str


class PromptOrder:
    """An endless order of prompts: every epoch passes over all of them once, shuffled by (seed, epoch).

    The state is (epoch, position), so ``load_state_dict`` restores it exactly, without replaying what was drawn. An
    epoch that ends within a batch is continued by the next one: nothing is repeated, lost or padded, and a batch may be
    larger than the set. ``prompts`` may hold copies (``resample_by_pass_rate``); each counts as one entry.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        assert prompts, "an order needs at least one prompt"
        self._prompts = list(prompts)
        self._seed = seed
        self._fingerprint = fingerprint(self._prompts)
        self._seek(epoch=0, position=0)

    @property
    def epoch(self) -> int:
        """The epoch that the next prompt comes from; with ``position``, all the state there is."""
        return self._epoch

    @property
    def position(self) -> int:
        """Entries of the current epoch that were taken already, below the number of prompts."""
        return self._position

    def __len__(self) -> int:
        """Entries of one epoch."""
        return len(self._prompts)

    def take(self, n: int) -> list[Prompt]:
        """Return the next ``n`` prompts and move past them."""
        assert n >= 0, n
        taken: list[Prompt] = []
        while len(taken) < n:
            chunk = self._order[self._position : self._position + n - len(taken)]
            taken += [self._prompts[index] for index in chunk]
            self._position += len(chunk)
            if self._position == len(self._prompts):
                self._seek(self._epoch + 1, 0)
        return taken

    def state_dict(self) -> OrderState:
        """Return the position together with what it is a position in."""
        return OrderState(
            seed=self._seed,
            epoch=self._epoch,
            position=self._position,
            num_prompts=len(self._prompts),
            fingerprint=self._fingerprint,
        )

    def load_state_dict(self, state: OrderState) -> None:
        """Continue where ``state`` was taken. Raises ``UserError`` when the prompts or the seed are not the same."""
        if state["num_prompts"] != len(self._prompts):
            raise UserError(
                f"data.train: the checkpoint was made with {state['num_prompts']} prompts after resampling, there are "
                f"{len(self._prompts)} now: resume with the same data and pass_rate_buckets, or use a new work_dir"
            )
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "data.train: the prompts' content or order differs from that of the checkpoint: resume with the same "
                "data, or use a new work_dir"
            )
        if state["seed"] != self._seed:
            raise UserError(
                f"seed={self._seed}: the checkpoint was made with seed={state['seed']}: resume with that, or use a new "
                "work_dir"
            )
        self._seek(state["epoch"], state["position"])

    def _seek(self, epoch: int, position: int) -> None:
        assert 0 <= position < len(self._prompts), (position, len(self._prompts))
        self._epoch = epoch
        self._position = position
        # Sorting by a hash is a shuffle that no library's version can change under a running experiment.
        key = [mix_seed(Stream.PROMPT_ORDER, self._seed, epoch, index) for index in range(len(self._prompts))]
        self._order = sorted(range(len(self._prompts)), key=key.__getitem__)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256, in hexadecimal, of every field of every prompt, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.question, prompt.gold_answer, prompt.pass_rate]).encode())
        digest.update(b"\n")
    return digest.hexdigest()
