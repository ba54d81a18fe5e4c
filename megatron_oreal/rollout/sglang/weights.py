"""One server's weights: from staging memory into its workers, visible only when all of them hold the same bytes.

A version is a label on the server (``weight_version``), which every response carries. It is taken away before the
first byte changes and given after every worker's digests have been compared with the staging memory's: whatever goes
wrong in between, no response can claim a version that it was not made with.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import itertools
import json
import pickle
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_oreal.layout import Digester, DigestReport
from megatron_oreal.rollout.engine import EngineError
from megatron_oreal.rollout.sglang.args import WEIGHT_LOADER
from megatron_oreal.rollout.sglang.client import RefusedError, ServerClient, UnreachableError
from megatron_oreal.rollout.sglang.loader import ORDER
from megatron_oreal.rollout.sglang.staging import Mailbox

_FLUSH_PAUSE_S = 0.05
TAGS = ("kv_cache", "weights", "cuda_graph")
"""SGLang's names of the memory that it can give back."""


Staged = Mapping[str, Any]
"""Where a worker finds weights (``ShardStaging.describe``)."""


@dataclass(frozen=True)
class Part:
    """``staged[i]``: for worker ``i``. ``taken``: when every worker has copied it, and its memory may be written."""

    staged: Sequence[Staged]
    is_last: bool
    taken: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)


class WeightSync:
    """Weights of the server behind ``client``, which has ``tp`` workers. ``digester`` from ``digests.shard_digester``.

    ``timeout_s`` bounds each call to the server. All coroutines run on the client's event loop.
    """

    def __init__(self, client: ServerClient, model_dir: str, *, tp: int, digester: Digester, timeout_s: float):
        self.client, self._model_dir, self._tp, self._timeout_s = client, model_dir, tp, timeout_s
        self._digester = digester
        self._session = uuid.uuid4().hex[:12]
        self._mailboxes = [Mailbox(f"mailbox{rank}") for rank in range(tp)]
        self._sequence = itertools.count(1)
        self._begin_end: bool | None = None
        self._noise = True

    def label(self, version: int) -> str:
        """The server's name for a version: no other engine object's, and no other run's."""
        return f"{self._session}:{version}"

    def restarted(self) -> None:
        """The server is a new process: it has dummy weights, and may be another SGLang."""
        self._begin_end, self._noise = None, True

    async def load(
        self, stagings: Sequence[Staged], hashes: Sequence[torch.Tensor], version: int, *, awake: bool
    ) -> DigestReport:
        """Have worker ``i`` take the whole shard ``stagings[i]`` (``ShardStaging.describe``), digests ``hashes[i]``.

        An ``awake`` server is paused meanwhile and has nothing cached afterwards; another is that anyway. Raises
        ``EngineError`` when a worker does not acknowledge or holds something else; the server then has no version.
        """
        parts: asyncio.Queue[Part | None] = asyncio.Queue()
        parts.put_nowait(Part(stagings, is_last=True))
        digests = await self.feed(parts, version, awake=awake)
        assert digests is not None
        return await self.accept(digests, hashes, version, awake=awake)

    async def feed(self, parts: asyncio.Queue[Part | None], version: int, *, awake: bool) -> list[Any] | None:
        """Have the workers take one part of their shards after the other, up to the last, in one update of SGLang's.

        The server has no version from before the first byte changes until ``accept``. Returns the workers' digests;
        None when the queue ends without a last part.
        """
        if awake:
            await self.pause()
        await self.set_label("none")
        async with self._update():
            is_first = True
            while (part := await parts.get()) is not None:
                orders = [
                    self._load_order(staging, rank, version, is_first) for rank, staging in enumerate(part.staged)
                ]
                for order in orders:
                    order["last"] = part.is_last
                answers = await self._order(orders, f"weights of version {version}")
                part.taken.set_result(None)
                is_first = False
                if part.is_last:
                    return [answer["digests"] for answer in answers]
        return None

    async def accept(
        self, digests: Sequence[Sequence[int]], hashes: Sequence[torch.Tensor], version: int, *, awake: bool
    ) -> DigestReport:
        """Give the server the version's label, if its workers hold what was staged; raises ``EngineError`` if not."""
        report = self._compare(version, hashes, digests)
        self._noise = False
        if awake:
            await self.flush()
        await self.set_label(self.label(version))
        if awake:
            await self.resume()
        return report

    async def forget_staging(self) -> None:
        """Have the workers unmap the staging memory."""
        async with self._update():
            await self._order([{"order": "forget"} for _ in range(self._tp)], "unmapping of the staging memory")

    async def pause(self) -> None:
        """Stop generation, drop its requests and what is cached."""
        await self.client.post("/pause_generation", {"mode": "abort"}, self._timeout_s)
        await self.flush()

    async def resume(self) -> None:
        """Undo ``pause``."""
        await self.client.post("/continue_generation", {}, self._timeout_s)

    async def flush(self) -> None:
        """Empty the caches; waits until the server is idle, as it must be before memory is released."""
        end = asyncio.get_running_loop().time() + self._timeout_s
        while True:
            try:
                await self.client.post("/flush_cache", {}, self._timeout_s)
                return
            except RefusedError as error:  # requests are still on their way out
                if asyncio.get_running_loop().time() > end:
                    raise EngineError(
                        f"{self.client.url} did not become idle in {self._timeout_s:g} s: {error}"
                    ) from None
            await asyncio.sleep(_FLUSH_PAUSE_S)

    async def release(self, tags: Sequence[str]) -> None:
        """Give device memory back; the server must be paused. Weights that were released have no version any more."""
        if "weights" in tags:
            await self.set_label("none")
        await self.client.post("/release_memory_occupation", {"tags": list(tags)}, self._timeout_s)

    async def retake(self, tags: Sequence[str]) -> None:
        """Take device memory again, with undefined contents."""
        await self.client.post("/resume_memory_occupation", {"tags": list(tags)}, self._timeout_s)

    async def set_label(self, label: str) -> None:
        """Set what responses say about their weights."""
        body = {"new_version": label, "abort_all_requests": False}
        await self.client.post("/update_weight_version", body, self._timeout_s)

    def close(self) -> None:
        """Give the mailboxes back. Idempotent."""
        for mailbox in self._mailboxes:
            mailbox.close()

    @contextlib.asynccontextmanager
    async def _update(self) -> AsyncIterator[None]:
        """From SGLang 0.5.21 on an update stands between two calls; before, they do not exist."""
        if self._begin_end is None:
            self._begin_end = await self.client.has("/begin_weight_update", self._timeout_s)
        if self._begin_end:
            await self.client.post("/begin_weight_update", {}, self._timeout_s)
        try:
            yield
        except UnreachableError:
            raise  # nobody is there to hear of the end
        except EngineError:
            await self._end_update()
            raise
        await self._end_update()

    async def _end_update(self) -> None:
        if self._begin_end:
            await self.client.post("/end_weight_update", {}, self._timeout_s)

    def _load_order(self, staging: Staged, rank: int, version: int, is_first: bool) -> dict[str, Any]:
        return {
            "order": "load",
            "staging": staging,
            "model_dir": self._model_dir,
            "tp": self._tp,
            "rank": rank,
            "first": is_first,
            "noise_seed": version + 1 if self._noise and is_first else None,
        }

    async def _order(self, orders: Sequence[dict[str, Any]], what: str) -> list[dict[str, Any]]:
        """Have every worker do its order, and return their answers."""
        sequence = next(self._sequence)
        payloads = []
        for order, mailbox in zip(orders, self._mailboxes, strict=True):
            mailbox.clear()
            content = json.dumps(order | {"sequence": sequence, "mailbox": mailbox.path}).encode()
            tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            # A plain pickle holds the bytes themselves: no shared memory whose owner SGLang would have to ask.
            payloads.append(base64.b64encode(pickle.dumps([(ORDER, tensor)])).decode())
        body = {
            "serialized_named_tensors": payloads,
            "load_format": WEIGHT_LOADER,
            "flush_cache": False,
            "abort_all_requests": False,
        }
        await self.client.post("/update_weights_from_tensor", body, self._timeout_s)
        answers = []
        for rank, mailbox in enumerate(self._mailboxes):
            answer = mailbox.read()
            where = f"{what}: {self.client.url}, tp rank {rank}"
            if answer is None or answer.get("sequence") != sequence:
                raise EngineError(f"{where} did not acknowledge")
            if "error" in answer:
                raise EngineError(f"{where}: {answer['error']}")
            answers.append(answer)
        return answers

    def _compare(self, version: int, hashes: Sequence[torch.Tensor], found: Sequence[Sequence[int]]) -> DigestReport:
        vectors = {rank: np.concatenate([[version, 0], each.cpu().numpy()]) for rank, each in enumerate(hashes)}
        for rank, (wrong_padding, *cells) in enumerate(found):
            vectors[self._tp + rank] = np.array([version, wrong_padding, *cells], dtype=np.int64)
        report = self._digester.compare(vectors)
        if isinstance(report, str):
            raise EngineError(f"{self.client.url}: {report} (ranks {self._tp} and up are the engine's)")
        return report
