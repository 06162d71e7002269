"""A link to one peer's pool by NIXL, its reads, and the probe that warms and measures it.

Everything called `advance` runs on the agent's thread. NIXL cannot stop a read: releasing its handle and removing its
peer both let the data land later (ADR 0012). So a transfer stays PENDING until its handle has ended, whatever is asked
of it; that it has failed shows in `error` before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvrelay_core.clock import Clock
from kvrelay_core.errors import DeadlineError, KvRelayError, TransferError, UnsupportedError
from kvrelay_transfer.connectors.base import (
    BlockRead,
    EndedTransfer,
    PeerLink,
    ReadWindow,
    Transfer,
    TransferState,
    check_block_range,
)
from kvrelay_transfer.connectors.nixl_agent import IndexArray, NixlAgent, PostedRead, PreparedSpans
from kvrelay_transfer.connectors.nixl_endpoint import NixlEndpoint
from kvrelay_transfer.connectors.nixl_words import PAGE_BYTES, Landing, Landings, pages_of
from kvrelay_transfer.fence import MemoryFence, WordArray
from kvrelay_transfer.pool_memory import PoolMemory

# Between GPUs a hand-off of 512 MiB takes a few milliseconds, and every read a tenth of one of Python besides. On CPU
# the agent's thread copies itself, when it posts: smaller reads let others in between.
GPU_WINDOW = ReadWindow(max_reads=8, max_read_bytes=128 << 20)
GPU_POLL_S = 0.0001


class Flight(Protocol):
    """Something that NIXL may still be writing for."""

    posted_at_s: float  # by time.perf_counter(), the read that NIXL has

    @property
    def is_posted(self) -> bool:
        """NIXL has a read of it that has not ended."""

    def advance(self) -> bool:
        """True when it is over and nothing of it can land any more. Does not raise."""

    def tear_down(self) -> None:
        """Nothing of it can land: it was not posted, or the agent is gone."""


@dataclass(frozen=True, slots=True, eq=False)
class ReaderSide:
    """Our half of every link."""

    agent: NixlAgent
    memory: PoolMemory
    clock: Clock
    deadline_s: float
    blocks: PreparedSpans  # of our pool
    landings: Landings  # for words
    scratch: PreparedSpans  # room for probes, in parts as large as a block
    scratch_blocks: int
    fly: Callable[[NixlLink, Flight], None]  # has the agent's thread look after it
    wake: Callable[[], None]
    is_reading: Callable[[str], bool]  # of the agent with this name; it may not be added or removed meanwhile


class NixlLink(PeerLink):
    def __init__(self, side: ReaderSide, peer_id: str, endpoint: NixlEndpoint) -> None:
        """On the agent's thread, which has taken in the peer. Raises TransferError when it cannot be read at all."""
        self.side = side
        self.peer_id = peer_id
        self.agent_name = endpoint.agent_name
        self.flights: list[Flight] = []  # the agent's thread's
        self.is_closed = False
        self.gb_per_s: float | None = None
        is_on_gpu = side.memory.device == "cuda"
        self.window = GPU_WINDOW if is_on_gpu else ReadWindow()
        self.poll_s = GPU_POLL_S if is_on_gpu else Transfer.poll_s
        self._endpoint = endpoint
        self._failure: TransferError | None = None
        self._prepare()
        self.flights.append(_Probe(self, endpoint.num_blocks))

    # ------------------------------------------------------------------------------ on the engine's thread

    def read(self, read: BlockRead) -> Transfer:
        if self.is_closed:
            return EndedTransfer(TransferError(f"the link to {self.peer_id} is closed"), TransferState.TORN_DOWN)
        try:
            if read.slices is not None:
                raise UnsupportedError("nixl reads whole blocks only")
            check_block_range(read.remote, self._endpoint.num_blocks, "the peer's")
            check_block_range(read.local, self.side.memory.num_blocks, "our")
        except KvRelayError as error:
            return EndedTransfer(error)
        transfer = _NixlTransfer(self, read, self.side.clock.now() + self.side.deadline_s)
        self.side.fly(self, transfer)
        return transfer

    def close(self) -> None:
        """Returns at once. A transfer becomes TORN_DOWN when NIXL says that it is over."""
        if not self.is_closed:
            self.is_closed = True
            self.side.wake()

    def probed_gb_per_s(self) -> float | None:
        return self.gb_per_s

    # ------------------------------------------------------------------------------- on the agent's thread

    def post_blocks(self, remote: IndexArray, local: IndexArray) -> PostedRead:
        return self.side.agent.post_read(self.side.blocks, local, self._blocks, remote)

    def pages_of(self, remote: IndexArray) -> IndexArray:
        return pages_of(remote, self._endpoint.num_blocks)

    def take_landing(self) -> Landing:
        return self.side.landings.take(self._endpoint.num_blocks)

    def post_words(self, pages: IndexArray, landing: Landing) -> PostedRead:
        return self.side.agent.post_read(landing.pages, pages, self._words, pages)

    def post_probe(self, blocks: IndexArray) -> PostedRead:
        return self.side.agent.post_read(self.side.scratch, blocks, self._blocks, blocks)

    def fail(self, error: TransferError) -> None:
        """NIXL's endpoint is of no use after an error, and may not be posted to."""
        self._failure = self._failure or error

    def renew(self) -> None:
        """Connects again after a failure, when nothing is under way: networks heal. Raises TransferError."""
        if self._failure is None:
            return
        if self.side.is_reading(self.agent_name):
            raise TransferError(f"the link to {self.peer_id} has failed: {self._failure.message}")
        self.let_go()
        self.side.agent.remove_remote(self.agent_name)
        self.side.agent.add_remote(self.agent_name, self._endpoint.metadata)
        self._prepare()
        self._failure = None

    def let_go(self) -> None:
        """Of all that NIXL has for this link; nothing of it is under way."""
        for spans in (self._blocks, self._words):
            self.side.agent.let_go(spans)

    def _prepare(self) -> None:
        block_bytes = self.side.memory.layout.block_bytes
        data, words = self._endpoint.data(block_bytes), self._endpoint.words()
        self._blocks = self.side.agent.prepare(self.agent_name, data, block_bytes)
        self._words = self.side.agent.prepare(self.agent_name, words, PAGE_BYTES)


def _first(count: int) -> IndexArray:
    return np.arange(count, dtype=np.int32)


class _NixlTransfer(Transfer):
    """Made by the step loop, run by the agent's thread; the state is stored last: who sees it sees the rest."""

    def __init__(self, link: NixlLink, read: BlockRead, deadline_at_s: float) -> None:
        self.poll_s = link.poll_s
        self.posted_at_s = 0.0
        self._link = link
        self._remote = read.remote.astype(np.int32)
        self._local = read.local.astype(np.int32)
        self._deadline_at_s = deadline_at_s
        self._state = TransferState.PENDING
        self._was_aborted = False
        self._posted: PostedRead | None = None
        self._pages: IndexArray | None = None  # of words, from when the blocks are asked for
        self._landing: Landing | None = None  # from when the words are asked for

    @property
    def is_posted(self) -> bool:
        return self._posted is not None

    def poll(self) -> TransferState:
        return self._state

    def abort(self) -> None:
        self._was_aborted = True

    def advance(self) -> bool:
        if self.error is None:
            self.error = self._why_unwanted()
        try:
            return self._advance()
        except TransferError as error:
            self._link.fail(error)
            self.error = self.error or error
            return self._end()

    def tear_down(self) -> None:
        self.error = self.error or TransferError(f"the connection to {self._link.peer_id} was closed")
        self._end()

    def _advance(self) -> bool:
        if self._posted is None:
            if self.error is not None:
                return self._end()
            self._link.renew()
            self.posted_at_s = time.perf_counter()
            self._posted = self._link.post_blocks(self._remote, self._local)
            self._pages = self._link.pages_of(self._remote)  # while the data is on its way
        if not self._is_over():
            return False
        if self._landing is None:
            self.error = self.error or self._why_unwanted()
            if self.error is not None:
                return self._end()
            self._post_words()
            if not self._is_over():
                return False
        return self._end()

    def _is_over(self) -> bool:
        return self._posted is None or self._posted.is_over()

    def _post_words(self) -> None:
        assert self._pages is not None, "known since the blocks were posted"
        self._landing = self._link.take_landing()
        self.posted_at_s = time.perf_counter()
        self._posted = self._link.post_words(self._pages, self._landing)

    def _end(self) -> bool:
        """DONE with the words, unless there is an error."""
        self._posted = None
        if self.error is None:
            self.words = self._arrived_words()
        if self._landing is not None:
            self._link.side.landings.give_back(self._landing)
        if self.error is None:
            self._state = TransferState.DONE
        else:
            self._state = TransferState.TORN_DOWN if self._link.is_closed else TransferState.FAILED
        return True

    def _arrived_words(self) -> WordArray:
        assert self._landing is not None, "the words have been read"
        MemoryFence()()
        return self._landing.words[self._remote]

    def _why_unwanted(self) -> KvRelayError | None:
        if self._link.is_closed:
            return TransferError(f"the connection to {self._link.peer_id} was closed")
        if self._was_aborted:
            return TransferError("the read was given up")
        if self._link.side.clock.now() >= self._deadline_at_s:
            return DeadlineError("the blocks did not arrive before the read's deadline")
        return None


class _Probe:
    """Three reads one after another: words, which connects the pair; a span, which touches its pages; the span again,
    which is measured. None of them writes to a block."""

    def __init__(self, link: NixlLink, num_blocks: int) -> None:
        """Raises TransferError when the peer cannot be read, as far as that is known before the pair is connected."""
        self._link = link
        self._blocks = _first(min(link.side.scratch_blocks, num_blocks))
        self._deadline_at_s = link.side.clock.now() + link.side.deadline_s
        self._passes_left = 2
        self._landing = link.take_landing()
        self.posted_at_s = time.perf_counter()
        try:
            self._posted = link.post_words(_first(1), self._landing)
        except TransferError:
            link.side.landings.give_back(self._landing)
            raise
        self.is_posted = True

    def advance(self) -> bool:
        try:
            while self._posted.is_over():
                if not self._passes_left:
                    return self._end(self._gb_per_s())
                if self._link.is_closed:
                    return self._end(0.0)
                self._passes_left -= 1
                self.posted_at_s = time.perf_counter()
                self._posted = self._link.post_probe(self._blocks)
        except TransferError as error:
            self._link.fail(error)
            return self._end(0.0)
        if self._link.side.clock.now() >= self._deadline_at_s:
            self._link.gb_per_s = 0.0  # but it is not over
        return False

    def tear_down(self) -> None:
        self._link.gb_per_s = self._link.gb_per_s or 0.0

    def _gb_per_s(self) -> float:
        size_bytes = len(self._blocks) * self._link.side.memory.layout.block_bytes
        return size_bytes / (time.perf_counter() - self.posted_at_s) / 1e9

    def _end(self, gb_per_s: float) -> bool:
        self.is_posted = False
        self._link.side.landings.give_back(self._landing)
        if self._link.gb_per_s is None:
            self._link.gb_per_s = gb_per_s
        return True
