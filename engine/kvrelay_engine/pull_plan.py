"""How the blocks of a ticket become blocks of our pool, whose size may be another one.

Reads, `Ready` and fence words count in blocks of the source; what we reserve, publish and keep counts in ours. A read
takes whole blocks of both sides (but for the last, partial one), so that each of our blocks belongs to one read and is
verified with it. Positions count from token 0 on, also where a group's ticket begins later. Knows positions in token
order only: no pool, no connector, no state.
"""

from __future__ import annotations

from kvrelay_core.errors import UnsupportedError
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.slice_plan import BlockPairs, RankPlan, plan_ranks


class PullPlan:
    def __init__(self, source: KvLayout, layout: KvLayout, num_tokens: int) -> None:
        """`layout` is ours. Of a group with a window only what the token at `num_tokens` sees.

        Raises MismatchError for other content, UnsupportedError for a source of several ranks.
        """
        ranks = plan_ranks(source, layout)
        if [plan.source_rank for plan in ranks] != [source.tp_rank]:
            raise UnsupportedError(
                f"this worker reads one rank of a source, the ticket is of rank {source.tp_rank} of {source.tp_size}"
            )
        self.num_tokens = num_tokens
        self.source_blocks = source.blocks_for(num_tokens)
        self.source_first = source.first_block(num_tokens)
        self.local_blocks = layout.blocks_for(num_tokens)
        self.local_first = layout.first_block(num_tokens)
        # Where our blocks are larger, nobody sends the first tokens of the first one, and nobody sees them.
        self.local_whole = layout.blocks_for(self.source_first * source.block_tokens)
        self.full_local_blocks = num_tokens // layout.block_tokens
        self._rank: RankPlan = ranks[0]
        self._source_tokens, self._local_tokens = source.block_tokens, layout.block_tokens
        self._stride = max(1, layout.block_tokens // source.block_tokens)  # source blocks that fill whole ones of ours
        self._stride_bytes = max(source.block_bytes, layout.block_bytes)

    def source_blocks_in(self, local_blocks: int) -> int:
        """Blocks of the source that lie wholly within our first ones."""
        return self._whole(local_blocks * self._local_tokens, self._source_tokens, self.source_blocks)

    def local_blocks_in(self, source_blocks: int) -> int:
        """Ours that lie wholly within the first of the source."""
        return self._whole(source_blocks * self._source_tokens, self._local_tokens, self.local_blocks)

    def _whole(self, num_tokens: int, block_tokens: int, num_blocks: int) -> int:
        return num_blocks if num_tokens >= self.num_tokens else num_tokens // block_tokens

    def read_end(self, first: int, num_ready: int, max_bytes: int) -> int:
        """Where the read ends that begins at block `first` of the source; `first` itself when it has to wait."""
        strides = max(1, max_bytes // self._stride_bytes)
        end = min(num_ready, first + strides * self._stride)
        return end if end == self.source_blocks else max(first, end - end % self._stride)

    def pair(self, first: int, end: int, num_reused: int) -> BlockPairs:
        """The pairs of a read of blocks [first, end) of the source; our first `num_reused` blocks are not written.

        Positions are counted from token 0 on, `num_reused` is at least `local_first`."""
        return self._rank.pair(first, end, self.num_tokens, num_reused * self._local_tokens)

    def size_bytes(self, pairs: BlockPairs) -> int:
        return len(pairs.remote) * self._rank.pair_bytes
