"""How parts get from host memory to the tiers below: on completion, before their eviction, or at the last goodbye."""

from __future__ import annotations

import pytest
from handoff_sides import wait_until
from tier_rig import ChainRig, put, record_of, records_of

from kvrelay_transfer.tiers.eviction import Eviction, Lru
from kvrelay_transfer.tiers.fake_store import FakeStore, Fault
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.s3_fifo import S3Fifo
from kvrelay_transfer.tiers.tier import TierLimits, WritePolicy

EVICTION = WritePolicy.EVICTION


def settled(rig: ChainRig) -> None:
    """All that was posted is done; nothing else is written for that."""
    stack = rig.chain._stack
    assert stack.host.writers.wait_idle(10)
    for tier in stack.tiers:
        assert tier.writers.wait_idle(10)


def test_on_eviction_a_tier_gets_nothing_while_there_is_room() -> None:
    store = FakeStore()
    with ChainRig(store, num_slots=64, policies=[EVICTION]) as rig:
        rig.offer(*records_of(*range(20)))
        settled(rig)
        assert store.usage().num_parts == 0 and rig.host.usage().num_parts == 40


@pytest.mark.parametrize("order", [Lru, S3Fifo])
def test_on_eviction_a_tier_gets_each_part_before_host_memory_evicts_it(order: type[Eviction[PartKey]]) -> None:
    store = FakeStore()
    with ChainRig(store, num_slots=64, policies=[EVICTION], eviction=order()) as rig:
        records = records_of(*range(100))
        for record in records:
            rig.offer(record)
            settled(rig)
        assert rig.host.usage().num_parts == 64
        assert 136 <= store.usage().num_parts < 160, "and few more than that"
        assert rig.fetch(records).finish() == 100


def test_a_tier_that_is_down_keeps_no_part_from_the_next_one() -> None:
    disk, redis = FakeStore(name="disk"), FakeStore(name="redis")
    disk.set_faults({Fault.ERROR: 1.0})
    with ChainRig(disk, redis, num_slots=32, policies=[EVICTION, EVICTION]) as rig:
        records = records_of(*range(60))
        for record in records:
            rig.offer(record)
            settled(rig)
        assert rig.host.usage().num_parts == 32 and redis.usage().num_parts >= 88
        assert rig.fetch(records).finish() == 60


def test_promoted_parts_make_way_too() -> None:
    disk, redis = FakeStore(name="disk"), FakeStore(name="redis")
    records = records_of(*range(60))
    put(redis, *records)
    with ChainRig(disk, redis, num_slots=32, policies=[EVICTION, WritePolicy.COMPLETION]) as rig:
        for record in records:
            assert rig.fetch([record]).finish() == 1
            settled(rig)
        assert disk.usage().num_parts > 60, "what host memory had no room for is a tier nearer now"
        assert redis.calls["put"] == 120, "those of the test"


def test_a_last_goodbye_writes_what_only_host_memory_has() -> None:
    disk, redis = FakeStore(name="disk"), FakeStore(name="redis")
    with ChainRig(
        disk, redis, policies=[EVICTION, WritePolicy.COMPLETION], tier_limits=TierLimits(max_writes=2)
    ) as rig:
        for record in records_of(*range(20)):
            rig.offer(record)
        assert rig.chain.drain(20)
        assert disk.usage().num_parts == redis.usage().num_parts == 40


def test_draining_ends_in_time_when_a_tier_does_not() -> None:
    store = FakeStore(delay_s=60.0)
    store.set_faults({Fault.SLOW: 1.0})
    with ChainRig(store) as rig:
        rig.offer(record_of(1))
        wait_until(lambda: store.num_waiting == 1)
        assert not rig.chain.drain(0.01)


def test_what_was_dropped_while_a_tier_was_down_is_written_later() -> None:
    store = FakeStore()
    store.set_faults({Fault.ERROR: 1.0})
    with ChainRig(store, num_slots=64, tier_limits=TierLimits(max_errors=2)) as rig:
        records = records_of(*range(20))
        rig.offer(*records)
        settled(rig)
        stats = rig.chain.stats().tiers[1]
        assert stats.is_open and stats.counts["dropped"] == 40 and stats.counts["errors"] == 2
        store.set_faults({})
        rig.clock.advance(10)
        assert rig.chain.drain(10)
        assert store.usage().num_parts == 40 and not rig.chain.stats().tiers[1].is_open


def test_a_tier_that_is_full_or_refuses_is_counted_and_nothing_else() -> None:
    store = FakeStore()
    store.set_faults({Fault.FULL: 1.0})
    with ChainRig(store) as rig:
        rig.offer(record_of(1))
        settled(rig)
        counts = rig.counts("fake")
        assert counts["dropped"] == 2 and counts["errors"] == 0 and not rig.chain.stats().tiers[1].is_open


def test_a_queue_of_writes_lends_at_most_half_of_host_memory() -> None:
    store = FakeStore(delay_s=60.0)
    store.set_faults({Fault.SLOW: 1.0})
    with ChainRig(store, num_slots=8) as rig:
        for record in records_of(*range(10)):
            rig.offer(record)
            assert rig.chain._stack.host.writers.wait_idle(10)
            assert rig.host.num_borrowed <= 4
        assert rig.counts("fake")["dropped"] >= 10
        store.set_faults({})
        store.release()
        assert rig.chain.drain(10)
