"""Which Redis: what a URL and a password say, so that nothing but the log-in sees the password.

    redis://[user[:password]@]host[:port][/db]                  one server; `rediss` for TLS
    redis-sentinel://[user[:password]@]host[:port][,...]/service[/db]      the master that Sentinels name
    redis-cluster://[user[:password]@]host[:port][,...]         a cluster, found through any of these

`rediss-sentinel` and `rediss-cluster` are those over TLS. Files for TLS are given as in redis-py's URLs:
`?ssl_ca_certs=ca.pem&ssl_certfile=client.pem&ssl_keyfile=client.key`. Opens no connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvrelay_core.errors import ConfigError

_PORT = 6379
_SENTINEL_PORT = 26379
_TLS_FILES = {"ssl_ca_certs": "ca_file", "ssl_certfile": "certificate_file", "ssl_keyfile": "key_file"}


class RedisKind(Enum):
    STANDALONE = ""
    SENTINEL = "-sentinel"
    CLUSTER = "-cluster"


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class RedisTls:
    """Without a CA the system's are trusted; host names are verified."""

    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None


@dataclass(frozen=True, slots=True)
class RedisLogin:
    """How to become somebody on a connection. Its password is in no text form of it."""

    user: str = ""  # none: the server's default user
    password: str = field(default="", repr=False)
    db: int = 0
    tls: RedisTls | None = None


@dataclass(frozen=True, slots=True)
class RedisTarget:
    """`login` is for the servers that keep data; Sentinels are logged in to with `sentinel_login`."""

    kind: RedisKind
    addresses: tuple[Address, ...]
    login: RedisLogin = RedisLogin()
    service: str = ""
    sentinel_login: RedisLogin = RedisLogin()

    def __str__(self) -> str:
        """The URL, without credentials and files."""
        scheme = ("redis" if self.login.tls is None else "rediss") + self.kind.value
        path = [self.service] if self.service else []
        path += [str(self.login.db)] if self.login.db else []
        return f"{scheme}://{','.join(map(str, self.addresses))}{'/' if path else ''}{'/'.join(path)}"


def parse_redis_url(url: str, password: str = "", sentinel_password: str = "") -> RedisTarget:
    """`password`, where given, counts instead of the URL's. Raises ConfigError, which does not show passwords."""
    try:
        parts = urlsplit(url)
        kind, is_tls = _scheme(parts.scheme)
        tls = _tls(parts.query) if is_tls else None
        if not is_tls and parts.query:
            raise ValueError("options are for TLS only: write rediss")
        credentials, _, hosts = parts.netloc.rpartition("@")
        default_port = _SENTINEL_PORT if kind is RedisKind.SENTINEL else _PORT
        addresses = tuple(_address(text, default_port) for text in hosts.split(","))
        service, db = _path(parts, kind)
    except ValueError as error:
        raise ConfigError(f"cannot use the Redis URL: {error}") from None
    if kind is RedisKind.STANDALONE and len(addresses) > 1:
        raise ConfigError("cannot use the Redis URL: several addresses need redis-sentinel:// or redis-cluster://")
    user, _, own_password = credentials.partition(":")
    login = RedisLogin(unquote(user), password or unquote(own_password), db, tls)
    if login.user and not login.password:
        raise ConfigError(f"the Redis user {login.user!r} has no password: give --redis-password-file")
    sentinel_login = RedisLogin(password=sentinel_password, tls=tls)
    return RedisTarget(kind, addresses, login, service, sentinel_login)


def _scheme(scheme: str) -> tuple[RedisKind, bool]:
    for kind in RedisKind:
        if scheme in (f"redis{kind.value}", f"rediss{kind.value}"):
            return kind, scheme.startswith("rediss")
    raise ValueError("it has to start with redis://, rediss://, redis-sentinel:// or redis-cluster://")


def _tls(query: str) -> RedisTls:
    options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    if unknown := set(options) - set(_TLS_FILES):
        raise ValueError(f"unknown options {', '.join(sorted(unknown))}; it takes {', '.join(_TLS_FILES)}")
    return RedisTls(**{_TLS_FILES[name]: value for name, value in options.items()})


def _address(text: str, default_port: int) -> Address:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("it names no host")
    return Address(parts.hostname, parts.port or default_port)


def _path(parts: SplitResult, kind: RedisKind) -> tuple[str, int]:
    """The service and the number of the database."""
    words = [unquote(word) for word in parts.path.split("/") if word]
    service = words.pop(0) if words and kind is RedisKind.SENTINEL else ""
    if kind is RedisKind.SENTINEL and not service:
        raise ValueError("it has to end with the name of the service that the Sentinels watch")
    if kind is RedisKind.CLUSTER and words:
        raise ValueError("a cluster has one database only")
    if len(words) > 1 or not all(word.isdigit() for word in words):
        raise ValueError("what follows the last / has to be the number of a database")
    return service, int(words[0]) if words else 0
