"""Paged attention in torch: the CPU path and the oracle of the kernels.

Decode rows are computed in groups by one attention call each, prefill chunks one by one. Either way keys and
values are copied once, by head, out of the pool. What is derived from block tables and lengths is planned at
the first layer of a step, for each window, and reused by the others. Of a window's context only the blocks in it
are copied. Knows nothing of devices or of how the pool is filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvrelay_kernels.attention.batch import AttentionBatch

# A group's keys and values should fit in a core's share of the cache: larger groups become bound by memory,
# smaller ones by the cost of a call.
_GROUP_BYTES = 4 << 20


@dataclass(slots=True, frozen=True)
class PoolRows:
    """The vectors of one head in one block are a row; a block has `block_rows` of them over all layers."""

    block_rows: int
    num_kv_heads: int
    block_tokens: int
    head_dim: int

    @classmethod
    def of(cls, layer_pool: Tensor) -> PoolRows:
        _, _, num_kv_heads, block_tokens, head_dim = layer_pool.shape
        assert layer_pool.stride()[1:] == (
            num_kv_heads * block_tokens * head_dim,
            block_tokens * head_dim,
            head_dim,
            1,
        ), "a block of the pool must be contiguous"
        return cls(layer_pool.stride(0) // (block_tokens * head_dim), num_kv_heads, block_tokens, head_dim)

    def view(self, layer_pool: Tensor) -> Tensor:
        """The pool from this layer on as [rows, T * D]; row indices are the same for every layer."""
        row_size = self.block_tokens * self.head_dim
        num_rows = (layer_pool.shape[0] - 1) * self.block_rows + 2 * self.num_kv_heads
        return layer_pool.as_strided((num_rows, row_size), (row_size, 1), layer_pool.storage_offset())

    def index(self, tables_BM: Tensor) -> Tensor:
        """Rows of all keys, then of all values, of each sequence's blocks: flat [2, B, K, M]."""
        first_B1M = tables_BM.to(torch.int64).unsqueeze(1) * self.block_rows
        heads_K1 = torch.arange(self.num_kv_heads, device=tables_BM.device).unsqueeze(1)
        keys_BKM = first_B1M + heads_K1
        return torch.stack((keys_BKM, keys_BKM + self.num_kv_heads)).view(-1)


@dataclass(slots=True, frozen=True)
class DecodeGroup:
    """Sequences with one query token each that are computed together."""

    tokens_B: Tensor | None  # their tokens' rows in the batch; None if they are the whole batch in order
    rows: Tensor  # see PoolRows.index
    max_context_len: int  # from the first block that is gathered
    stale_rows: Tensor | None  # token vectors among those gathered that the mask hides; None: cut off
    mask_B11S: Tensor | None  # added to the scores: -inf past a context and before a window


@dataclass(slots=True, frozen=True)
class Chunk:
    """Consecutive query tokens of one sequence."""

    first_token: int
    num_tokens: int
    rows: Tensor  # see PoolRows.index
    context_len: int  # from the first block that is gathered
    num_hidden: int  # first slots of these that no token sees
    mask_QS: Tensor | None  # None: causal, and the chunk is the whole context


@dataclass(slots=True, frozen=True)
class ReferencePlan:
    pool_rows: PoolRows
    decode_groups: list[DecodeGroup]
    chunks: list[Chunk]


def paged_attention(q_NHD: Tensor, layer_pool: Tensor, batch: AttentionBatch, scale: float, window: int = 0) -> Tensor:
    """See `kvrelay_kernels.attention.op.paged_attention`."""
    plan = batch.plan(ReferencePlan, lambda: _make_plan(batch, layer_pool, window), window)
    rows_RV = plan.pool_rows.view(layer_pool)
    if not plan.chunks and len(plan.decode_groups) == 1 and plan.decode_groups[0].tokens_B is None:
        return _attend_group(q_NHD, rows_RV, plan.decode_groups[0], plan.pool_rows, scale)
    out_NHD = torch.empty(q_NHD.shape, dtype=q_NHD.dtype, device=q_NHD.device)
    for group in plan.decode_groups:
        assert group.tokens_B is not None
        q_BHD = q_NHD.index_select(0, group.tokens_B)
        out_NHD.index_copy_(0, group.tokens_B, _attend_group(q_BHD, rows_RV, group, plan.pool_rows, scale))
    for chunk in plan.chunks:
        tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
        out_NHD[tokens] = _attend_chunk(q_NHD[tokens], rows_RV, chunk, plan.pool_rows, scale)
    return out_NHD


def _attend_group(q_BHD: Tensor, rows_RV: Tensor, group: DecodeGroup, pool_rows: PoolRows, scale: float) -> Tensor:
    num_sequences, num_heads, head_dim = q_BHD.shape
    kv = rows_RV.index_select(0, group.rows)
    if group.stale_rows is not None:
        # A mask alone does not do: 0 * NaN is NaN.
        kv.view(-1, head_dim).index_fill_(0, group.stale_rows, 0.0)
    k_BKSD, v_BKSD = kv.view(2, num_sequences, pool_rows.num_kv_heads, -1, head_dim)[..., : group.max_context_len, :]
    # The query heads of a KV head take the place of query tokens: keys are read once for all of them.
    q_BKGD = q_BHD.reshape(num_sequences, pool_rows.num_kv_heads, -1, head_dim)
    out_BKGD = scaled_dot_product_attention(q_BKGD, k_BKSD, v_BKSD, attn_mask=group.mask_B11S, scale=scale)
    return out_BKGD.reshape(num_sequences, num_heads, head_dim)


def _attend_chunk(q_QHD: Tensor, rows_RV: Tensor, chunk: Chunk, pool_rows: PoolRows, scale: float) -> Tensor:
    kv = rows_RV.index_select(0, chunk.rows)
    kv_KSD = kv.view(2, pool_rows.num_kv_heads, -1, pool_rows.head_dim)
    kv_KSD[:, :, : chunk.num_hidden] = 0.0  # a mask alone does not do
    k_KSD, v_KSD = kv_KSD[:, :, : chunk.context_len]
    out_1HQD = scaled_dot_product_attention(
        q_QHD.transpose(0, 1).unsqueeze(0),
        k_KSD.unsqueeze(0),
        v_KSD.unsqueeze(0),
        attn_mask=chunk.mask_QS,
        is_causal=chunk.mask_QS is None,
        scale=scale,
        enable_gqa=True,
    )
    return out_1HQD.squeeze(0).transpose(0, 1)


def _make_plan(batch: AttentionBatch, layer_pool: Tensor, window: int) -> ReferencePlan:
    pool_rows = PoolRows.of(layer_pool)
    sequences = range(batch.num_sequences)
    decode = [sequence for sequence in sequences if batch.query_len(sequence) == 1]
    chunks = [
        _make_chunk(batch, sequence, pool_rows, layer_pool.dtype, window)
        for sequence in sequences
        if batch.query_len(sequence) > 1
    ]
    groups = [
        _make_group(batch, group, pool_rows, layer_pool.dtype, window)
        for group in _split_into_groups(batch, decode, pool_rows, layer_pool.element_size(), window)
    ]
    return ReferencePlan(pool_rows, groups, chunks)


def _split_into_groups(
    batch: AttentionBatch, decode: list[int], pool_rows: PoolRows, element_bytes: int, window: int
) -> list[list[int]]:
    """Groups of like context length, so that padding is small, and of about `_GROUP_BYTES`."""

    def size_bytes(sequence: int) -> int:
        context_len = batch.context_lens[sequence]
        blocks = -(-context_len // pool_rows.block_tokens) - _first_block(context_len - 1, window, pool_rows)
        return blocks * 2 * pool_rows.num_kv_heads * pool_rows.block_tokens * pool_rows.head_dim * element_bytes

    if size_bytes(max(decode, key=size_bytes, default=0)) * len(decode) <= _GROUP_BYTES:
        return [decode] if decode else []
    groups: list[list[int]] = []
    for sequence in sorted(decode, key=size_bytes, reverse=True):
        # The first of a group is its longest: all are padded to it.
        if groups and size_bytes(groups[-1][0]) * (len(groups[-1]) + 1) <= _GROUP_BYTES:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def _first_block(position: int, window: int, pool_rows: PoolRows) -> int:
    """The block of the first token that the token at `position`, and any after it, sees."""
    return max(0, position - window + 1) // pool_rows.block_tokens if window else 0


def _make_group(
    batch: AttentionBatch, group: list[int], pool_rows: PoolRows, dtype: torch.dtype, window: int
) -> DecodeGroup:
    device = batch.block_tables_BM.device
    context_lens = [batch.context_lens[sequence] for sequence in group]
    first_blocks = [_first_block(context_len - 1, window, pool_rows) for context_len in context_lens]
    lens = [
        context_len - first_block * pool_rows.block_tokens
        for context_len, first_block in zip(context_lens, first_blocks, strict=True)
    ]
    lens_B = torch.tensor(lens, device=device)
    max_context_len = int(lens_B.max())
    num_blocks = -(-max_context_len // pool_rows.block_tokens)
    is_whole_batch = len(group) == batch.num_tokens
    tokens_B = None
    tables_BM = batch.block_tables_BM
    if not is_whole_batch:
        tokens_B = torch.tensor([batch.query_starts[sequence] for sequence in group], device=device)
        tables_BM = tables_BM.index_select(0, torch.tensor(group, device=device))
    rows = pool_rows.index(
        _shift(tables_BM, first_blocks, num_blocks) if any(first_blocks) else tables_BM[:, :num_blocks]
    )
    slots_S = torch.arange(num_blocks * pool_rows.block_tokens, device=device)
    is_stale_BS = slots_S >= lens_B.unsqueeze(1)
    is_hidden_BS = is_stale_BS
    if window:
        is_hidden_BS = is_stale_BS | (slots_S < lens_B.unsqueeze(1) - window)
    if not bool(is_hidden_BS[:, :max_context_len].any()):
        return DecodeGroup(tokens_B, rows, max_context_len, None, None)
    mask_BS = torch.zeros(is_hidden_BS.shape, dtype=dtype, device=device).masked_fill_(is_hidden_BS, float("-inf"))
    mask_B11S = mask_BS[:, None, None, :max_context_len]
    return DecodeGroup(tokens_B, rows, max_context_len, _stale_rows(is_hidden_BS, pool_rows.num_kv_heads), mask_B11S)


def _shift(tables_BM: Tensor, first_blocks: list[int], num_blocks: int) -> Tensor:
    """`num_blocks` entries of each table from its first one on; past a table's end some block of it."""
    firsts_B1 = torch.tensor(first_blocks, device=tables_BM.device).unsqueeze(1)
    columns_BM = firsts_B1 + torch.arange(num_blocks, device=tables_BM.device)
    return tables_BM.gather(1, columns_BM.clamp_(max=tables_BM.shape[1] - 1))


def _stale_rows(is_hidden_BS: Tensor, num_kv_heads: int) -> Tensor:
    """The vectors of hidden slots among those gathered, [2, B, K, S] of them."""
    num_sequences, num_slots = is_hidden_BS.shape
    sequence_E, slot_E = is_hidden_BS.nonzero().unbind(1)
    of_first_head_E = sequence_E * (num_kv_heads * num_slots) + slot_E
    heads_K1 = torch.arange(num_kv_heads, device=is_hidden_BS.device).mul_(num_slots).unsqueeze(1)
    keys_KE = of_first_head_E + heads_K1
    return torch.cat((keys_KE, keys_KE + num_sequences * num_kv_heads * num_slots)).view(-1)


def _make_chunk(batch: AttentionBatch, sequence: int, pool_rows: PoolRows, dtype: torch.dtype, window: int) -> Chunk:
    num_tokens, context_len = batch.query_len(sequence), batch.context_lens[sequence]
    num_blocks = -(-context_len // pool_rows.block_tokens)
    first_block = _first_block(context_len - num_tokens, window, pool_rows)
    rows = pool_rows.index(batch.block_tables_BM[sequence : sequence + 1, first_block:num_blocks])
    num_slots = context_len - first_block * pool_rows.block_tokens
    first_token = batch.query_starts[sequence]
    mask_QS = None
    if batch.last_visible is not None or 0 < window < context_len:
        mask_QS = _masked_chunk(batch, sequence, context_len - num_slots, window, dtype)
    elif num_tokens < context_len:
        mask_QS = torch.full((num_tokens, context_len), float("-inf"), dtype=dtype, device=rows.device)
        mask_QS.triu_(context_len - num_tokens + 1)
    num_hidden = max(0, num_slots - num_tokens - window + 1) if window else 0
    return Chunk(first_token, num_tokens, rows, num_slots, num_hidden, mask_QS)


def _masked_chunk(batch: AttentionBatch, sequence: int, first_slot: int, window: int, dtype: torch.dtype) -> Tensor:
    """The mask of a chunk with a window, or whose tokens see past themselves, from the context's `first_slot` on."""
    device = batch.block_tables_BM.device
    context_len = batch.context_lens[sequence]
    slots_S = torch.arange(first_slot, context_len, device=device)
    positions_Q1 = torch.arange(context_len - batch.query_len(sequence), context_len, device=device).unsqueeze(1)
    last_Q1 = positions_Q1
    if batch.last_visible_N is not None:
        last_Q1 = batch.last_visible_N[batch.query_starts[sequence] : batch.query_starts[sequence + 1]].unsqueeze(1)
    is_hidden_QS = slots_S > last_Q1
    if window:
        is_hidden_QS |= slots_S <= positions_Q1 - window
    return torch.zeros(is_hidden_QS.shape, dtype=dtype, device=device).masked_fill_(is_hidden_QS, float("-inf"))
