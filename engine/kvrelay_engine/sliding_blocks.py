"""The blocks of layers that see the last tokens only: what a sequence holds of them, and when it gives them back.

A sequence's sliding table is indexed by position as its full one is. An entry that no token still to be computed sees
is given back after the step that saw it last, and becomes the null block; entries that are not needed yet are null
too. What was given back stays in the prefix cache until it is reused.

So a sequence holds a bounded number of blocks at once, however long it grows. It is promised that number when it gets
its place, a ticket keeps what it names, and the promises never add up to more than the pool: a running sequence never
waits for a block of this group, and nobody is preempted for one.

Knows nothing of the full group's blocks, of steps or of messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from kvrelay_core.errors import PoolExhaustedError
from kvrelay_engine.block_pool import NULL_BLOCK
from kvrelay_engine.kv_group import KvGroup
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import GroupBlocks

if TYPE_CHECKING:
    from kvrelay_engine.config import EngineConfig
    from kvrelay_engine.engine_parts import EngineParts


def held(blocks: Iterable[int]) -> list[int]:
    """The entries of a table that are blocks."""
    return [block for block in blocks if block != NULL_BLOCK]


def most_blocks(num_tokens: int, block_tokens: int) -> int:
    """That so many consecutive tokens can touch, wherever they begin."""
    return (num_tokens + 2 * block_tokens - 2) // block_tokens


def most_while_decoding(layout: KvLayout) -> int:
    """Blocks of a sequence that computes at most one block's tokens in a step."""
    return most_blocks(layout.window - 1 + layout.block_tokens, layout.block_tokens)


def most_while_computing(layout: KvLayout, chunk_tokens: int) -> int:
    """Blocks of a sequence that computes chunks of up to so many tokens."""
    return most_blocks(layout.window - 1 + chunk_tokens, layout.block_tokens)


def most_in_ticket(layout: KvLayout) -> int:
    """Blocks that the token behind a prompt sees."""
    return most_blocks(max(1, layout.window - 1), layout.block_tokens)


def make_sliding(
    config: EngineConfig, parts: EngineParts, num_held_by_reads: Callable[[], int]
) -> SlidingBlocks | None:
    """None where the engine has one group."""
    if parts.sliding is None:
        return None
    return SlidingBlocks(parts.sliding, config.tokens_per_step, parts.max_model_len, num_held_by_reads)


class SlidingBlocks:
    def __init__(
        self, group: KvGroup, max_chunk_tokens: int, max_model_len: int, num_held_by_reads: Callable[[], int]
    ) -> None:
        """`max_chunk_tokens` of one step, but for an image that is kept whole. `num_held_by_reads`: blocks that belong
        to reads and to no sequence."""
        self.group = group
        self.pool = group.pool
        self.layout = group.layout
        self._max_chunk_tokens = max_chunk_tokens
        self._max_model_len = max_model_len
        self._num_held_by_reads = num_held_by_reads
        self._promised: dict[Sequence, int] = {}
        self._leased: dict[Sequence, int] = {}

    # ------------------------------------------------------------------------------------------- promises

    @property
    def num_unpromised(self) -> int:
        """Blocks that nobody is entitled to."""
        holders = self._promised.keys() | self._leased.keys()
        promised = sum(max(self._promised.get(one, 0), self._leased.get(one, 0)) for one in holders)
        return self.pool.num_blocks - 1 - promised - self._num_held_by_reads()

    def check_fits(self, sequence: Sequence) -> None:
        """Raises PoolExhaustedError for a sequence that could never get its place."""
        needed = self._most_of(sequence)
        if needed > self.pool.num_blocks - 1:
            raise PoolExhaustedError(
                f"the request needs up to {needed} KV blocks of the layers with a window of {self.layout.window} "
                f"tokens, the pool has {self.pool.num_blocks - 1}; ask for fewer choices, or start the worker with "
                "more --kv-blocks",
                needed=needed,
            )

    def _most_of(self, sequence: Sequence) -> int:
        """Blocks of a sequence that computes its tokens here, and of the branches that it will have."""
        request = sequence.request
        chunk_tokens = max((self._max_chunk_tokens, *(media.num_tokens for media in request.generation.media)))
        most = most_while_computing(self.layout, chunk_tokens)
        if request.handoff:
            most += most_in_ticket(self.layout)
        return self._within_length(sequence, most) * sequence.num_seats

    def _within_length(self, sequence: Sequence, num_blocks: int) -> int:
        """A sequence never holds more blocks than its tokens fill."""
        request = sequence.request
        num_tokens = len(sequence.tokens)
        if not request.is_prefill:
            num_tokens = max(num_tokens, sequence.num_prompt + request.generation.sampling.max_tokens)
        return min(num_blocks, self.layout.blocks_for(min(num_tokens, self._max_model_len)))

    # --------------------------------------------------------------------------------------- prefix hits

    def longest_hit(self, keys: SequenceOf[bytes], blocks_per_unit: int) -> int:
        """Of the first blocks with these keys, how many whole units can be a hit: the blocks that the token behind
        them sees are cached here."""
        runs, run = [0], 0  # of cached blocks that end before each
        for key in keys:
            run = run + 1 if self.pool.lookup((key,)) else 0
            runs.append(run)
        for num_units in range(len(keys) // blocks_per_unit, 0, -1):
            stop = num_units * blocks_per_unit
            if runs[stop] >= stop - self.layout.first_block(stop * self.layout.block_tokens):
                return num_units
        return 0

    # ------------------------------------------------------------------------------------ a sequence's life

    def take_place(self, sequence: Sequence, num_cached: int) -> bool:
        """Of a sequence that is computed here: promises what it needs, and takes the cached blocks that the token at
        `num_cached` sees, and those that its ticket will name. False, and nothing is held, while there is no room."""
        promise = self._most_of(sequence)
        if promise > self.num_unpromised:
            return False
        self._promised[sequence] = promise
        first, stop = self.layout.first_block(num_cached), num_cached // self.layout.block_tokens
        hits = self.pool.lookup(sequence.chain.keys()[first:stop])
        assert len(hits) == stop - first, "the cached prefix is not there any more"
        self.pool.pin(hits)
        sequence.sliding, sequence.num_slid = [NULL_BLOCK] * first + hits, first
        if sequence.request.handoff:
            num_tokens = len(sequence.tokens)
            begin, end = max(stop, self.layout.first_block(num_tokens)), self.layout.blocks_for(num_tokens)
            sequence.sliding += [NULL_BLOCK] * (begin - stop) + self.pool.reserve(end - begin)
        return True

    def expect(self, sequence: Sequence) -> bool:
        """Of a sequence whose KV comes by a hand-off: promises what it needs. False while there is no room."""
        promise = self._within_length(sequence, most_while_decoding(self.layout)) * sequence.num_seats
        if promise > self.num_unpromised:
            return False
        self._promised[sequence] = promise
        return True

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Makes the table cover the next tokens."""
        table, block_tokens = sequence.sliding, self.layout.block_tokens
        end = self.layout.blocks_for(sequence.num_computed + num_tokens)
        table += [NULL_BLOCK] * (end - len(table))
        missing = [index for index in range(sequence.num_computed // block_tokens, end) if table[index] == NULL_BLOCK]
        if missing:
            for index, block in zip(missing, self.pool.reserve(len(missing)), strict=True):
                table[index] = block

    def slide(self, sequence: Sequence) -> None:
        """A step of the sequence has completed: gives back what no later token sees."""
        first = self.layout.first_block(sequence.num_computed)
        if first > sequence.num_slid:
            gone = slice(sequence.num_slid, first)
            self.pool.release(held(sequence.sliding[gone]), sequence.last_step)
            sequence.sliding[gone] = [NULL_BLOCK] * len(sequence.sliding[gone])
            sequence.num_slid = first
        if sequence.num_uncomputed <= 1 and not (sequence.request.is_prefill or sequence.request.pending_choices):
            self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """It decodes from now on, and needs less."""
        most = self._within_length(sequence, most_while_decoding(self.layout))
        self._promised[sequence] = min(self._promised[sequence], most)

    def fork(self, trunk: Sequence, branches: SequenceOf[Sequence]) -> list[tuple[int, int]]:
        """Gives branches, whose full blocks are theirs already, the trunk's blocks, and each a share of its promise.

        Returns the pairs of blocks that are to be copied: where a branch has the last, partial block."""
        num_full = trunk.num_computed // self.layout.block_tokens
        share = self._promised[trunk] // (1 + len(branches))
        copies = []
        for branch in branches:
            branch.sliding, branch.num_slid = trunk.sliding[:num_full], trunk.num_slid
            self.pool.pin(held(branch.sliding))
            self._promised[branch] = share
            if len(branch.blocks) > num_full:
                branch.sliding += self.pool.reserve(1)
                copies.append((trunk.sliding[num_full], branch.sliding[num_full]))
        self._promised[trunk] = share
        return copies

    def free(self, sequence: Sequence) -> None:
        """Gives all of its blocks back, but for those that its ticket keeps. Idempotent."""
        self.pool.release(held(sequence.sliding), sequence.last_step)
        sequence.sliding, sequence.num_slid = [], 0
        self._promised.pop(sequence, None)

    # ------------------------------------------------------------------------------------------- tickets

    def lease(self, sequence: Sequence) -> GroupBlocks:
        """Keeps what the token behind the sequence's sees, for its ticket."""
        first = self.layout.first_block(len(sequence.tokens))
        blocks = tuple(sequence.sliding[first : self.layout.blocks_for(len(sequence.tokens))])
        assert NULL_BLOCK not in blocks, "blocks are reserved before the ticket is issued"
        self.pool.pin(blocks)
        self._leased[sequence] = len(blocks)
        return self._name(first, blocks)

    def end_lease(self, sequence: Sequence, blocks: tuple[int, ...]) -> None:
        self.pool.release(blocks, sequence.last_step)
        del self._leased[sequence]

    def cached(self, keys: SequenceOf[bytes]) -> GroupBlocks:
        """What the token behind a hit with these keys sees."""
        first = self.layout.first_block(len(keys) * self.layout.block_tokens)
        return self._name(first, tuple(self.pool.lookup(keys[first:])))

    def _name(self, first: int, blocks: tuple[int, ...]) -> GroupBlocks:
        words = tuple(map(self.pool.word, blocks))
        return GroupBlocks(self.group.index, first * self.layout.block_tokens, blocks, words)

    # ----------------------------------------------------------------------------------------- accounting

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Asserts that nobody holds more than was promised, or what is not accounted for."""
        self.pool.check_integrity()
        assert self.num_unpromised >= 0, "more sliding blocks are promised than there are"
        counts: Counter[int] = Counter()
        for sequence in running:
            blocks = held(sequence.sliding)
            assert len(blocks) <= self._promised.get(sequence, 0), f"{len(blocks)} sliding blocks were not promised"
            counts.update(blocks)
        for block, count in counts.items():
            assert self.pool.references(block) >= count, f"sliding block {block} is used by {count}, held by fewer"
        if not self._leased and not self._num_held_by_reads() and self._promised.keys() <= set(running):
            assert self.pool.num_in_use == len(counts), f"{self.pool.num_in_use - len(counts)} sliding blocks leaked"
