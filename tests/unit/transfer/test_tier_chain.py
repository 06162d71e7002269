"""The chain as a whole: what was offered comes back from whichever tier has it, bit-equal and in order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tier_rig import ChainRig, FakeSource, FetchRig, put, record_of, records_of

from kvrelay_transfer.tiers.codec_zstd import ZstdCodec
from kvrelay_transfer.tiers.disk_store import DiskStore
from kvrelay_transfer.tiers.fake_store import FakeStore, Fault
from kvrelay_transfer.tiers.part_format import HEADER_BYTES, PartHeader, open_part, seal_part
from kvrelay_transfer.tiers.records import Record
from kvrelay_transfer.tiers.s3_fifo import S3Fifo
from kvrelay_transfer.tiers.tier import WritePolicy


def test_what_was_offered_comes_back_from_host_memory() -> None:
    with ChainRig() as rig:
        records = records_of(1, 2, 3)
        rig.offer(*records)
        assert rig.chain.drain(10)
        fetch = rig.fetch([*records, record_of(4)])
        assert fetch.finish() == fetch.fetch.num_found == 3
        assert rig.counts("host")["hits"] == 6 and rig.counts("host")["misses"] == 1


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
        assert rig.chain.drain(10)
        fetch = rig.fetch(records)
        assert fetch.finish() == fetch.fetch.num_found == 36


def test_nothing_to_fetch_is_over_at_once() -> None:
    with ChainRig() as rig:
        for fetch in (rig.fetch([]), rig.fetch(records_of(1))):
            assert fetch.fetch.is_terminal and fetch.fetch.num_loaded == 0


@pytest.mark.parametrize("seed", range(4))
def test_two_workers_that_share_a_tier_under_faults(seed: int) -> None:
    """Both offer and fetch what they like, host memory is small, the tier fails and evicts: all that is loaded is
    right, and in the end nothing is lent and no slot lost."""
    choose = random.Random(seed)
    faults = dict.fromkeys((Fault.MISSING, Fault.TRUNCATED, Fault.FLIPPED, Fault.SWAPPED, Fault.TORN), 0.02)
    disk, redis = (FakeStore(faults, name=name, seed=seed, capacity_bytes=200_000) for name in ("disk", "redis"))
    policies = (WritePolicy.EVICTION, WritePolicy.COMPLETION)
    with (
        ChainRig(disk, redis, num_slots=24, policies=policies) as first,
        ChainRig(redis, num_slots=12, eviction=S3Fifo()) as second,
    ):
        fetches: list[FetchRig] = []
        num_loaded = 0
        for _ in range(150):
            rig = choose.choice((first, second))
            run = records_of(*range(start := choose.randrange(30), start + choose.randrange(1, 12)))
            if choose.random() < 0.5:
                for record in run:
                    rig.chain.offer(record, FakeSource(record))
            else:
                fetches.append(rig.fetch(run))
            if len(fetches) > 6:
                fetch = fetches.pop(choose.randrange(len(fetches)))
                if choose.random() < 0.3:
                    fetch.fetch.abort()
                num_loaded += fetch.finish()
        num_loaded += sum(fetch.finish() for fetch in fetches)
        assert num_loaded > 20


class EveryOther:
    """A codec that halves parts of which every other byte is a zero, and keeps the rest raw."""

    number = 7

    def encode(self, raw: memoryview, into: memoryview) -> int | None:
        if any(raw[1::2]):
            return None
        into[: len(raw) // 2] = raw[::2].tobytes()
        return len(raw) // 2

    def decode(self, body: memoryview, into: memoryview) -> bool:
        if 2 * len(body) != len(into):
            return False
        into[:] = bytes(byte for kept in body for byte in (kept, 0))
        return True


class SparseSource(FakeSource):
    """The first part is half zeros, the second is not."""

    def __init__(self, record: Record) -> None:
        super().__init__(record)
        self._parts[0][1::2] = bytes(len(self._parts[0]) // 2)

    @property
    def raw(self) -> list[bytes]:
        return [bytes(part) for part in self._parts]


@pytest.mark.parametrize("secret", [b"", bytes(range(32))])
def test_parts_are_encoded_in_tiers_and_raw_in_host_memory(secret: bytes) -> None:
    store = FakeStore()
    record = record_of(1)
    with ChainRig(store, codec=EveryOther(), secret=secret) as rig:
        source = SparseSource(record)
        assert rig.chain.offer(record, source)
        assert rig.chain.drain(10)
        into = memoryview(bytearray(1 << 13))
        headers = [open_part(key, into[: store.get(key, into) or 0], secret) for key in record.keys]
        assert headers == [
            PartHeader(record.keys[0], 2, 4000, 2000, EveryOther.number),
            PartHeader(record.keys[1], 2, 3900, 3900, 0),
        ]
        for place in ("host", "fake"):
            fetch = FetchRig(rig.chain, [record])
            fetch.poll_to_the_end()
            assert fetch.fetch.num_loaded == 1
            assert [fetch.destinations[0].parts[part] for part in (0, 1)] == source.raw
            assert rig.counts(place)["hits"] == 2
            rig.host.clear()


def test_a_lossless_codec_gives_back_every_bit() -> None:
    store = FakeStore()
    record = record_of(1)
    with ChainRig(store, codec=ZstdCodec(element_bytes=2)) as rig:
        source = SparseSource(record)
        assert rig.chain.offer(record, source) and rig.chain.drain(10)
        assert 4000 < store.usage().used_bytes < 7000, "one of the two is smaller"
        rig.host.clear()
        fetch = rig.fetch([record])
        fetch.poll_to_the_end()
        assert [fetch.destinations[0].parts[part] for part in (0, 1)] == source.raw


def test_a_part_that_its_codec_cannot_read_is_bad() -> None:
    store = FakeStore()
    record = record_of(1)
    body = bytes(1999)
    part = bytearray(HEADER_BYTES) + body
    with ChainRig(store, codec=EveryOther()) as rig:
        for codec, raw_bytes in ((EveryOther.number, 4000), (EveryOther.number + 1, 3998), (0, 1999)):
            put(store, record)
            store.remove(record.keys[0])
            seal_part(PartHeader(record.keys[0], 2, raw_bytes, len(body), codec), memoryview(part))
            assert store.put(record.keys[0], memoryview(part))
            assert rig.fetch([record]).finish() == 0
            assert record.keys[0] not in set(store.keys())
        assert rig.counts("fake")["bad"] == 3


def test_without_the_secret_a_part_is_bad() -> None:
    store = FakeStore()
    records = records_of(1, 2)
    put(store, records[0], secret=bytes(range(32)))
    put(store, records[1])
    with ChainRig(store, secret=bytes(range(32))) as rig:
        assert rig.fetch(records).finish() == 1
        assert rig.counts("fake")["bad"] >= 1


def test_a_part_that_is_longer_than_it_should_be_is_bad_and_can_be_stored_again() -> None:
    store = FakeStore()
    record = record_of(1)
    put(store, record)
    store.remove(record.keys[1])
    part = bytearray(HEADER_BYTES + 4000)
    seal_part(PartHeader(record.keys[1], 2, 4000, 4000), memoryview(part))
    assert store.put(record.keys[1], memoryview(part))
    with ChainRig(store) as rig:
        assert rig.fetch([record]).finish() == 0
        assert rig.counts("fake")["bad"] == 1
        rig.host.clear()
        rig.offer(record)
        assert rig.chain.drain(10)
        rig.host.clear()
        assert rig.fetch([record]).finish() == 1


def test_what_was_stored_on_disk_is_loaded_by_the_next_process(tmp_path: Path) -> None:
    records = records_of(*range(12))
    for loaded_before in (0, 12):
        with ChainRig(DiskStore(tmp_path, 1 << 20)) as rig:
            assert rig.fetch(records).finish() == loaded_before
            for record in records:
                rig.chain.offer(record, FakeSource(record))
            assert rig.chain.drain(10)
            assert rig.counts("disk")["hits"] == 2 * loaded_before
