"""Closing a chain in whatever state: threads end, fetches end, slots come back."""

from __future__ import annotations

import threading

from handoff_sides import wait_until
from tier_rig import NEVER_S, ChainRig, FakeSource, FetchRig, Gate, GatedStore, put, record_of, records_of

from kvrelay_transfer.tiers.fake_store import FakeStore, Fault
from kvrelay_transfer.tiers.part_key import PartKey


def test_an_idle_chain_and_twice() -> None:
    with ChainRig(FakeStore()) as rig:
        rig.chain.close()


def test_a_closed_chain_finds_nothing_and_takes_nothing() -> None:
    with ChainRig(FakeStore()) as rig:
        rig.offer(record_of(1))
        assert rig.chain.drain(10)
        rig.chain.close()
        fetch = rig.fetch(records_of(1, 2))
        assert fetch.fetch.is_terminal and fetch.fetch.num_found == 0
        assert not rig.chain.offer(record_of(2), FakeSource(record_of(2)))
        assert rig.chain.drain(0) and [tier.name for tier in rig.chain.stats().tiers] == ["host", "fake"]


def test_while_parts_are_read() -> None:
    store = FakeStore(delay_s=60.0)
    records = records_of(*range(8))
    put(store, *records)
    store.tell(records[3].keys[0], Fault.SLOW)
    with ChainRig(store) as rig:
        fetch = rig.fetch(records)
        fetch.poll_until(lambda: store.num_waiting == 1)
        rig.chain.close()
        assert fetch.finish() <= 3


def test_while_the_tier_is_asked_what_it_has() -> None:
    store = GatedStore()
    store.lookups.shut()
    with ChainRig(store) as rig:
        fetch = rig.fetch(records_of(1, 2))
        wait_until(lambda: store.lookups.num_waiting == 1)
        closing = threading.Thread(target=rig.chain.close)
        closing.start()
        store.lookups.open()
        closing.join()
        assert fetch.finish() == 0


def test_while_parts_are_written() -> None:
    store = FakeStore(delay_s=60.0)
    store.set_faults({Fault.SLOW: 1.0})
    with ChainRig(store) as rig:
        rig.offer(*records_of(*range(5)))
        wait_until(lambda: store.num_waiting == 1)
        rig.chain.close()


def test_while_a_record_is_gathered() -> None:
    with ChainRig(FakeStore()) as rig:
        source = FakeSource(record_of(1))
        source.gate.shut()
        assert rig.chain.offer(record_of(1), source)
        assert rig.chain.offer(record_of(2), FakeSource(record_of(2)))
        wait_until(lambda: source.gate.num_waiting == 1)
        closing = threading.Thread(target=rig.chain.close)
        closing.start()
        wait_until(lambda: not rig.chain.knows(record_of(2)))
        source.gate.open()
        closing.join()
        assert not rig.chain.knows(record_of(1))


def test_while_a_destination_is_written_it_is_not_terminal() -> None:
    with ChainRig() as rig:
        records = records_of(1, 2)
        rig.offer(*records)
        assert rig.chain.drain(10)
        fetch = rig.fetch(records)
        fetch.gate.shut()
        fetch.poll_until(lambda: fetch.gate.num_waiting == 1)
        rig.chain.close(timeout_s=0.0)
        fetch.poll_until(lambda: fetch.fetch.is_over)
        assert not fetch.fetch.is_terminal
        fetch.gate.open()
        assert fetch.finish() == 0


class HangingStore(FakeStore):
    """Its reads hang, and closing it does not end them: a disk of a network that is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = Gate()

    def get(self, key: PartKey, into: memoryview) -> int | None:
        self.reads.pass_through()
        into[:4] = b"late"
        return None


def test_a_thread_that_hangs_is_left_behind_with_its_slot_and_without_a_destination() -> None:
    store = HangingStore()
    records = records_of(1, 2)
    put(store, *records)
    store.reads.shut()
    with ChainRig(store) as rig:
        fetch = rig.fetch(records, until_s=1.0)
        fetch.poll_until(lambda: store.reads.num_waiting == 2)
        rig.clock.advance(1.0)
        assert fetch.finish() == 0
        rig.chain.close(timeout_s=0.01)
        assert rig.host.num_free == 62, "what it may still write to is nobody else's"
        store.reads.open()


def test_many_at_once() -> None:
    """Whatever is under way when it is closed."""
    disk, redis = FakeStore(name="disk"), FakeStore(name="redis")
    records = records_of(*range(40))
    put(disk, *records[:20])
    put(redis, *records[10:])
    for seed in range(10):
        with ChainRig(disk_of(disk), disk_of(redis), num_slots=16) as rig:
            fetches = [FetchRig(rig.chain, records, NEVER_S) for _ in range(4)]
            for record in records_of(*range(100, 100 + seed)):
                rig.chain.offer(record, FakeSource(record))
            for fetch in fetches:
                for _ in range(seed):
                    fetch.fetch.poll()
            rig.chain.close()
            assert all(fetch.finish() <= 40 for fetch in fetches)


def disk_of(store: FakeStore) -> FakeStore:
    """Another with the same parts."""
    other = FakeStore(name=store.name)
    into = memoryview(bytearray(1 << 13))
    for key in list(store.keys()):
        length = store.get(key, into)
        assert length is not None and other.put(key, into[:length])
    return other
