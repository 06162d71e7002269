"""The ways of the storm whose reads run on threads of their own: shm, nixl and ucx, source and reader in this process.

Time in the storm is a number and goes on with its turns, while the threads need real time. So now and then a turn waits
until the oldest read has ended: a read lasts some turns, however slow the machine is.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from handoff_sides import SourceSide, wait_until
from storm_links import LAND_CHANCE, GrpcLink, MemoryLink, StormLink

from kvrelay_core.clock import ManualClock
from kvrelay_engine.handoff_reader import HandoffReader
from kvrelay_engine.messages import Event
from kvrelay_transfer.connectors.base import BlockRead, Connector, ConnectorOffer, PeerInfo, PeerLink, Transfer
from kvrelay_transfer.connectors.nixl import NixlConnector
from kvrelay_transfer.connectors.nixl_link import NixlLink
from kvrelay_transfer.connectors.shm import ShmConnector
from kvrelay_transfer.connectors.ucx import UcxConnector
from kvrelay_transfer.connectors.ucx_source import UcxSource
from kvrelay_transfer.fence import RemoteWords


class ThreadLink(StormLink):
    """`between` is called on the thread that reads the words, or has them read."""

    reads_words: tuple[Any, str]  # a class, and its method that comes between the data and the words

    def __init__(self, clock: ManualClock, num_blocks: int, emit: Callable[[Event], None]) -> None:
        self._source: Connector | None = None
        self._side: SourceSide | None = None
        self._under_way: list[tuple[BlockRead, Transfer]] = []
        owner, name = self.reads_words
        read_words = getattr(owner, name)

        def act_and_read(*args: Any) -> Any:
            self.between()
            return read_words(*args)

        self._patch = patch.object(owner, name, act_and_read)
        self._patch.start()
        super().__init__(clock, num_blocks, emit)
        self._watch(self.connector)

    @abstractmethod
    def make_source(self, side: SourceSide) -> Connector: ...

    def offer_of(self, side: SourceSide) -> ConnectorOffer:
        if side is not self._side:
            self._close_source()
            self._source, self._side = self.make_source(side), side
        assert self._source is not None
        offer = self._source.offer()
        assert offer is not None
        return offer

    def progress(self, reader: HandoffReader, chance: random.Random) -> None:
        self._drop_ended()
        if self._under_way and chance.random() < LAND_CHANCE:
            _, oldest = self._under_way[0]
            wait_until(lambda: oldest.poll().is_terminal)

    def written_blocks(self) -> list[int]:
        self._drop_ended()
        return [block for read, _ in self._under_way for block in read.local_blocks]

    def close(self) -> None:
        super().close()
        self._close_source()
        self._patch.stop()

    def _watch(self, connector: Connector) -> None:
        """Keeps every read of its links until it has ended."""
        connect = connector.connect

        def connect_and_watch(peer: PeerInfo, offer: ConnectorOffer) -> PeerLink:
            link = connect(peer, offer)
            post = link.read

            def post_and_keep(read: BlockRead) -> Transfer:
                transfer = post(read)
                self._under_way.append((read, transfer))
                return transfer

            link.read = post_and_keep  # type: ignore[method-assign]
            return link

        connector.connect = connect_and_watch  # type: ignore[method-assign]

    def _drop_ended(self) -> None:
        self._under_way = [entry for entry in self._under_way if not entry[1].poll().is_terminal]

    def _close_source(self) -> None:
        if self._source is not None:
            self._source.close()


class ShmLink(ThreadLink):
    reads_words = RemoteWords, "read"

    def __init__(self, clock: ManualClock, num_blocks: int, emit: Callable[[Event], None], directory: Path) -> None:
        self._directory = directory
        super().__init__(clock, num_blocks, emit)

    def make_connector(self) -> Connector:
        return ShmConnector(self.memory, self.clock, None)

    def make_source(self, side: SourceSide) -> Connector:
        return ShmConnector(side.memory, self.clock, self._directory / "source.sock")


class NixlStormLink(ThreadLink):
    reads_words = NixlLink, "post_words"

    def make_connector(self) -> Connector:
        return NixlConnector(self.memory, self.clock)

    def make_source(self, side: SourceSide) -> Connector:
        source = NixlConnector(side.memory, self.clock)
        source.serve(side.source)
        return source


class UcxStormLink(ThreadLink):
    reads_words = UcxSource, "_send_words"

    def make_connector(self) -> Connector:
        return UcxConnector(self.memory, self.clock)

    def make_source(self, side: SourceSide) -> Connector:
        source = UcxConnector(side.memory, self.clock)
        source.serve(side.source)
        return source


def make_link(
    name: str, clock: ManualClock, num_blocks: int, emit: Callable[[Event], None], directory: Path
) -> StormLink:
    match name:
        case "memory":
            return MemoryLink(clock, num_blocks, emit)
        case "shm":
            return ShmLink(clock, num_blocks, emit, directory)
        case "grpc":
            return GrpcLink(clock, num_blocks, emit)
        case "nixl":
            return NixlStormLink(clock, num_blocks, emit)
        case "ucx":
            return UcxStormLink(clock, num_blocks, emit)
    raise AssertionError(name)
