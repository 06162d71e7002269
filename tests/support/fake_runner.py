"""A runner whose answers can be computed by hand, and which notices every wrong block.

A token's "KV" is its id, or for a media token the first number of its embedding (as key), and its position (as
value). The next token is a function of the whole context as it is read back *through the block table*, so a block that
is wrong, stale or misplaced changes the answer.

With a sliding pool every token looks at its window there as well, and what is not what the full pool says is noted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvrelay_engine.runner import BatchRow
from kvrelay_transfer.layout import KvLayout

VOCAB_SIZE = 97


def fake_layout(block_tokens: int = 4, hash_unit_tokens: int = 4, window: int = 0) -> KvLayout:
    return KvLayout("float32", 1, 1, block_tokens, 1, hash_unit_tokens=hash_unit_tokens, window=window)


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

    def __init__(self, pool: torch.Tensor, sliding_pool: torch.Tensor | None = None, window: int = 0) -> None:
        self._keys_BT = pool[:, 0, 0, 0, :, 0]
        self._values_BT = pool[:, 0, 1, 0, :, 0]
        self._pools = [pool] if sliding_pool is None else [pool, sliding_pool]
        self._window = window
        if sliding_pool is not None:
            sliding_pool[0] = -1.0  # a read of the null block shows
        self.wrong_windows: list[int] = []  # positions that a token did not see in its window
        self.batches: list[list[int]] = []  # tokens per row of each batch
        self.num_copies = 0
        self.failure: Exception | None = None  # raised by the next run, half-way
        self.broken_rows: set[int] = set()  # of the next run's logits: they are NaN

    def run(self, batch: Sequence[BatchRow]) -> torch.Tensor:
        self.batches.append([len(row.token_ids) for row in batch])
        for row in batch:
            self._write(row)
            if self._window:
                self._slide(row)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        logits = [self._logits(row) for row in batch if row.wants_logits]
        for index in self.broken_rows:
            logits[index][index] = torch.nan
        self.broken_rows = set()
        return torch.stack(logits) if logits else torch.empty((0, VOCAB_SIZE))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], group: int = 0) -> None:
        for source, destination in pairs:
            self._pools[group][destination] = self._pools[group][source]
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

    def _slide(self, row: BatchRow) -> None:
        """Writes the row's tokens to the sliding pool as well, and looks at all that they see there."""
        full, sliding = (pool[:, 0, :, 0, :, 0] for pool in self._pools)
        block_tokens = full.shape[2]
        end = row.start + len(row.token_ids)
        for position in range(row.start, end):
            block, offset = divmod(position, block_tokens)
            sliding[row.sliding_table[block], :, offset] = full[row.block_table[block], :, offset]
        for position in range(max(0, row.start - self._window + 1), end):
            block, offset = divmod(position, block_tokens)
            seen, meant = sliding[row.sliding_table[block], :, offset], full[row.block_table[block], :, offset]
            if not torch.equal(seen, meant):
                self.wrong_windows.append(position)

    def _logits(self, row: BatchRow) -> torch.Tensor:
        """The next token has the highest logit, the ones after it (cyclically) ever lower ones."""
        length = row.start + len(row.token_ids)
        blocks = torch.tensor(list(row.block_table))
        tokens = self._keys_BT[blocks].flatten()[:length].long()
        positions = self._values_BT[blocks].flatten()[:length].long()
        best = int(((positions + 1) * (tokens + 3)).sum()) % VOCAB_SIZE
        rank_V = (torch.arange(VOCAB_SIZE) - best) % VOCAB_SIZE
        return -0.5 * rank_V.float()
