"""Who owns which KV block: reference counts, an LRU free list, the prefix-cache map and the fence words.

A block is free (in the free list, perhaps still hashed and then a possible prefix hit), held (one or more
references), or retiring (unreferenced, but a launched step may still touch it). Block 0 is the null block:
never handed out, never in a ticket.

Rules kept here: a word is bumped when its block leaves the free list to be written, in the same step that
drops its hash, and never on a hit or a pin (PROTOCOL A1); a freed block comes back only after the last step
that could touch it (A4). The pool knows nothing of sequences, tokens or memory: blocks are numbers.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvrelay_core.errors import PoolExhaustedError

NULL_BLOCK = 0


class FenceWords(Protocol):
    """The fence words of a pool, in memory that readers see (`kvrelay_transfer.fence`)."""

    def read(self, block: int) -> int: ...

    def bump(self, block: int) -> int:
        """Invalidates every ticket of the block; returns the new word."""
        ...


class BlockPool:
    def __init__(self, num_blocks: int, words: FenceWords) -> None:
        """`num_blocks` counts the null block."""
        self.num_blocks = num_blocks
        self._words = words
        self._references = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Oldest first: the next block to be reused. Values are unused.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._retiring: deque[tuple[int, int]] = deque()  # (step, block), steps ascending
        self._completed_step = 0

    # ------------------------------------------------------------------------------- reserve, pin, free

    @property
    def num_free(self) -> int:
        """Blocks that `reserve` can hand out now (cached ones included)."""
        return len(self._free)

    def reserve(self, count: int) -> list[int]:
        """Takes blocks to be written: bumps their words, drops their hashes. All or nothing."""
        if count > len(self._free):
            raise PoolExhaustedError(
                f"{count} KV blocks needed, {len(self._free)} of {self.num_blocks - 1} free", needed=count
            )
        return [self._take_oldest() for _ in range(count)]

    def _take_oldest(self) -> int:
        block, _ = self._free.popitem(last=False)
        key, self._key_of[block] = self._key_of[block], None
        if key is not None:
            del self._block_of[key]
        self._words.bump(block)
        self._references[block] = 1
        return block

    def pin(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each block; takes free, cached ones out of the free list unchanged."""
        for block in blocks:
            assert block != NULL_BLOCK, "the null block is never pinned"
            if self._references[block] == 0:
                assert block in self._free, f"block {block} is retiring"
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Iterable[int], last_step: int = 0) -> None:
        """Drops a reference of each block. Unreferenced blocks become free once `last_step`, the last launched
        step that could touch them, has completed. Later blocks of a chain are reused first."""
        for block in reversed(list(blocks)):
            assert self._references[block] > 0, f"block {block} released more often than taken"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if last_step <= self._completed_step:
                self._free[block] = None
            else:
                self._retiring.append((last_step, block))

    def complete_step(self, step: int) -> None:
        """The given step, and every one before it, will touch no block any more."""
        self._completed_step = step
        while self._retiring and self._retiring[0][0] <= step:
            self._free[self._retiring.popleft()[1]] = None

    def word(self, block: int) -> int:
        return self._words.read(block)

    def references(self, block: int) -> int:
        return self._references[block]

    # --------------------------------------------------------------------------------------- prefix cache

    def publish(self, block: int, key: bytes) -> bool:
        """Enters a sealed block into the prefix cache; False when another block has the key (both stay)."""
        assert self._references[block] > 0, "only a held block can be published"
        if key in self._block_of or self._key_of[block] is not None:
            return False
        self._block_of[key] = block
        self._key_of[block] = key
        return True

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Takes blocks out of the prefix cache whose data nobody should use. Those that are not in it stay so."""
        for block in blocks:
            key, self._key_of[block] = self._key_of[block], None
            if key is not None:
                del self._block_of[key]

    def disown(self, keys: Iterable[bytes]) -> None:
        """Takes what is cached under these keys out of the prefix cache, whoever made it."""
        self.unpublish([block for key in keys if (block := self._block_of.get(key)) is not None])

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `keys`. Pins nothing."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None or (self._references[block] == 0 and block not in self._free):
                break
            found.append(block)
        return found

    def clear_cache(self) -> None:
        for block in self._block_of.values():
            self._key_of[block] = None
        self._block_of.clear()

    # ----------------------------------------------------------------------------------------- accounting

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._block_of)

    def check_integrity(self) -> None:
        """Asserts that every block is in exactly one state. Run when idle and after every test."""
        retiring = {block for _, block in self._retiring}
        assert len(retiring) == len(self._retiring), "a block retires twice"
        for block in range(1, self.num_blocks):
            states = (block in self._free) + (block in retiring) + (self._references[block] > 0)
            assert states == 1, f"block {block} is in {states} states"
        assert self._references[NULL_BLOCK] == 0 and NULL_BLOCK not in self._free
        for key, block in self._block_of.items():
            assert self._key_of[block] == key, f"block {block} is cached under a key that is not its own"
        assert sum(key is not None for key in self._key_of) == len(self._block_of)
