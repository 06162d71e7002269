"""Two pools in two processes, a link between them, and which scattered blocks to move."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from msgspec import Struct

from kvrelay_cli.transfer.side import Side
from kvrelay_cli.transfer.source import Source
from kvrelay_core.errors import InternalError, TransferError
from kvrelay_core.request import AttemptId
from kvrelay_transfer.connectors.base import BlockRead, PeerInfo, PeerLink, Transfer, TransferState
from kvrelay_transfer.fence import agree
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.naps import allow_naps, nap
from kvrelay_transfer.ticket import GroupBlocks, KvTicket, LeaseTerms

DEADLINE_S = 60.0


def layout_of(span_bytes: int) -> KvLayout:
    """Whose blocks have `span_bytes`, a power of two from 4 KiB: 8 heads of 128 in two bytes, as of Llama-3.1-8B, with
    up to its 32 layers."""
    tokens_of_layers = span_bytes // (2 * 8 * 128 * 2)
    num_layers = min(32, tokens_of_layers)
    return KvLayout("bfloat16", num_layers, num_kv_heads=8, block_tokens=tokens_of_layers // num_layers, head_dim=128)


class Spans(Struct, frozen=True):
    """Scattered blocks of a source's pool and of the reader's, as many as there are bytes to move."""

    layout: KvLayout
    remote: tuple[int, ...]
    local: tuple[int, ...]

    def read(self, peer: PeerInfo, first: int = 0, end: int | None = None) -> BlockRead:
        """Of all blocks, or of those in [first, end), as one of several reads."""
        remote, local = self.remote[first:end], self.local[first:end]
        attempt = AttemptId("bench", "bench", 1)
        groups = (GroupBlocks(0, 0, remote, (0,) * len(remote)),)
        ticket = KvTicket(
            "bench", "bench", "bench", peer.engine_epoch, attempt, b"", self.layout, groups, 0, b"", LeaseTerms()
        )
        return BlockRead(ticket, 0, remote, local)


class Pair:
    """A source's pool, ours, a link between them, and which blocks to move."""

    def __init__(
        self, name: str, source: Source, span_bytes: int, size_bytes: int, reader_device: str, folder: Path
    ) -> None:
        """Moves `size_bytes` in whole spans, one at least. Raises ConfigError or TransferError where the connector
        cannot work here."""
        allow_naps()
        self.layout = layout_of(span_bytes)
        num_spans = max(1, size_bytes // span_bytes)
        self.size_bytes = num_spans * span_bytes
        self._chosen = random.Random(span_bytes)
        self._num_spans = num_spans
        self.side = Side(name, self.layout, num_spans + 1, reader_device, folder)
        try:
            opened = source.open(name, self.layout, 2 * num_spans + 1)
            self.peer = opened.peer
            self._words = np.array(opened.words, np.uint64)
            started_s = time.perf_counter()
            self.link: PeerLink = self.side.connect(self.peer)
            self.connect_s = time.perf_counter() - started_s
            self.wait(lambda: self.link.probed_gb_per_s() is not None)
            self.scatter()
        except BaseException:
            self.side.close()
            raise

    def scatter(self) -> None:
        """Chooses what the next reads move: half of the source's blocks, no two neighbours in the same order on both
        sides."""
        remote = self._chosen.sample(range(1, 2 * self._num_spans + 1), self._num_spans)
        local = self._chosen.sample(range(1, self._num_spans + 1), self._num_spans)
        self.spans = Spans(self.layout, tuple(remote), tuple(local))
        step = max(1, self.link.window.max_read_bytes // self.layout.block_bytes)
        self._whole = self.spans.read(self.peer)
        self._pieces = [self.spans.read(self.peer, first, first + step) for first in range(0, len(remote), step)]
        self._one = self.spans.read(self.peer, 0, 1)

    def read_all(self) -> None:
        """In one read."""
        self._read([self._whole])

    def read_in_pieces(self) -> None:
        """As the engine does, in reads that suit the link."""
        self._read(self._pieces)

    def post_all(self) -> Callable[[], bool]:
        """Posts reads as `read_in_pieces` does, but all at once; says whether all have ended, when it is asked."""
        under_way = [(read, self.link.read(read)) for read in self._pieces]

        def advance() -> bool:
            self._take_in(under_way)
            return not under_way

        return advance

    def read_one(self) -> None:
        """A single span."""
        self._read([self._one])

    def check(self, num_spans: int | None = None) -> None:
        """Every byte of the spans (or of the first so many) is where it belongs."""
        if not self.side.holds(self.spans.remote[:num_spans], self.spans.local[:num_spans]):
            raise InternalError("the blocks that arrived are not those that were sent; nothing was measured")

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Naps, but does not sleep: that would be part of what is measured. Without naps it would keep the interpreter
        from the threads of connectors, as no engine does."""
        give_up_s = time.monotonic() + DEADLINE_S
        while not is_done():
            self.side.progress()
            nap()
            if time.monotonic() > give_up_s:
                raise TransferError(f"nothing came within {DEADLINE_S:g} s")

    def close(self) -> None:
        self.link.close()
        self.side.close()

    def _read(self, wanted: list[BlockRead]) -> None:
        """From the first post to the comparison of the last words, as many under way as suit the link."""
        left = wanted[::-1]
        under_way: list[tuple[BlockRead, Transfer]] = []

        def advance() -> bool:
            self._take_in(under_way)
            while left and len(under_way) < self.link.window.max_reads:
                read = left.pop()
                under_way.append((read, self.link.read(read)))
            return not under_way

        self.wait(advance)

    def _take_in(self, under_way: list[tuple[BlockRead, Transfer]]) -> None:
        for read, transfer in under_way.copy():
            if transfer.poll().is_terminal:
                under_way.remove((read, transfer))
                self._check_words(read, transfer)

    def _check_words(self, read: BlockRead, transfer: Transfer) -> None:
        if transfer.poll() is not TransferState.DONE:
            raise transfer.error or TransferError("a read failed")
        if not agree(transfer.words, self._words[read.remote]):
            raise InternalError("the fence words that arrived are not the source's; nothing was measured")
