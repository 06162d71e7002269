"""Host memory: slots, borrowed parts, and that none of either is lost. What every store does: contract suite."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tier_rig import PART_BYTES, SLOT_BYTES, put, raw_of, record_of, sealed_of

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.tiers.host_slab import HostSlab
from kvrelay_transfer.tiers.host_store import Borrow, HostStore, Slot
from kvrelay_transfer.tiers.part_format import HEADER_BYTES, PartHeader, open_part
from kvrelay_transfer.tiers.part_key import PartKey

RECORDS = [record_of(number, num_parts=1) for number in range(8)]
KEYS = [record.keys[0] for record in RECORDS]
RAW_BYTES = PART_BYTES - 100


@pytest.fixture
def store() -> Iterator[HostStore]:
    """With three slots. All of them are free in the end."""
    store = HostStore(HostSlab(3 * SLOT_BYTES, PART_BYTES))
    yield store
    store.clear()
    assert store.num_free == 3
    store.close()


def filled(store: HostStore, number: int) -> Slot:
    slot = store.reserve(RAW_BYTES)
    assert slot is not None
    slot.body(RAW_BYTES)[:] = raw_of(RECORDS[number], 0)
    return slot


def publish(store: HostStore, *numbers: int) -> None:
    for number in numbers:
        store.publish(filled(store, number), KEYS[number], 1, RAW_BYTES).give_back()


def borrowed(store: HostStore, number: int) -> Borrow:
    borrow = store.borrow(KEYS[number])
    assert borrow is not None
    assert borrow.part.raw == raw_of(RECORDS[number], 0)
    return borrow


def here(store: HostStore) -> list[int]:
    return sorted(KEYS.index(key) for key in list(store.keys()))


def test_slots_are_aligned_and_do_not_overlap() -> None:
    slab = HostSlab(4 * SLOT_BYTES, PART_BYTES)
    assert (slab.slot_bytes, slab.num_slots) == (SLOT_BYTES, 4)
    for index in range(4):
        slab.slot(index)[:] = bytes([index]) * SLOT_BYTES
    assert [slab.slot(index)[0] for index in range(4)] == [slab.slot(index)[-1] for index in range(4)] == [0, 1, 2, 3]
    assert HostSlab(1, PART_BYTES).num_slots == 1, "one at least"


def test_more_than_there_is_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="lower --host-cache"):
        HostSlab(1 << 60, PART_BYTES)


def test_a_reserved_slot_is_nobodys_part(store: HostStore) -> None:
    slot = filled(store, 0)
    assert store.num_free == 2 and KEYS[0] not in store and store.borrow(KEYS[0]) is None
    store.withdraw(slot)
    assert store.num_free == 3


def test_no_slot_for_what_is_too_large_or_when_all_are_reserved(store: HostStore) -> None:
    assert store.reserve(store.max_part_bytes + 1) is None
    slots = [filled(store, 0) for _ in range(3)]
    assert store.reserve(RAW_BYTES) is None
    for slot in slots:
        store.withdraw(slot)


def test_a_borrowed_part_is_not_evicted(store: HostStore) -> None:
    publish(store, 0, 1, 2)
    borrow = borrowed(store, 0)
    others = [borrowed(store, 1), borrowed(store, 2)]
    assert store.reserve(RAW_BYTES) is None, "all are lent"
    borrow.give_back()
    publish(store, 3)
    assert here(store) == [1, 2, 3]
    for other in others:
        other.give_back()


def test_giving_back_twice_is_giving_back_once(store: HostStore) -> None:
    publish(store, 0, 1, 2)
    first, second = borrowed(store, 0), borrowed(store, 0)
    second.give_back()
    second.give_back()
    publish(store, 3, 4)
    assert here(store) == [0, 3, 4]
    first.give_back()
    publish(store, 5)
    assert here(store) == [3, 4, 5]


def test_a_part_that_is_removed_while_it_is_borrowed_stays_until_it_is_given_back(store: HostStore) -> None:
    publish(store, 0)
    borrow = borrowed(store, 0)
    store.remove(KEYS[0])
    assert KEYS[0] not in store and store.num_free == 2
    publish(store, 0)
    assert borrow.part.raw == raw_of(RECORDS[0], 0)
    borrow.give_back()
    assert store.num_free == 2 and here(store) == [0], "the new one"


def test_what_is_published_twice_is_here_once_and_the_first_stays(store: HostStore) -> None:
    publish(store, 0)
    first = borrowed(store, 0)
    second = store.publish(filled(store, 0), KEYS[0], 1, RAW_BYTES)
    assert second.part is first.part and store.num_free == 2
    first.give_back()
    second.give_back()


def test_the_coldest_that_is_wanted_is_lent_without_being_used(store: HostStore) -> None:
    publish(store, 0, 1, 2)
    first = borrowed(store, 0)

    def coldest(max_asked: int, *wanted: int) -> int | None:
        borrow = store.borrow_coldest(lambda key: KEYS.index(key) in wanted, max_asked)
        if borrow is None:
            return None
        with borrow as part:
            return KEYS.index(part.key)

    assert coldest(9, 1, 2) == 1
    first.give_back()  # it was used last
    assert coldest(9, 0, 1, 2) == 1 and coldest(9, 2) == 2
    assert coldest(1, 2) is None and coldest(9) is None
    publish(store, 3)
    assert here(store) == [0, 2, 3]


def test_only_what_may_be_evicted_is(store: HostStore) -> None:
    publish(store, 0, 1, 2)
    assert store.reserve(RAW_BYTES, lambda key: False) is None
    slot = store.reserve(RAW_BYTES, lambda key: key == KEYS[1])
    assert slot is not None and here(store) == [0, 2]
    store.withdraw(slot)


def test_a_part_is_sealed_when_it_is_asked_for_and_once() -> None:
    secret = bytes(range(32))
    store = HostStore(HostSlab(2 * SLOT_BYTES, PART_BYTES), secret=secret)
    publish(store, 0)
    into = memoryview(bytearray(SLOT_BYTES))
    length = store.get(KEYS[0], into)
    assert length is not None
    assert open_part(KEYS[0], into[:length], secret) == PartHeader(KEYS[0], 1, RAW_BYTES, RAW_BYTES)
    with ThreadPoolExecutor(4) as pool, borrowed(store, 0) as part:
        assert all(sealed == into[:length] for sealed in pool.map(part.sealed, [secret] * 16))
    store.close()


def test_encoded_parts_are_not_for_host_memory(store: HostStore) -> None:
    encoded = bytearray(sealed_of(RECORDS[0], 0))
    encoded[10] = 1  # the number of a codec
    assert not store.put(KEYS[0], memoryview(encoded))
    assert not store.put(KEYS[0], memoryview(b"no part"))


def test_what_is_lent_outlives_the_store() -> None:
    store = HostStore(HostSlab(3 * SLOT_BYTES, PART_BYTES))
    publish(store, 0)
    borrow, slot = borrowed(store, 0), filled(store, 1)
    store.close()
    assert store.reserve(RAW_BYTES) is None and store.num_leading(KEYS) == 0
    late = store.publish(slot, KEYS[1], 1, RAW_BYTES)
    assert late.part.raw == raw_of(RECORDS[1], 0) and KEYS[1] not in store
    late.give_back()
    borrow.give_back()
    assert store.num_free == 3


@pytest.mark.parametrize("seed", range(3))
def test_threads_lose_no_slot_and_read_no_part_that_is_being_written(seed: int) -> None:
    store = HostStore(HostSlab(4 * SLOT_BYTES, PART_BYTES))
    bodies = [raw_of(record, 0) for record in RECORDS]

    def work(worker: int) -> int:
        choose = random.Random(seed * 10 + worker)
        num_read = 0
        for _ in range(200):
            number = choose.randrange(len(KEYS))
            borrow = store.borrow(KEYS[number])
            if borrow is None:
                slot = store.reserve(RAW_BYTES)
                if slot is None:
                    continue
                slot.body(RAW_BYTES)[:] = bodies[number]
                if choose.random() < 0.2:
                    slot.body(RAW_BYTES)[:] = bytes(RAW_BYTES)
                    store.withdraw(slot)
                    continue
                borrow = store.publish(slot, KEYS[number], 1, RAW_BYTES)
            if choose.random() < 0.1:
                store.remove(KEYS[number])
            with borrow as part:
                assert part.raw == bodies[number]
                num_read += 1
        return num_read

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(work, range(4))) > 20
    assert store.num_borrowed == 0
    assert store.num_free + len(list(store.keys())) == 4
    store.close()
    assert store.num_free == 4


def test_what_was_put_sealed_is_given_as_it_came(store: HostStore) -> None:
    put(store, RECORDS[0])
    into = memoryview(bytearray(SLOT_BYTES))
    assert store.get(KEYS[0], into) == HEADER_BYTES + RAW_BYTES
    assert into[: HEADER_BYTES + RAW_BYTES] == sealed_of(RECORDS[0], 0)
    assert isinstance(KEYS[0], PartKey)
