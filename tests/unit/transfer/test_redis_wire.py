"""RESP2 on one end of a socket pair, with whatever the test wants to come on it, in whatever pieces."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from kvrelay_transfer.tiers.redis_streams import PlainStream, StreamError
from kvrelay_transfer.tiers.redis_wire import RedisWire, RefusedError

PATIENT_S = 30.0
HASTY_S = 0.1
LARGE = bytes(range(256)) * 4096  # 1 MiB


class Peer:
    """The server's end, `sock`, of what a wire has the other end of."""

    def __init__(self) -> None:
        self.far_end, self.sock = socket.socketpair()
        self._sender: threading.Thread | None = None

    def says(self, *pieces: bytes) -> None:
        """One write each; on a thread, since what is large needs a reader."""

        def send() -> None:
            for piece in pieces:
                self.sock.sendall(piece)

        self._sender = threading.Thread(target=send)
        self._sender.start()

    def heard(self, num_bytes: int) -> bytes:
        return self.sock.recv(num_bytes, socket.MSG_WAITALL)

    def close(self) -> None:
        if self._sender is not None:
            self._sender.join()
        self.sock.close()
        self.far_end.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def wire(peer: Peer) -> RedisWire:
    return RedisWire(PlainStream(peer.far_end, PATIENT_S))


@pytest.fixture
def hasty_wire(peer: Peer) -> RedisWire:
    return RedisWire(PlainStream(peer.far_end, HASTY_S))


def room(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))


@pytest.mark.parametrize("size", [0, 1, 40, 57, 58, 59, 60, 61, 62, 63, 64, 65, 5000, len(LARGE)])
def test_get_reads_values_of_any_size(peer: Peer, wire: RedisWire, size: int) -> None:
    """Some end within what is read ahead, some just around there."""
    peer.says(b"$%d\r\n" % size + LARGE[:size] + b"\r\n")
    into = room(size + 10)
    assert wire.get(b"key", into) == size
    assert into[:size] == LARGE[:size] and not any(into[size:]) and wire.is_usable
    assert peer.heard(22) == b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n"


def test_get_reads_a_value_byte_by_byte(peer: Peer, wire: RedisWire) -> None:
    text = b"$300\r\n" + LARGE[:300] + b"\r\n"
    peer.says(*(text[at : at + 1] for at in range(len(text))))
    into = room(300)
    assert wire.get(b"key", into) == 300 and into == LARGE[:300]


def test_get_of_nothing_and_of_an_error_stay_in_step(peer: Peer, wire: RedisWire) -> None:
    peer.says(b"$-1\r\n")
    assert wire.get(b"key", room(10)) is None and wire.is_usable
    peer.says(b"-MOVED 7 127.0.0.1:7001\r\n")
    with pytest.raises(RefusedError, match="MOVED 7") as caught:
        wire.get(b"key", room(10))
    assert caught.value.code == "MOVED" and wire.is_usable


def test_get_of_what_does_not_fit_is_out_of_step(peer: Peer, wire: RedisWire) -> None:
    peer.says(b"$11\r\nhello world\r\n")
    into = room(10)
    assert wire.get(b"key", into) is None
    assert not wire.is_in_step and not any(into)


def test_put_sends_the_value_as_it_lies_there(peer: Peer, wire: RedisWire) -> None:
    head = b"*5\r\n$3\r\nSET\r\n$3\r\nkey\r\n$%d\r\n" % len(LARGE)
    whole = head + LARGE + b"\r\n$2\r\nEX\r\n$2\r\n60\r\n"
    heard: list[bytes] = []

    def serve() -> None:
        heard.append(peer.heard(len(whole)))
        peer.sock.sendall(b"+OK\r\n")

    server = threading.Thread(target=serve)
    server.start()
    wire.put(b"key", memoryview(LARGE), 60)
    server.join()
    assert heard == [whole] and wire.is_usable


def test_put_that_is_refused_stays_in_step(peer: Peer, wire: RedisWire) -> None:
    peer.says(b"-OOM command not allowed when used memory > 'maxmemory'.\r\n")
    with pytest.raises(RefusedError) as caught:
        wire.put(b"key", memoryview(b"value"), 60)
    assert caught.value.code == "OOM" and wire.is_usable


def test_answers_of_every_kind(peer: Peer, wire: RedisWire) -> None:
    peer.says(b"+PONG\r\n:-3\r\n$4\r\na\r\nb\r\n", b"*3\r\n$1\r\n0\r\n*2\r\n:1\r\n$-1\r\n-ERR no\r\n*-1\r\n")
    replies = list(wire.call_many([[b"A"]] * 5))
    assert replies[:3] == [b"PONG", -3, b"a\r\nb"] and replies[4] is None
    assert isinstance(replies[3], list) and replies[3][:2] == [b"0", [1, None]] and str(replies[3][2]) == "ERR no"


def test_more_commands_than_go_at_once(peer: Peer, wire: RedisWire) -> None:
    peer.says(b":1\r\n" * 1200)
    assert list(wire.call_many([[b"EXISTS", b"key"]] * 1200)) == [1] * 1200
    assert wire.is_usable


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n", b"$x\r\n", b"$3\r\nabcde", b":1\r\n", b"+OK\r\n", b"\r\n", b"x" * 70_000],
)
def test_no_redis_server(peer: Peer, wire: RedisWire, answer: bytes) -> None:
    peer.says(answer)
    with pytest.raises(StreamError, match="is this a Redis server"):
        wire.get(b"key", room(3))
    assert not wire.is_usable


def test_a_large_answer_where_small_ones_belong(peer: Peer, wire: RedisWire) -> None:
    peer.says(b"$9000000000\r\n")
    with pytest.raises(StreamError, match="9000000000 bytes"):
        wire.call(b"INFO")


@pytest.mark.parametrize("said", [b"", b"$10", b"$100000\r\n" + LARGE[:99_999]])
def test_silence_ends_by_the_timeout(peer: Peer, hasty_wire: RedisWire, said: bytes) -> None:
    peer.says(said)
    with pytest.raises(StreamError, match=r"within 0\.1 s"):
        hasty_wire.get(b"key", room(100_000))
    assert not hasty_wire.is_usable


def test_a_trickle_ends_by_the_timeout(peer: Peer, hasty_wire: RedisWire) -> None:
    """Each byte comes in time, all together do not."""
    ended = threading.Event()

    def trickle() -> None:
        peer.sock.sendall(b"$100000\r\n")
        while not ended.wait(HASTY_S / 10):
            peer.sock.sendall(b"x")

    server = threading.Thread(target=trickle)
    server.start()
    with pytest.raises(StreamError, match=r"within 0\.1 s"):
        hasty_wire.get(b"key", room(100_000))
    ended.set()
    server.join()


def test_a_peer_that_takes_nothing_ends_by_the_timeout(hasty_wire: RedisWire) -> None:
    with pytest.raises(StreamError, match=r"within 0\.1 s"):
        hasty_wire.put(b"key", memoryview(LARGE * 8), 60)


@pytest.mark.parametrize("said", [b"", b"$10", b"$100000\r\n" + LARGE[:99_999]])
def test_a_closed_connection(peer: Peer, wire: RedisWire, said: bytes) -> None:
    def serve() -> None:
        peer.heard(22)
        peer.sock.sendall(said)
        peer.sock.shutdown(socket.SHUT_WR)

    server = threading.Thread(target=serve)
    server.start()
    with pytest.raises(StreamError, match="closed by the server"):
        wire.get(b"key", room(100_000))
    server.join()
    assert not wire.is_usable


def test_what_nobody_asked_for_makes_it_unusable(peer: Peer, wire: RedisWire) -> None:
    assert wire.is_usable
    peer.sock.sendall(b"+OK\r\n")
    assert not wire.is_usable


def test_shut_ends_a_call_on_another_thread(peer: Peer, wire: RedisWire) -> None:
    problems: list[StreamError] = []

    def ask() -> None:
        try:
            wire.get(b"key", room(10))
        except StreamError as error:
            problems.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    assert peer.heard(22)  # it was sent, and now it waits or is about to
    wire.shut()
    asker.join(timeout=10)
    assert not asker.is_alive() and len(problems) == 1
