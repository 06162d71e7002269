"""A process of its own that owns a KV pool: `pool_owner.py SOCKET|nixl BLOCKS BLOCK_FLOATS [DEVICE]`.

It serves the pool's descriptor at SOCKET, or the pool by NIXL, where `nixl-resting` has no ticket open. Prints one JSON
line when the pool is filled (block i with the float i), then does what each line on stdin says: `bump BLOCK` rewrites
a block for another request. Ends with its stdin.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from kvrelay_core.clock import MonotonicClock
from kvrelay_transfer.connectors.base import Connector
from kvrelay_transfer.connectors.nixl import NixlConnector
from kvrelay_transfer.connectors.shm import ShmConnector
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.ticket import Ticket


class AnyExport:
    """The gate of a source that exports all it has."""

    def check_export(self, ticket: Ticket, group: int, blocks: Sequence[int]) -> None:
        pass


def connect(where: str, memory: PoolMemory) -> Connector:
    if not where.startswith("nixl"):
        return ShmConnector(memory, MonotonicClock(), Path(where))
    connector = NixlConnector(memory, MonotonicClock())
    connector.serve(None if where == "nixl-resting" else AnyExport())
    return connector


def main(where: str, num_blocks: int, block_floats: int, device: str = "cpu") -> None:
    layout = KvLayout("float32", 1, 1, 4, block_floats // 8, hash_unit_tokens=8)
    memory = PoolMemory.allocate(layout, num_blocks, device, os.urandom(16))
    numbers = torch.arange(num_blocks, dtype=torch.float32, device=device)
    memory.tensor.copy_(numbers.view(-1, 1, 1, 1, 1, 1).expand_as(memory.tensor))
    assert float(memory.tensor[-1].flatten()[-1]) == num_blocks - 1, "a GPU has filled it by now"
    connector = connect(where, memory)
    offer = connector.offer()
    assert offer is not None
    words = [memory.words.read(block) for block in range(num_blocks)]
    ready = {"epoch": memory.engine_epoch.hex(), "endpoint": offer.endpoint.hex(), "words": words}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        _, block_text = line.split()
        memory.words.bump(int(block_text))
        memory.tensor[int(block_text)] = -1.0
        print("done", flush=True)
    connector.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
