"""The encoder's engine: media items in, tickets out, one batch at a time.

    step = end leases -> batch decoded items under the budget of patches -> encode -> publish -> tickets

An item that is in the cache is answered at once; one that is asked for twice at the same time is encoded once. Others
are decoded beside the loop: those that are ready are encoded in the order of arrival, and wait for none that is not.
A bad item is an error to those who asked for it, and to nobody else. Items wait for blocks that leases hold, up to
`reserve_budget_s`. Synchronous and single-threaded, as `kvrelay_engine.engine`; knows no sockets and no models.
"""

from __future__ import annotations

import itertools
import logging
from bisect import insort
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvrelay_core.clock import Clock
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import (
    DrainingError,
    InternalError,
    KvRelayError,
    OverloadedError,
    PoolExhaustedError,
    RequestCancelledError,
)
from kvrelay_core.media.video import count_bytes
from kvrelay_core.request import ErrorInfo
from kvrelay_engine.config import EngineConfig
from kvrelay_engine.embeddings.cache import CachedItem, EmbeddingCache
from kvrelay_engine.embeddings.source import EmbeddingSource
from kvrelay_engine.encoder.decoding import Decoder, Decoding
from kvrelay_engine.encoder.tower import MediaInput, Tower
from kvrelay_engine.encoder_messages import EncodeItem, ItemEncoded
from kvrelay_engine.messages import (
    Abort,
    Beat,
    Drain,
    EngineCommand,
    Event,
    Export,
    GetLoad,
    Load,
    LoadReply,
    ReleaseTicket,
    Shutdown,
)

logger = logging.getLogger(__name__)

# Undecoded items that may wait: a bound of this process's memory.
MAX_QUEUED_BYTES = 256 << 20


@dataclass(slots=True, eq=False)
class _Job:
    """An item that is to be encoded, and who asked for it."""

    number: int  # in order of arrival
    content_hash: bytes
    decoding: Decoding[Any]
    size_bytes: int  # as received
    waiters: list[int] = field(default_factory=list)
    blocks: tuple[int, ...] = ()
    waiting_since_s: float | None = None  # for blocks

    @property
    def decoded(self) -> MediaInput:
        assert self.decoding.result is not None, "it is ready"
        return self.decoding.result  # type: ignore[no-any-return]


class EncoderEngine:
    def __init__(
        self,
        config: EngineConfig,
        tower: Tower[Any],
        cache: EmbeddingCache,
        source: EmbeddingSource,
        decoder: Decoder[Any],
        clock: Clock,
        emit: Callable[[Event], None],
        computing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`computing` goes around what may take seconds."""
        self._computing = computing
        self._tower = tower
        self._cache = cache
        self.source = source
        self._decoder = decoder
        self._clock = clock
        self._emit = emit
        self._patch_budget = config.patches_per_step
        self._room_budget_s = config.reserve_budget_s
        self._jobs: dict[bytes, _Job] = {}  # by content hash, in order of arrival
        self._decoding: dict[Decoding[Any], _Job] = {}  # those that are not ready
        self._ready: list[_Job] = []  # in order of arrival
        self._numbers = itertools.count()
        self._queued_bytes = 0
        self.is_draining = False  # it was told, for good
        self.num_steps = 0
        self.num_hits = 0

    # ----------------------------------------------------------------------------------------- commands

    def handle(self, command: EngineCommand) -> None:
        """Never raises for what a request or a reader did wrong: that is answered by an event."""
        match command:
            case EncodeItem():
                self._take(command)
            case Abort(id):
                self._forget_waiter(id)
            case Export() | ReleaseTicket():
                self.source.handle(command)
            case GetLoad(call, check_integrity):
                error = self._inconsistency() if check_integrity else None
                self._emit(LoadReply(call, self.report(), error))
            case Drain():
                self.is_draining = True
            case Shutdown():
                self.close()
            case _:
                raise InternalError(f"an encoder's engine was given a {type(command).__name__}")

    def _take(self, command: EncodeItem) -> None:
        if self.is_draining:
            self._fail(command.id, DrainingError("the encoder is draining; ask another one"))
            return
        item = self._cache.find(command.content_hash)
        if item is not None:
            self.num_hits += 1
            self._emit(ItemEncoded(command.id, self.source.issue(item), was_cached=True))
            return
        job = self._jobs.get(command.content_hash)
        if job is None:
            if self._queued_bytes + count_bytes(command.data) > MAX_QUEUED_BYTES:
                self._fail(command.id, OverloadedError("too many images wait to be encoded; ask another encoder"))
                return
            job = self._begin(command)
        job.waiters.append(command.id)

    def _begin(self, command: EncodeItem) -> _Job:
        decoding = self._decoder.submit(command.data)
        job = _Job(next(self._numbers), command.content_hash, decoding, count_bytes(command.data))
        self._jobs[command.content_hash] = self._decoding[decoding] = job
        self._queued_bytes += job.size_bytes
        return job

    def _forget_waiter(self, request_id: int) -> None:
        for job in list(self._jobs.values()):
            if request_id in job.waiters:
                job.waiters.remove(request_id)
                if not job.waiters:
                    self._remove(job)

    # --------------------------------------------------------------------------------------------- steps

    def step(self) -> bool:
        """One turn; True if it encoded something."""
        self.source.tick()
        self._take_decoded()
        batch = self._next_batch()
        if batch:
            self.num_steps += 1
            self._encode(batch)
        return bool(batch)

    def _take_decoded(self) -> None:
        for decoding in self._decoder.take_finished():
            job = self._decoding[decoding]
            if decoding.error is None:
                del self._decoding[decoding]
                insort(self._ready, job, key=lambda one: one.number)
            else:
                self._end(job, _as_known(decoding.error))

    def _next_batch(self) -> list[_Job]:
        """Of those that are ready in order of arrival, as many as the budget allows, at least one; each has its
        blocks."""
        batch: list[_Job] = []
        num_patches = 0
        for job in list(self._ready):
            decoded = job.decoded
            if batch and num_patches + decoded.num_patches > self._patch_budget:
                break
            if not self._reserve(job, decoded):
                if job.content_hash not in self._jobs:
                    continue  # refused
                break
            num_patches += decoded.num_patches
            batch.append(job)
            if num_patches >= self._patch_budget:
                break
        return batch

    def _reserve(self, job: _Job, decoded: MediaInput) -> bool:
        """False: the item waits for room, or was refused."""
        needed = self._cache.layout.blocks_for(decoded.num_tokens)
        if needed > self._cache.num_blocks:
            message = (
                f"the image needs {needed} blocks of embeddings, the whole pool has {self._cache.num_blocks}; "
                "send a smaller one, or start the encoder with more --embedding-mib"
            )
            self._end(job, PoolExhaustedError(message, needed=needed))
            return False
        blocks = self._cache.reserve(decoded.num_tokens)
        if blocks is not None:
            job.blocks = blocks
            return True
        now_s = self._clock.now()
        if job.waiting_since_s is None:
            job.waiting_since_s = now_s
        if now_s - job.waiting_since_s >= self._room_budget_s:
            self._end(job, OverloadedError("other requests hold all room for embeddings; ask another encoder"))
        return False

    def _encode(self, batch: list[_Job]) -> None:
        try:
            rows = self._rows_of(batch)
        except Exception as error:
            if len(batch) == 1:
                logger.exception("an item could not be encoded")
                self._cache.give_back(batch[0].blocks)
                self._end(batch[0], InternalError(f"the vision tower failed: {error!r}"))
                return
            for job in batch:  # one of them is the cause: the others are not to suffer
                self._encode([job])
            return
        for job, rows_of_job in zip(batch, rows, strict=True):
            self._cache.write(job.blocks, rows_of_job)
            self._answer(job, self._cache.publish(job.content_hash, job.blocks, len(rows_of_job)))

    def _rows_of(self, batch: list[_Job]) -> list[Tensor]:
        inputs = [job.decoded for job in batch]
        with self._computing():
            rows = self._tower.encode(inputs)
        expected = [(decoded.num_tokens, self._cache.layout.hidden_size) for decoded in inputs]
        if [tuple(one.shape) for one in rows] != expected:
            raise InternalError(f"the tower gave rows {[tuple(one.shape) for one in rows]}, expected {expected}")
        return rows

    def _answer(self, job: _Job, item: CachedItem) -> None:
        for waiter in job.waiters:
            self._emit(ItemEncoded(waiter, self.source.issue(item)))
        self._cache.drop(item)
        self._remove(job)

    def _end(self, job: _Job, error: KvRelayError) -> None:
        for waiter in job.waiters:
            self._fail(waiter, error)
        self._remove(job)

    def _fail(self, request_id: int, error: KvRelayError) -> None:
        self._emit(ItemEncoded(request_id, error=info_of(error)))

    def _remove(self, job: _Job) -> None:
        del self._jobs[job.content_hash]
        self._queued_bytes -= job.size_bytes
        if self._decoding.pop(job.decoding, None) is None:
            self._ready.remove(job)
        self._decoder.end(job.decoding)

    # ------------------------------------------------------------------------------------ load and the end

    @property
    def has_jobs(self) -> bool:
        return bool(self._jobs)

    @property
    def is_decoding(self) -> bool:
        return bool(self._decoding)

    @property
    def is_idle(self) -> bool:
        """No item waits or is decoded, and nobody holds one."""
        return not self._jobs and not self.source.num_leases and self._decoder.is_idle

    def report(self) -> Load:
        pool = self._cache.pool
        return Load(
            requests_waiting=len(self._jobs),
            blocks_total=self._cache.num_blocks,
            blocks_in_use=pool.num_in_use,
            blocks_cached=self._cache.num_cached_blocks,
            blocks_pinned=self.source.num_pinned,
            leases=self.source.num_leases,
            embedding_items=self._cache.num_items,
            embedding_hits=self.num_hits,
            embeddings_evicted=self._cache.num_evicted,
            steps=self.num_steps,
            expired_leases=self.source.num_expired,
        )

    def beat(self) -> None:
        self._emit(Beat(self.report(), {}, self.is_draining))

    def check_integrity(self) -> None:
        """Asserts that nobody but the leases holds a block, between two steps."""
        self._cache.check_integrity(self.source.holds())
        assert self._queued_bytes == sum(job.size_bytes for job in self._jobs.values())
        assert len(self._jobs) == len(self._decoding) + len(self._ready)

    def _inconsistency(self) -> ErrorInfo | None:
        try:
            self.check_integrity()
        except AssertionError as error:
            return info_of(InternalError(str(error)))
        return None

    def close(self) -> None:
        """Ends every item and lease without a word to anybody."""
        for job in list(self._jobs.values()):
            job.waiters.clear()
            self._end(job, RequestCancelledError("the encoder shuts down"))
        self.source.close()


def _as_known(error: Exception) -> KvRelayError:
    if isinstance(error, KvRelayError):
        return error
    logger.error("an item could not be decoded", exc_info=error)
    return InternalError(f"the image could not be decoded: {error!r}")
