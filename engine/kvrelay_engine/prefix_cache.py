"""Which blocks of a sequence come from, and go into, the prefix cache.

The map itself is the BlockPool's; here are its rules: hits in whole hash units that leave at least one token
to compute (PROTOCOL A3), and only sealed blocks enter (A2). Where a model has a sliding group as well, a hit has all
blocks of the full group, and of the sliding one those that the token behind it sees. What is sealed is offered to the
tiers, where there are any. Knows nothing of scheduling or hand-offs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from kvrelay_core.errors import InternalError
from kvrelay_core.hashing import root_hash
from kvrelay_core.request import MediaReference
from kvrelay_engine.block_pool import NULL_BLOCK, BlockPool
from kvrelay_engine.sequence import HashChain, Sequence
from kvrelay_engine.sliding_blocks import SlidingBlocks
from kvrelay_engine.tier_stores import TierStores
from kvrelay_transfer.layout import KvLayout

if TYPE_CHECKING:
    from kvrelay_engine.engine_parts import EngineParts


def find_hit(pool: BlockPool, layout: KvLayout, sliding: SlidingBlocks | None, keys: SequenceOf[bytes]) -> list[int]:
    """Blocks of the full group that make the longest hit within `keys`, in whole units. Pins nothing."""
    found = pool.lookup(keys)
    blocks_per_unit = layout.hit_tokens // layout.block_tokens
    num_units = len(found) // blocks_per_unit
    if sliding is not None:
        num_units = sliding.longest_hit(keys[: len(found)], blocks_per_unit)
    return found[: num_units * blocks_per_unit]


def make_cache(parts: EngineParts, sliding: SlidingBlocks | None) -> PrefixCache:
    stores = None if parts.tiers is None else TierStores(parts.tiers)
    return PrefixCache(parts.pool, parts.layout, parts.identity.model_fingerprint, sliding, stores)


class PrefixCache:
    def __init__(
        self,
        pool: BlockPool,
        layout: KvLayout,
        model_fingerprint: bytes,
        sliding: SlidingBlocks | None = None,
        stores: TierStores | None = None,
    ) -> None:
        self._pool = pool
        self._sliding = sliding
        self._stores = stores
        self._layout = layout
        self._model_fingerprint = model_fingerprint

    def new_chain(self, cache_salt: str, media: Iterable[MediaReference] = ()) -> HashChain:
        """The empty hash chain of a sequence of this model and tenant, that will have `media` among its tokens."""
        return HashChain(root_hash(self._model_fingerprint, cache_salt=cache_salt), self._layout, media)

    def match(self, sequence: Sequence, clip: Callable[[int], int] = lambda num_tokens: num_tokens) -> list[int]:
        """Cached blocks of the full group that hold the sequence's first tokens, with what a sliding group needs for
        them being cached too. Pins nothing. `clip` may shorten a hit, to a whole number of units."""
        unit = self._layout.hit_tokens
        sequence.chain.extend(sequence.tokens)
        keys = sequence.chain.keys()[: (len(sequence.tokens) - 1) // unit * (unit // self._layout.block_tokens)]
        found = find_hit(self._pool, self._layout, self._sliding, keys)
        while (num_usable := clip(len(found) * self._layout.block_tokens) // self._layout.block_tokens) < len(found):
            found = find_hit(self._pool, self._layout, self._sliding, keys[:num_usable])
        return found

    def words_to_fill(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
        """Fence words of the blocks that the next `num_tokens` tokens make full; noted when a step is launched."""
        block_tokens = self._layout.block_tokens
        first = sequence.num_computed // block_tokens
        last = (sequence.num_computed + num_tokens) // block_tokens
        if first == last:
            return ()  # most steps of a decoding sequence
        words = tuple(self._pool.word(block) for block in sequence.blocks[first:last])
        if self._sliding is not None:
            words += tuple(self._sliding.pool.word(block) for block in sequence.sliding[first:last])
        return words

    def seal(self, sequence: Sequence, num_tokens: int, words: tuple[int, ...]) -> None:
        """The step that computed the next `num_tokens` tokens has completed; `words` are those of its launch.

        Raises InternalError, and counts nothing, if a block was given to someone else meanwhile.
        """
        if self.words_to_fill(sequence, num_tokens) != words:
            raise InternalError(f"a KV block of request {sequence.request.id} was reused while its step ran")
        sequence.num_computed += num_tokens
        self.publish(sequence)
        if self._stores is not None:
            self._stores.sealed(sequence)
        if self._sliding is not None:
            self._sliding.slide(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Enters the sequence's full, computed blocks into the cache, as far as whole hash units cover them."""
        num_full = sequence.num_computed // self._layout.block_tokens
        if num_full <= sequence.num_published:
            return
        sequence.chain.extend(sequence.tokens)
        keys = sequence.chain.keys()[:num_full]
        for index in range(sequence.num_published, len(keys)):
            self._pool.publish(sequence.blocks[index], keys[index])
            if self._sliding is not None and sequence.sliding[index] != NULL_BLOCK:
                self._sliding.pool.publish(sequence.sliding[index], keys[index])
        sequence.num_published = max(sequence.num_published, len(keys))

    def disown(self, sequence: Sequence) -> None:
        """Nobody is to find what the sequence computed."""
        self._pool.unpublish(sequence.blocks)
        if self._sliding is not None:  # much of it is not held any more
            self._sliding.pool.disown(sequence.chain.keys())
