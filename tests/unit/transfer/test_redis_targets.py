"""URLs of Redis: what they mean, what is refused, and that no password shows."""

from __future__ import annotations

import pytest

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.tiers.redis_targets import Address, RedisKind, RedisTls, parse_redis_url


@pytest.mark.parametrize(
    ("url", "kind", "addresses", "text"),
    [
        ("redis://cache", RedisKind.STANDALONE, [("cache", 6379)], "redis://cache:6379"),
        ("redis://[::1]:7000/3", RedisKind.STANDALONE, [("::1", 7000)], "redis://[::1]:7000/3"),
        ("rediss://u:p%40ss@cache:1", RedisKind.STANDALONE, [("cache", 1)], "rediss://cache:1"),
        ("redis-sentinel://a,b:2/kv/5", RedisKind.SENTINEL, [("a", 26379), ("b", 2)], "redis-sentinel://a:26379,b:2/kv/5"),
        ("rediss-cluster://:p@a:1,b:2", RedisKind.CLUSTER, [("a", 1), ("b", 2)], "rediss-cluster://a:1,b:2"),
    ],
)  # fmt: skip
def test_forms(url: str, kind: RedisKind, addresses: list[tuple[str, int]], text: str) -> None:
    target = parse_redis_url(url)
    assert target.kind is kind
    assert target.addresses == tuple(Address(*address) for address in addresses)
    assert str(target) == text


def test_credentials_and_database() -> None:
    login = parse_redis_url("redis://kv:p%40ss%3A@cache/7").login
    assert (login.user, login.password, login.db, login.tls) == ("kv", "p@ss:", 7, None)
    assert parse_redis_url("redis://:own@cache", password="given").login.password == "given"
    assert parse_redis_url("redis://kv@cache", password="given").login.user == "kv"


def test_sentinels_have_a_password_of_their_own() -> None:
    target = parse_redis_url("redis-sentinel://kv:p@a/kv/2", sentinel_password="s")
    assert (target.service, target.login.db, target.login.password) == ("kv", 2, "p")
    assert (target.sentinel_login.user, target.sentinel_login.password, target.sentinel_login.db) == ("", "s", 0)


def test_files_for_tls() -> None:
    url = "rediss://cache?ssl_ca_certs=/etc/ca.pem&ssl_certfile=c.pem&ssl_keyfile=c.key"
    assert parse_redis_url(url).login.tls == RedisTls("/etc/ca.pem", "c.pem", "c.key")
    assert parse_redis_url("rediss://cache").login.tls == RedisTls()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://cache", "has to start with"),
        ("cache:6379", "has to start with"),
        ("redis://", "no host"),
        ("redis://a,b", "several addresses"),
        ("redis://a:seven", "seven"),
        ("redis://a/db0", "number of a database"),
        ("redis://a/0/1", "number of a database"),
        ("redis://a?ssl_ca_certs=x", "write rediss"),
        ("rediss://a?timeout=3", "unknown options timeout"),
        ("redis-sentinel://a", "name of the service"),
        ("redis-cluster://a/1", "one database only"),
        ("redis://kv@a", "--redis-password-file"),
    ],
)
def test_what_is_refused(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_redis_url(url)


def test_no_password_shows() -> None:
    target = parse_redis_url("redis-sentinel://kv:geheim@a/s", sentinel_password="geheim")
    assert target.login.password == target.sentinel_login.password == "geheim"
    assert "geheim" not in f"{target} {target!r} {target.login!r} {target.sentinel_login}"
    for url in ("http://kv:geheim@a", "redis://kv:geheim@a:port", "redis://kv:geheim@a/x", "redis://kv:geheim@"):
        with pytest.raises(ConfigError) as caught:
            parse_redis_url(url)
        assert "geheim" not in str(caught.value) and caught.value.__cause__ is None
