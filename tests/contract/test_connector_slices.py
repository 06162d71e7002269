"""Reads between pools of other block sizes and other ranks, on every connector that can slice.

The plan is data and has tests of its own (`tests/unit/transfer/test_slice_plan.py`); here it is carried out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from connector_benches import ConnectorBench, Shapes, ShmBench, make_bench
from handoff_sides import LAYOUT, make_memory
from msgspec.structs import replace
from split_kv import Bytes, cut, glue, heads_of, make_kv, rank_layout

from kvrelay_core.errors import TransferError
from kvrelay_transfer.connectors.base import BlockRead, BlockSlices, TransferState
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.slice_plan import BlockPairs, plan_ranks

SLICING = ["memory", "shm", "grpc"]
BLOCK_TOKENS = (16, 32, 64, 128)
RANKS = (1, 2, 4)
NUM_HEADS, NUM_TOKENS = 4, 300
WIDE, NARROW = rank_layout(LAYOUT, NUM_HEADS, 64, 1, 0), rank_layout(LAYOUT, NUM_HEADS, 16, 1, 0)
KV = make_kv(LAYOUT, NUM_HEADS, NUM_TOKENS)


def fill(bench: ConnectorBench, kv: Bytes) -> None:
    """The ticket's blocks hold the rank's part of `kv`."""
    blocks = cut(kv, bench.side.layout)
    for block, data in zip(bench.blocks, blocks, strict=True):
        bench.side.memory.host_blocks.data.reshape(-1, len(data))[block] = data


def scatter(layout: KvLayout, seed: int) -> list[int]:
    """Blocks of the reader's pool for all tokens."""
    return random.Random(seed).sample(range(1, 40), layout.blocks_for(NUM_TOKENS))


def pairs_of(bench: ConnectorBench) -> BlockPairs:
    """Of the whole ticket."""
    plans = plan_ranks(bench.side.layout, bench.shapes.reader)
    (plan,) = [plan for plan in plans if plan.source_rank == bench.side.layout.tp_rank]
    return plan.pair(0, len(bench.blocks), NUM_TOKENS)


def whole_read(bench: ConnectorBench, local: list[int]) -> BlockRead:
    pairs = pairs_of(bench)
    remote = tuple(bench.blocks[position] for position in pairs.remote)
    return BlockRead(bench.ticket, 0, remote, tuple(local[position] for position in pairs.local), pairs.slices)


def arrived(bench: ConnectorBench, local: list[int]) -> Bytes:
    return glue(bench.memory.block_rows[local].numpy(), bench.shapes.reader, NUM_TOKENS)


def seeded_sample(cells: list[tuple[int, ...]], share: int) -> list[object]:
    """One in `share` runs always, the others in full runs."""
    chosen = set(random.Random(2).sample(range(len(cells)), len(cells) // share))
    return [
        pytest.param(*cell, marks=[] if index in chosen else [pytest.mark.full]) for index, cell in enumerate(cells)
    ]


@pytest.fixture(params=SLICING)
def connector(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[(WIDE, NARROW), (NARROW, WIDE)], ids=["large source", "small source"])
def bench(request: pytest.FixtureRequest, connector: str, tmp_path: Path) -> Iterator[ConnectorBench]:
    source, reader = request.param
    bench = make_bench(connector, tmp_path, Shapes(source, reader, NUM_TOKENS))
    fill(bench, KV)
    yield bench
    bench.close()


@pytest.mark.parametrize(("theirs", "ours"), list(product(BLOCK_TOKENS, BLOCK_TOKENS)))
def test_every_block_size_is_read_into_every_other(connector: str, tmp_path: Path, theirs: int, ours: int) -> None:
    source, reader = replace(WIDE, block_tokens=theirs), replace(WIDE, block_tokens=ours)
    bench = make_bench(connector, tmp_path, Shapes(source, reader, NUM_TOKENS))
    assert bench.connector.can_slice
    fill(bench, KV)
    local = scatter(reader, theirs + ours)
    read = whole_read(bench, local)
    transfer = bench.link.read(read)
    bench.finish(transfer)
    assert transfer.poll() is TransferState.DONE and transfer.error is None
    assert np.array_equal(arrived(bench, local), KV)
    assert tuple(transfer.words) == bench.words_of(read.remote_blocks)
    untouched = [block for block in range(bench.memory.num_blocks) if block not in local]
    assert not bench.memory.block_rows[untouched].any()
    bench.close()


@pytest.mark.parametrize(
    ("p", "d", "theirs", "ours"), seeded_sample(list(product(RANKS, RANKS, BLOCK_TOKENS, BLOCK_TOKENS)), 9)
)
def test_ranks_are_read_into_ranks(connector: str, tmp_path: Path, p: int, d: int, theirs: int, ours: int) -> None:
    """Every rank of a reader pulls its heads from the pools of as many ranks of the source as have them."""
    for rank in range(d):
        reader = rank_layout(LAYOUT, NUM_HEADS, ours, d, rank)
        memory, local = make_memory(40, reader), scatter(reader, rank)
        for plan in plan_ranks(rank_layout(LAYOUT, NUM_HEADS, theirs, p, 0), reader):
            source = rank_layout(LAYOUT, NUM_HEADS, theirs, p, plan.source_rank)
            directory = tmp_path / f"{rank}-{plan.source_rank}"
            directory.mkdir()
            bench = make_bench(connector, directory, Shapes(source, reader, NUM_TOKENS, memory))
            fill(bench, KV)
            transfer = bench.link.read(whole_read(bench, local))
            bench.finish(transfer)
            assert transfer.poll() is TransferState.DONE
            bench.close()
        kv = glue(memory.block_rows[local].numpy(), reader, NUM_TOKENS)
        assert np.array_equal(kv, heads_of(KV, reader))
        memory.close()


def test_a_block_reused_before_the_read_shows_in_the_word_of_each_of_its_pairs(bench: ConnectorBench) -> None:
    reused = bench.blocks[1]
    bench.side.overwrite(reused)
    read = whole_read(bench, scatter(bench.shapes.reader, 1))
    transfer = bench.link.read(read)
    bench.finish(transfer)
    assert transfer.poll() is TransferState.DONE
    expected = bench.words_of(read.remote_blocks)
    changed = [index for index, word in enumerate(transfer.words) if word != expected[index]]
    assert changed == [index for index, block in enumerate(read.remote_blocks) if block == reused]
    assert {transfer.words[index] for index in changed} == {bench.side.memory.words.read(reused)}


def test_a_block_reused_during_the_read_shows_in_its_word(bench: ConnectorBench) -> None:
    """The first 64 tokens, last piece first: no two pairs are one copy, and the reuse comes behind the first."""
    local = scatter(bench.shapes.reader, 1)
    read = first_pairs(whole_read(bench, local), 4, step=-1)
    reused = read.remote_blocks[0]
    transfer = bench.read_interrupted(read, lambda: bench.side.overwrite(reused))
    assert transfer.poll() is TransferState.DONE
    expected = bench.words_of(read.remote_blocks)
    assert transfer.words[0] == expected[0] + 1, "the words were read after the reuse"
    assert np.array_equal(arrived(bench, local)[:, :, :, 48:64], KV[:, :, :, 48:64]), "and the data before it"


def first_pairs(read: BlockRead, count: int, step: int = 1) -> BlockRead:
    assert read.slices is not None
    chosen = np.arange(count)[::step]
    slices = BlockSlices(read.slices.shape, read.slices.remote_offsets[chosen], read.slices.local_offsets[chosen])
    return BlockRead(read.ticket, 0, read.remote[chosen], read.local[chosen], slices)


def test_an_abort_in_the_middle_of_a_shm_copy_stops_between_pairs(tmp_path: Path) -> None:
    bench = make_bench("shm", tmp_path, Shapes(WIDE, NARROW, NUM_TOKENS))
    assert isinstance(bench, ShmBench)
    fill(bench, KV)
    local = sorted(scatter(NARROW, 1), reverse=True)
    states: list[TransferState] = []

    def abort_while_copying() -> None:
        transfer.abort()
        states.append(transfer.poll())

    bench.stall()
    bench.gated.watch(lambda look: abort_while_copying() if look == 3 else None)
    transfer = bench.link.read(whole_read(bench, local))
    bench.resume()
    bench.finish(transfer)
    assert states == [TransferState.PENDING], "the copier still holds the destination"
    assert transfer.poll() is TransferState.FAILED
    assert bench.memory.block_rows[local[:2]].any(1).all()
    assert not bench.memory.block_rows[local[3:]].any()
    bench.close()


@pytest.mark.parametrize("side", ["remote", "local"])
@pytest.mark.parametrize("offset", [-4, 10**6])
def test_rows_outside_their_block_fail(bench: ConnectorBench, side: str, offset: int) -> None:
    read = first_pairs(whole_read(bench, [1, 2, 3, 4, 5] * 4), 2)
    assert read.slices is not None
    offsets = {"remote": read.slices.remote_offsets.tolist(), "local": read.slices.local_offsets.tolist()}
    offsets[side][1] = offset
    slices = BlockSlices(read.slices.shape, offsets["remote"], offsets["local"])
    transfer = bench.link.read(BlockRead(read.ticket, 0, read.remote, read.local, slices))
    bench.finish(transfer)
    assert transfer.poll() is TransferState.FAILED
    assert isinstance(transfer.error, TransferError) and "leaves its block" in transfer.error.message
    assert not bench.memory.block_rows.any()


def test_whole_blocks_of_another_size_fail(bench: ConnectorBench) -> None:
    transfer = bench.link.read(bench.request(bench.blocks[:1], (1,)))
    bench.finish(transfer)
    assert transfer.poll() is TransferState.FAILED
    assert isinstance(transfer.error, TransferError) and "by slices only" in transfer.error.message
    assert not bench.memory.block_rows.any()


def test_grpc_refuses_a_peer_whose_block_is_larger_than_a_slot(tmp_path: Path) -> None:
    vast = replace(WIDE, block_tokens=1 << 20)
    bench = make_bench("grpc", tmp_path)
    peer = replace(bench.side.peer(bench.offer), layout=vast)
    with pytest.raises(TransferError, match="lower its --block-tokens"):
        bench.connector.connect(peer, bench.offer)
    bench.close()
