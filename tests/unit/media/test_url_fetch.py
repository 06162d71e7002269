"""Fetching against a server of the test's own: names lead where the test says, and loopback stands for the Internet."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from certificates import CertificateAuthority

from kvrelay_core.errors import InvalidRequestError, KvRelayError, OverloadedError, UnavailableError, UnsupportedError
from kvrelay_core.media.public_address import Address
from kvrelay_core.media.url_fetch import UrlFetcher, resolve
from kvrelay_core.media.url_rules import UrlRules

LOOPBACK = ip_address("127.0.0.1")
OTHER_LOOPBACK = ip_address("127.0.0.2")  # stands for a private address: it may not be dialled
MAX_BYTES = 1000
PICTURE = b"\x89PNG" + bytes(range(256))
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Answers each path as `answers` says, and keeps the heads of the requests that it got."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Answer] = {}
        self.heads: list[str] = []
        self.port = 0
        self.num_open = 0
        self.idle = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        self.idle.clear()
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            answer = self.answers[head.split()[1]]
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (ConnectionError, asyncio.IncompleteReadError):  # the other side has had enough
            pass
        finally:
            writer.close()
            self.num_open -= 1
            if not self.num_open:
                self.idle.set()


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Server]:
    """Leaving the block asserts that no connection is left open."""
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, **options)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
        async with asyncio.timeout(5):
            while server.num_open:
                await server.idle.wait()
    finally:
        listening.close()


class Names:
    """A resolver whose answers are listed; the last one stays."""

    def __init__(self, **answers: Sequence[Address]) -> None:
        self.answers = {name.replace("_", "."): list(addresses) for name, addresses in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[Address]:
        self.asked.append(host)
        found = self.answers[host]
        return [found.pop(0) if len(found) > 1 else found[0]]


def fetcher_for(server: Server, names: Names, **options: Any) -> UrlFetcher:
    hosts = tuple(f"{name}:{server.port}" for name in names.answers)
    given = {"max_bytes": MAX_BYTES, "timeout_s": 5.0, "may_dial": lambda address: address == LOOPBACK, **options}
    given.setdefault("ssl_context", ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))  # it trusts nobody, and costs little
    return UrlFetcher(UrlRules(hosts), resolve=names, **given)


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


async def test_the_body_comes_as_it_is_whatever_its_type_says() -> None:
    async with serving() as server:
        server.answers["/a.png?x=1"] = ok(PICTURE, "Content-Type: text/html")
        names = Names(pics_test=[LOOPBACK])
        told: list[int] = []
        fetched = await fetcher_for(server, names).fetch(f"http://pics.test:{server.port}/a.png?x=1#there", told.append)
        assert fetched == PICTURE and sum(told) == len(PICTURE)
        [head] = server.heads
        assert f"Host: pics.test:{server.port}\r\n" in head and "identity" in head
        assert names.asked == ["pics.test"]


async def test_chunks_and_a_body_till_the_end_of_the_connection() -> None:
    async with serving() as server:
        server.answers["/chunked"] = (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        )
        server.answers["/closed"] = b"HTTP/1.0 200 OK\r\n\r\nabcde"
        fetcher = fetcher_for(server, Names(pics_test=[LOOPBACK]))
        for path in ("chunked", "closed"):
            assert await fetcher.fetch(f"http://pics.test:{server.port}/{path}") == b"abcde"


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fe80::1"])
async def test_a_name_of_a_private_address_is_not_dialled(address: str) -> None:
    """By the rule that is used where nothing is injected."""
    async with serving() as server:
        names = Names(pics_test=[ip_address(address)])
        fetcher = UrlFetcher(UrlRules((f"pics.test:{server.port}",)), max_bytes=9, timeout_s=5, resolve=names)
        with pytest.raises(UnsupportedError, match="no public address"):
            await fetcher.fetch(f"http://pics.test:{server.port}/")
        assert not server.heads


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "0x7f000001", "2130706433", "localhost", "[::1]"])
async def test_ways_to_write_loopback_are_not_dialled(host: str) -> None:
    """With the system's resolver."""
    fetcher = UrlFetcher(UrlRules(("*",)), max_bytes=9, timeout_s=5)
    with pytest.raises(UnsupportedError, match="no public address"):
        await fetcher.fetch(f"http://{host}/")


async def test_one_private_address_spoils_a_names_public_ones() -> None:
    async def both(host: str, port: int) -> Sequence[Address]:
        return LOOPBACK, OTHER_LOOPBACK

    async with serving() as server:
        names = Names(pics_test=[LOOPBACK])
        fetcher = fetcher_for(server, names)
        mixed = UrlFetcher(
            UrlRules((f"pics.test:{server.port}",)), max_bytes=9, timeout_s=5, resolve=both,
            may_dial=lambda address: address == LOOPBACK,
        )  # fmt: skip
        server.answers["/"] = ok(b"x")
        assert await fetcher.fetch(f"http://pics.test:{server.port}/") == b"x"
        with pytest.raises(UnsupportedError, match="no public address"):
            await mixed.fetch(f"http://pics.test:{server.port}/")
        assert len(server.heads) == 1


async def test_a_name_that_resolves_differently_the_second_time_is_asked_once() -> None:
    async with serving() as server:
        server.answers["/"] = ok(PICTURE)
        names = Names(pics_test=[LOOPBACK, OTHER_LOOPBACK])
        fetcher = fetcher_for(server, names)
        assert await fetcher.fetch(f"http://pics.test:{server.port}/") == PICTURE
        assert names.asked == ["pics.test"]
        with pytest.raises(UnsupportedError, match="no public address"):
            await fetcher.fetch(f"http://pics.test:{server.port}/")


async def test_redirects_are_followed_a_few_times() -> None:
    async with serving() as server:
        names = Names(pics_test=[LOOPBACK], cdn_test=[LOOPBACK])
        fetcher = fetcher_for(server, names)
        server.answers |= {
            "/1": redirect("/2", 301),
            "/2": redirect(f"http://cdn.test:{server.port}/3", 307),
            "/3": redirect("4", 308),
            "/4": ok(PICTURE),
            "/round": redirect("/round"),
            "/nowhere": b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        }
        assert await fetcher.fetch(f"http://pics.test:{server.port}/1") == PICTURE
        assert names.asked == ["pics.test", "pics.test", "cdn.test", "cdn.test"]
        with pytest.raises(InvalidRequestError, match="more than 3 times"):
            await fetcher.fetch(f"http://pics.test:{server.port}/round")
        with pytest.raises(InvalidRequestError, match="answered 302"):
            await fetcher.fetch(f"http://pics.test:{server.port}/nowhere")


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1:{port}/secret", "http://inside.test:{port}/secret", "//turns.test:{port}/secret",
     "file:///etc/passwd", "gopher://pics.test:{port}/secret", "http://pics.test/secret"],
)  # fmt: skip
async def test_redirects_lead_to_nothing_else(location: str) -> None:
    """Neither to what is not listed, nor to a listed name of a private address, nor to one that has become private."""
    async with serving() as server:
        server.answers |= {
            "/": redirect(location.format(port=server.port)),
            "/turn": redirect(f"http://turns.test:{server.port}/"),
            "/secret": ok(b"secret"),
        }
        names = Names(pics_test=[LOOPBACK], inside_test=[OTHER_LOOPBACK], turns_test=[LOOPBACK, OTHER_LOOPBACK])
        fetcher = fetcher_for(server, names)
        with pytest.raises(UnsupportedError):
            await fetcher.fetch(f"http://pics.test:{server.port}/turn" if "turns" in location else
                                f"http://pics.test:{server.port}/")  # fmt: skip
        assert not any("/secret" in head.split()[1] for head in server.heads)


async def drip(writer: asyncio.StreamWriter) -> None:
    """A byte now and then, for as long as somebody listens."""
    while not writer.is_closing():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


async def drip_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    await drip(writer)


@pytest.mark.parametrize("answer", [drip, drip_body])
async def test_a_slow_drip_ends_with_the_time_limit(answer: Answer) -> None:
    async with serving() as server:
        server.answers["/"] = answer
        fetcher = fetcher_for(server, Names(pics_test=[LOOPBACK]), timeout_s=0.2, max_bytes=10**9)
        with pytest.raises(UnavailableError, match=r"within 0\.2 s"):
            await fetcher.fetch(f"http://pics.test:{server.port}/")


async def test_a_resolver_that_does_not_answer_ends_with_the_time_limit() -> None:
    async def never(host: str, port: int) -> Sequence[Address]:
        await asyncio.Event().wait()
        raise AssertionError

    fetcher = UrlFetcher(UrlRules(("*",)), max_bytes=9, timeout_s=0.05, resolve=never)
    with pytest.raises(UnavailableError, match=r"within 0\.05 s"):
        await fetcher.fetch("http://pics.test/")


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not writer.is_closing():
        writer.write(bytes(4096))
        await writer.drain()


async def endless_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while not writer.is_closing():
        writer.write(b"X-Y: " + b"z" * 4096 + b"\r\n")
        await writer.drain()


async def test_too_much_is_not_read() -> None:
    async with serving() as server:
        server.answers |= {
            "/endless": endless,
            "/announced": f"HTTP/1.1 200 OK\r\nContent-Length: {MAX_BYTES + 1}\r\n\r\n".encode(),
            "/head": endless_head,
            "/fits": ok(bytes(MAX_BYTES)),
        }
        fetcher = fetcher_for(server, Names(pics_test=[LOOPBACK]))
        told: list[int] = []
        for path in ("endless", "announced"):
            with pytest.raises(InvalidRequestError, match="more than the 1000 bytes"):
                await fetcher.fetch(f"http://pics.test:{server.port}/{path}", told.append)
        assert sum(told) <= MAX_BYTES
        with pytest.raises(UnavailableError, match="no image came"):
            await fetcher.fetch(f"http://pics.test:{server.port}/head")
        assert len(await fetcher.fetch(f"http://pics.test:{server.port}/fits")) == MAX_BYTES


async def test_who_counts_the_bytes_can_stop_it() -> None:
    def full(num_bytes: int) -> None:
        raise OverloadedError("full")

    async with serving() as server:
        server.answers["/"] = drip_body
        with pytest.raises(OverloadedError, match="full"):
            await fetcher_for(server, Names(pics_test=[LOOPBACK])).fetch(f"http://pics.test:{server.port}/", full)


@pytest.mark.parametrize(
    ("status", "error"),
    [(204, InvalidRequestError), (206, InvalidRequestError), (304, InvalidRequestError), (401, InvalidRequestError),
     (404, InvalidRequestError), (429, UnavailableError), (500, UnavailableError), (503, UnavailableError)],
)  # fmt: skip
async def test_another_status_is_not_an_image(status: int, error: type[KvRelayError]) -> None:
    async with serving() as server:
        server.answers["/"] = f"HTTP/1.1 {status} Status\r\nContent-Length: 0\r\n\r\n".encode()
        with pytest.raises(error, match=f"answered {status}"):
            await fetcher_for(server, Names(pics_test=[LOOPBACK])).fetch(f"http://pics.test:{server.port}/")


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"]
)
async def test_a_broken_answer_is_an_error_of_ours(answer: bytes) -> None:
    async with serving() as server:
        server.answers["/"] = answer
        with pytest.raises(UnavailableError, match=r"no image came from pics\.test"):
            await fetcher_for(server, Names(pics_test=[LOOPBACK])).fetch(f"http://pics.test:{server.port}/")


async def test_nobody_listens() -> None:
    async with serving() as server:
        pass
    with pytest.raises(UnavailableError, match=r"no image came from pics\.test"):
        await fetcher_for(server, Names(pics_test=[LOOPBACK])).fetch(f"http://pics.test:{server.port}/")


async def test_a_fetch_that_is_cancelled_hangs_up() -> None:
    async with serving() as server:
        server.answers["/"] = drip_body
        fetcher = fetcher_for(server, Names(pics_test=[LOOPBACK]), max_bytes=10**9)
        begun = asyncio.Event()
        task = asyncio.create_task(fetcher.fetch(f"http://pics.test:{server.port}/", lambda _: begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_tls_checks_the_name_and_not_the_address(tmp_path: Path) -> None:
    authority = CertificateAuthority(tmp_path / "ca")
    files = authority.issue("pics.test", "DNS:pics.test")
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(files.certificate, files.key)
    trusting = ssl.create_default_context(cafile=files.ca)
    async with serving(ssl=ours) as server:
        server.answers["/"] = ok(PICTURE)
        names = Names(pics_test=[LOOPBACK], cdn_test=[LOOPBACK])
        fetcher = fetcher_for(server, names, ssl_context=trusting)
        assert await fetcher.fetch(f"https://pics.test:{server.port}/") == PICTURE
        for other in (fetcher, fetcher_for(server, names)):
            host = "cdn.test" if other is fetcher else "pics.test"
            with pytest.raises(UnavailableError, match="certificate"):
                await other.fetch(f"https://{host}:{server.port}/")


async def test_the_systems_resolver_gives_each_address_once() -> None:
    assert LOOPBACK in await resolve("localhost", 80)
    assert await resolve("127.0.0.1", 80) == (LOOPBACK,)
