"""A source of the nixl connector in a process of its own (`pool_owner.py`), to be stopped and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from handoff_sides import ADDRESS, MODEL

from kvrelay_transfer.connectors.base import ConnectorOffer, PeerInfo
from kvrelay_transfer.layout import KvLayout

OWNER = Path(__file__).parent / "pool_owner.py"
OWNER_BLOCKS, OWNER_FLOATS = 64, 4096


def layout_of(block_floats: int) -> KvLayout:
    return KvLayout("float32", 1, 1, 4, block_floats // 8, hash_unit_tokens=8)


OWNER_LAYOUT = layout_of(OWNER_FLOATS)


class OwnerProcess:
    """Block i is full of the float i."""

    def __init__(
        self,
        how: str = "nixl",
        device: str = "cpu",
        num_blocks: int = OWNER_BLOCKS,
        block_floats: int = OWNER_FLOATS,
    ) -> None:
        """`how` is "nixl" or "nixl-resting"."""
        self.layout = layout_of(block_floats)
        self.process = subprocess.Popen(
            [sys.executable, str(OWNER), how, str(num_blocks), str(block_floats), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = json.loads(self._read_line())
        self.words = tuple(ready["words"])
        self.offer = ConnectorOffer("nixl", bytes.fromhex(ready["endpoint"]))
        self.peer = PeerInfo(ADDRESS, bytes.fromhex(ready["epoch"]), MODEL, self.layout, (self.offer,))

    def bump(self, block: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"bump {block}\n")
        self.process.stdin.flush()
        assert self._read_line() == "done\n"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=20)

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()

    def _read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()
