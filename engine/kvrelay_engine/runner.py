"""What the engine loop asks of a model: run a ragged batch over the paged pool, give logits of some rows.

`ModelRunner` (model_runner.py) does it with a model; tests use a runner with hand-computable answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class MediaRows:
    """Tokens `first : first + n` take these embeddings [n, E] in place of those of their ids.

    Where a model's images see themselves in both directions (`ModelConfig.media_see_ahead`), it is a whole image.
    """

    first: int
    rows: torch.Tensor


@dataclass(slots=True)
class BatchRow:
    """Consecutive tokens of one sequence to be computed in this step."""

    token_ids: Sequence[int]
    start: int  # position of the first of them; KV of all earlier positions is in the pool
    block_table: Sequence[int]  # covers positions 0 .. start + len(token_ids) - 1
    wants_logits: bool  # of the last token
    media: Sequence[MediaRows] = ()  # `first` counts from the row's own first token
    # M-RoPE: time, height and width of each token; None: all three are start, start + 1, ...
    positions: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None
    # Of layers with a window, where they are a KV group of their own: null where the window of no token reaches.
    sliding_table: Sequence[int] = ()


class Runner(Protocol):
    vocab_size: int

    def run(self, batch: Sequence[BatchRow]) -> torch.Tensor:
        """Writes the rows' KV into the pool. Returns float32 logits [rows that want them, vocab], in order.

        When it returns (CPU) or when the current stream has passed it (CUDA) the KV is in the pool.
        """
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], group: int = 0) -> None:
        """Copies whole blocks (source, destination) of a KV group: a fork's partial block."""
        ...
