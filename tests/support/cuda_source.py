"""A process that owns KV pools in GPU memory: CUDA maps a pool into every process but its own.

    source = CudaSource("cuda:1")
    opened = source.open(layout, num_blocks, socket_path)    a pool, its words, and a connector that serves it
    source.overwrite(3); source.block_rows(); source.words((3, 4))
    source.kill(); source.end()

One line of JSON each way per call; bytes are hex.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from handoff_sides import ADDRESS, MODEL, SourceSide, make_sequence
from msgspec import Struct

from kvrelay_core.clock import ManualClock, MonotonicClock
from kvrelay_transfer.connectors.base import ConnectorOffer, PeerInfo
from kvrelay_transfer.connectors.cuda_ipc import CudaIpcConnector
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.ticket import KvTicket

# What block i of a patterned pool is filled with.
PATTERN_PERIOD = 251


def other_device() -> str:
    """For the source: a GPU that is not the reader's, where there are two."""
    return "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"


class OpenedPool(Struct, frozen=True):
    epoch: bytes
    offer: ConnectorOffer
    layout: KvLayout
    ticket: KvTicket | None

    @property
    def peer(self) -> PeerInfo:
        return PeerInfo(ADDRESS, self.epoch, MODEL, self.layout, (self.offer,))


class CudaSource:
    """The parent's side."""

    def __init__(self, device: str) -> None:
        words = [sys.executable, str(Path(__file__)), device]
        folder = str(Path(__file__).parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def open_ticket(self, layout: KvLayout, num_tokens: int, socket_path: Path) -> OpenedPool:
        """A small pool with one finished ticket of random blocks."""
        return self._open("open_ticket", layout, num_tokens, socket_path)

    def open_pattern(self, layout: KvLayout, num_blocks: int, socket_path: Path) -> OpenedPool:
        """A pool of any size whose block i is filled with bytes i % PATTERN_PERIOD."""
        return self._open("open_pattern", layout, num_blocks, socket_path)

    def overwrite(self, block: int) -> None:
        self._ask("overwrite", block)

    def block_rows(self) -> torch.Tensor:
        """[num_blocks, block_bytes], on CPU."""
        rows = bytes.fromhex(self._ask("block_rows")["rows"])
        return torch.frombuffer(bytearray(rows), dtype=torch.uint8)

    def words(self, blocks: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._ask("words", list(blocks))["words"])

    def close_pool(self) -> None:
        self._ask("close")

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def _open(self, kind: str, layout: KvLayout, size: int, socket_path: Path) -> OpenedPool:
        answer = self._ask(kind, msgspec.msgpack.encode(layout).hex(), size, str(socket_path))
        ticket = bytes.fromhex(answer["ticket"])
        return OpenedPool(
            epoch=bytes.fromhex(answer["epoch"]),
            offer=ConnectorOffer(answer["name"], bytes.fromhex(answer["endpoint"])),
            layout=layout,
            ticket=msgspec.msgpack.decode(ticket, type=KvTicket) if ticket else None,
        )

    def _ask(self, *words: object) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(words), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, f"the source ended with {self.process.wait()} at {words[0]}"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer


class _Owner:
    """The process's side."""

    def __init__(self, device: str) -> None:
        self._device = device
        torch.cuda.set_device(device)
        self._side: SourceSide | None = None

    def open_ticket(self, layout: str, num_tokens: int, socket_path: str) -> dict[str, object]:
        self._side = SourceSide(ManualClock(), layout=_layout(layout), device=self._device)
        ticket = self._side.prefill(make_sequence(list(range(num_tokens)), layout=self._side.layout))
        return self._serve(self._side.memory, socket_path, msgspec.msgpack.encode(ticket))

    def open_pattern(self, layout: str, num_blocks: int, socket_path: str) -> dict[str, object]:
        memory = PoolMemory.allocate(_layout(layout), num_blocks, self._device, os.urandom(16))
        pattern = torch.arange(num_blocks, device=self._device).remainder(PATTERN_PERIOD).to(torch.uint8)
        memory.block_rows.copy_(pattern[:, None].expand_as(memory.block_rows))
        torch.cuda.synchronize()
        return self._serve(memory, socket_path, b"")

    def overwrite(self, block: int) -> dict[str, object]:
        assert self._side is not None
        self._side.overwrite(block)
        torch.cuda.synchronize()
        return {}

    def block_rows(self) -> dict[str, object]:
        return {"rows": self._memory.block_rows.cpu().numpy().tobytes().hex()}

    def words(self, blocks: list[int]) -> dict[str, object]:
        return {"words": [self._memory.words.read(block) for block in blocks]}

    def close(self) -> dict[str, object]:
        self._connector.close()
        self._memory.close()
        if self._side is not None:
            self._side.close()
            self._side = None
        return {}

    def _serve(self, memory: PoolMemory, socket_path: str, ticket: bytes) -> dict[str, object]:
        self._memory = memory
        self._connector = CudaIpcConnector(memory, MonotonicClock(), Path(socket_path))
        offer = self._connector.offer()
        assert offer is not None
        return {
            "epoch": memory.engine_epoch.hex(),
            "name": offer.name,
            "endpoint": offer.endpoint.hex(),
            "ticket": ticket.hex(),
        }


def _layout(text: str) -> KvLayout:
    return msgspec.msgpack.decode(bytes.fromhex(text), type=KvLayout)


def main(device: str) -> None:
    owner = _Owner(device)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = getattr(owner, name)(*arguments)
        except Exception as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
