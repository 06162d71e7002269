"""What every store has to do: `kvrelay_transfer.tiers.part_store`. Each test runs on each store.

What goes wrong with one kind of store only is tested beside it: disks in `tests/unit/transfer/test_disk_store.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sealed_parts import PART_BYTES, is_whole, key_of, part_of
from store_benches import BENCHES, StoreBench

from kvrelay_transfer.tiers.part_format import HEADER_BYTES, BadPart, open_part
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.part_store import PartStore, StoreError

ALL = list(BENCHES)
BOUNDED = [name for name, bench in BENCHES.items() if bench.is_bounded]
DURABLE = [name for name, bench in BENCHES.items() if bench.is_durable]
LYING = [name for name, bench in BENCHES.items() if bench.can_lie]


@pytest.fixture(params=ALL)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreBench]:
    bench = BENCHES[request.param](tmp_path)
    yield bench
    bench.close()


def put(store: PartStore, *keys: PartKey) -> None:
    for key in keys:
        assert store.put(key, memoryview(part_of(key)))


def got(store: PartStore, key: PartKey, room_bytes: int = PART_BYTES) -> bytes | None:
    into = bytearray(room_bytes)
    length = store.get(key, memoryview(into))
    return None if length is None else bytes(into[:length])


def keys_of(*numbers: int) -> list[PartKey]:
    return [key_of(number) for number in numbers]


def test_a_part_comes_back_bit_equal(bench: StoreBench) -> None:
    put(bench.store, key_of(1), key_of(2))
    assert got(bench.store, key_of(1)) == part_of(key_of(1))
    assert got(bench.store, key_of(2)) == part_of(key_of(2))


@pytest.mark.parametrize("body_bytes", [0, 1, 4096, 1_000_003])
def test_parts_of_any_size(bench: StoreBench, body_bytes: int) -> None:
    part = part_of(key_of(1), body_bytes)
    assert bench.store.put(key_of(1), memoryview(part))
    assert got(bench.store, key_of(1), len(part)) == part
    assert got(bench.store, key_of(1), len(part) + 5000) == part


def test_what_is_not_here_is_none(bench: StoreBench) -> None:
    put(bench.store, key_of(1))
    others = key_of(2), key_of(1, model=b"other"), key_of(1, part=1)
    assert [got(bench.store, key) for key in others] == [None, None, None]


def test_a_part_that_would_not_fit_is_none_and_stays(bench: StoreBench) -> None:
    put(bench.store, key_of(1))
    assert got(bench.store, key_of(1), PART_BYTES - 1) is None
    assert got(bench.store, key_of(1), PART_BYTES) == part_of(key_of(1))


def test_nothing_is_written_behind_the_room_that_was_given(bench: StoreBench) -> None:
    put(bench.store, key_of(1))
    memory = bytearray(b"\xee" * (PART_BYTES + 64))
    assert bench.store.get(key_of(1), memoryview(memory)[:PART_BYTES]) == PART_BYTES
    assert memory[PART_BYTES:] == b"\xee" * 64


def test_only_the_contiguous_prefix_counts(bench: StoreBench) -> None:
    put(bench.store, *keys_of(1, 2, 4))
    assert bench.store.count_prefix(keys_of(1, 2, 3, 4)) == 2
    assert bench.store.count_prefix(keys_of(4, 1, 2)) == 3
    assert bench.store.count_prefix(keys_of(3, 1)) == 0
    assert bench.store.count_prefix([]) == 0


def test_a_part_that_is_put_again_is_here_once(bench: StoreBench) -> None:
    put(bench.store, key_of(1))
    once = bench.store.usage()
    put(bench.store, key_of(1), key_of(1))
    again = bench.store.usage()
    assert again == once if bench.is_bounded else again.num_parts == once.num_parts
    assert got(bench.store, key_of(1)) == part_of(key_of(1))


def test_remove(bench: StoreBench) -> None:
    put(bench.store, *keys_of(1, 2))
    bench.store.remove(key_of(1))
    bench.store.remove(key_of(1))
    bench.store.remove(key_of(7))
    assert got(bench.store, key_of(1)) is None
    assert list(bench.store.keys()) == keys_of(2)
    put(bench.store, key_of(1))
    assert got(bench.store, key_of(1)) == part_of(key_of(1))


def test_keys_and_usage_are_of_what_is_here(bench: StoreBench) -> None:
    assert list(bench.store.keys()) == [] and bench.store.usage().num_parts == 0
    keys = [key_of(1), key_of(1, model=b"other"), key_of(1, part=1), key_of(2)]
    put(bench.store, *keys)
    assert sorted(bench.store.keys()) == sorted(keys)
    usage = bench.store.usage()
    assert usage.num_parts == 4 and usage.used_bytes >= 4 * PART_BYTES and usage.num_evicted == 0


def test_clear_takes_the_parts_of_every_model(bench: StoreBench) -> None:
    put(bench.store, key_of(1), key_of(1, model=b"other"), key_of(2))
    assert bench.store.clear() == 3
    assert list(bench.store.keys()) == [] and bench.store.usage().num_parts == 0
    assert bench.store.clear() == 0
    put(bench.store, key_of(1))
    assert got(bench.store, key_of(1)) == part_of(key_of(1))


@pytest.mark.parametrize("bench", BOUNDED, indirect=True)
def test_a_full_store_keeps_its_bound_and_the_newest(bench: StoreBench) -> None:
    store = bench.open(4 * bench.room_of(PART_BYTES))
    try:
        for number in range(12):
            put(store, key_of(number))
            usage = store.usage()
            assert usage.used_bytes <= usage.capacity_bytes
            assert got(store, key_of(number)) == part_of(key_of(number))
        assert sorted(store.keys()) == sorted(keys_of(8, 9, 10, 11))
        assert store.usage().num_evicted == 8
    finally:
        store.close()


@pytest.mark.parametrize("bench", BOUNDED, indirect=True)
def test_who_was_used_last_stays(bench: StoreBench) -> None:
    store = bench.open(3 * bench.room_of(PART_BYTES))
    try:
        put(store, *keys_of(1, 2, 3))
        assert got(store, key_of(1)) is not None
        put(store, *keys_of(4, 5))
        assert sorted(store.keys()) == sorted(keys_of(1, 4, 5))
    finally:
        store.close()


@pytest.mark.parametrize("bench", BOUNDED, indirect=True)
def test_what_could_never_fit_is_refused_and_drives_nobody_out(bench: StoreBench) -> None:
    store = bench.open(2 * bench.room_of(PART_BYTES))
    try:
        put(store, key_of(1))
        large = part_of(key_of(2), 3 * bench.room_of(PART_BYTES))
        assert not store.put(key_of(2), memoryview(large))
        assert list(store.keys()) == keys_of(1)
    finally:
        store.close()


@pytest.mark.parametrize("bench", DURABLE, indirect=True)
def test_another_store_over_the_same_place_finds_it(bench: StoreBench) -> None:
    put(bench.store, *keys_of(1, 2))
    again = bench.open()
    try:
        assert again.count_prefix(keys_of(1, 2, 3)) == 2
        assert got(again, key_of(2)) == part_of(key_of(2))
        assert again.usage().num_parts == 2
        again.remove(key_of(1))
        assert got(bench.store, key_of(1)) is None
    finally:
        again.close()


def flipped(part: bytes, bit: int) -> bytes:
    return part[: bit // 8] + bytes([part[bit // 8] ^ 1 << bit % 8]) + part[bit // 8 + 1 :]


LIES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda part: b"",
    "no header": lambda part: part[: HEADER_BYTES - 1],
    "truncated": lambda part: part[:-1],
    "longer": lambda part: part + b"\0",
    "flipped in the header": lambda part: flipped(part, 8 * 20),
    "flipped in the checksum": lambda part: flipped(part, 8 * (HEADER_BYTES - 20)),
    "flipped in the body": lambda part: flipped(part, 8 * len(part) - 3),
    "half of zeros": lambda part: part[: len(part) // 2].ljust(len(part), b"\0"),
    "of another model": lambda part: part_of(key_of(1, model=b"other")),
    "another part": lambda part: part_of(key_of(1, part=1)),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("bench", LYING, indirect=True)
def test_a_part_that_changed_is_a_miss_and_can_be_put_anew(bench: StoreBench, lie: str) -> None:
    key = key_of(1)
    put(bench.store, key)
    bench.replace(key, LIES[lie](part_of(key)))
    into = bytearray(PART_BYTES + 64)
    length = bench.store.get(key, memoryview(into))
    if length is not None:
        assert isinstance(open_part(key, memoryview(into)[:length]), BadPart)
    bench.store.remove(key)
    put(bench.store, key)
    assert got(bench.store, key) == part_of(key)


def test_threads_never_see_a_part_that_is_not_whole(bench: StoreBench) -> None:
    """Each puts, gets and removes the same few keys; whatever a get returns is whole."""
    keys = keys_of(*range(6))
    start = threading.Barrier(4)

    def work(worker: int) -> int:
        into = memoryview(bytearray(PART_BYTES))
        hits = 0
        start.wait(timeout=10)
        for step in range(60):
            key = keys[(worker + step) % len(keys)]
            assert bench.store.put(key, memoryview(part_of(key)))
            length = bench.store.get(key, into)
            if length is not None:
                assert is_whole(key, into[:length])
                hits += 1
            if step % 7 == worker:
                bench.store.remove(key)
        return hits

    with ThreadPoolExecutor(4) as pool:
        hits = list(pool.map(work, range(4)))
    assert min(hits) > 0
    usage = bench.store.usage()
    assert usage.num_parts == len(list(bench.store.keys())) <= len(keys)


@pytest.mark.parametrize("bench", BOUNDED, indirect=True)
def test_threads_keep_the_bound_together(bench: StoreBench) -> None:
    """What is being written needs room, too: there is some for all of them and more."""
    store = bench.open(6 * bench.room_of(PART_BYTES))
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda key: store.put(key, memoryview(part_of(key))), keys_of(*range(40))))
        usage = store.usage()
        assert usage.num_parts == len(list(store.keys())) == 6 and usage.num_evicted == 34
    finally:
        store.close()


def test_a_closed_store_refuses(bench: StoreBench) -> None:
    put(bench.store, key_of(1))
    bench.store.close()
    into, part = memoryview(bytearray(PART_BYTES)), memoryview(part_of(key_of(1)))
    calls: list[Callable[[], object]] = [
        lambda: bench.store.count_prefix([key_of(1)]),
        lambda: bench.store.get(key_of(1), into),
        lambda: bench.store.put(key_of(1), part),
        lambda: bench.store.remove(key_of(1)),
        lambda: list(bench.store.keys()),
        bench.store.clear,
        bench.store.usage,
    ]
    for call in calls:
        with pytest.raises(StoreError):
            call()
    bench.store.close()
