"""The trunk of a request becomes one sequence per choice: full blocks are shared, the partial one is copied.

Knows block tables and tokens; nothing of how the first tokens came.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from kvrelay_core.errors import MismatchError
from kvrelay_core.request import ChoiceState, FirstToken
from kvrelay_engine.engine_parts import EngineParts
from kvrelay_engine.sampler import SampledToken
from kvrelay_engine.sequence import EngineRequest, Sequence
from kvrelay_engine.sliding_blocks import SlidingBlocks


class Branching:
    def __init__(self, parts: EngineParts, sliding: SlidingBlocks | None = None) -> None:
        self._pool = parts.pool
        self._block_tokens = parts.layout.block_tokens
        self._copy_blocks = parts.runner.copy_blocks
        self._synchronize = parts.synchronize
        self._sliding = sliding

    def branch(self, trunk: Sequence) -> list[Sequence]:
        """One sequence for each of the request's pending choices; the first is the trunk itself.

        Where no block is free for the copy, the branch computes the partial block again. Where layers have a window,
        what that block's tokens see is not held any more: such a branch holds nothing, and is to be computed like one
        that was preempted.
        """
        request = trunk.request
        choices, request.pending_choices = request.pending_choices, ()
        forks = [self._fork(trunk, choice) for choice in choices[1:]]
        branches = [trunk, *forks]
        num_full = trunk.num_computed // self._block_tokens
        copies = [(trunk.blocks[num_full], fork.blocks[num_full]) for fork in forks if len(fork.blocks) > num_full]
        seated = [fork for fork in forks if fork.blocks]
        sliding_copies = [] if self._sliding is None else self._sliding.fork(trunk, seated)
        if copies:
            self._copy_blocks(copies)
            if self._sliding is not None:
                self._copy_blocks(sliding_copies, self._sliding.group.index)
            self._synchronize()  # a branch may end at once, and a hand-off be read into its block before the next step
        if len(choices) > 1:
            for sequence, choice in zip(branches, choices, strict=True):
                sequence.tokens += choice.committed
        request.sequences = branches
        return branches

    def _fork(self, trunk: Sequence, choice: ChoiceState) -> Sequence:
        num_full, num_partial = divmod(trunk.num_computed, self._block_tokens)
        if num_partial and not self._pool.num_free and self._sliding is not None:
            return Sequence(trunk.request, choice.index, list(trunk.tokens), trunk.chain.fork())
        shared = trunk.blocks[:num_full]
        self._pool.pin(shared)
        private = self._pool.reserve(1) if num_partial and self._pool.num_free else []
        return Sequence(
            trunk.request,
            choice.index,
            list(trunk.tokens),
            trunk.chain.fork(),
            num_computed=trunk.num_computed if private or not num_partial else num_full * self._block_tokens,
            num_published=trunk.num_published,
            num_cached=trunk.num_cached,
            blocks=shared + private,
            last_step=trunk.last_step,
        )


def tokens_to_branch_with(request: EngineRequest, first_tokens: SequenceOf[FirstToken]) -> dict[int, SampledToken]:
    """The hand-off's first token of each choice. Raises MismatchError when they are not those of the request."""
    tokens = {first.choice: SampledToken(first.token_id, first.logprobs) for first in first_tokens}
    position = request.trunk.num_generated
    fits = all(first.position == position for first in first_tokens)
    if not fits or tokens.keys() != {choice.index for choice in request.pending_choices}:
        raise MismatchError("the hand-off's first tokens are not those of the request's choices")
    return tokens
