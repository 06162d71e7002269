"""What a connector is: a way to read blocks of a peer's pool into our own.

    offer()               once, at start: what a peer needs to reach our pool          (source side)
    serve(gate)           while tickets are open, for those whose source takes part    (source side)
    connect(peer, offer)  once per peer: a link to the peer's pool                     (reader side)
    link.read(...)        per hand-off chunk: posts the copy and returns at once
    transfer.poll()       from the engine's step loop, never blocking, until terminal
    link.close()          the peer is gone; transfers still posted become TORN_DOWN

Contract of a read (PROTOCOL A5, A6, E3):
- the destination blocks belong to the transfer until `poll()` returns a terminal state; after `abort()` too;
- when `poll()` returns DONE, `words` holds the source's fence words of the remote blocks, one for each pair, read by a
  *second* operation that was issued after the data's completion was observed. Comparing them is the caller's part;
- every read has a deadline of its own; a source that does not progress ends as FAILED or TORN_DOWN. Where a copy cannot
  be stopped, the transfer stays PENDING with its `error` set: the read has failed, and its destination is not free yet.

A connector knows nothing of requests, leases or prefix caches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from functools import cached_property
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from kvrelay_core.errors import KvRelayError, MismatchError, TransferError
from kvrelay_transfer.embedding_layout import PoolLayout
from kvrelay_transfer.fence import Words
from kvrelay_transfer.ticket import Ticket

Blocks = npt.NDArray[np.int64]  # numbers of blocks, or byte offsets into them


class TransferState(Enum):
    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    TORN_DOWN = "torn down"

    @property
    def is_terminal(self) -> bool:
        return self is not TransferState.PENDING


class ConnectorOffer(Struct, frozen=True, array_like=True):
    """How to reach a pool through the connector `name`; only that connector reads `endpoint`."""

    name: str
    endpoint: bytes


class PoolOffer(Struct, frozen=True, array_like=True):
    """The pool of one KV group behind the first, and how to reach it."""

    layout: PoolLayout
    offers: tuple[ConnectorOffer, ...]


class PeerInfo(Struct, frozen=True, array_like=True):
    """A source as its Connect handshake described it. `peer_id` is its address."""

    peer_id: str
    engine_epoch: bytes
    model_fingerprint: bytes
    layout: PoolLayout
    offers: tuple[ConnectorOffer, ...]
    more_pools: tuple[PoolOffer, ...] = ()

    @property
    def layouts(self) -> tuple[PoolLayout, ...]:
        """Of each of its groups."""
        return (self.layout, *(pool.layout for pool in self.more_pools))

    def of_group(self, group: int) -> PeerInfo:
        """The source as if it had this group alone. Raises MismatchError where it has no such group."""
        if group > len(self.more_pools):
            raise MismatchError(
                f"{self.peer_id} has {1 + len(self.more_pools)} KV groups, this worker {1 + group} or more; "
                "run one release with one model on both"
            )
        pool = self.more_pools[group - 1] if group else self
        return PeerInfo(self.peer_id, self.engine_epoch, self.model_fingerprint, pool.layout, pool.offers)


class SliceShape(Struct, frozen=True, array_like=True):
    """`outer` x `inner` rows of `row_bytes`, and how far apart (in bytes) they lie in a block of either side."""

    outer: int
    inner: int
    row_bytes: int
    remote_outer_stride: int
    remote_inner_stride: int
    local_outer_stride: int
    local_inner_stride: int

    @property
    def size_bytes(self) -> int:
        """What one pair of blocks moves."""
        return self.outer * self.inner * self.row_bytes

    def extent(self, outer_stride: int, inner_stride: int) -> int:
        """Bytes from the first row's begin to the last row's end."""
        return (self.outer - 1) * outer_stride + (self.inner - 1) * inner_stride + self.row_bytes


def as_blocks(numbers: Sequence[int] | Blocks) -> Blocks:
    """A tuple is read so in half the time that np.array() takes."""
    return numbers if isinstance(numbers, np.ndarray) else np.fromiter(numbers, np.int64, len(numbers))


class BlockSlices:
    """Where in each pair of blocks the rows begin (byte offsets); the rows of all pairs are spaced alike."""

    def __init__(
        self, shape: SliceShape, remote_offsets: Sequence[int] | Blocks, local_offsets: Sequence[int] | Blocks
    ) -> None:
        self.shape = shape
        self.remote_offsets = as_blocks(remote_offsets)
        self.local_offsets = as_blocks(local_offsets)


class BlockRead:
    """Block remote[i] of the peer is to be copied into our block local[i].

    Whole blocks of equal layouts; with `slices` the rows that these name, and then a block may be in several pairs.
    The arrays are not to be changed.
    """

    def __init__(
        self,
        ticket: Ticket,
        group: int,
        remote: Sequence[int] | Blocks,
        local: Sequence[int] | Blocks,
        slices: BlockSlices | None = None,
    ) -> None:
        self.ticket = ticket
        self.group = group
        self.remote = as_blocks(remote)
        self.local = as_blocks(local)
        self.slices = slices

    @cached_property
    def remote_blocks(self) -> tuple[int, ...]:
        """`remote` for messages and loops; a read of many blocks is better off without."""
        return tuple(self.remote.tolist())

    @cached_property
    def local_blocks(self) -> tuple[int, ...]:
        """The same of `local`."""
        return tuple(self.local.tolist())


class ExportGate(Protocol):
    """What a connector whose source takes part in reads asks before it sends anything."""

    def check_export(self, ticket: Ticket, group: int, blocks: Sequence[int]) -> None:
        """Raises TicketRejectedError, LeaseExpiredError or TransferError unless `blocks` of `ticket` may be read now.

        May be called on any thread. The words are still to be read after the data (PROTOCOL A6).
        """


class LinkSpeed(Struct, frozen=True, array_like=True):
    """What a probe found; 0.0 stands for what it did not measure. `latency_s` is that of a few KiB, from posting to
    their arrival."""

    gb_per_s: float = 0.0  # 10^9 bytes a second
    latency_s: float = 0.0


class ReadWindow(Struct, frozen=True, array_like=True):
    """What suits a link: how large its reads should be, and how many of them one hand-off has under way."""

    max_reads: int = 4
    max_read_bytes: int = 32 << 20


class Transfer(ABC):
    """One asynchronous read."""

    poll_s: float = 0.0005  # between two looks of a caller who has nothing else to do
    words: Words = ()
    error: KvRelayError | None = None  # may come before the terminal state, and is final

    @abstractmethod
    def poll(self) -> TransferState:
        """Never blocks. Terminal states are final."""

    @abstractmethod
    def abort(self) -> None:
        """Asks for an early end. The destination stays the transfer's until `poll()` says it is terminal."""


class PeerLink(ABC):
    window = ReadWindow()

    @abstractmethod
    def read(self, read: BlockRead) -> Transfer:
        """Posts the copy. What cannot be posted comes back as a transfer that FAILED."""

    @abstractmethod
    def close(self) -> None:
        """The peer is gone. Returns at once; transfers still posted become TORN_DOWN."""

    def probed_gb_per_s(self) -> float | None:
        """What the probe at connect measured (10^9 bytes a second); None while it runs, 0.0 if there is none."""
        return 0.0

    def probed_speed(self) -> LinkSpeed | None:
        """As `probed_gb_per_s`, with the latency where the probe measures it."""
        gb_per_s = self.probed_gb_per_s()
        return None if gb_per_s is None else LinkSpeed(gb_per_s)


class EndedTransfer(Transfer):
    """A read that was over before it began."""

    def __init__(self, error: KvRelayError, state: TransferState = TransferState.FAILED) -> None:
        self.error = error
        self._state = state

    def poll(self) -> TransferState:
        return self._state

    def abort(self) -> None:
        pass


def check_block_range(blocks: Sequence[int] | Blocks, num_blocks: int, whose: str) -> None:
    """Raises TransferError for a block that a pool of `num_blocks` does not have; the null block counts as such."""
    numbers = as_blocks(blocks)
    if numbers.size and not (numbers.min() > 0 and numbers.max() < num_blocks):
        raise TransferError(f"block numbers outside 1..{num_blocks - 1} of {whose} pool")


def check_slices(read: BlockRead, remote_block_bytes: int, local_block_bytes: int) -> None:
    """Raises TransferError for rows that leave their blocks, and for whole blocks of unequal size."""
    if read.slices is None:
        if remote_block_bytes != local_block_bytes:
            raise TransferError(f"blocks of {remote_block_bytes} and {local_block_bytes} bytes are read by slices only")
        return
    shape, remote, local = read.slices.shape, read.slices.remote_offsets, read.slices.local_offsets
    if not len(remote) == len(local) == len(read.remote) == len(read.local):
        raise TransferError("a sliced read needs one offset on each side for each pair of blocks")
    if not len(remote):
        return
    remote_end = remote.max() + shape.extent(shape.remote_outer_stride, shape.remote_inner_stride)
    local_end = local.max() + shape.extent(shape.local_outer_stride, shape.local_inner_stride)
    if (
        min(msgspec.structs.astuple(shape)) < 1
        or min(remote.min(), local.min()) < 0
        or remote_end > remote_block_bytes
        or local_end > local_block_bytes
    ):
        raise TransferError("a slice leaves its block")


class Connector(ABC):
    name: str
    can_slice = False  # its links read `BlockRead.slices`, thus peers of another layout

    @abstractmethod
    def offer(self) -> ConnectorOffer | None:
        """None when this side can only read."""

    def serve(self, gate: ExportGate | None) -> None:  # noqa: B027 - most have nothing to do
        """Reads of our pool may come from now on, and `gate` judges them; None: no ticket is open, be at rest.

        Called by the engine's thread, before the ticket leaves it. One-sided connectors have nothing to do.
        """

    @abstractmethod
    def connect(self, peer: PeerInfo, offer: ConnectorOffer) -> PeerLink:
        """Raises TransferError when the peer's pool cannot be reached this way."""

    @abstractmethod
    def close(self) -> None: ...
