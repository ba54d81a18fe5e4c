"""The embedded engine: continuous batching inside the trainer's process, for a machine without SGLang."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_oreal.errors import UserError
from megatron_oreal.layout import ModelSpec, embedded_layout
from megatron_oreal.rollout.checks import checked_prompts
from megatron_oreal.rollout.embedded_model import EmbeddedModel
from megatron_oreal.rollout.engine import Completion, EngineError, Health, Request, SamplingParams
from megatron_oreal.rollout.kv_cache import KvCache
from megatron_oreal.rollout.sampling import random_streams, sample, uniforms

_PREFILL_TOKENS = 8192
"""Padded tokens that one prefill forward may hold; a longer prompt goes alone."""

OnComplete = Callable[[int, Completion], None]


class EmbeddedEngine:
    """An ``Engine`` in plain PyTorch for the dense families of ``ModelSpec``, on a CPU or one CUDA device.

    ``max_running_requests`` slots decode together, and a slot is refilled in the step after its sequence ended.
    ``max_length`` is the largest ``SamplingParams.max_length`` that will be asked for. Calls are synchronous: nothing
    generates while the caller writes into ``weight_buffers()``. The KV cache lives only inside ``generate`` and holds,
    of every running sequence, at most twice its length.

    ``num_decode_steps`` and ``num_prefill_tokens`` count the forward passes over the slots and the prompt tokens run
    since construction, a prompt shared by several running samples once.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_running_requests: int,
        max_length: int,
    ):
        if max_length > spec.max_position_embeddings:
            raise UserError(
                f"max_length={max_length} (config: rollout.gen_max_length) exceeds the model's "
                f"max_position_embeddings={spec.max_position_embeddings}: lower it"
            )
        if max_running_requests < 1:
            raise UserError(f"max_running_requests={max_running_requests} must be at least 1")
        self.num_decode_steps = 0
        self.num_prefill_tokens = 0
        self.max_running_requests = max_running_requests
        self.max_length = max_length
        self.layout = embedded_layout(spec)
        self._model: EmbeddedModel | None = EmbeddedModel(spec, dtype, torch.device(device), max_length)
        self._version = -1
        self._awake = True
        self._generating = False

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, on_complete: OnComplete | None = None
    ) -> list[Completion]:
        """Draw one response per request, in request order.

        Greedy sampling ignores top-p and top-k and reports a ``kept_mass`` of 1. Raises ``EngineError`` when asleep,
        shut down, before the first ``load_weights``, for parameters out of range, or when the weights give logits that
        are not finite; ``UserError`` for a prompt that leaves no room for a response.
        """
        model = self._idle_model()
        if not self._awake:
            raise EngineError("generate: the engine is asleep; call wake first")
        if self._version < 0:
            raise EngineError("generate: no weights are loaded yet; call load_weights first")
        prompts = checked_prompts(requests, sampling, max_length=self.max_length, vocab_size=model.spec.vocab_size)
        if not prompts:
            return []
        run = _Run(self, model, prompts, requests, sampling, on_complete)
        self._generating = True
        try:
            return run.finish_all()
        finally:
            self._generating = False

    def weight_buffers(self) -> Mapping[str, Tensor]:
        """Return the live weights: SGLang's names and fused layout at tensor-parallel size 1 (``weight_shapes``)."""
        return self._idle_model().weights

    def weight_shards(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Return ``{0: weight_buffers()}``."""
        return {0: self.weight_buffers()}

    def load_weights(self, version: int) -> None:
        """Take what stands in ``weight_buffers()`` as ``version``; raises ``EngineError`` unless it is a newer one."""
        self._idle_model()
        if version <= self._version:
            raise EngineError(f"load_weights: version {version} is not newer than the loaded version {self._version}")
        self._version = version

    def sleep(self) -> None:
        """Refuse generation until ``wake``. The weights stay; on a GPU the freed KV cache goes back to the driver."""
        model = self._idle_model()
        self._awake = False
        if model.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Undo ``sleep``."""
        self._idle_model()
        self._awake = True

    def health(self) -> Health:
        """Answer in any state."""
        if self._model is None:
            return Health(ok=False, version=self._version, awake=False, detail="shut down")
        detail = "generating" if self._generating else "idle" if self._awake else "asleep"
        return Health(ok=True, version=self._version, awake=self._awake, detail=detail)

    def shutdown(self) -> None:
        """Release the weights; every later call but ``health`` and ``shutdown`` raises ``EngineError``."""
        if self._model is not None:
            self._idle_model()
            self._model = None

    def _idle_model(self) -> EmbeddedModel:
        if self._model is None:
            raise EngineError("the engine is shut down")
        if self._generating:
            raise EngineError("the engine is generating; its on_complete callback must not call it")
        return self._model


class _Run:
    """One ``generate`` call: which request sits in which slot, and what it has produced.

    The state of the slots lives on the host; a step sends tokens, positions and random numbers to the device and brings
    back the sampled tokens with their log-probabilities, which is its only synchronisation. A sequence enters decoding
    with all but its last prompt token in the cache, so that every token is sampled by the same code.
    """

    def __init__(
        self,
        engine: EmbeddedEngine,
        model: EmbeddedModel,
        prompts: list[np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_complete: OnComplete | None,
    ):
        slots = min(engine.max_running_requests, len(prompts))
        self._engine, self._model, self._sampling, self._on_complete = engine, model, sampling, on_complete
        self._prompts = prompts
        self._keys = [prompt.tobytes() for prompt in prompts]
        self._limits = [request.limit(sampling) for request in requests]
        self._request_streams = random_streams([request.seed for request in requests])
        self._next_request = 0
        self._completions: list[Completion | None] = [None] * len(prompts)
        self._cache = KvCache(model.spec, slots, sampling.max_length, model.dtype, model.device)
        self._capacities = np.array([pool.capacity for pool in self._cache.pools])
        self._free_slots = list(reversed(range(slots)))
        self._holders: dict[bytes, list[int]] = {}
        """The running slots that have a given prompt."""
        self._request = np.zeros(slots, dtype=np.int64)
        self._stream = np.zeros(slots, dtype=np.uint64)
        self._token = np.zeros(slots, dtype=np.int64)
        self._position = np.zeros(slots, dtype=np.int64)
        self._count = np.zeros(slots, dtype=np.int64)
        self._limit = np.zeros(slots, dtype=np.int64)
        self._kept_mass = np.zeros(slots)
        self._out_tokens = np.zeros((slots, 64), dtype=np.int32)
        self._out_logp = np.zeros((slots, 64), dtype=np.float32)

    def finish_all(self) -> list[Completion]:
        """Run until every request has its completion."""
        self._admit()
        order = self._cache.close_gaps()
        while order.size:
            stopped, done = self._step(order)
            outgrown = ~done & (self._position[order] >= self._capacities[self._cache.pool_of[order]])
            if not done.any() and not outgrown.any():
                continue
            self._complete(order[done], stopped[done])
            self._promote(order[outgrown])
            self._admit()
            order = self._cache.close_gaps()
        return [completion for completion in self._completions if completion is not None]

    def _step(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decode one token of each running sequence; which of them stopped, and which are done, bool [n]."""
        device, positions = self._model.device, self._position[order]
        draws = torch.from_numpy(uniforms(self._stream[order], positions)).to(device)
        inputs = torch.from_numpy(np.stack((self._token[order], positions))).to(device)
        logits = self._model.decode(self._cache, inputs[0], inputs[1], self._longest(positions))
        sampled = sample(logits, draws, self._sampling)
        self._engine.num_decode_steps += 1
        fields = [sampled.tokens, sampled.logp] + ([] if sampled.kept_mass is None else [sampled.kept_mass])
        host = torch.stack([field.double() for field in fields]).cpu().numpy()
        tokens, logp = host[0].astype(np.int64), host[1]
        if not np.isfinite(logp).all():
            raise EngineError(f"weights of version {self._engine.health().version} give logits that are not finite")
        count = self._count[order]
        self._reserve_output(int(count.max()) + 1)
        self._out_tokens[order, count] = tokens
        self._out_logp[order, count] = logp
        self._kept_mass[order] += host[2] if len(fields) == 3 else 1.0
        self._token[order] = tokens
        self._position[order] = positions + 1
        self._count[order] = count + 1
        stopped = np.zeros(len(order), dtype=bool)
        if self._sampling.stop_token_id is not None:
            stopped = tokens == self._sampling.stop_token_id
        return stopped, stopped | (count + 1 >= self._limit[order])

    def _longest(self, positions: np.ndarray) -> list[int]:
        """For each pool the largest position in it, plus one; 0 when it is empty."""
        longest, start = [], 0
        for pool in self._cache.pools:
            stop = start + len(pool.slots)
            longest.append(int(positions[start:stop].max()) + 1 if stop > start else 0)
            start = stop
        return longest

    def _reserve_output(self, length: int) -> None:
        if length > self._out_tokens.shape[1]:
            room = ((0, 0), (0, self._out_tokens.shape[1]))
            self._out_tokens, self._out_logp = np.pad(self._out_tokens, room), np.pad(self._out_logp, room)

    def _complete(self, slots: np.ndarray, stopped: np.ndarray) -> None:
        """Hand out the completions of ``slots`` and free them."""
        for slot, stop in zip(slots.tolist(), stopped.tolist(), strict=True):
            request, count = int(self._request[slot]), int(self._count[slot])
            completion = Completion(
                token_ids=self._out_tokens[slot, :count].copy(),
                logp=self._out_logp[slot, :count].copy(),
                finish_reason="stop" if stop else "length",
                kept_mass=float(self._kept_mass[slot] / count),
            )
            self._completions[request] = completion
            self._cache.release(slot)
            self._holders[self._keys[request]].remove(slot)
            self._free_slots.append(slot)
            if self._on_complete is not None:
                self._on_complete(request, completion)

    def _promote(self, slots: np.ndarray) -> None:
        """Move sequences that outgrew their pool to the next, from the last pool down: the rows given up are reused."""
        pools = self._cache.pool_of[slots]
        for pool in sorted(set(pools.tolist()), reverse=True):
            self._cache.promote(slots[pools == pool])

    def _admit(self) -> None:
        """Fill the free slots with the next requests; a prompt that a running slot has is copied, not run again."""
        fresh: list[int] = []
        copies: list[tuple[int, int, int]] = []
        while self._free_slots and self._next_request < len(self._prompts):
            slot, request = self._free_slots.pop(), self._next_request
            self._next_request += 1
            prompt, prefix = self._prompts[request], len(self._prompts[request]) - 1
            self._request[slot], self._stream[slot] = request, self._request_streams[request]
            self._token[slot], self._position[slot] = prompt[-1], prefix
            self._count[slot], self._kept_mass[slot] = 0, 0.0
            self._limit[slot] = self._limits[request]
            self._cache.admit(slot, len(prompt))
            holders = self._holders.setdefault(self._keys[request], [])
            if prefix and holders:
                copies.append((holders[0], slot, prefix))
            elif prefix:
                fresh.append(slot)
            holders.append(slot)
        for chunk in self._prefill_chunks(fresh):
            self._prefill(chunk)
        if copies:
            self._cache.copy_prefixes(*np.array(copies).T)

    def _prefill_chunks(self, slots: list[int]) -> Iterator[list[int]]:
        """Split into forwards: one pool each, prompts of similar length, ``_PREFILL_TOKENS`` with padding."""
        chunk: list[int] = []
        for slot in sorted(slots, key=lambda s: int(self._position[s])):
            same_pool = not chunk or self._cache.pool_of[slot] == self._cache.pool_of[chunk[0]]
            if chunk and (not same_pool or (len(chunk) + 1) * self._position[slot] > _PREFILL_TOKENS):
                yield chunk
                chunk = []
            chunk.append(slot)
        if chunk:
            yield chunk

    def _prefill(self, slots: list[int]) -> None:
        lengths = self._position[slots]
        tokens = np.zeros((len(slots), int(lengths.max())), dtype=np.int64)
        for row, slot in enumerate(slots):
            tokens[row, : lengths[row]] = self._prompts[self._request[slot]][:-1]
        device, pool = self._model.device, self._cache.pools[self._cache.pool_of[slots[0]]]
        rows = torch.from_numpy(self._cache.row_of[slots]).to(device)
        self._model.prefill(torch.from_numpy(tokens).to(device), pool, rows)
        self._engine.num_prefill_tokens += int(lengths.sum())
