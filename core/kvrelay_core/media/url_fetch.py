"""Fetches an image by its URL, from the public Internet only. Needs the extra `media-url`; imported only where used.

A name is resolved once for each connection, all its addresses are checked, and one of those is dialled: what the name
resolves to a moment later does not matter. The name goes on in `Host` and in TLS. Each redirect begins anew. Nothing is
taken from the environment (proxies, cookies, credentials), and what the answer says of its type is not looked at.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any

import httpcore2

from kvrelay_core.errors import InvalidRequestError, KvRelayError, UnavailableError, UnsupportedError
from kvrelay_core.media.public_address import Address, is_public
from kvrelay_core.media.url_rules import UrlPlace, UrlRules

MAX_REDIRECTS = 3
MAX_FETCHES = 64  # at once, of a router
_MAX_DIALLED = 4  # addresses of one name
_CONNECT_S = 3.0  # for each
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = (("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close"), ("User-Agent", "kvrelay"))

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]


async def resolve(host: str, port: int) -> Sequence[Address]:
    """All addresses of a name, or of the many ways to write an address. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(ipaddress.ip_address(info[4][0]) for info in found))


class UrlFetcher:
    def __init__(
        self,
        rules: UrlRules,
        *,
        max_bytes: int,
        timeout_s: float,
        resolve: Resolve = resolve,
        may_dial: Callable[[Address], bool] = is_public,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`timeout_s` is for all of a fetch: waiting its turn, names, connections, redirects and the body."""
        self._rules = rules
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._backend = _CheckedBackend(resolve, may_dial)
        self._ssl_context = ssl_context or httpcore2.default_ssl_context()
        self._slots = asyncio.Semaphore(MAX_FETCHES)

    async def fetch(self, url: str, on_bytes: Callable[[int], None] = lambda _: None) -> bytes:
        """The body, at most `max_bytes`. `on_bytes` is told of each piece of it as it comes, and may raise.

        Raises InvalidRequestError for a bad URL, a refusal of the server and too long a body, UnsupportedError for
        what is not allowed, UnavailableError when another try may help.
        """
        place = self._rules.place_of(url)
        try:
            async with asyncio.timeout(self._timeout_s), self._slots:
                return await self._follow(place, on_bytes)
        except TimeoutError as error:
            raise UnavailableError(
                f"media: {place.host} did not send the image within {self._timeout_s:g} s; send its bytes",
                field="media",
            ) from error

    async def _follow(self, place: UrlPlace, on_bytes: Callable[[int], None]) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            try:
                found = await self._get(place, on_bytes)
            except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError) as error:
                raise UnavailableError(f"media: no image came from {place.host}: {error}", field="media") from error
            if isinstance(found, bytes):
                return found
            place = found
        raise InvalidRequestError(f"media: the URL redirects more than {MAX_REDIRECTS} times", field="media")

    async def _get(self, place: UrlPlace, on_bytes: Callable[[int], None]) -> bytes | UrlPlace:
        """The body, or where else to look for it. A connection of its own: what is kept open was checked long ago."""
        url = httpcore2.URL(scheme=place.scheme, host=place.host, port=place.port, target=place.target)
        pool = httpcore2.AsyncConnectionPool(ssl_context=self._ssl_context, network_backend=self._backend)
        extensions = {"timeout": {"connect": _CONNECT_S}}
        async with pool, pool.stream("GET", url, headers=_HEADERS, extensions=extensions) as response:
            headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in headers:
                return self._rules.redirected(place, headers[b"location"])
            if response.status != 200:
                raise _bad_status(place, response.status)
            return await self._read(response, headers.get(b"content-length", ""), on_bytes)

    async def _read(self, response: httpcore2.Response, announced: str, on_bytes: Callable[[int], None]) -> bytes:
        if announced.isdigit() and int(announced) > self._max_bytes:
            raise self._too_long()
        body = bytearray()
        async with aclosing(response.aiter_stream()) as pieces:
            async for piece in pieces:
                if len(body) + len(piece) > self._max_bytes:
                    raise self._too_long()
                on_bytes(len(piece))
                body += piece
        return bytes(body)

    def _too_long(self) -> KvRelayError:
        return InvalidRequestError(
            f"media: what the URL leads to has more than the {self._max_bytes} bytes allowed", field="media"
        )


class _CheckedBackend(httpcore2.AsyncNetworkBackend):
    """Dials addresses that were checked, never a name."""

    def __init__(self, resolve: Resolve, may_dial: Callable[[Address], bool]) -> None:
        self._resolve = resolve
        self._may_dial = may_dial
        self._sockets = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        failure: Exception = httpcore2.ConnectError("no address")
        for address in (await self._checked(host, port))[:_MAX_DIALLED]:
            try:
                return await self._sockets.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def _checked(self, host: str, port: int) -> Sequence[Address]:
        """One that may not be dialled spoils them all, and looks like a name that does not exist: callers are not to
        learn the names of a private network."""
        try:
            addresses = await self._resolve(host, port)
        except (OSError, ValueError):  # ValueError: no name can be like that
            addresses = ()
        if not addresses or not all(map(self._may_dial, addresses)):
            raise UnsupportedError(f"media: {host} has no public address; send the image's bytes", field="media")
        return addresses


def _bad_status(place: UrlPlace, status: int) -> KvRelayError:
    text = f"media: {place.host} answered {status} instead of an image"
    return (UnavailableError if status >= 500 or status == 429 else InvalidRequestError)(text, field="media")
