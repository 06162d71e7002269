"""The source of a measurement: a process that owns a pool and serves it by one connector, without a ticket check.

One line of JSON each way per pool.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from kvrelay_cli.transfer.line_process import LineChild, LineProcess
from kvrelay_cli.transfer.side import Side
from kvrelay_core.errors import ConfigError, KvRelayError
from kvrelay_transfer.connectors.base import ConnectorOffer, PeerInfo
from kvrelay_transfer.layout import KvLayout

OPEN_TIMEOUT_S = 60.0


class Opened(Struct, frozen=True):
    """A pool of the source: how to reach it, and the fence word of each block."""

    peer: PeerInfo
    words: tuple[int, ...]


class Source:
    """The parent's handle of the process."""

    def __init__(self, device: str) -> None:
        self._process = LineProcess("kvrelay_cli.transfer.source", [device])

    def open(self, name: str, layout: KvLayout, num_blocks: int) -> Opened:
        """A new pool, in place of the last one, that connector `name` reads. Raises ConfigError when it cannot be
        had, DeadlineError or WorkerLostError when the process is gone."""
        question = [name, msgspec.msgpack.encode(layout).hex(), num_blocks]
        told = self._process.ask(question, OPEN_TIMEOUT_S)
        if "error" in told:
            raise ConfigError(told["error"])
        offer = ConnectorOffer(name, bytes.fromhex(told["endpoint"]))
        peer = PeerInfo(told["peer_id"], bytes.fromhex(told["epoch"]), b"", layout, (offer,))
        return Opened(peer, tuple(told["words"]))

    def close(self) -> None:
        self._process.close()


def serve(device: str, folder: Path) -> None:
    child = LineChild()
    side: Side | None = None
    try:
        for name, layout, num_blocks in child.questions():
            if side is not None:
                side.close()
                side = None
            try:
                decoded = msgspec.msgpack.decode(bytes.fromhex(layout), type=KvLayout)
                side = Side(name, decoded, num_blocks, device, folder)
                side.fill()
                child.answer(_description(side))
            except KvRelayError as error:
                child.answer({"error": str(error)})
    finally:
        if side is not None:
            side.close()


def _description(side: Side) -> dict[str, Any]:
    peer = side.serve()
    [offer] = peer.offers
    return {
        "peer_id": peer.peer_id, "epoch": peer.engine_epoch.hex(), "endpoint": offer.endpoint.hex(),
        "words": [side.memory.words.read(block) for block in range(side.memory.num_blocks)],
    }  # fmt: skip


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
