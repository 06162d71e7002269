"""Orders of eviction: who goes first, who may not, what a scan does, and that the two are what the papers say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_transfer.tiers.eviction import Eviction, Lru
from kvrelay_transfer.tiers.s3_fifo import S3Fifo

ORDERS: dict[str, Callable[[], Eviction[int]]] = {"lru": Lru, "s3_fifo": S3Fifo}


class Cache:
    """A set of so many keys, for trying an order."""

    def __init__(self, order: Eviction[int], capacity: int) -> None:
        self.order, self.capacity = order, capacity
        self.keys: set[int] = set()
        self.num_hits = 0

    def ask(self, key: int) -> None:
        if key in self.keys:
            self.num_hits += 1
            self.order.touch(key)
            return
        if len(self.keys) == self.capacity:
            self.evict()
        self.keys.add(key)
        self.order.insert(key)

    def evict(self, may_go: Callable[[int], bool] = lambda key: True) -> int | None:
        victim = self.order.victim(may_go)
        if victim is not None:
            self.order.remove(victim)
            self.keys.remove(victim)
        return victim


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> Eviction[int]:
    return ORDERS[request.param]()


def test_without_uses_the_oldest_goes_first(order: Eviction[int]) -> None:
    cache = Cache(order, 10)
    for key in range(10):
        cache.ask(key)
    assert [cache.evict() for _ in range(10)] == list(range(10))
    assert cache.evict() is None


def test_who_may_not_go_stays_where_it_was(order: Eviction[int]) -> None:
    cache = Cache(order, 10)
    for key in range(10):
        cache.ask(key)
    assert cache.evict(lambda key: key >= 4) == 4
    assert cache.evict(lambda key: False) is None
    assert [cache.evict() for _ in range(3)] == [0, 1, 2]


def test_asking_for_a_victim_evicts_nobody(order: Eviction[int]) -> None:
    cache = Cache(order, 10)
    for key in range(10):
        cache.ask(key)
    assert [order.victim(lambda key: True) for _ in range(3)] == [0, 0, 0]
    order.remove(5)  # of its own accord
    cache.keys.remove(5)
    assert [cache.evict() for _ in range(9)] == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_lru_keeps_what_was_used_last() -> None:
    cache = Cache(Lru(), 3)
    for key in (1, 2, 3, 1, 4):
        cache.ask(key)
    assert cache.keys == {1, 3, 4}


def test_a_scan_flushes_lru_and_not_s3_fifo() -> None:
    """Ten keys that everybody uses, and a thousand that are asked for once."""
    hits = {}
    for name, make in ORDERS.items():
        cache = Cache(make(), 50)
        for _ in range(5):
            for key in range(10):
                cache.ask(key)
        for key in range(1000, 2000):
            cache.ask(key)
        before = cache.num_hits
        for key in range(10):
            cache.ask(key)
        hits[name] = cache.num_hits - before
    assert hits == {"lru": 0, "s3_fifo": 10}


def test_a_ghost_that_comes_back_goes_to_the_main_queue() -> None:
    cache = Cache(S3Fifo(), 10)
    for key in range(10):
        for _ in range(3):
            cache.ask(key)
    for key in (100, 101, 102):
        cache.ask(key)  # the last one in small is evicted when the next one comes
    assert 100 not in cache.keys
    cache.ask(100)
    for key in range(200, 220):
        cache.ask(key)
    assert 100 in cache.keys, "twenty keys that nobody knows pass through the small queue"


@given(st.sampled_from(sorted(ORDERS)), st.integers(1, 8), st.lists(st.integers(0, 20), max_size=200))
def test_an_order_knows_just_the_keys_that_are_there(name: str, capacity: int, asked: list[int]) -> None:
    cache = Cache(ORDERS[name](), capacity)
    for key in asked:
        cache.ask(key)
        assert len(cache.keys) <= capacity
    left = set()
    while (victim := cache.evict()) is not None:
        left.add(victim)
    assert len(left) == min(capacity, len(set(asked))) and not cache.keys
