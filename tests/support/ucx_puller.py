"""A process of its own that asks for all blocks of a ticket and never takes a chunk: `ucx_puller.py ARGS_JSON`.

Prints `asked` when chunks wait for it. Ends by being killed.
"""

from __future__ import annotations

import json
import sys
import threading

import msgspec
from handoff_sides import ADDRESS, MODEL, make_memory
from ucx_owner import LAYOUT, NUM_BLOCKS, use_small_chunks

from kvrelay_core.clock import MonotonicClock
from kvrelay_transfer.connectors.base import BlockRead, ConnectorOffer, PeerInfo
from kvrelay_transfer.connectors.ucx import UcxConnector
from kvrelay_transfer.connectors.ucx_reader import UcxReader
from kvrelay_transfer.connectors.ucx_worker import Arrival
from kvrelay_transfer.ticket import KvTicket


def leave_chunk(reader: UcxReader, arrival: Arrival) -> None:
    print("asked", flush=True)
    threading.Event().wait()


def main(options: dict[str, str], epoch: str, endpoint: str, ticket: str) -> None:
    use_small_chunks()
    UcxReader.take_chunk = leave_chunk  # type: ignore[method-assign,assignment]
    connector = UcxConnector(make_memory(NUM_BLOCKS, LAYOUT), MonotonicClock(), options=options)
    offer = ConnectorOffer("ucx", bytes.fromhex(endpoint))
    link = connector.connect(PeerInfo(ADDRESS, bytes.fromhex(epoch), MODEL, LAYOUT, (offer,)), offer)
    theirs = msgspec.msgpack.decode(bytes.fromhex(ticket), type=KvTicket)
    blocks = theirs.groups[0].blocks
    link.read(BlockRead(theirs, 0, blocks, blocks))
    sys.stdin.read()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
