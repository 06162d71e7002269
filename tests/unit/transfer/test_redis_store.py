"""Parts in real Redis servers: each way to reach one. What every store does is in `tests/contract/test_part_stores.py`;
what goes wrong, in `test_redis_faults.py`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from certificates import CertificateAuthority
from redis_servers import RedisSentinel, RedisServer
from sealed_parts import PART_BYTES, is_whole, key_of, part_of

from kvrelay_transfer.tiers.part_store import StoreError
from kvrelay_transfer.tiers.redis_store import RedisStore
from kvrelay_transfer.tiers.redis_targets import parse_redis_url

WAYS = ["plain", "password", "acl user", "tls", "tls and acl user", "sentinel"]


def store_at(url: str, **options: float) -> RedisStore:
    return RedisStore(
        parse_redis_url(url), timeout_s=options.get("timeout_s", 10.0), ttl_s=int(options.get("ttl_s", 60))
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisStore]:
    with closing(store_at(server.url)) as store:
        yield store


def put(store: RedisStore, number: int) -> None:
    assert store.put(key_of(number), memoryview(part_of(key_of(number))))


def assert_hit(store: RedisStore, number: int) -> None:
    into = memoryview(bytearray(PART_BYTES))
    assert store.get(key_of(number), into) == PART_BYTES
    assert is_whole(key_of(number), into)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_a_server(way: str, tmp_path: Path) -> None:
    ca = CertificateAuthority(tmp_path / "ca") if "tls" in way else None
    password, user = "" if way in ("plain", "tls") else "pa:ss@word", "kv" if "user" in way else ""
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer(tmp_path / "redis", password=password, user=user, tls=ca))
        url = server.url
        if way == "sentinel":
            url = stack.enter_context(RedisSentinel(tmp_path / "sentinel", server)).url
        store = stack.enter_context(closing(store_at(url)))
        put(store, 1)
        put(store, 2)
        assert_hit(store, 1)
        assert store.count_prefix([key_of(2), key_of(1), key_of(3)]) == 2
        assert sorted(store.keys()) == sorted([key_of(1), key_of(2)])
        assert store.usage().num_parts == 2
        store.remove(key_of(1))
        assert store.get(key_of(1), memoryview(bytearray(PART_BYTES))) is None
        assert store.clear() == 1


def test_a_large_part_over_tls(tmp_path: Path) -> None:
    part = part_of(key_of(1), 4 << 20)
    into = memoryview(bytearray(len(part)))
    with RedisServer(tmp_path / "redis", tls=CertificateAuthority(tmp_path / "ca")) as server:
        with closing(store_at(server.url)) as store:
            assert store.put(key_of(1), memoryview(part))
            assert store.get(key_of(1), into) == len(part) and into == part


def test_a_database_of_its_own(server: RedisServer) -> None:
    with closing(store_at(f"{server.url}/3")) as third, closing(store_at(server.url)) as first:
        put(third, 1)
        assert first.count_prefix([key_of(1)]) == 0 and third.count_prefix([key_of(1)]) == 1


def test_a_part_expires(server: RedisServer, store: RedisStore) -> None:
    put(store, 1)
    assert 0 < server.do("TTL", key_of(1).text) <= 60
    server.do("PEXPIRE", key_of(1).text, 0)
    assert store.get(key_of(1), memoryview(bytearray(PART_BYTES))) is None


def test_keys_of_others_stay(server: RedisServer, store: RedisStore) -> None:
    server.do("SET", "theirs", "value")
    server.do("SET", "kvr1:not:a:key", "value")
    for number in range(3):
        put(store, number)
    assert len(list(store.keys())) == 3
    assert store.clear() == 3
    assert server.do("DBSIZE") == 2


def test_more_keys_than_a_page(server: RedisServer, store: RedisStore) -> None:
    with server.client() as client:
        client.mset({key_of(number).text: b"x" for number in range(2500)})
    assert len(set(store.keys())) == 2500
    assert store.count_prefix([key_of(number) for number in range(2600)]) == 2500
    assert store.clear() == 2500


def test_connections_are_as_many_as_threads_need_and_are_kept(server: RedisServer, store: RedisStore) -> None:
    def num_connections() -> int:
        return len(server.do("CLIENT", "LIST").splitlines()) - 1  # but for the one that asks

    for number in range(20):
        put(store, number)
    assert num_connections() == 1
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: assert_hit(store, number), [*range(20)] * 4))
    assert num_connections() <= 4


def test_close_ends_what_is_under_way(server: RedisServer) -> None:
    """Long before the timeout."""
    store = store_at(server.url, timeout_s=100.0)
    put(store, 1)
    server.freeze()
    problems: list[StoreError] = []

    def ask() -> None:
        try:
            store.get(key_of(1), memoryview(bytearray(PART_BYTES)))
        except StoreError as error:
            problems.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    store.close()  # before, during or after that: it ends
    asker.join(timeout=10)
    assert not asker.is_alive() and len(problems) == 1
    server.thaw()
    with pytest.raises(StoreError, match="closed"):
        store.usage()


def test_a_closed_store_has_no_connection(server: RedisServer) -> None:
    store = store_at(server.url)
    put(store, 1)
    store.close()
    store.close()
    assert len(server.do("CLIENT", "LIST").splitlines()) == 1


def test_a_store_connects_when_it_is_needed() -> None:
    store_at("redis://127.0.0.1:1").close()
