"""How the fence words of scattered blocks are read: by whole pages, into memory that is lent to one read at a time.

A descriptor costs about as much for a word as for a page (over CMA between two GPUs' processes 1.5 us, a third of what
a copy of 16 KiB costs), and pages that follow each other become one. Knows of words, not of what they guard.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay_core.errors import ConfigError, TransferError
from kvrelay_transfer.connectors.nixl_agent import IndexArray, MemorySpan, NixlAgent, PreparedSpans
from kvrelay_transfer.fence import WORD_BYTES, WordArray

PAGE_BYTES = 4096  # a pool's words begin at one and fill up their last (`region.py`)
WORDS_PER_PAGE = PAGE_BYTES // WORD_BYTES
_LEAST_PAGES = 16


def num_pages(num_blocks: int) -> int:
    return -(-num_blocks // WORDS_PER_PAGE)


def words_span(address: int, num_blocks: int) -> MemorySpan:
    """The words of a pool, in whole pages."""
    return MemorySpan(address, num_pages(num_blocks) * PAGE_BYTES, "DRAM", 0)


class Landing:
    """Registered memory for so many pages of words."""

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


class WordPlan(NamedTuple):
    """Which `pages` of a peer's words to read, ascending, and where each block's word is when they have landed."""

    pages: IndexArray
    places: npt.NDArray[np.int64]

    @classmethod
    def of(cls, blocks: IndexArray, num_blocks: int) -> WordPlan:
        """For `blocks` of a pool that has `num_blocks`."""
        page_of, place_in_page = np.divmod(blocks, WORDS_PER_PAGE)
        is_read = np.zeros(num_pages(num_blocks), np.bool_)
        is_read[page_of] = True
        first_place = (np.cumsum(is_read) - 1) * WORDS_PER_PAGE
        return cls(np.flatnonzero(is_read).astype(np.int32), first_place[page_of] + place_in_page)


class Landings:
    """The landings of one agent, kept from read to read."""

    def __init__(self, agent: NixlAgent) -> None:
        self._agent = agent
        self._free: list[Landing] = []

    def take(self, size_pages: int) -> Landing:
        """One that nothing lands in. Raises TransferError when there is none and no memory for another."""
        fitting = [landing for landing in self._free if landing.size_pages >= size_pages]
        if not fitting:
            return Landing(self._agent, max(_LEAST_PAGES, 1 << (size_pages - 1).bit_length()))
        landing = min(fitting, key=lambda each: each.size_pages)
        self._free.remove(landing)
        return landing

    def give_back(self, landing: Landing) -> None:
        """When its read has ended."""
        self._free.append(landing)
