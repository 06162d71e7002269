"""Bytes in and out of a connected socket, each call within about twice `timeout_s`.

A plain socket is set to block in the kernel, with the kernel's own timeouts: a large value is then one call without the
GIL, where Python's timeouts would wake up for every piece that comes. Knows no Redis.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress

_TIMEVAL = struct.Struct("@ll")


class StreamError(Exception):
    """The connection is of no use any more: closed, silent for too long, or out of step."""


class Stream(ABC):
    """Owned by one thread at a time; only `shut` may be called by others."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s

    def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        """All of them, one after the other. Raises StreamError."""
        until_s = time.monotonic() + self._timeout_s
        waiting = [memoryview(piece) for piece in pieces]
        while waiting:
            num_sent = self._guarded(lambda: self._send_some(waiting), until_s)
            while waiting and num_sent >= len(waiting[0]):
                num_sent -= len(waiting.pop(0))
            if waiting:
                waiting[0] = waiting[0][num_sent:]

    def receive_some(self, into: memoryview) -> int:
        """At least one byte, at most what there is room for. Raises StreamError."""
        return self._guarded(lambda: self._sock.recv_into(into), time.monotonic() + self._timeout_s)

    def receive(self, into: Sequence[memoryview]) -> None:
        """Fills them all, one after the other. Raises StreamError."""
        until_s = time.monotonic() + self._timeout_s
        waiting = [piece for piece in into if piece]
        while waiting:
            num_read = self._guarded(lambda: self._receive_most(waiting), until_s)
            while waiting and num_read >= len(waiting[0]):
                num_read -= len(waiting.pop(0))
            if waiting:
                waiting[0] = waiting[0][num_read:]

    def is_quiet(self) -> bool:
        """Whether the peer has neither closed the connection nor sent anything; asks the kernel only."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def shut(self) -> None:
        """Calls that are under way on another thread end with StreamError."""
        with suppress(OSError):  # is not connected any more
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _guarded(self, call: Callable[[], int], until_s: float) -> int:
        try:
            num_bytes = call()
        except (BlockingIOError, TimeoutError) as error:
            raise StreamError(f"no answer within {self._timeout_s:g} s") from error
        except (OSError, ValueError) as error:  # ValueError: TLS says so of a socket that was closed
            raise StreamError(f"connection lost: {error}") from error
        if num_bytes == 0:
            raise StreamError("connection closed by the server")
        if time.monotonic() > until_s:
            raise StreamError(f"too slow: not done within {self._timeout_s:g} s")
        return num_bytes

    @abstractmethod
    def _send_some(self, pieces: Sequence[memoryview]) -> int: ...

    @abstractmethod
    def _receive_most(self, into: Sequence[memoryview]) -> int: ...


class PlainStream(Stream):
    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        super().__init__(sock, timeout_s)
        sock.settimeout(None)
        timeval = _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def _send_some(self, pieces: Sequence[memoryview]) -> int:
        return self._sock.sendmsg(pieces)

    def _receive_most(self, into: Sequence[memoryview]) -> int:
        return self._sock.recvmsg_into(into, 0, socket.MSG_WAITALL)[0]


class TlsStream(Stream):
    """A record of TLS, at most 16 KiB, at a time."""

    def __init__(self, sock: ssl.SSLSocket, timeout_s: float) -> None:
        super().__init__(sock, timeout_s)
        sock.settimeout(timeout_s)

    def _send_some(self, pieces: Sequence[memoryview]) -> int:
        return self._sock.send(pieces[0])

    def _receive_most(self, into: Sequence[memoryview]) -> int:
        return self._sock.recv_into(into[0])


def stream_over(sock: socket.socket, timeout_s: float) -> Stream:
    """The stream for a connected socket, which stays the caller's to close."""
    return TlsStream(sock, timeout_s) if isinstance(sock, ssl.SSLSocket) else PlainStream(sock, timeout_s)
