"""Connections to servers of one log-in: redis-py opens and authenticates them, `RedisWire` speaks on them.

As many to a server as threads use it at once. Knows no keys.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import socket
from typing import Any

from redis.connection import Connection, SSLConnection
from redis.exceptions import AuthenticationError, RedisError

from kvrelay_transfer.tiers.redis_streams import StreamError, stream_over
from kvrelay_transfer.tiers.redis_targets import Address, RedisLogin
from kvrelay_transfer.tiers.redis_wire import RedisWire


class OpenWire(RedisWire):
    """A wire that owns its connection."""

    def __init__(self, connection: Any, timeout_s: float) -> None:
        self._connection = connection  # redis-py has no types for it
        sock = connection._sock
        assert isinstance(sock, socket)
        super().__init__(stream_over(sock, timeout_s))

    def close(self) -> None:
        """By the thread that has it."""
        self._connection.disconnect()


class RedisConnections:
    """Thread-safe. `timeout_s` bounds each command, and each step of opening a connection."""

    def __init__(self, login: RedisLogin, timeout_s: float) -> None:
        self._login = login
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._idle: dict[Address, list[OpenWire]] = defaultdict(list)
        self._busy: set[OpenWire] = set()
        self._is_closed = False

    @contextmanager
    def borrow(self, address: Address) -> Iterator[RedisWire]:
        """Raises StreamError when there is no connection to be had."""
        wire = self._take(address) or self._open(address)
        try:
            yield wire
        finally:
            self._give_back(address, wire)

    def drop_idle(self, address: Address) -> None:
        with self._lock:
            idle = self._idle.pop(address, [])
        for wire in idle:
            wire.close()

    def close(self) -> None:
        """What is under way ends with StreamError."""
        with self._lock:
            self._is_closed = True
            addresses = list(self._idle)
            for wire in self._busy:
                wire.shut()
        for address in addresses:
            self.drop_idle(address)

    def _take(self, address: Address) -> OpenWire | None:
        while True:
            with self._lock:
                if self._is_closed:
                    raise StreamError("closed")
                idle = self._idle[address]
                if not idle:
                    return None
                wire = idle.pop()
                self._busy.add(wire)
            if wire.is_usable:
                return wire
            with self._lock:
                self._busy.discard(wire)
            wire.close()

    def _open(self, address: Address) -> OpenWire:
        wire = open_wire(address, self._login, self._timeout_s)
        with self._lock:
            if not self._is_closed:
                self._busy.add(wire)
                return wire
        wire.close()
        raise StreamError("closed")

    def _give_back(self, address: Address, wire: OpenWire) -> None:
        with self._lock:
            self._busy.discard(wire)
            if wire.is_in_step and not self._is_closed:
                self._idle[address].append(wire)
                return
        wire.close()


def open_wire(address: Address, login: RedisLogin, timeout_s: float) -> OpenWire:
    """Connected, by TLS if asked for, authenticated and on the right database. Raises StreamError."""
    options = {
        "host": address.host,
        "port": address.port,
        "username": login.user or None,
        "password": login.password or None,
        "db": login.db,
        "protocol": 2,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
    }
    make: Callable[..., Any] = Connection
    if login.tls is not None:
        make = SSLConnection
        options |= {
            "ssl_ca_certs": login.tls.ca_file,
            "ssl_certfile": login.tls.certificate_file,
            "ssl_keyfile": login.tls.key_file,
        }
    connection = make(**options)
    try:
        connection.connect()
    except AuthenticationError as error:
        raise StreamError(f"{address} refuses user and password ({error}): see --redis-password-file") from error
    except (RedisError, OSError) as error:
        raise StreamError(f"cannot connect to {address}: {error}") from error
    return OpenWire(connection, timeout_s)
