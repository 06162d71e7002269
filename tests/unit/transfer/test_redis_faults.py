"""What real Redis servers do to a store: a miss or a StoreError, soon; never another part, and well again by itself."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from certificates import CertificateAuthority
from cuttable_proxy import CuttableProxy
from proxy_thread import ProxyThread
from redis_servers import RedisServer
from sealed_parts import PART_BYTES, is_whole, key_of, part_of

from kvrelay_transfer.tiers.part_store import StoreError
from kvrelay_transfer.tiers.redis_store import RedisStore
from kvrelay_transfer.tiers.redis_targets import parse_redis_url

PATIENT_S = 30.0
HASTY_S = 0.3
MIB = 1 << 20


def store_at(url: str, timeout_s: float = PATIENT_S) -> RedisStore:
    return RedisStore(parse_redis_url(url), timeout_s=timeout_s)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisStore]:
    with closing(store_at(server.url)) as store:
        yield store


@pytest.fixture
def proxies() -> Iterator[ProxyThread]:
    proxies = ProxyThread()
    yield proxies
    proxies.close()


@pytest.fixture
def proxy(proxies: ProxyThread, server: RedisServer) -> CuttableProxy:
    return proxies.open(server.address)


@pytest.fixture
def hasty(proxy: CuttableProxy) -> Iterator[RedisStore]:
    """By the proxy, with a connection already."""
    with closing(store_at(f"redis://{proxy.address}", HASTY_S)) as store:
        put(store, 1)
        put(store, 2)
        yield store


def put(store: RedisStore, number: int, body_bytes: int = PART_BYTES) -> bool:
    return store.put(key_of(number), memoryview(part_of(key_of(number), body_bytes)))


def is_hit(store: RedisStore, number: int, room_bytes: int = 2 * PART_BYTES) -> bool:
    """What comes is whole in any case."""
    into = memoryview(bytearray(room_bytes))
    length = store.get(key_of(number), into)
    assert length is None or is_whole(key_of(number), into[:length])
    return length is not None


# ------------------------------------------------------------------------------------------------ down and up again


def test_a_server_that_was_killed_and_comes_back_empty(server: RedisServer, store: RedisStore) -> None:
    put(store, 1)
    server.kill()
    for call in every_call(store):
        with pytest.raises(StoreError, match=r"redis://127\.0\.0\.1"):
            call()
    server.start()
    assert not is_hit(store, 1) and put(store, 1) and is_hit(store, 1)


def test_the_first_call_after_a_restart_works(server: RedisServer, store: RedisStore) -> None:
    """The connection that was kept is of no use any more, and that is seen before a command is lost on it."""
    put(store, 1)
    server.restart()
    assert put(store, 1) and is_hit(store, 1)


def test_a_server_that_kept_its_parts(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis", is_durable=True) as server, closing(store_at(server.url)) as store:
        put(store, 1)
        server.restart()
        assert is_hit(store, 1)


def test_a_server_that_is_killed_and_started_while_parts_come_and_go(server: RedisServer, store: RedisStore) -> None:
    ended = threading.Event()
    counts = {"hits": 0, "misses": 0, "errors": 0}

    def load(first: int) -> None:
        number = first
        while not ended.is_set():
            number = first + (number + 1) % 8
            try:
                found = is_hit(store, number, 2 * MIB)
                counts["hits" if found else "misses"] += 1
                if not found:
                    put(store, number, MIB)
            except StoreError:
                counts["errors"] += 1

    threads = [threading.Thread(target=load, args=(100 * index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            seen = counts["hits"]
            await_more(lambda seen=seen: counts["hits"] > seen + 10)  # type: ignore[misc]
            server.restart()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert put(store, 1) and is_hit(store, 1)


# --------------------------------------------------------------------------------------------------------- no room


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru"])
def test_a_full_server_evicts_under_us(policy: str, tmp_path: Path) -> None:
    lines = "maxmemory 8mb", f"maxmemory-policy {policy}"
    with RedisServer(tmp_path / "redis", *lines) as server, closing(store_at(server.url)) as store:
        for number in range(20):
            assert put(store, number, MIB)
            assert is_hit(store, number, 2 * MIB)
        hits = [is_hit(store, number, 2 * MIB) for number in range(20)]
        assert 3 <= sum(hits) < 8 and not hits[0]
        usage = store.usage()
        assert usage.num_parts == sum(hits) and usage.capacity_bytes == 8 * MIB
        assert store.count_prefix([key_of(0), key_of(19)]) == 0


def test_a_full_server_that_evicts_nothing_refuses(tmp_path: Path) -> None:
    lines = "maxmemory 8mb", "maxmemory-policy noeviction"
    with RedisServer(tmp_path / "redis", *lines) as server, closing(store_at(server.url)) as store:
        stored = [put(store, number, MIB) for number in range(12)]
        assert stored[0] and not stored[-1]
        assert [is_hit(store, number, 2 * MIB) for number in range(12)] == stored
        store.clear()
        assert put(store, 1, MIB) and is_hit(store, 1, 2 * MIB)
        assert len(server.do("CLIENT", "LIST").splitlines()) == 2, "a refusal costs no connection"


# ------------------------------------------------------------------------------------------------------- not let in


@pytest.mark.parametrize("login", ["", ":wrong@", "kv:wrong@", "nobody:geheim@"])
def test_who_is_not_let_in(login: str, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis", password="geheim", user="kv") as server:
        with closing(store_at(f"redis://{login}{server.address}")) as store:
            for call in every_call(store):
                with pytest.raises(StoreError, match=r"NOAUTH|user and password") as caught:
                    call()
                assert "wrong" not in str(caught.value) and "geheim" not in str(caught.value)


def test_a_user_who_may_only_read(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path / "redis", password="geheim", user="kv") as server,
        closing(store_at(server.url)) as store,
    ):
        put(store, 1)
        server.do("ACL", "SETUSER", "kv", "-set", "-unlink")
        with pytest.raises(StoreError, match="NOPERM"):
            put(store, 2)
        assert is_hit(store, 1)


def test_tls_where_there_is_none_and_the_other_way_round(server: RedisServer, tmp_path: Path) -> None:
    ca, other_ca = CertificateAuthority(tmp_path / "ca"), CertificateAuthority(tmp_path / "other")
    with RedisServer(tmp_path / "tls", tls=ca) as tls_server:
        for url, problem in {
            f"rediss://{server.address}": "cannot connect",
            f"redis://{tls_server.address}": "cannot connect",
            f"rediss://{tls_server.address}": "CERTIFICATE_VERIFY_FAILED",
            f"rediss://{tls_server.address}?ssl_ca_certs={other_ca.certificate}": "CERTIFICATE_VERIFY_FAILED",
            f"rediss://{tls_server.address}?ssl_ca_certs={tmp_path}/missing.pem": "No such file",
        }.items():
            with closing(store_at(url, HASTY_S)) as store, pytest.raises(StoreError, match=problem):
                store.usage()


def test_another_kind_of_server() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as web:
        thread = threading.Thread(target=lambda: web.serve_forever(0.01))
        thread.start()
        with closing(store_at(f"redis://127.0.0.1:{web.server_port}", HASTY_S)) as store:
            with pytest.raises(StoreError, match=r"redis://127\.0\.0\.1"):
                store.usage()
        web.shutdown()
        thread.join()


# ------------------------------------------------------------------------------------------------- slow and silent


def test_half_a_second_more_is_a_hit_where_there_is_time(proxies: ProxyThread, proxy: CuttableProxy) -> None:
    with closing(store_at(f"redis://{proxy.address}")) as store:
        put(store, 1, MIB)
        proxies.do(lambda: proxy.delay(0.5))
        begun_s = time.monotonic()
        assert is_hit(store, 1, 2 * MIB)
        assert time.monotonic() - begun_s >= 0.5


def test_half_a_second_more_is_an_error_where_there_is_none(
    proxies: ProxyThread, proxy: CuttableProxy, hasty: RedisStore
) -> None:
    """The answers that come too late are nobody's."""
    proxies.do(lambda: proxy.delay(0.5))
    begun_s = time.monotonic()
    for number in (1, 2):
        with pytest.raises(StoreError, match=r"within|Timeout"):
            is_hit(hasty, number)
    assert time.monotonic() - begun_s < 20 * HASTY_S
    proxies.do(proxy.mend)
    assert is_hit(hasty, 2) and is_hit(hasty, 1)


def test_a_trickle_is_an_error(proxies: ProxyThread, proxy: CuttableProxy, hasty: RedisStore) -> None:
    put(hasty, 3, MIB)
    proxies.do(lambda: proxy.slow(50_000))
    with pytest.raises(StoreError, match="within"):
        is_hit(hasty, 3, 2 * MIB)
    with pytest.raises(StoreError, match="within"):
        put(hasty, 4, 16 * MIB)
    proxies.do(proxy.mend)
    assert is_hit(hasty, 3, 2 * MIB) and not is_hit(hasty, 4)


def test_a_server_that_stands_still(server: RedisServer, hasty: RedisStore) -> None:
    server.freeze()
    for call in every_call(hasty)[:3]:
        with pytest.raises(StoreError, match=r"within|Timeout"):
            call()
    server.thaw()
    assert put(hasty, 1) and is_hit(hasty, 1)


def test_a_connection_that_is_cut_within_a_value(proxies: ProxyThread, proxy: CuttableProxy, store: RedisStore) -> None:
    put(store, 3, MIB)
    with closing(store_at(f"redis://{proxy.address}")) as other:
        is_hit(other, 1)
        proxies.do(lambda: proxy.slow(200_000))
        cut = threading.Timer(0.2, lambda: proxies.do(proxy.cut))
        cut.start()
        with pytest.raises(StoreError, match="connection"):
            is_hit(other, 3, 2 * MIB)
        cut.join()
        proxies.do(proxy.mend)
        assert is_hit(other, 3, 2 * MIB)


# ------------------------------------------------------------------------------------------------ what lies there


def test_a_value_that_is_not_ours(server: RedisServer, store: RedisStore) -> None:
    """Truncated, flipped, of another model: the contract suite has those for all stores."""
    server.do("RPUSH", key_of(1).text, "a", "list")
    server.do("SET", key_of(2).text, b"x" * 3 * PART_BYTES)
    with pytest.raises(StoreError, match="WRONGTYPE"):
        is_hit(store, 1)
    assert not is_hit(store, 2), "too large for what was asked for"
    for number in (1, 2):
        store.remove(key_of(number))
        assert put(store, number) and is_hit(store, number)


def every_call(store: RedisStore) -> list[Callable[[], object]]:
    return [
        lambda: store.count_prefix([key_of(1)]),
        lambda: is_hit(store, 1),
        lambda: put(store, 1),
        lambda: store.remove(key_of(1)),
        lambda: list(store.keys()),
        store.clear,
        store.usage,
    ]


def await_more(is_so: Callable[[], bool], deadline_s: float = 30.0) -> None:
    until_s = time.monotonic() + deadline_s
    while not is_so():
        assert time.monotonic() < until_s, "nothing came any more"
        time.sleep(0.002)
