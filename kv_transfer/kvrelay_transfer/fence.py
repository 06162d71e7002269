"""Fence words: one number per block that changes whenever the block is given away to be written (PROTOCOL A1).

word = epoch (32 random bits, new at each engine start) << 32 | generation (32 bits). A reader that saw the same
word in the ticket and after its copy knows that the block was not rewritten in between.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WORD_BYTES = 8
_GENERATION_MASK = 0xFFFF_FFFF

WordArray = npt.NDArray[np.uint64]
Words = tuple[int, ...] | WordArray


def agree(words: Words, others: Words) -> bool:
    """Whether the two name the same words in the same order. 64 bits each: no array of them is made as of floats."""
    return bool(np.array_equal(np.asarray(words, np.uint64), np.asarray(others, np.uint64)))


class MemoryFence:
    """A full barrier between the loads and stores before it and those after it.

    Python has none of its own. Giving a lock back is a release store, taking it again an acquire; the pair in
    this order keeps everything on its side, on weakly ordered processors too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        self._lock.release()
        self._lock.acquire()


class FenceWords:
    """The owner's side; implements `kvrelay_engine.block_pool.FenceWords`."""

    def __init__(self, words: WordArray, engine_epoch: bytes) -> None:
        """`words` [num_blocks] lies where readers see it; it is overwritten."""
        self._words = words
        self._fence = MemoryFence()
        words[:] = np.uint64(int.from_bytes(engine_epoch[:4], "little") << 32)

    @property
    def address(self) -> int:
        """Of the word of block 0."""
        return int(self._words.ctypes.data)

    def read(self, block: int) -> int:
        return int(self._words[block])

    def read_after_copy(self, blocks: npt.NDArray[np.int64]) -> WordArray:
        """The words now; no load of data that came before, on this thread, is delayed past them."""
        MemoryFence()()
        return self._words[blocks]

    def bump(self, block: int) -> int:
        """The store is visible before anything that is written to the block afterwards."""
        word = int(self._words[block])
        bumped = (word & ~_GENERATION_MASK) | (word + 1 & _GENERATION_MASK)
        self._words[block] = bumped
        self._fence()
        return bumped


class RemoteWords:
    """The reader's side."""

    def __init__(self, words: WordArray) -> None:
        self._words = words
        self._fence = MemoryFence()

    def read(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """The words now; no load of data that came before is delayed past them."""
        # A tuple is read so in half the time that np.array() takes.
        return tuple(self.read_at(np.fromiter(blocks, np.int64, len(blocks))).tolist())

    def read_at(self, blocks: npt.NDArray[np.int64]) -> WordArray:
        """The same as an array."""
        self._fence()
        return self._words[blocks]
