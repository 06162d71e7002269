"""Lays a ragged batch of token ids and block tables out as the flat tensors that the layers read.

All integers of a step go to the device in two copies, in three where tokens have three positions. It knows nothing
of models: only the block size of the pools. Where layers with a window have a pool of their own, their blocks are laid
out beside those of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvrelay_engine.models.layers.step import LogitsRows, ModelStep
from kvrelay_engine.runner import BatchRow, MediaRows
from kvrelay_kernels.attention import AttentionBatch


class StepBuilder:
    def __init__(
        self,
        block_tokens: int,
        device: torch.device,
        *,
        media_see_ahead: bool = False,
        has_sliding_group: bool = False,
    ) -> None:
        """With `media_see_ahead` the tokens of each of a row's media see all of it: it must come whole. With
        `has_sliding_group` rows have a sliding table too."""
        self._block_tokens = block_tokens
        self._has_sliding_group = has_sliding_group
        self._media_see_ahead = media_see_ahead
        self._device = device

    def build(self, batch: Sequence[BatchRow]) -> ModelStep:
        """Every row has at least one token, and a block table that covers its last one."""
        query_starts, context_lens, wanted = [0], [], []
        for index, row in enumerate(batch):
            query_starts.append(query_starts[-1] + len(row.token_ids))
            context_lens.append(row.start + len(row.token_ids))
            if row.wants_logits:
                wanted.append(index)
        logits_rows = [query_starts[index + 1] - 1 for index in wanted]
        media = _place_in_batch(batch, query_starts)
        wide = self._lay_out_tokens(batch, query_starts, logits_rows)
        num_tokens = query_starts[-1]
        token_ids_N, positions_N, slots_N, rows_R = wide.split_with_sizes([num_tokens] * 3 + [len(logits_rows)])
        attention = self._attention_batch(batch, query_starts, context_lens)
        logits = None if len(wanted) == num_tokens else LogitsRows(rows_R, attention.last_tokens(wanted))
        positions_3N = self._mrope_positions(batch, query_starts)
        step = ModelStep(token_ids_N, positions_N, slots_N, attention, logits, positions_3N, media)
        return replace(step, local=self._local_step(batch, step, wanted)) if self._has_sliding_group else step

    def _local_step(self, batch: Sequence[BatchRow], step: ModelStep, wanted: list[int]) -> ModelStep:
        """The same step in the blocks of the sliding group."""
        slots = np.empty(step.attention.num_tokens, dtype=np.int64)
        tables_BM = np.zeros(step.attention.block_tables_BM.shape, dtype=np.int32)
        for row, first, table_M in zip(batch, step.attention.query_starts, tables_BM, strict=False):
            end = row.start + len(row.token_ids)
            width = -(-end // self._block_tokens)
            table_M[:width] = row.sliding_table[:width]
            blocks, offsets = np.divmod(np.arange(row.start, end), self._block_tokens)
            slots[first : first + len(row.token_ids)] = table_M[blocks].astype(np.int64) * self._block_tokens + offsets
        attention = step.attention.in_blocks(torch.from_numpy(tables_BM).to(self._device, non_blocking=True))
        logits = step.logits and LogitsRows(step.logits.rows_R, attention.last_tokens(wanted))
        slots_N = torch.from_numpy(slots).to(self._device, non_blocking=True)
        return replace(step, slots_N=slots_N, attention=attention, logits=logits)

    def _lay_out_tokens(self, batch: Sequence[BatchRow], query_starts: list[int], logits_rows: list[int]) -> Tensor:
        """int64: all token ids, then all positions, all slots, and the rows that want logits."""
        num_tokens, block_tokens = query_starts[-1], self._block_tokens
        flat = np.empty(3 * num_tokens + len(logits_rows), dtype=np.int64)
        token_ids_N, positions_N, slots_N = flat[: 3 * num_tokens].reshape(3, num_tokens)
        flat[3 * num_tokens :] = logits_rows
        for row, first in zip(batch, query_starts, strict=False):
            if len(row.token_ids) == 1:
                block, offset = divmod(row.start, block_tokens)
                token_ids_N[first] = row.token_ids[0]
                positions_N[first] = row.start if row.positions is None else row.positions[0][0]
                slots_N[first] = row.block_table[block] * block_tokens + offset
                continue
            tokens = slice(first, first + len(row.token_ids))
            token_ids_N[tokens] = row.token_ids
            indices = np.arange(row.start, row.start + len(row.token_ids))
            positions_N[tokens] = indices if row.positions is None else row.positions[0]
            blocks, offsets = np.divmod(indices, block_tokens)
            slots_N[tokens] = np.asarray(row.block_table)[blocks] * block_tokens + offsets
        return torch.from_numpy(flat).to(self._device, non_blocking=True)

    def _mrope_positions(self, batch: Sequence[BatchRow], query_starts: list[int]) -> Tensor | None:
        """int64 [3, N] on the device; None where every token's three positions are one."""
        if all(row.positions is None or row.positions[0] == row.positions[1] == row.positions[2] for row in batch):
            return None
        positions_3N = np.empty((3, query_starts[-1]), dtype=np.int64)
        for row, first in zip(batch, query_starts, strict=False):
            end = first + len(row.token_ids)
            positions_3N[:, first:end] = (
                np.arange(row.start, row.start + len(row.token_ids)) if row.positions is None else row.positions
            )
        return torch.from_numpy(positions_3N).to(self._device, non_blocking=True)

    def _attention_batch(
        self, batch: Sequence[BatchRow], query_starts: list[int], context_lens: list[int]
    ) -> AttentionBatch:
        """int32 on the device: block tables, padded with the null block, then starts, then lengths."""
        num_sequences = len(batch)
        widths = [-(-context_len // self._block_tokens) for context_len in context_lens]
        num_columns = max(widths)
        table_size = num_sequences * num_columns
        flat = np.zeros(table_size + 2 * num_sequences + 1, dtype=np.int32)
        for index, (row, width) in enumerate(zip(batch, widths, strict=True)):
            flat[index * num_columns : index * num_columns + width] = row.block_table[:width]
        flat[table_size : table_size + num_sequences + 1] = query_starts
        flat[table_size + num_sequences + 1 :] = context_lens
        narrow = torch.from_numpy(flat).to(self._device, non_blocking=True)
        last_visible = self._last_visible(batch)
        tables, starts_B1, lens_B = narrow.split_with_sizes([table_size, num_sequences + 1, num_sequences])
        return AttentionBatch(
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables_BM=tables.view(num_sequences, num_columns),
            max_query_len=max(len(row.token_ids) for row in batch),
            query_starts_B1=starts_B1,
            context_lens_B=lens_B,
            last_visible=last_visible,
            last_visible_N=None
            if last_visible is None
            else torch.tensor(last_visible, dtype=torch.int32).to(self._device, non_blocking=True),
        )

    def _last_visible(self, batch: Sequence[BatchRow]) -> list[int] | None:
        """For each token the last position that it sees; None where that is its own everywhere."""
        if not self._media_see_ahead or not any(row.media for row in batch):
            return None
        last_visible = []
        for row in batch:
            last = list(range(row.start, row.start + len(row.token_ids)))
            for item in row.media:
                end = item.first + len(item.rows)
                last[item.first : end] = [row.start + end - 1] * len(item.rows)
            last_visible += last
        return last_visible


def _place_in_batch(batch: Sequence[BatchRow], query_starts: list[int]) -> list[MediaRows]:
    """The rows' media, counted from the first token of the batch."""
    placed = []
    for row, first in zip(batch, query_starts, strict=False):
        for item in row.media:
            end = item.first + len(item.rows)
            assert 0 <= item.first < end <= len(row.token_ids), "media rows lie outside the tokens of their row"
            placed.append(MediaRows(first + item.first, item.rows))
    return placed
