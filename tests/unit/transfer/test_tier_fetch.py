"""A fetch: what it finds, where it ends, and that nobody writes to a destination once it is terminal."""

from __future__ import annotations

import pytest
from handoff_sides import wait_until
from tier_rig import PART_BYTES, ChainRig, FetchRig, GatedStore, put, record_of, records_of

from kvrelay_transfer.tiers.fake_store import FakeStore, Fault
from kvrelay_transfer.tiers.fetch import FetchLimits
from kvrelay_transfer.tiers.part_search import PartSearch
from kvrelay_transfer.tiers.tier import TierLimits


def test_the_first_records_load_while_the_rest_is_looked_up() -> None:
    store = GatedStore()
    records = records_of(*range(20))
    put(store, *records)
    store.lookups.shut(after=1)
    with ChainRig(store) as rig:
        fetch = rig.fetch(records)
        fetch.poll_until(lambda: fetch.fetch.num_loaded == 4)
        assert fetch.fetch.num_found == 4 and not fetch.fetch.is_over
        store.lookups.open()
        assert fetch.finish() == 20
        assert store.calls["count_prefix"] == 3, "of 8, 16 and 16 parts"


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(
    ("fault", "count"),
    [
        (Fault.MISSING, "misses"),
        (Fault.TRUNCATED, "bad"),
        (Fault.FLIPPED, "bad"),
        (Fault.SWAPPED, "bad"),
    ],
)
def test_a_part_that_is_not_what_was_asked_for_ends_the_fetch_there(fault: Fault, count: str, part: int) -> None:
    store = FakeStore()
    records = records_of(*range(6))
    put(store, *records)
    key = records[2].keys[part]
    store.tell(key, fault)
    with ChainRig(store) as rig:
        fetch = rig.fetch(records)
        assert fetch.finish() == 2
        assert fetch.fetch.num_found == 6
        assert rig.counts("fake")[count] == 1 and rig.counts("fake")["errors"] == 0
        assert (key in set(store.keys())) == (fault is Fault.MISSING), "what is bad is removed"
        store.tell(key, None)
        put(store, records[2])
        assert rig.fetch(records).finish() == 6


def test_an_error_of_the_lookup_or_of_the_load_is_a_miss() -> None:
    store = FakeStore()
    records = records_of(*range(6))
    put(store, *records)
    with ChainRig(store) as rig:
        store.tell(records[2].keys[1], Fault.ERROR)
        assert rig.fetch(records).finish() == 0, "the whole lookup failed"
        assert rig.fetch(records[:2]).finish() == 2
        assert rig.counts("fake")["errors"] == 1
        store.tell(records[2].keys[1], None)
        assert rig.fetch(records).finish() == 6


@pytest.mark.parametrize("num_rooms", [0, 3])
def test_no_room_ends_it(num_rooms: int) -> None:
    with ChainRig(limits=FetchLimits(max_ahead_bytes=2 * PART_BYTES)) as rig:
        records = records_of(*range(6))
        rig.offer(*records)
        assert rig.chain.drain(10)
        fetch = rig.fetch(records, num_rooms=num_rooms)
        assert fetch.finish() == num_rooms and fetch.fetch.num_found == 6


def test_room_is_taken_as_it_is_needed() -> None:
    with ChainRig(limits=FetchLimits(max_ahead_bytes=4 * PART_BYTES)) as rig:
        records = records_of(*range(6))
        rig.offer(*records)
        assert rig.chain.drain(10)
        fetch = rig.fetch(records)
        fetch.gate.shut()
        fetch.fetch.poll()
        fetch.fetch.poll()
        assert len(fetch.destinations) == 2
        fetch.gate.open()
        assert fetch.finish() == 6


def test_a_record_larger_than_the_window_is_loaded_all_the_same() -> None:
    with ChainRig(limits=FetchLimits(max_ahead_bytes=1)) as rig:
        records = records_of(*range(3))
        rig.offer(*records)
        assert rig.chain.drain(10)
        assert rig.fetch(records).finish() == 3


def test_what_is_not_worth_loading_is_not_loaded() -> None:
    with ChainRig() as rig:
        records = records_of(1, 2)
        rig.offer(*records)
        assert rig.chain.drain(10)
        asked: list[tuple[float, ...]] = []

        def is_worth(*offer: float) -> bool:
            asked.append(offer)
            return False

        fetch = rig.fetch(records, is_worth=is_worth)
        assert fetch.finish() == 0 and fetch.fetch.num_found == 2
        assert asked == [(2, 0.0)] and not fetch.destinations, "nothing has been measured: it takes no time"


def test_little_may_not_be_worth_it_when_more_is() -> None:
    store = GatedStore()
    records = records_of(*range(20))
    put(store, *records)
    store.lookups.shut(after=1)
    with ChainRig(store) as rig:
        fetch = rig.fetch(records, is_worth=lambda num_records, seconds: num_records >= 12)
        fetch.poll_until(lambda: fetch.fetch.num_found == 4)
        assert not fetch.fetch.is_over and not fetch.destinations
        store.lookups.open()
        assert fetch.finish() == 20


def test_what_is_found_while_the_engine_judges_is_judged_too() -> None:
    store = GatedStore()
    records = records_of(*range(20))
    put(store, *records)
    store.lookups.shut(after=1)
    with ChainRig(store) as rig:
        search: list[PartSearch] = []

        def is_worth(num_records: int, seconds: float) -> bool:
            store.lookups.open()
            wait_until(lambda: search[0].is_over)
            return num_records == 20

        fetch = rig.fetch(records, is_worth=is_worth)
        search.append(fetch.fetch._search)
        assert fetch.finish() == 20


def test_the_estimate_grows_with_the_bytes_and_the_time_they_took() -> None:
    store = FakeStore()
    records = records_of(*range(8))
    put(store, *records)
    store.tell(records[0].keys[0], Fault.SLOW)
    with ChainRig(store) as rig:
        fetch = rig.fetch(records[:1])
        fetch.poll_until(lambda: store.num_waiting == 1)
        rig.clock.advance(2.0)
        store.release()
        assert fetch.finish() == 1
        asked: list[float] = []

        def is_worth(num_records: int, seconds: float) -> bool:
            asked.append(seconds)
            return False

        for end in (3, 5):
            assert rig.fetch(records[1:end], is_worth=is_worth).finish() == 0
        assert asked[0] > 1.0 and asked[1] == pytest.approx(2 * asked[0])


def test_a_tier_that_was_too_slow_lately_is_not_asked_in_a_hurry() -> None:
    store = GatedStore()
    records = records_of(*range(3))
    put(store, *records)
    store.lookups.shut()
    with ChainRig(store) as rig:
        fetch = rig.fetch(records)
        wait_until(lambda: store.lookups.num_waiting == 1)
        rig.clock.advance(0.5)
        store.lookups.open()
        assert fetch.finish() == 3
        rig.host.clear()
        assert rig.fetch(records, until_s=0.9).fetch.is_terminal and store.calls["count_prefix"] == 1
        assert rig.fetch(records, until_s=1.1).finish() == 3, "who can wait may ask"
        rig.host.clear()
        rig.clock.advance(60.0)
        assert rig.fetch(records, until_s=60.9).finish() == 3, "it was long ago"


def test_a_slow_load_costs_the_fetch_its_time_and_no_more() -> None:
    store = FakeStore(delay_s=60.0)
    records = records_of(*range(3))
    put(store, *records)
    store.tell(records[1].keys[0], Fault.SLOW)
    with ChainRig(store) as rig:
        fetch = rig.fetch(records, until_s=5.0)
        fetch.poll_until(lambda: store.num_waiting == 1 and fetch.fetch.num_loaded == 1)
        rig.clock.advance(4.9)
        fetch.fetch.poll()
        assert not fetch.fetch.is_over
        rig.clock.advance(0.1)
        fetch.fetch.poll()
        assert fetch.fetch.is_terminal, "the thread that waits has no destination"
        assert fetch.finish() == 1
        store.release()
        wait_until(lambda: records[1].keys[0] in rig.host)
        assert 0 not in fetch.destinations[1].parts


def test_an_aborted_fetch_is_terminal_when_nobody_copies_any_more() -> None:
    with ChainRig() as rig:
        records = records_of(*range(5))
        rig.offer(*records)
        assert rig.chain.drain(10)
        fetch = rig.fetch(records)
        fetch.gate.shut()
        fetch.poll_until(lambda: fetch.gate.num_waiting == 1)
        fetch.fetch.abort()
        assert fetch.fetch.is_over and not fetch.fetch.is_terminal
        fetch.fetch.poll()
        assert not fetch.fetch.is_terminal
        fetch.gate.open()
        fetch.poll_until(lambda: fetch.fetch.is_terminal)
        fetch.fetch.abort()
        assert sum(len(destination.parts) for destination in fetch.destinations) == 1, "the one that was under way"
        assert fetch.fetch.num_loaded == 0


def test_what_lands_after_the_end_does_not_count() -> None:
    with ChainRig() as rig:
        records = records_of(1, 2, num_parts=1)
        rig.offer(*records)
        assert rig.chain.drain(10)
        fetch = rig.fetch(records)
        fetch.gate.shut()
        fetch.poll_until(lambda: fetch.gate.num_waiting == 1)
        fetch.fetch.abort()
        fetch.gate.open()
        fetch.poll_to_the_end()
        assert fetch.destinations[0].parts and fetch.fetch.num_loaded == 0, "its blocks have been given up"


def test_a_fetch_that_ended_early_is_terminal_when_later_records_are_not_written_any_more() -> None:
    store = FakeStore()
    store.num_readers = 2
    records = records_of(1, 2, num_parts=1)
    put(store, *records)
    store.tell(records[0].keys[0], Fault.SLOW)
    with ChainRig(store) as rig:
        fetch = rig.fetch(records)
        fetch.gate.shut()
        fetch.poll_until(lambda: store.num_waiting == 1 and fetch.gate.num_waiting == 1)
        store.remove(records[0].keys[0])
        store.release()
        fetch.poll_until(lambda: fetch.fetch.is_over)
        assert not fetch.fetch.is_terminal
        fetch.gate.open()
        assert fetch.finish() == 0


def test_what_host_memory_evicts_meanwhile_is_searched_again() -> None:
    store = FakeStore()
    with ChainRig(store, num_slots=4) as rig:
        records = records_of(1, 2)
        rig.offer(*records)
        assert rig.chain.drain(10)
        fetch = rig.fetch(records)
        rig.offer(record_of(3))
        assert rig.chain.drain(10)
        assert fetch.finish() == 2
        counts = rig.counts("fake")
        assert counts["hits"] + rig.counts("host")["hits"] == 4 and counts["hits"] >= 2


def test_an_answer_about_what_was_searched_before_is_ignored() -> None:
    store = GatedStore()
    store.set_faults({Fault.FULL: 1.0})
    records = records_of(1, 2, 3, 4)
    with ChainRig(store, num_slots=4) as rig:
        rig.offer(*records[:2])
        assert rig.chain.drain(10)
        store.set_faults({})
        put(store, *records[2:])
        store.lookups.shut()
        fetch = rig.fetch(records)
        wait_until(lambda: store.lookups.num_waiting == 1)
        assert fetch.fetch.num_found == 2
        assert rig.host.clear() == 4
        fetch.fetch.poll()
        store.lookups.open()
        assert fetch.finish() == fetch.fetch.num_found == 0 and store.calls["get"] == 0


def test_what_host_memory_evicts_and_nobody_else_has_ends_the_fetch() -> None:
    with ChainRig(num_slots=4) as rig:
        records = records_of(1, 2)
        rig.offer(*records)
        assert rig.chain.drain(10)
        fetch = rig.fetch(records)
        rig.offer(record_of(3))
        assert rig.chain.drain(10)
        assert fetch.finish() == 0


def test_loads_pass_by_a_host_store_that_has_no_room() -> None:
    store = FakeStore()
    with ChainRig(store, num_slots=2) as rig:
        full = record_of(9)
        rig.offer(full)
        assert rig.chain.drain(10)
        borrows = [rig.host.borrow(key) for key in full.keys]
        records = records_of(1, 2, 3)
        put(store, *records)
        assert rig.fetch(records).finish() == 3
        assert set(rig.host.keys()) == set(full.keys)
        assert not rig.offer(record_of(4))[0].num_copies
        wait_until(lambda: rig.counts("host")["dropped"] == 1)
        for borrow in borrows:
            assert borrow is not None
            borrow.give_back()


def test_two_fetches_of_the_same_load_it_once_when_the_second_comes_later() -> None:
    store = FakeStore()
    store.num_readers = 1
    records = records_of(*range(3))
    put(store, *records)
    store.tell(records[0].keys[0], Fault.SLOW)
    with ChainRig(store) as rig:
        first = rig.fetch(records)
        first.poll_until(lambda: store.num_waiting == 1)
        store.tell(records[0].keys[0], None)
        second = rig.fetch(records)
        store.release()
        second.poll_until(lambda: second.fetch.num_found == 3)
        assert first.finish() == second.finish() == 3
        assert store.calls["get"] == 6


def test_a_full_queue_ends_the_fetch_there() -> None:
    store = FakeStore(delay_s=60.0)
    store.num_readers = 1
    records = records_of(*range(4))
    put(store, *records)
    store.tell(records[0].keys[0], Fault.SLOW)
    with ChainRig(store, tier_limits=TierLimits(max_reads=3)) as rig:
        fetch = rig.fetch(records)
        fetch.poll_until(lambda: store.num_waiting == 1)
        store.release()
        assert fetch.finish() in (1, 2), "one that runs and three that wait are four parts, perhaps three"


def test_an_exception_of_a_destination_ends_the_fetch_and_costs_no_thread() -> None:
    class BrokenRig(FetchRig):
        def _take_room(self, first: int, end: int) -> list[object]:  # type: ignore[override]
            return [object()] * (end - first)

    with ChainRig() as rig:
        records = records_of(1)
        rig.offer(*records)
        assert rig.chain.drain(10)
        broken = BrokenRig(rig.chain, records)
        broken.poll_until(lambda: broken.fetch.is_terminal)
        assert broken.fetch.num_loaded == 0
        wait_until(lambda: rig.counts("host")["errors"] == 1)
        assert rig.fetch(records).finish() == 1


@pytest.mark.parametrize("seed", range(4))
def test_many_fetches_at_once_over_tiers_that_fail(seed: int) -> None:
    """Whatever fails, what is loaded is right, and every slot comes back."""
    faults = dict.fromkeys((Fault.MISSING, Fault.TRUNCATED, Fault.FLIPPED, Fault.SWAPPED), 0.02) | {Fault.ERROR: 0.01}
    disk, redis = FakeStore(name="disk", seed=seed), FakeStore(name="redis", seed=seed + 100)
    records = [records_of(*range(first, first + 30)) for first in range(0, 120, 15)]
    for run in records:
        put(disk, *run[3:20])
        put(redis, *run[:8], *run[18:])
    for store in (disk, redis):
        store.set_faults(faults)
    with ChainRig(disk, redis, num_slots=24, tier_limits=TierLimits(max_errors=1000)) as rig:
        fetches = [rig.fetch(run) for run in records for _ in range(2)]
        loaded = [fetch.finish() for fetch in fetches]
        assert sum(loaded) > 40
