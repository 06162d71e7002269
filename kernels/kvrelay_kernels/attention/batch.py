"""What attention must know of a ragged batch: built once per step, used by every layer.

Knows nothing of models or of the scheduler. Block tables name blocks of the pool that already hold, or are
being given in this layer, the keys and values of all tokens of the context.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")


@dataclass(slots=True, eq=False)
class AttentionBatch:
    """B sequences; sequence b has the query tokens `query_starts[b] : query_starts[b + 1]` of the batch.

    The query tokens are the last ones of the context, so token i of q queries sees context - q + i + 1 tokens.
    Every sequence has at least one query token. In a layer with a window of w, a token sees no more than the last w
    of them. `last_visible` names for each query token the last position of the context that it sees, where that is
    not its own everywhere: tokens of an image see all of it. No position past the context is named.
    """

    query_starts: Sequence[int]  # B + 1
    context_lens: Sequence[int]  # B: tokens of the sequence, the new ones included
    block_tables_BM: Tensor  # int32 or int64, padded with 0
    max_query_len: int
    query_starts_B1: Tensor  # int32 [B + 1], device copies for the kernels
    context_lens_B: Tensor  # int32 [B]
    last_visible: Sequence[int] | None = None  # N; None: causal
    last_visible_N: Tensor | None = None  # int32 [N], its device copy
    _plans: dict[tuple[type[Any], int], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        query_starts: Sequence[int],
        context_lens: Sequence[int],
        block_tables_BM: Tensor,
        last_visible: Sequence[int] | None = None,
    ) -> AttentionBatch:
        """Derives the rest; the tensors lie where the block tables lie."""
        device = block_tables_BM.device
        return cls(
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables_BM=block_tables_BM,
            max_query_len=max((b - a for a, b in itertools.pairwise(query_starts)), default=0),
            query_starts_B1=torch.tensor(query_starts, dtype=torch.int32, device=device),
            context_lens_B=torch.tensor(context_lens, dtype=torch.int32, device=device),
            last_visible=last_visible,
            last_visible_N=None
            if last_visible is None
            else torch.tensor(last_visible, dtype=torch.int32, device=device),
        )

    def to(self, device: torch.device) -> AttentionBatch:
        """The same batch on another device, not planned yet."""
        return AttentionBatch.build(
            self.query_starts, self.context_lens, self.block_tables_BM.to(device), self.last_visible
        )

    def in_blocks(self, block_tables_BM: Tensor) -> AttentionBatch:
        """The same queries over other blocks, not planned yet."""
        return replace(self, block_tables_BM=block_tables_BM, _plans={})

    def last_tokens(self, sequences: Sequence[int]) -> AttentionBatch:
        """Of these sequences the last token each, which sees all of the context."""
        index = torch.tensor(sequences, dtype=torch.int64, device=self.block_tables_BM.device)
        return AttentionBatch.build(
            range(len(sequences) + 1),
            [self.context_lens[sequence] for sequence in sequences],
            self.block_tables_BM.index_select(0, index),
        )

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    def query_len(self, sequence: int) -> int:
        return self.query_starts[sequence + 1] - self.query_starts[sequence]

    def plan(self, kind: type[Plan], make: Callable[[], Plan], window: int = 0) -> Plan:
        """What an implementation derives from the batch at the first layer of a window and reuses at the others."""
        found = self._plans.get((kind, window))
        if found is None:
            found = self._plans[kind, window] = make()
        return found
