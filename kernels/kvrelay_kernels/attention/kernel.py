"""Paged attention in Triton: one kernel for decode rows and prefill chunks, and one that combines splits.

A program takes a tile of query rows of one KV head. A row is one query token of one query head; rows run over
the heads that share the KV head first, so keys and values are read once for all of them. With few programs the
context is split over several, each leaving a partial result and its log-sum-exp, and a second kernel combines
them. Slots past a context, and those before the window of a tile's first token, are never read. Without a window and
without tokens that see past themselves all that is compiled away. Also runs in Triton's interpreter on the CPU.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, no-any-return"
# Triton has no types: a kernel is compiled from its source, not called.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.attention.batch import AttentionBatch
from kvrelay_kernels.launch import Launch, launch_for, num_multiprocessors


@triton.jit
def _span_of_split(first, end, split, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """The slots of this split among those from the tile of `first` on, up to `end`; whole tiles but for the last."""
    begin = first // TILE * TILE
    split_len = tl.cdiv(tl.cdiv(end - begin, TILE), NUM_SPLITS) * TILE
    split_start = begin + split * split_len
    return split_start, tl.minimum(end, split_start + split_len)


@triton.jit
def _slot_offsets(
    table_ptr, start, slots, slot_mask, block_stride,
    HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Where the vectors of a tile of slots begin, counted from the sequence's head in block 0."""
    if BLOCK_TOKENS >= TILE:
        # The tile lies in one block: both are powers of two, and tiles start at multiples of TILE.
        blocks = tl.load(table_ptr + start // BLOCK_TOKENS).to(tl.int64)
    else:
        blocks = tl.load(table_ptr + slots // BLOCK_TOKENS, mask=slot_mask, other=0).to(tl.int64)
    return blocks * block_stride + (slots % BLOCK_TOKENS) * HEAD_DIM


@triton.jit
def _accumulate(scores, v, largest, total, acc):
    """One tile of the online softmax: the largest score, the sum of weights, the weighted values."""
    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    # A row that sees nothing of this tile yet must not compute -inf - -inf.
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(largest - shift)
    acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_largest, total * decay + tl.sum(weights, axis=1), acc


@triton.jit
def _attend_kernel(
    q_ptr, pool_ptr, tables_ptr, tiles_ptr, query_starts_ptr, context_lens_ptr, last_visible_ptr, out_ptr, lse_ptr,
    scale_log2e, q_stride_token, q_stride_head, block_stride, plane_stride, table_stride, num_tokens,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, LOOKS_AHEAD: tl.constexpr,
):  # fmt: skip
    sequence = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first_row = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    query_start = tl.load(query_starts_ptr + sequence)
    query_len = tl.load(query_starts_ptr + sequence + 1) - query_start
    context_len = tl.load(context_lens_ptr + sequence)

    rows = first_row + tl.arange(0, ROWS)
    columns = tl.arange(0, DIM_TILE)
    row_mask = rows < query_len * GROUP
    column_mask = columns < HEAD_DIM
    tokens = query_start + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    positions = context_len - query_len + rows // GROUP
    q_offset = tokens.to(tl.int64) * q_stride_token + heads * q_stride_head
    q_mask = row_mask[:, None] & column_mask[None, :]
    q = tl.load(q_ptr + q_offset[:, None] + columns[None, :], mask=q_mask, other=0.0)

    last = positions
    if LOOKS_AHEAD:
        last = tl.load(last_visible_ptr + tokens, mask=row_mask, other=0)
        end = tl.max(last, axis=0) + 1
    else:
        # The last query token of the tile sees the most; nothing past that is read.
        end = tl.minimum(context_len, context_len - query_len + (first_row + ROWS - 1) // GROUP + 1)
    first = 0
    if WINDOW:
        first = tl.maximum(0, context_len - query_len + first_row // GROUP - WINDOW + 1)
    split_start, split_end = _span_of_split(first, end, split, TILE, NUM_SPLITS)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_TILE], tl.float32)
    head_ptr = pool_ptr + kv_head.to(tl.int64) * (BLOCK_TOKENS * HEAD_DIM)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    for start in range(split_start, split_end, TILE):
        slots = start + tl.arange(0, TILE)
        slot_mask = slots < split_end
        if WINDOW:
            slot_mask &= slots >= first
        slot_offset = _slot_offsets(table_ptr, start, slots, slot_mask, block_stride, HEAD_DIM, BLOCK_TOKENS, TILE)
        kv_ptr = head_ptr + slot_offset[:, None] + columns[None, :]
        kv_mask = slot_mask[:, None] & column_mask[None, :]
        k = tl.load(kv_ptr, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e
        visible = slot_mask[None, :] & (slots[None, :] <= last[:, None])
        if WINDOW:
            visible &= slots[None, :] > positions[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
        v = tl.load(kv_ptr + plane_stride, mask=kv_mask, other=0.0)
        largest, total, acc = _accumulate(scores, v, largest, total, acc)

    safe_total = tl.where(total == 0.0, 1.0, total)
    acc = acc / safe_total[:, None]
    num_heads = NUM_KV_HEADS * GROUP
    out_row = (split * num_tokens + tokens).to(tl.int64) * num_heads + heads
    out_mask = row_mask[:, None] & column_mask[None, :]
    tl.store(out_ptr + out_row[:, None] * HEAD_DIM + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_mask)
    if NUM_SPLITS > 1:
        tl.store(lse_ptr + out_row, largest + tl.log2(safe_total), mask=row_mask)


@triton.jit
def _combine_kernel(
    partial_ptr, lse_ptr, tokens_ptr, out_ptr, num_tokens,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr, SPLITS_TILE: tl.constexpr,
):  # fmt: skip
    token = tl.load(tokens_ptr + tl.program_id(0)).to(tl.int64)
    row = token * NUM_HEADS + tl.program_id(1)
    splits = tl.arange(0, SPLITS_TILE)
    columns = tl.arange(0, DIM_TILE)
    split_rows = row + splits.to(tl.int64) * num_tokens * NUM_HEADS
    lse = tl.load(lse_ptr + split_rows, mask=splits < NUM_SPLITS, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    mask = (splits < NUM_SPLITS)[:, None] & (columns < HEAD_DIM)[None, :]
    partial = tl.load(partial_ptr + split_rows[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
    combined = tl.sum(partial * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    out_ptrs = out_ptr + row * HEAD_DIM + columns
    tl.store(out_ptrs, combined.to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM)


@dataclass(slots=True, frozen=True)
class TilePlan:
    """Query tiles of the batch: (sequence, first query row) each, int32 [tiles, 2]."""

    decode_tiles: Tensor
    decode_tokens: Tensor
    decode_launch: Launch
    num_splits: int
    chunk_tiles: Tensor
    chunk_launch: Launch


def paged_attention(q_NHD: Tensor, layer_pool: Tensor, batch: AttentionBatch, scale: float, window: int = 0) -> Tensor:
    """See `kvrelay_kernels.attention.op.paged_attention`."""
    assert q_NHD.stride(-1) == 1
    plan = batch.plan(TilePlan, lambda: _make_plan(q_NHD, layer_pool, batch, window), window)
    out_NHD = torch.empty(q_NHD.shape, dtype=q_NHD.dtype, device=q_NHD.device)
    if len(plan.chunk_tiles):
        ahead_N = batch.last_visible_N
        _attend(
            q_NHD, layer_pool, batch, scale, plan.chunk_tiles, plan.chunk_launch, 1, window, ahead_N, out_NHD, out_NHD
        )
    if len(plan.decode_tiles) and plan.num_splits == 1:
        _attend(
            q_NHD, layer_pool, batch, scale, plan.decode_tiles, plan.decode_launch, 1, window, None, out_NHD, out_NHD
        )
    elif len(plan.decode_tiles):
        _attend_in_splits(q_NHD, layer_pool, batch, scale, plan, window, out_NHD)
    return out_NHD


def _attend(
    q_NHD: Tensor,
    layer_pool: Tensor,
    batch: AttentionBatch,
    scale: float,
    tiles: Tensor,
    launch: Launch,
    num_splits: int,
    window: int,
    last_visible_N: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    num_tokens, num_heads, head_dim = q_NHD.shape
    num_kv_heads, block_tokens = layer_pool.shape[2:4]
    _attend_kernel[(len(tiles), num_kv_heads, num_splits)](
        q_NHD,
        layer_pool,
        batch.block_tables_BM,
        tiles,
        batch.query_starts_B1,
        batch.context_lens_B,
        batch.context_lens_B if last_visible_N is None else last_visible_N,
        out,
        lse,
        scale * 1.4426950408889634,
        q_NHD.stride(0),
        q_NHD.stride(1),
        layer_pool.stride(0),
        layer_pool.stride(1),
        batch.block_tables_BM.stride(0),
        num_tokens,
        GROUP=num_heads // num_kv_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIM_TILE=max(16, triton.next_power_of_2(head_dim)),  # the least that tl.dot takes
        BLOCK_TOKENS=block_tokens,
        ROWS=launch.rows,
        TILE=launch.tile,
        NUM_SPLITS=num_splits,
        WINDOW=window,
        LOOKS_AHEAD=last_visible_N is not None,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _attend_in_splits(
    q_NHD: Tensor, layer_pool: Tensor, batch: AttentionBatch, scale: float, plan: TilePlan, window: int, out_NHD: Tensor
) -> None:
    num_tokens, num_heads, head_dim = q_NHD.shape
    num_splits = plan.num_splits
    partial_SNHD = torch.empty((num_splits, *q_NHD.shape), dtype=torch.float32, device=q_NHD.device)
    lse_SNH = torch.empty((num_splits, num_tokens, num_heads), dtype=torch.float32, device=q_NHD.device)
    tiles, launch = plan.decode_tiles, plan.decode_launch
    _attend(q_NHD, layer_pool, batch, scale, tiles, launch, num_splits, window, None, partial_SNHD, lse_SNH)
    _combine_kernel[(len(plan.decode_tokens), num_heads)](
        partial_SNHD,
        lse_SNH,
        plan.decode_tokens,
        out_NHD,
        num_tokens,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        DIM_TILE=triton.next_power_of_2(head_dim),
        NUM_SPLITS=num_splits,
        SPLITS_TILE=triton.next_power_of_2(num_splits),
    )


def _make_plan(q_NHD: Tensor, layer_pool: Tensor, batch: AttentionBatch, window: int) -> TilePlan:
    device = q_NHD.device
    num_kv_heads = layer_pool.shape[2]
    group = q_NHD.shape[1] // num_kv_heads
    suffix = " float32" if q_NHD.dtype == torch.float32 else ""
    decode_launch = launch_for("paged_attention", "decode" + suffix, device)
    chunk_launch = launch_for("paged_attention", "prefill" + suffix, device)
    decode = [sequence for sequence in range(batch.num_sequences) if batch.query_len(sequence) == 1]
    chunk_tiles = [
        (sequence, row)
        for sequence in range(batch.num_sequences)
        if batch.query_len(sequence) > 1
        for row in range(0, batch.query_len(sequence) * group, chunk_launch.rows)
    ]
    decode_tiles = [(sequence, row) for sequence in decode for row in range(0, group, decode_launch.rows)]
    decode_tokens = [batch.query_starts[sequence] for sequence in decode]
    longest = max((batch.context_lens[sequence] for sequence in decode), default=0)
    if window:
        longest = min(longest, window)
    return TilePlan(
        decode_tiles=torch.tensor(decode_tiles, dtype=torch.int32, device=device),
        decode_tokens=torch.tensor(decode_tokens, dtype=torch.int32, device=device),
        decode_launch=decode_launch,
        num_splits=_num_splits(len(decode_tiles) * num_kv_heads, longest, decode_launch.tile, device),
        chunk_tiles=torch.tensor(chunk_tiles, dtype=torch.int32, device=device),
        chunk_launch=chunk_launch,
    )


def _num_splits(num_programs: int, longest: int, tile: int, device: torch.device) -> int:
    """Enough splits to fill the GPU twice, each of a tile or more; a power of two: few variants to compile."""
    useful = longest // tile
    wanted = 2 * num_multiprocessors(device) // max(1, num_programs)
    return 1 << max(0, min(useful, wanted).bit_length() - 1)
