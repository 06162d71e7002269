"""Plans between layouts, against the naive way: slicing one tensor that holds the KV of all ranks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from handoff_sides import LAYOUT
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from split_kv import Bytes, copy_rows, cut, glue, heads_of, make_kv, rank_layout

from kvrelay_core.errors import MismatchError
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.slice_plan import BlockPairs, plan_ranks

BLOCK_TOKENS = (16, 32, 64, 128)
RANKS = (1, 2, 4)
THIN = replace(LAYOUT, head_dim=2, num_layers=2, dtype="bfloat16")


def execute(pairs: BlockPairs, source: Bytes, target: Bytes) -> None:
    if pairs.slices is None:
        target[pairs.local] = source[pairs.remote]
    else:
        copy_rows(source, pairs.remote, target, pairs.local, pairs.slices)


def pull(kv: Bytes, source: KvLayout, reader: KvLayout, begin: int = 0, step: int = 10**6) -> Bytes:
    """The reader's blocks after it has pulled tokens from `begin` on, `step` source blocks at a time."""
    num_tokens = kv.shape[3]
    target = np.zeros((reader.blocks_for(num_tokens), reader.block_bytes), np.uint8)
    for plan in plan_ranks(source, reader):
        theirs = cut(kv, replace(source, tp_rank=plan.source_rank))
        for first in range(begin // source.block_tokens, len(theirs), step):
            end = min(first + step, len(theirs))
            execute(plan.pair(first, end, num_tokens, begin), theirs, target)
    return target


@pytest.mark.parametrize(("theirs", "ours"), list(product(BLOCK_TOKENS, BLOCK_TOKENS)))
@pytest.mark.parametrize(("p", "d"), list(product(RANKS, RANKS)))
def test_every_rank_gets_its_heads_of_every_token(theirs: int, ours: int, p: int, d: int) -> None:
    kv = make_kv(THIN, num_heads=4, num_tokens=200)
    for rank in range(d):
        source, reader = rank_layout(THIN, 4, theirs, p, 0), rank_layout(THIN, 4, ours, d, rank)
        assert np.array_equal(glue(pull(kv, source, reader), reader, 200), heads_of(kv, reader))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_range_of_any_shape_equals_the_naive_slice(data: st.DataObject) -> None:
    """Also fewer heads than ranks, other elements, a prefix that is here already, and reads of few blocks each."""
    draw = data.draw
    base = replace(THIN, num_layers=draw(st.integers(1, 2)), dtype=draw(st.sampled_from(["float32", "float8_e4m3"])))
    num_heads, p, d = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(RANKS)), draw(st.sampled_from(RANKS))
    source = rank_layout(base, num_heads, draw(st.sampled_from(BLOCK_TOKENS)), p, draw(st.integers(0, p - 1)))
    reader = rank_layout(base, num_heads, draw(st.sampled_from(BLOCK_TOKENS)), d, draw(st.integers(0, d - 1)))
    num_tokens = draw(st.integers(1, 300))
    begin = draw(st.integers(0, num_tokens // reader.block_tokens)) * reader.block_tokens
    kv = make_kv(base, num_heads, num_tokens)

    target = glue(pull(kv, source, reader, begin, draw(st.integers(1, 5))), reader, num_tokens)

    assert np.array_equal(target[:, :, :, begin:], heads_of(kv, reader)[:, :, :, begin:])
    assert not target[:, :, :, :begin].any(), "what is here already is not written again"


@pytest.mark.parametrize("tp_size", RANKS)
def test_equal_layouts_read_whole_blocks_of_their_own_rank(tp_size: int) -> None:
    for rank in range(tp_size):
        layout = rank_layout(THIN, 4, 16, tp_size, rank)
        (plan,) = plan_ranks(layout, layout)
        assert plan.source_rank == rank
        pairs = plan.pair(2, 5, 70)
        assert pairs.remote.tolist() == pairs.local.tolist() == [2, 3, 4] and pairs.slices is None


def test_copies_of_a_head_are_read_from_several_ranks() -> None:
    """Four ranks with two heads: each of four readers has a rank of its own, and two readers share no rank."""
    source = rank_layout(THIN, 2, 16, 4, 0)
    ranks = [plan_ranks(source, rank_layout(THIN, 2, 16, 4, rank))[0].source_rank for rank in range(4)]
    assert ranks == [0, 1, 2, 3]
    ranks = [plan_ranks(source, rank_layout(THIN, 2, 16, 2, rank))[0].source_rank for rank in range(2)]
    assert ranks == [0, 3]


def test_rows_are_as_long_as_both_sides_allow() -> None:
    """Heads of one block size are one row; only a smaller block on one side cuts them."""
    (plan, _) = plan_ranks(rank_layout(THIN, 4, 64, 2, 0), rank_layout(THIN, 4, 64, 1, 0))
    assert plan.shape is not None
    assert (plan.shape.outer, plan.shape.inner, plan.shape.row_bytes) == (4, 1, 2 * 64 * 4)
    (plan,) = plan_ranks(rank_layout(THIN, 4, 64, 1, 0), rank_layout(THIN, 4, 16, 1, 0))
    assert plan.shape is not None
    assert (plan.shape.outer, plan.shape.inner, plan.shape.row_bytes) == (4, 4, 16 * 4)


def test_a_plan_says_how_much_it_moves() -> None:
    reader = rank_layout(THIN, 4, 16, 1, 0)
    (plan,) = plan_ranks(rank_layout(THIN, 4, 64, 1, 0), reader)
    pairs = plan.pair(0, 2, 100)
    assert pairs.remote.tolist() == [0, 0, 0, 0, 1, 1, 1] and pairs.local.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert plan.pair_bytes == reader.block_bytes
    (plan,) = plan_ranks(reader, reader)
    assert plan.pair_bytes == reader.block_bytes


@pytest.mark.parametrize(
    ("change", "field"),
    [({"dtype": "float32"}, "dtype"), ({"num_layers": 3}, "num_layers"), ({"num_kv_heads": 8}, "num_kv_heads")],
)
def test_other_content_is_a_mismatch(change: dict[str, object], field: str) -> None:
    reader = rank_layout(THIN, 4, 16, 1, 0)
    with pytest.raises(MismatchError, match=field):
        plan_ranks(replace(reader, block_tokens=64, **change), reader)
