"""A process of its own that owns a KV pool and serves it over UCX: `ucx_owner.py OPTIONS_JSON`.

Prints one JSON line with its offer and a ticket over its blocks, then does what each line on stdin says, and prints
what came of it: `hold N` stops the connector's thread when it packs the N-th chunk from now (it prints `held` then),
`chunks` tells how many chunks are taken, `close` ends in order.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import msgspec
from handoff_sides import SourceSide, make_sequence

from kvrelay_core.clock import ManualClock, MonotonicClock
from kvrelay_transfer.connectors import ucx_chunks
from kvrelay_transfer.connectors.ucx import UcxConnector
from kvrelay_transfer.layout import KvLayout

# Blocks of 256 KiB, four of them in a chunk.
LAYOUT = KvLayout("float32", 2, 2, 4, 4096, hash_unit_tokens=8)
NUM_BLOCKS = 32
TICKET_BLOCKS = 24
CHUNK_BYTES = 4 * LAYOUT.block_bytes


def use_small_chunks() -> None:
    ucx_chunks.CHUNK_BYTES["cpu"] = CHUNK_BYTES


def hold_gather(number: int) -> None:
    """The thread that packs the `number`-th chunk from now never goes on."""
    gather = ucx_chunks.HostCopier.gather
    seen = 0

    def held(copier: ucx_chunks.HostCopier, blocks: Any, chunk: Any, then: Callable[[], None]) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            print("held", flush=True)
            threading.Event().wait()
        gather(copier, blocks, chunk, then)

    ucx_chunks.HostCopier.gather = held  # type: ignore[method-assign,assignment]


def main(options: dict[str, str]) -> None:
    use_small_chunks()
    side = SourceSide(ManualClock(), NUM_BLOCKS, layout=LAYOUT)
    ticket = side.prefill(make_sequence(list(range(4 * TICKET_BLOCKS)), layout=LAYOUT))
    connector = UcxConnector(side.memory, MonotonicClock(), options=options)
    connector.serve(side.source)
    ready = {
        "epoch": side.memory.engine_epoch.hex(),
        "endpoint": connector.offer().endpoint.hex(),
        "ticket": msgspec.msgpack.encode(ticket).hex(),
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        match line.split():
            case ["hold", number]:
                hold_gather(int(number))
                print("ready", flush=True)
            case ["chunks"]:
                print(connector.source.num_chunks_taken, flush=True)
            case ["close"]:
                break
    connector.close()
    side.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
