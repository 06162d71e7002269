"""The trunk of a request becomes one sequence per choice: full blocks are shared, the partial one is copied.

Knows block tables and tokens; nothing of where the first tokens come from.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from kvrelay_core.request import ChoiceState
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.layout import KvLayout

CopyBlocks = Callable[[SequenceOf[tuple[int, int]]], None]


def branch(trunk: Sequence, pool: BlockPool, layout: KvLayout, copy_blocks: CopyBlocks) -> list[Sequence]:
    """One sequence for each of the request's pending choices; the first is the trunk itself.

    Where no block is free for the copy, the branch computes the partial block again.
    """
    request = trunk.request
    choices, request.pending_choices = request.pending_choices, ()
    branches = [trunk, *(_fork(trunk, choice, pool, layout) for choice in choices[1:])]
    num_full = trunk.num_computed // layout.block_tokens
    copies = [(trunk.blocks[num_full], fork.blocks[num_full]) for fork in branches[1:] if len(fork.blocks) > num_full]
    if copies:
        copy_blocks(copies)
    if len(choices) > 1:
        for sequence, choice in zip(branches, choices, strict=True):
            sequence.tokens += choice.committed
    request.sequences = branches
    return branches


def _fork(trunk: Sequence, choice: ChoiceState, pool: BlockPool, layout: KvLayout) -> Sequence:
    num_full, num_partial = divmod(trunk.num_computed, layout.block_tokens)
    shared = trunk.blocks[:num_full]
    pool.pin(shared)
    private = pool.reserve(1) if num_partial and pool.num_free else []
    return Sequence(
        trunk.request,
        choice.index,
        list(trunk.tokens),
        trunk.chain.fork(),
        num_computed=trunk.num_computed if private or not num_partial else num_full * layout.block_tokens,
        num_published=trunk.num_published,
        num_cached=trunk.num_cached,
        blocks=shared + private,
        last_step=trunk.last_step,
    )
