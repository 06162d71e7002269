"""Two pools in two processes, a link between them, and which scattered blocks to move."""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transfer_source import PERIOD, Side, Source, Spans

from kvrelay_core.errors import TransferError
from kvrelay_transfer.connectors.base import BlockRead, PeerInfo, PeerLink, Transfer, TransferState
from kvrelay_transfer.layout import KvLayout

# Block tokens and layers of Llama-3.1-8B's shape by span; its own blocks of 16 and 64 tokens are the last two.
LAYOUTS = {
    span: KvLayout("bfloat16", num_layers=layers, num_kv_heads=8, block_tokens=tokens, head_dim=128)
    for span, layers, tokens in (
        (16 << 10, 4, 1), (128 << 10, 32, 1), (512 << 10, 32, 4), (2 << 20, 32, 16), (8 << 20, 32, 64),
    )
}  # fmt: skip
PIECE_BYTES = 32 << 20  # one read of the engine, which keeps four under way
PIECES_UNDER_WAY = 4
DEADLINE_S = 60.0


class Pair:
    """A source's pool, ours, a link between them, and which blocks to move."""

    def __init__(self, name: str, source: Source, span_bytes: int, args: argparse.Namespace, folder: Path) -> None:
        self.layout = LAYOUTS[span_bytes]
        self.size_bytes = args.size_mib << 20
        num_spans = self.size_bytes // span_bytes
        # Half of the source's blocks, no two neighbours in the same order on both sides.
        generator = random.Random(span_bytes)
        remote = generator.sample(range(1, 2 * num_spans + 1), num_spans)
        local = generator.sample(range(1, num_spans + 1), num_spans)
        self.spans = Spans(self.layout, tuple(remote), tuple(local))
        self.peer: PeerInfo = source.open(self.layout, 2 * num_spans + 1)
        step = max(1, PIECE_BYTES // span_bytes)
        self.whole: BlockRead = self.spans.read(self.peer)
        self._pieces = [self.spans.read(self.peer, first, first + step) for first in range(0, num_spans, step)]
        self.side = Side(name, self.layout, num_spans + 1, args.reader_device, folder)
        try:
            started_s = time.perf_counter()
            self.link: PeerLink = self.side.connect(self.peer)
            self.connect_s = time.perf_counter() - started_s
            wait(lambda: self.link.probed_gb_per_s() is not None)
        except BaseException:
            self.side.close()
            raise

    def read_all(self) -> None:
        """In one read."""
        finish([self.link.read(self.whole)])

    def read_in_pieces(self) -> None:
        """As the engine does."""
        under_way: list[Transfer] = []
        for piece in self._pieces:
            if len(under_way) == PIECES_UNDER_WAY:
                finish([under_way.pop(0)])
            under_way.append(self.link.read(piece))
        finish(under_way)

    def check(self) -> None:
        """Every byte is where it belongs."""
        rows = self.side.memory.block_rows[list(self.spans.local)]
        expected = torch.tensor([block % PERIOD for block in self.spans.remote], dtype=torch.uint8, device=rows.device)
        if not bool((rows == expected[:, None]).all()):
            raise SystemExit("the blocks that arrived are not those that were sent; nothing was measured")

    def close(self) -> None:
        self.link.close()
        self.side.close()


def finish(transfers: list[Transfer]) -> None:
    wait(lambda: all(transfer.poll().is_terminal for transfer in transfers))
    for transfer in transfers:
        if transfer.poll() is not TransferState.DONE:
            raise transfer.error or TransferError("a read failed")


def wait(is_done: Callable[[], bool]) -> None:
    """Gives the processor away, but does not sleep: that would be part of what is measured."""
    give_up_s = time.monotonic() + DEADLINE_S
    while not is_done():
        os.sched_yield()
        if time.monotonic() > give_up_s:
            raise TransferError(f"nothing came within {DEADLINE_S:g} s")
