"""A runner whose answers can be computed by hand, and which notices every wrong block.

A token's "KV" is its id, or for a media token the first number of its embedding (as key), and its position (as
value). The next token is a function of the whole context as it is read back *through the block table*, so a block that
is wrong, stale or misplaced changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrelay_engine.runner import BatchRow
from kvrelay_transfer.layout import KvLayout

VOCAB_SIZE = 97


def fake_layout(block_tokens: int = 4, hash_unit_tokens: int = 4) -> KvLayout:
    return KvLayout("float32", 1, 1, block_tokens, 1, hash_unit_tokens=hash_unit_tokens)


def next_token(context: Sequence[int]) -> int:
    """What the fake model says after this context."""
    return sum((position + 1) * (token + 3) for position, token in enumerate(context)) % VOCAB_SIZE


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The greedy answer to a prompt."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context))
    return context[len(prompt) :]


class FakeRunner:
    """Implements `kvrelay_engine.runner.Runner` over a pool tensor [blocks, 1, 2, 1, block_tokens, 1]."""

    vocab_size = VOCAB_SIZE

    def __init__(self, pool: torch.Tensor) -> None:
        self._keys_BT = pool[:, 0, 0, 0, :, 0]
        self._values_BT = pool[:, 0, 1, 0, :, 0]
        self._pool = pool
        self.batches: list[list[int]] = []  # tokens per row of each batch
        self.num_copies = 0
        self.failure: Exception | None = None  # raised by the next run, half-way
        self.broken_rows: set[int] = set()  # of the next run's logits: they are NaN

    def run(self, batch: Sequence[BatchRow]) -> torch.Tensor:
        self.batches.append([len(row.token_ids) for row in batch])
        for row in batch:
            self._write(row)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        logits = [self._logits(row) for row in batch if row.wants_logits]
        for index in self.broken_rows:
            logits[index][index] = torch.nan
        self.broken_rows = set()
        return torch.stack(logits) if logits else torch.empty((0, VOCAB_SIZE))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, destination in pairs:
            self._pool[destination] = self._pool[source]
            self.num_copies += 1

    def _write(self, row: BatchRow) -> None:
        block_tokens = self._keys_BT.shape[1]
        for position, token in enumerate(row.token_ids, row.start):
            block, offset = row.block_table[position // block_tokens], position % block_tokens
            self._keys_BT[block, offset] = token
            self._values_BT[block, offset] = position
        for media in row.media:
            for index, value in enumerate(media.rows[:, 0], row.start + media.first):
                self._keys_BT[row.block_table[index // block_tokens], index % block_tokens] = value

    def _logits(self, row: BatchRow) -> torch.Tensor:
        """The next token has the highest logit, the ones after it (cyclically) ever lower ones."""
        length = row.start + len(row.token_ids)
        blocks = torch.tensor(list(row.block_table))
        tokens = self._keys_BT[blocks].flatten()[:length].long()
        positions = self._values_BT[blocks].flatten()[:length].long()
        best = int(((positions + 1) * (tokens + 3)).sum()) % VOCAB_SIZE
        rank_V = (torch.arange(VOCAB_SIZE) - best) % VOCAB_SIZE
        return -0.5 * rank_V.float()
