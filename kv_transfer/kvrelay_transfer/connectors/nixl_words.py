"""How the fence words of scattered blocks are read: by whole pages, into memory that is lent to one read at a time.

A descriptor costs about as much for a word as for a page (over CMA between two GPUs' processes 1.5 us, a third of what
a copy of 16 KiB costs), and pages that follow each other become one. Knows of words, not of what they guard.
"""

from __future__ import annotations

import numpy as np

from kvrelay_core.errors import ConfigError, TransferError
from kvrelay_transfer.connectors.nixl_agent import IndexArray, MemorySpan, NixlAgent, PreparedSpans
from kvrelay_transfer.fence import WORD_BYTES, WordArray

PAGE_BYTES = 4096  # a pool's words begin at one and fill up their last (`region.py`)
WORDS_PER_PAGE = PAGE_BYTES // WORD_BYTES


def num_pages(num_blocks: int) -> int:
    return -(-num_blocks // WORDS_PER_PAGE)


def words_span(address: int, num_blocks: int) -> MemorySpan:
    """The words of a pool, in whole pages."""
    return MemorySpan(address, num_pages(num_blocks) * PAGE_BYTES, "DRAM", 0)


def pages_of(blocks: IndexArray, num_blocks: int) -> IndexArray:
    """Those that hold the words of `blocks`, of a pool that has `num_blocks`; ascending, each once."""
    is_read = np.zeros(num_pages(num_blocks), np.bool_)
    is_read[blocks // WORDS_PER_PAGE] = True
    return is_read.nonzero()[0].astype(np.int32)


class Landing:
    """Registered memory as large as the words of some pool: a page that is read lands where it lies there."""

    def __init__(self, agent: NixlAgent, size_pages: int) -> None:
        """Raises TransferError when the memory cannot be registered."""
        self.size_pages = size_pages
        self.words: WordArray = np.zeros(size_pages * WORDS_PER_PAGE, np.uint64)
        span = MemorySpan(int(self.words.ctypes.data), self.words.nbytes, "DRAM", 0)
        try:
            agent.register(span)
        except ConfigError as error:
            raise TransferError(f"no room for a read's fence words: {error.message}") from error
        self.pages: PreparedSpans = agent.prepare(None, span, PAGE_BYTES)


class Landings:
    """The landings of one agent, kept from read to read: as many as there were reads at once."""

    def __init__(self, agent: NixlAgent) -> None:
        self._agent = agent
        self._free: list[Landing] = []

    def take(self, num_blocks: int) -> Landing:
        """For words of a pool that has `num_blocks`. Raises TransferError when there is no memory for another."""
        size_pages = num_pages(num_blocks)
        for landing in self._free:
            if landing.size_pages >= size_pages:
                self._free.remove(landing)
                return landing
        return Landing(self._agent, size_pages)

    def give_back(self, landing: Landing) -> None:
        """When its read has ended."""
        self._free.append(landing)
