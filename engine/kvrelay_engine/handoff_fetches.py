"""The service process as the grpc connector's socket half: its requests become events."""

from __future__ import annotations

from collections.abc import Callable

from kvrelay_engine.messages import Event, Fetch, FetchAbort, SlotFree
from kvrelay_transfer.connectors.base import BlockRead


class EmittedFetches:
    """Implements `kvrelay_transfer.connectors.grpc.SocketHalf`."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit

    def fetch(self, read_id: int, peer_id: str, read: BlockRead) -> None:
        self._emit(Fetch(read_id, peer_id, read.ticket, read.group, read.remote_blocks))

    def abort_fetch(self, read_id: int) -> None:
        self._emit(FetchAbort(read_id))

    def free_slot(self, slot: int) -> None:
        self._emit(SlotFree(slot))
