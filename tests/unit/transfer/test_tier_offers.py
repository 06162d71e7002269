"""Stores behind the back of the step loop (PROTOCOL A7): nothing wrong reaches any tier, and nobody waits."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np
import pytest
from handoff_sides import wait_until
from tier_rig import ChainRig, FakeSource, put, raw_of, record_of, records_of

from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.tiers.fake_store import FakeStore
from kvrelay_transfer.tiers.kv_chunks import KvChunks
from kvrelay_transfer.tiers.kv_records import KvRecords, KvRecordSource
from kvrelay_transfer.tiers.part_format import HEADER_BYTES, PartHeader, open_part
from kvrelay_transfer.tiers.part_key import KeyMaker
from kvrelay_transfer.tiers.part_store import PartStore


def whole_parts(store: PartStore) -> dict[str, bytes]:
    """The bodies of all parts, every one of which is what its key names."""
    found = {}
    for key in list(store.keys()):
        into = memoryview(bytearray(1 << 16))
        length = store.get(key, into)
        assert length is not None and isinstance(open_part(key, into[:length]), PartHeader)
        found[key.text] = bytes(into[HEADER_BYTES:length])
    return found


def test_a_block_that_was_given_away_before_the_copy_is_not_stored() -> None:
    store = FakeStore()
    with ChainRig(store) as rig:
        blocker, victim = FakeSource(record_of(1)), FakeSource(record_of(2))
        blocker.gate.shut()
        assert rig.chain.offer(record_of(1), blocker)
        assert rig.chain.offer(record_of(2), victim)
        victim.overwrite()
        blocker.gate.open()
        assert rig.chain.drain(10)
        assert victim.num_copies == 1, "after that it was seen"
        expected = {key.text: raw_of(record_of(1), part) for part, key in enumerate(record_of(1).keys)}
        assert whole_parts(store) == whole_parts(rig.host) == expected
        assert rig.counts("host")["stale"] == 1 and not rig.chain.knows(record_of(2))


@pytest.mark.parametrize("num_whole", [0, 1])
def test_a_block_that_is_given_away_during_the_copy_is_not_stored(num_whole: int) -> None:
    store = FakeStore()
    with ChainRig(store) as rig:
        record = record_of(1, num_parts=3)
        source = FakeSource(record)
        source.gate.shut(after=num_whole)
        assert rig.chain.offer(record, source)
        wait_until(lambda: source.gate.num_waiting == 1 and source.num_copies == num_whole)
        source.overwrite()
        source.gate.open()
        assert rig.chain.drain(10)
        expected = {record.keys[part].text: raw_of(record, part) for part in range(num_whole)}
        assert whole_parts(store) == whole_parts(rig.host) == expected, "what was copied before is right"
        assert rig.counts("host")["stale"] == 1
        assert not rig.chain.knows(record) and rig.chain.offer(record, FakeSource(record)), "it may be offered anew"
        assert rig.chain.drain(10)
        assert len(whole_parts(store)) == 3


LAYOUT = KvLayout("float32", 3, 2, 4, 8, hash_unit_tokens=8)
CHUNKS = KvChunks(LAYOUT, 8, 2)
NUM_BLOCKS = 9  # four chunks and the null block


class Turmoil:
    """An engine that writes chunk after chunk into few blocks, and offers each before it gives its blocks away."""

    def __init__(self, rig: ChainRig) -> None:
        self._rig = rig
        self._memory = PoolMemory.allocate(LAYOUT, NUM_BLOCKS, "cpu", os.urandom(16))
        self._records = KvRecords(self._memory, CHUNKS, KeyMaker((b"kv",)))
        self._rows = self._memory.block_rows.numpy()
        self.expected: dict[str, bytes] = {}

    def run(self, num_chunks: int, wait: Callable[[int], None]) -> None:
        """Block by block: the word, then the bytes. `wait` is called before each chunk is written."""
        for number in range(num_chunks):
            wait(number)
            blocks = [1 + number % 4 * 2, 2 + number % 4 * 2]
            for block in blocks:
                self._memory.words.bump(block)
                self._rows[block] = np.random.default_rng(number * 2 + block % 2).integers(0, 256, self._rows.shape[1])
            record = self._records.record(number.to_bytes(4, "little"))
            source = self._records.source(blocks)
            for part, key in enumerate(record.keys):
                body = bytearray(record.part_bytes[part])
                source.copy_out(part, memoryview(body))
                self.expected[key.text] = bytes(body)
            self._rig.chain.offer(record, source)


def test_an_engine_that_reuses_its_blocks_all_the_time_poisons_nothing() -> None:
    disk, redis = FakeStore(name="disk"), FakeStore(name="redis")
    with ChainRig(disk, redis, num_slots=16) as rig:
        turmoil = Turmoil(rig)
        host_counts = rig.chain.stats
        # Every now and then the writers catch up, else almost all would be stale.
        turmoil.run(
            400, lambda number: None if number % 10 else wait_until(lambda: host_counts().tiers[0].num_queued == 0)
        )
        assert rig.chain.drain(20)
        counts = rig.counts("host")
        assert counts["stale"] > 10 and counts["written"] > 50
        for store in (rig.host, disk, redis):
            parts = whole_parts(store)
            assert parts and {key: turmoil.expected[key] for key in parts} == parts
        assert len(whole_parts(disk)) >= 50


def test_without_the_fence_the_same_engine_would_poison_the_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvRecordSource, "is_intact", lambda source: True)
    store = FakeStore()
    with ChainRig(store) as rig:
        turmoil = Turmoil(rig)
        blocker = FakeSource(record_of(1))
        blocker.gate.shut()
        assert rig.chain.offer(record_of(1), blocker)
        turmoil.run(5, lambda number: None)
        blocker.gate.open()
        assert rig.chain.drain(10)
        parts = {key: part for key, part in whole_parts(store).items() if key in turmoil.expected}
        assert {key: turmoil.expected[key] for key in parts} != parts, "or the test above proves nothing"


def test_what_is_known_is_not_stored_again() -> None:
    store = FakeStore()
    with ChainRig(store, num_slots=2) as rig:
        first, second = records_of(1, 2)
        rig.offer(first)
        assert rig.chain.knows(first) and not rig.chain.offer(first, FakeSource(first))
        assert rig.chain.drain(10)
        assert rig.chain.knows(first) and not rig.chain.offer(first, FakeSource(first))
        rig.offer(second)
        assert rig.chain.drain(10)
        assert first.keys[0] not in rig.host and rig.chain.knows(first), "the tier has it"
        assert store.calls["put"] == 4


def test_only_what_is_missing_of_a_record_is_copied() -> None:
    with ChainRig() as rig:
        record = record_of(1, num_parts=3)
        rig.offer(record)
        assert rig.chain.drain(10)
        rig.host.remove(record.keys[1])
        (source,) = rig.offer(record)
        assert rig.chain.drain(10)
        assert source.num_copies == 1 and rig.fetch([record]).finish() == 1


def test_what_the_tier_has_already_is_not_put_again() -> None:
    store = FakeStore()
    record = record_of(1)
    put(store, record)
    with ChainRig(store) as rig:
        assert not rig.chain.knows(record)
        rig.offer(record)
        assert rig.chain.drain(10)
        assert store.calls["put"] == 2, "those of the test"
        assert rig.chain.knows(record)


def test_what_a_tier_lost_is_stored_again() -> None:
    store = FakeStore()
    records = records_of(*range(12))
    with ChainRig(store, num_slots=4) as rig:
        for record in records:
            rig.offer(record)
            assert rig.chain.drain(10)
        assert store.clear() == 24
        rig.host.clear()
        assert all(map(rig.chain.knows, records)), "as far as it knows"
        assert rig.fetch(records).finish() == 0
        assert not any(map(rig.chain.knows, records))
        for record in records:
            rig.offer(record)
            assert rig.chain.drain(10)
        assert store.usage().num_parts == 24


def test_the_newest_offer_is_dropped_when_too_many_wait() -> None:
    with ChainRig(max_offers=2) as rig:
        first = FakeSource(record_of(0))
        first.gate.shut()
        assert rig.chain.offer(record_of(0), first)
        wait_until(lambda: first.gate.num_waiting == 1)
        offered = [rig.chain.offer(record, FakeSource(record)) for record in records_of(1, 2, 3)]
        assert offered == [True, True, False]
        assert rig.counts("host")["dropped"] == 1 and not rig.chain.knows(record_of(3))
        first.gate.open()
        assert rig.chain.drain(10)
        assert rig.fetch(records_of(0, 1, 2, 3)).finish() == 3


def test_no_room_in_host_memory_drops_the_offer() -> None:
    with ChainRig(num_slots=2) as rig:
        rig.offer(record_of(1))
        assert rig.chain.drain(10)
        borrows = [rig.host.borrow(key) for key in record_of(1).keys]
        (source,) = rig.offer(record_of(2))
        assert rig.chain.drain(10)
        assert source.num_copies == 0 and rig.counts("host")["dropped"] == 1
        for borrow in borrows:
            assert borrow is not None
            borrow.give_back()
        rig.offer(record_of(2))
        assert rig.chain.drain(10)
        assert rig.fetch([record_of(2)]).finish() == 1


def test_an_exception_of_a_source_is_counted_and_costs_no_slot_and_no_thread() -> None:
    class BrokenSource(FakeSource):
        def copy_out(self, part: int, into: memoryview) -> None:
            raise RuntimeError("the GPU is gone")

    with ChainRig(num_slots=2) as rig:
        for number in range(3):
            assert rig.chain.offer(record_of(number), BrokenSource(record_of(number)))
        assert rig.chain.drain(10)
        assert rig.counts("host")["errors"] == 3
        rig.offer(record_of(1))
        assert rig.chain.drain(10)
        assert rig.fetch([record_of(1)]).finish() == 1


def test_an_offer_never_waits_for_a_copy() -> None:
    with ChainRig() as rig:
        source = FakeSource(record_of(1))
        source.gate.shut()
        assert rig.chain.offer(record_of(1), source)
        wait_until(lambda: source.gate.num_waiting == 1)
        assert rig.chain.knows(record_of(1)) and not rig.chain.knows(record_of(2))
        assert rig.chain.offer(record_of(2), FakeSource(record_of(2)))
        assert threading.current_thread() is threading.main_thread()
        source.gate.open()
