"""Which blocks of a sequence come from, and go into, the prefix cache.

The map itself is the BlockPool's; here are its rules: hits in whole hash units that leave at least one token
to compute (PROTOCOL A3), and only sealed blocks enter (A2). Knows nothing of scheduling or hand-offs.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvrelay_core.errors import InternalError
from kvrelay_core.hashing import root_hash
from kvrelay_core.request import MediaReference
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.sequence import HashChain, Sequence
from kvrelay_transfer.layout import KvLayout


class PrefixCache:
    def __init__(self, pool: BlockPool, layout: KvLayout, model_fingerprint: bytes) -> None:
        self._pool = pool
        self._layout = layout
        self._model_fingerprint = model_fingerprint

    def new_chain(self, cache_salt: str, media: Iterable[MediaReference] = ()) -> HashChain:
        """The empty hash chain of a sequence of this model and tenant, that will have `media` among its tokens."""
        return HashChain(root_hash(self._model_fingerprint, cache_salt=cache_salt), self._layout, media)

    def match(self, sequence: Sequence) -> list[int]:
        """Cached blocks that hold the sequence's first tokens. Pins nothing."""
        unit = self._layout.hit_tokens
        blocks_per_unit = unit // self._layout.block_tokens
        usable_blocks = (len(sequence.tokens) - 1) // unit * blocks_per_unit
        sequence.chain.extend(sequence.tokens)
        found = self._pool.lookup(sequence.chain.keys()[:usable_blocks])
        return found[: len(found) // blocks_per_unit * blocks_per_unit]

    def words_to_fill(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
        """Fence words of the blocks that the next `num_tokens` tokens make full; noted when a step is launched."""
        block_tokens = self._layout.block_tokens
        first = sequence.num_computed // block_tokens
        last = (sequence.num_computed + num_tokens) // block_tokens
        if first == last:
            return ()  # most steps of a decoding sequence
        return tuple(self._pool.word(block) for block in sequence.blocks[first:last])

    def seal(self, sequence: Sequence, num_tokens: int, words: tuple[int, ...]) -> None:
        """The step that computed the next `num_tokens` tokens has completed; `words` are those of its launch.

        Raises InternalError, and counts nothing, if a block was given to someone else meanwhile.
        """
        if self.words_to_fill(sequence, num_tokens) != words:
            raise InternalError(f"a KV block of request {sequence.request.id} was reused while its step ran")
        sequence.num_computed += num_tokens
        self.publish(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Enters the sequence's full, computed blocks into the cache, as far as whole hash units cover them."""
        num_full = sequence.num_computed // self._layout.block_tokens
        if num_full <= sequence.num_published:
            return
        sequence.chain.extend(sequence.tokens)
        keys = sequence.chain.keys()[:num_full]
        for index in range(sequence.num_published, len(keys)):
            self._pool.publish(sequence.blocks[index], keys[index])
        sequence.num_published = max(sequence.num_published, len(keys))
