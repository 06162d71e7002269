"""The faults of the fake store: which keys meet them, and what they do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from handoff_sides import wait_until
from sealed_parts import PART_BYTES, key_of, part_of

from kvrelay_transfer.tiers.fake_store import FakeStore, Fault
from kvrelay_transfer.tiers.part_format import BadPart, open_part
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.part_store import StoreError

KEY = key_of(1)


def put(store: FakeStore, key: PartKey = KEY) -> bool:
    return store.put(key, memoryview(part_of(key)))


def opened(store: FakeStore, key: PartKey = KEY) -> object:
    """The header of what get returned or why it is bad; None for a miss."""
    into = memoryview(bytearray(PART_BYTES))
    length = store.get(key, into)
    return None if length is None else open_part(key, into[:length])


def test_faults_are_drawn_by_the_key_alone() -> None:
    keys = [key_of(number) for number in range(2000)]
    shares = {Fault.MISSING: 0.1, Fault.ERROR: 0.3}
    drawn = [FakeStore(shares).fault_of(key) for key in keys]
    again = FakeStore(shares)
    assert [again.fault_of(key) for key in reversed(keys)] == drawn[::-1]
    assert 150 < drawn.count(Fault.MISSING) < 250 and 500 < drawn.count(Fault.ERROR) < 700
    assert [FakeStore(shares, seed=1).fault_of(key) for key in keys] != drawn
    first = "".join(str(fault.value)[0] if fault else "-" for fault in drawn[:16])
    assert first == "e--m----ee-----m", "the same on every machine"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (Fault.TRUNCATED, BadPart.TRUNCATED),
        (Fault.TORN, BadPart.DAMAGED),
        (Fault.SWAPPED, BadPart.FOREIGN),
        (Fault.MISSING, None),
    ],
)
def test_what_is_read_after_a_fault(fault: Fault, why: BadPart | None) -> None:
    store = FakeStore({fault: 1.0})
    assert put(store) and put(store, key_of(2))
    assert opened(store) is why
    assert store.count_prefix([KEY]) == 1, "which promises nothing"


def test_a_flipped_bit_is_one_bit() -> None:
    store = FakeStore({Fault.FLIPPED: 1.0})
    into = bytearray(PART_BYTES)
    assert put(store) and store.get(KEY, memoryview(into)) == PART_BYTES
    difference = int.from_bytes(into, "big") ^ int.from_bytes(part_of(KEY), "big")
    assert difference.bit_count() == 1
    assert isinstance(opened(store), BadPart)


def test_a_full_store_takes_nothing() -> None:
    store = FakeStore({Fault.FULL: 1.0})
    assert not put(store)
    assert store.usage().num_parts == 0


def test_an_error_is_raised_by_every_call_that_names_the_key() -> None:
    store = FakeStore()
    assert put(store) and put(store, key_of(2))
    store.tell(KEY, Fault.ERROR)
    calls: list[Callable[[], object]] = [
        lambda: put(store),
        lambda: opened(store),
        lambda: store.count_prefix([key_of(2), KEY]),
    ]
    for call in calls:
        with pytest.raises(StoreError):
            call()
    assert opened(store, key_of(2))
    assert store.calls == {"put": 3, "get": 2, "count_prefix": 1}
    store.tell(KEY, None)
    assert opened(store)


def test_a_slow_call_waits_until_it_is_released() -> None:
    store = FakeStore(delay_s=60.0)
    assert put(store)
    store.tell(KEY, Fault.SLOW)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(opened, store)
        wait_until(lambda: store.num_waiting == 1)
        assert put(store, key_of(2)), "others are not held up"
        store.release()
        assert answer.result(timeout=10)
    assert store.num_waiting == 0


def test_a_slow_call_ends_with_its_time() -> None:
    store = FakeStore({Fault.SLOW: 1.0}, delay_s=0.01)
    assert put(store) and opened(store)


def test_closing_ends_slow_calls() -> None:
    store = FakeStore({Fault.SLOW: 1.0}, delay_s=60.0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(put, store)
        wait_until(lambda: store.num_waiting == 1)
        store.close()
        assert isinstance(answer.exception(timeout=10), StoreError)


def test_faults_come_and_go() -> None:
    store = FakeStore()
    assert put(store)
    store.set_faults({Fault.ERROR: 1.0})
    with pytest.raises(StoreError):
        opened(store)
    store.set_faults({})
    assert opened(store)
