"""The chain as a whole: what was offered comes back from whichever tier has it, bit-equal and in order."""

from __future__ import annotations

from handoff_sides import wait_until
from tier_rig import ChainRig, put, record_of, records_of

from kvrelay_transfer.tiers.fake_store import FakeStore


def test_what_was_offered_comes_back_from_host_memory() -> None:
    with ChainRig() as rig:
        records = records_of(1, 2, 3)
        rig.offer(*records)
        assert rig.chain.drain(10)
        fetch = rig.fetch([*records, record_of(4)])
        assert fetch.finish() == fetch.fetch.num_found == 3
        assert rig.counts("host")["hits"] == 6


def test_what_was_offered_is_written_to_every_tier_and_found_there_by_others() -> None:
    disk, redis = FakeStore(name="disk"), FakeStore(name="redis")
    with ChainRig(disk, redis) as rig:
        records = records_of(1, 2, 3)
        rig.offer(*records)
        assert rig.chain.drain(10)
        assert disk.usage().num_parts == redis.usage().num_parts == 6
    with ChainRig(second := FakeStore(name="redis")) as rig:
        put(second, *records)
        assert rig.fetch(records).finish() == 3
        assert rig.counts("redis")["hits"] == 6 and rig.counts("host")["hits"] == 0
        assert rig.fetch(records).finish() == 3
        assert rig.counts("redis")["hits"] == 6 and rig.counts("host")["hits"] == 6, "promoted"


def test_records_are_found_over_several_tiers() -> None:
    disk, redis = FakeStore(name="disk"), FakeStore(name="redis")
    with ChainRig(disk, redis) as rig:
        records = records_of(*range(40))
        put(disk, *records[0:10], *records[20:22], *records[30:36])
        put(redis, *records[5:20], *records[22:30], *records[38:])
        rig.offer(record_of(21))
        wait_until(lambda: rig.chain.drain(10))
        fetch = rig.fetch(records)
        assert fetch.finish() == fetch.fetch.num_found == 36


def test_nothing_to_fetch_is_over_at_once() -> None:
    with ChainRig() as rig:
        for fetch in (rig.fetch([]), rig.fetch(records_of(1))):
            assert fetch.fetch.is_terminal and fetch.fetch.num_loaded == 0
