"""What an engine has for reading one KV group of other engines: our pool, links to theirs, reads that were given up.

Knows no requests. Destinations of reads under way are quarantined until the connector says that they ended (PROTOCOL
A5).
"""

from __future__ import annotations

import math
from typing import Protocol

from kvrelay_core.errors import InternalError, KvRelayError, MismatchError, TransferError
from kvrelay_engine.group_pull import GroupPull, PostedRead
from kvrelay_engine.handoff_peers import ActiveLink, PeerLinks
from kvrelay_engine.kv_group import KvGroup
from kvrelay_engine.read_room import ReadRoom
from kvrelay_transfer.block_digest import BlockDigester
from kvrelay_transfer.connectors.base import PeerInfo
from kvrelay_transfer.connectors.grpc import GrpcConnector
from kvrelay_transfer.quarantine import Quarantine


class ReadLimits(Protocol):
    """Where one is None, what suits the link."""

    @property
    def max_reads(self) -> int | None: ...  # under way, of one who asks

    @property
    def max_read_bytes(self) -> int | None: ...

    @property
    def max_quarantined_share(self) -> float: ...  # of the pool, per link


class ReaderGroup:
    def __init__(self, group: KvGroup, peers: PeerLinks, limits: ReadLimits) -> None:
        self.index = group.index
        self.pool = group.pool
        self.layout = group.layout
        self._digester = group.digester
        self.num_digests_checked = 0
        self.num_digests_wrong = 0
        self.peers = peers
        max_quarantined = int(limits.max_quarantined_share * group.pool.num_blocks)
        self.quarantine = Quarantine(max_quarantined)
        self._room = ReadRoom(limits.max_reads, limits.max_read_bytes, max_quarantined * group.layout.block_bytes)
        grpc = group.connectors.get(GrpcConnector.name)
        self._grpc = grpc if isinstance(grpc, GrpcConnector) else None

    def connect(self, peer: PeerInfo) -> None:
        try:
            self.peers.connect(peer.of_group(self.index))
        except MismatchError as error:
            self.peers.refuse(peer.peer_id, error)

    def next_read_bytes(self, pull: GroupPull, active: ActiveLink, under_way_bytes: int) -> int:
        """How much to ask of the pull's source next; 0: nothing now. `under_way_bytes` of all reads from there, without
        those that were given up."""
        given_up = self.quarantine.num_blocks_of(active.peer.peer_id, active.connector)
        given_up_bytes = given_up * self.layout.block_bytes
        return self._room.next_read_bytes(active.link.window, len(pull.reads), under_way_bytes, given_up_bytes)

    def seconds_for(self, size_bytes: int, read: PostedRead) -> float:
        """By the probe of the link that the read goes by; inf where there was none."""
        speed = self.peers.records.find(read.peer_id, read.connector).speed
        return size_bytes / (1e9 * speed.gb_per_s) if speed is not None and speed.gb_per_s else math.inf

    def verify(self, pull: GroupPull, read: PostedRead) -> list[tuple[int, bytes]]:
        """Blocks of ours that are whole by a read that is done, with their keys.

        Raises StaleTicketError where one was reused meanwhile, TransferError where one is not what was sealed.
        """
        pull.check_words(read)
        if pull.digests and self._digester is not None and read.read.slices is None:
            self._check_digests(pull, read, self._digester)
        return pull.accept(read)

    def _check_digests(self, pull: GroupPull, read: PostedRead, digester: BlockDigester) -> None:
        for remote, local in zip(read.read.remote_blocks, read.read.local_blocks, strict=True):
            expected = pull.digests.get(remote)
            if expected is None:
                continue
            self.num_digests_checked += 1
            if digester.digest(local) != expected:
                self.num_digests_wrong += 1
                self.peers.distrust(read.peer_id, read.connector)
                raise TransferError(
                    f"block {remote} of {read.peer_id} is not what was sealed there, after a read by {read.connector}; "
                    "nothing of that read is used. Look for faults of memory, of the link and of its library",
                    peer_id=read.peer_id,
                )

    def drop(self, pull: GroupPull, kept: int) -> None:
        """Frees the blocks after the first `kept`, except those that a read may still write to."""
        self.pool.release(pull.unused_blocks(kept))
        for read in pull.reads:
            self.quarantine.add(read.peer_id, read.connector, read.transfer, read.blocks)
        self.collect_quarantine()

    def collect_quarantine(self) -> None:
        self.pool.release(self.quarantine.collect())
        for peer_id, connector in self.quarantine.links_over_cap():
            self.peers.tear_down(peer_id, connector)
            self.pool.release(self.quarantine.collect())

    def deliver(self, read: int, first: int, slot: int, words: tuple[int, ...]) -> None:
        self._fetches.deliver(read, first, slot, words)

    def end_fetch(self, read: int, error: KvRelayError | None) -> None:
        self._fetches.end(read, error)

    @property
    def _fetches(self) -> GrpcConnector:
        if self._grpc is None:
            raise InternalError("a fetched piece came, but this engine has no grpc connector")
        return self._grpc
