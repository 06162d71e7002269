"""What stands between the chain and a store: breaker, workers, measured speed, known keys, and the tier of them all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
from handoff_sides import wait_until
from tier_rig import Gate, put, record_of

from kvrelay_core.clock import ManualClock, MonotonicClock
from kvrelay_transfer.tiers.breaker import Breaker
from kvrelay_transfer.tiers.fake_store import FakeStore
from kvrelay_transfer.tiers.known_keys import KnownKeys
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.speed import Speed
from kvrelay_transfer.tiers.tier import Tier, TierLimits
from kvrelay_transfer.tiers.tier_stats import Count
from kvrelay_transfer.tiers.workers import Job, Workers

KEY = record_of(1).keys[0]


# ------------------------------------------------------------------------------------------------- breaker


def failed(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        assert breaker.admit()
        breaker.fail()


def test_a_breaker_opens_after_errors_in_a_row() -> None:
    breaker = Breaker(ManualClock(), max_errors=3)
    failed(breaker, 2)
    assert breaker.admit()
    breaker.succeed()
    failed(breaker, 2)
    assert not breaker.is_open
    failed(breaker, 1)
    assert breaker.is_open and not breaker.admit() and breaker.num_openings == 1


def test_after_the_pause_one_may_try() -> None:
    clock = ManualClock()
    breaker = Breaker(clock, max_errors=1, pause_s=1.0)
    failed(breaker, 1)
    clock.advance(0.9)
    assert not breaker.admit()
    clock.advance(0.1)
    assert not breaker.is_open and breaker.admit()
    assert breaker.is_open and not breaker.admit(), "the others wait"
    breaker.succeed()
    assert breaker.admit() and breaker.admit()


def test_the_pause_doubles_up_to_a_bound_and_starts_anew() -> None:
    clock = ManualClock()
    breaker = Breaker(clock, max_errors=1, pause_s=1.0, max_pause_s=4.0)
    failed(breaker, 1)
    for pause_s in (1.0, 2.0, 4.0, 4.0):
        clock.advance(pause_s - 0.1)
        assert breaker.is_open
        clock.advance(0.1)
        failed(breaker, 1)
    clock.advance(4.0)
    assert breaker.admit()
    breaker.succeed()
    failed(breaker, 1)
    clock.advance(1.0)
    assert not breaker.is_open


def test_calls_that_began_before_it_opened_do_not_prolong_the_pause() -> None:
    clock = ManualClock()
    breaker = Breaker(clock, max_errors=1, pause_s=1.0)
    assert breaker.admit() and breaker.admit()
    breaker.fail()
    clock.advance(0.9)
    breaker.fail()
    clock.advance(0.1)
    assert not breaker.is_open and breaker.num_openings == 1


# ------------------------------------------------------------------------------------------------- workers


class Bugs:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers("kvrelay-tier-test-r", 1, 2, Bugs().add)
    yield workers
    workers.stop()
    assert workers.join(10)


def test_jobs_run_in_order_and_the_first_before_them(workers: Workers) -> None:
    gate, ran = Gate(), list[int]()
    gate.shut()
    assert workers.post(Job(gate.pass_through, lambda: None))
    wait_until(lambda: gate.num_waiting == 1)
    assert workers.post(Job(lambda: ran.append(1), lambda: None))
    assert workers.post_first(Job(lambda: ran.append(0), lambda: None))
    assert not workers.post(Job(lambda: ran.append(2), lambda: None)), "there is room for two"
    assert not workers.wait_room(0) and not workers.wait_idle(0)
    gate.open()
    assert workers.wait_idle(10) and workers.wait_room(0)
    assert ran == [0, 1]


def test_an_exception_is_counted_and_the_thread_lives() -> None:
    bugs, given_up = Bugs(), list[int]()
    workers = Workers("kvrelay-tier-test-r", 1, 8, bugs.add)

    def fail() -> None:
        raise RuntimeError("a bug")

    for number in range(3):
        assert workers.post(Job(fail, partial(given_up.append, number)))
    assert workers.post(Job(fail, fail)), "and even if giving up fails"
    assert workers.wait_idle(10)
    assert given_up == [0, 1, 2] and bugs.count == 5
    workers.stop()
    assert workers.join(10)


def test_what_waits_when_they_stop_is_given_up_and_what_runs_goes_on() -> None:
    workers = Workers("kvrelay-tier-test-r", 1, 8, Bugs().add)
    gate, ended = Gate(), list[str]()
    gate.shut()

    def run() -> None:
        gate.pass_through()
        ended.append("ran")

    assert workers.post(Job(run, lambda: None))
    wait_until(lambda: gate.num_waiting == 1)
    assert workers.post(Job(run, lambda: ended.append("given up")))
    workers.stop()
    assert ended == ["given up"] and not workers.post(Job(run, lambda: None)) and not workers.wait_room(1)
    assert not workers.join(0.01), "it hangs, and nobody waits for it"
    gate.open()
    assert workers.join(10) and ended == ["given up", "ran"]


def test_they_are_stuck_when_all_are_at_one_job_for_too_long() -> None:
    workers = Workers("kvrelay-tier-test-r", 2, 8, Bugs().add)
    gate = Gate()
    gate.shut()
    assert workers.post(Job(gate.pass_through, lambda: None))
    wait_until(lambda: gate.num_waiting == 1)
    assert not workers.are_stuck(0.0), "one is free"
    assert workers.post(Job(gate.pass_through, lambda: None))
    wait_until(lambda: gate.num_waiting == 2)
    assert workers.are_stuck(0.0) and not workers.are_stuck(60.0)
    gate.open()
    workers.stop()
    assert workers.join(10) and not workers.are_stuck(0.0)


# --------------------------------------------------------------------------------------------------- speed


def test_the_speed_is_that_of_all_threads_together() -> None:
    clock = ManualClock(100.0)
    speed = Speed(clock)
    assert speed.seconds_for(1 << 30) == speed.gb_per_s == 0.0
    with speed.measure(1000) as first, speed.measure(1000) as second:
        clock.advance(2.0)
        first()
        clock.advance(2.0)
        second()
    assert speed.seconds_for(1000) == pytest.approx(2.0)
    assert speed.gb_per_s == pytest.approx(500e-9)


def test_time_in_which_nothing_was_under_way_does_not_count() -> None:
    clock = ManualClock()
    speed = Speed(clock)
    for _ in range(2):
        with speed.measure(1000) as arrived:
            clock.advance(1.0)
            arrived()
        clock.advance(1.0)
    assert speed.gb_per_s == pytest.approx(1000e-9)


def test_old_measurements_lose_their_weight() -> None:
    clock = ManualClock()
    speed = Speed(clock)
    with speed.measure(1000) as arrived:
        clock.advance(4.0)
        arrived()
    speed.record_latency(2.0)
    assert speed.seconds_for(1000) == pytest.approx(6.0)
    clock.advance(30.0)
    assert speed.seconds_for(1000) == pytest.approx(3.0)
    speed.record_latency(2.0)
    assert speed.seconds_for(1000) == pytest.approx(4.0), "each has an age of its own"


def test_what_did_not_come_is_not_measured() -> None:
    clock = ManualClock()
    speed = Speed(clock)
    with speed.measure(1000):
        clock.advance(4.0)
    assert speed.gb_per_s == 0.0


# ---------------------------------------------------------------------------------------------- known keys


def numbered(number: int) -> PartKey:
    return PartKey(b"n" * 16, number.to_bytes(32, "little"), 0)


def test_a_key_is_claimed_once() -> None:
    known = KnownKeys()
    assert known.claim(KEY) and KEY in known and not known.claim(KEY)
    known.settle(KEY, is_stored=False)
    assert KEY not in known and known.claim(KEY)
    known.settle(KEY, is_stored=True)
    assert KEY in known and not known.claim(KEY)
    known.discard([KEY])
    assert KEY not in known


def test_what_is_being_stored_is_not_discarded() -> None:
    known = KnownKeys()
    assert known.claim(KEY)
    known.discard([KEY])
    assert KEY in known


def test_the_oldest_are_forgotten() -> None:
    known = KnownKeys(max_keys=3)
    for number in (1, 2, 3, 1, 4):
        known.add(numbered(number))
    assert [number for number in range(6) if numbered(number) in known] == [1, 3, 4]


# ---------------------------------------------------------------------------------------------------- tier


def make_tier(store: FakeStore, **limits: float) -> Tier:
    return Tier(store, MonotonicClock(), limits=TierLimits(**limits))  # type: ignore[arg-type]


def test_a_tier_whose_readers_hang_is_not_asked() -> None:
    store = FakeStore()
    tier = make_tier(store, stuck_s=0.0)
    gate = Gate()
    gate.shut()
    assert tier.can_read
    for _ in range(store.num_readers):
        assert tier.readers.post(Job(gate.pass_through, lambda: None))
    wait_until(lambda: gate.num_waiting == store.num_readers)
    assert not tier.can_read and tier.can_write
    gate.open()
    assert tier.readers.wait_idle(10) and tier.can_read
    tier.stop()
    assert tier.join(10)


def assert_miss(tier: Tier) -> None:
    assert tier.get(KEY, memoryview(bytearray(8)), 8) is None


def test_a_bug_of_a_store_costs_no_thread_and_opens_the_breaker() -> None:
    class BrokenStore(FakeStore):
        def get(self, key: PartKey, into: memoryview) -> int | None:
            raise ZeroDivisionError

    store = BrokenStore()
    put(store, record_of(1))
    tier = make_tier(store, max_errors=2)
    for _ in range(2):
        assert tier.readers.post(Job(lambda: assert_miss(tier), lambda: None))
    assert tier.readers.wait_idle(10)
    assert tier.counts[Count.ERRORS] == 2 and not tier.can_read
    tier.stop()
    assert tier.join(10)


def test_the_usage_is_asked_for_behind_the_back_of_who_wants_to_see_it() -> None:
    store = FakeStore()
    put(store, record_of(1))
    tier = make_tier(store)
    assert tier.stats().usage.num_parts == 0
    assert tier.writers.wait_idle(10)
    assert tier.stats().usage.num_parts == 2 and store.calls["usage"] == 1
    tier.stop()
    assert tier.join(10)


def test_threads_are_named_after_their_tier() -> None:
    before = set(threading.enumerate())
    tier = make_tier(FakeStore(name="disk"))
    names = {thread.name for thread in set(threading.enumerate()) - before}
    assert names == {"kvrelay-tier-disk-r0", "kvrelay-tier-disk-r1", "kvrelay-tier-disk-w0"}
    tier.stop()
    assert tier.join(10)
