"""RESP2, as far as a tier speaks it, on a stream: large values between a socket and memory, without a copy in between.

https://redis.io/docs/latest/develop/reference/protocol-spec/. Knows no addresses, no parts and no retries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from kvrelay_transfer.tiers.redis_streams import Stream, StreamError

Reply: TypeAlias = "bytes | int | list[Reply] | RefusedError | None"

_AHEAD_BYTES = 64 << 10  # small replies are read so many bytes at once
_HEAD_BYTES = 64  # and no more than these where a large value follows
_MAX_SMALL_BYTES = 1 << 20  # of a value that is not a part
_BATCH = 512  # commands under way at once: their replies fit every socket's buffer


class RefusedError(Exception):
    """The server answered with an error. The connection is as good as before."""

    @property
    def code(self) -> str:
        """OOM, MOVED, READONLY, ..."""
        return str(self).split(" ", 1)[0]


class RedisWire:
    """One thread at a time. Raises StreamError, after which `is_in_step` is false."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.is_in_step = True  # no reply is owed; false for good after an error
        self._room = bytearray(_AHEAD_BYTES)
        self._view = memoryview(self._room)
        self._start = self._end = 0  # of what was read and not used, in the room

    @property
    def is_usable(self) -> bool:
        """Whether it is in step and, as far as the kernel knows, still connected."""
        return self.is_in_step and self._stream.is_quiet()

    def get(self, key: bytes, into: memoryview) -> int | None:
        """Writes the value to the start of `into` and returns its length. None when there is none, or when it would
        not fit, which leaves the wire out of step. Raises RefusedError."""
        self._send([command(b"GET", key)])
        line = self._line(_HEAD_BYTES)
        if line[:1] == b"-":
            self.is_in_step = True
            raise _refusal(line)
        length = _length(line, b"$")
        if length < 0 or length > len(into):
            self.is_in_step = length < 0
            return None
        self._value(into[:length])
        self.is_in_step = True
        return length

    def put(self, key: bytes, value: memoryview, ttl_s: int) -> None:
        """Raises RefusedError."""
        ttl = b"%d" % ttl_s
        head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value))
        tail = b"\r\n$2\r\nEX\r\n$%d\r\n%b\r\n" % (len(ttl), ttl)
        self._send([head, value, tail])
        reply = self._reply()
        if isinstance(reply, RefusedError):
            self.is_in_step = True
            raise reply
        if reply != b"OK":
            raise StreamError("the answer to SET is not OK: is this a Redis server?")
        self.is_in_step = True

    def call(self, *words: bytes) -> Reply:
        """For a command with small words and a small answer. Raises RefusedError."""
        (reply,) = self.call_many([words])
        if isinstance(reply, RefusedError):
            raise reply
        return reply

    def call_many(self, commands: Sequence[Sequence[bytes]]) -> Iterator[Reply]:
        """Pipelined, in batches; refusals are among the replies. The last batches are not sent where the iterator is
        left before."""
        for first in range(0, len(commands), _BATCH):
            batch = commands[first : first + _BATCH]
            self._send([b"".join(command(*words) for words in batch)])
            replies = [self._reply() for _ in batch]
            self.is_in_step = True
            yield from replies

    def shut(self) -> None:
        """From any thread: what is under way ends soon."""
        self._stream.shut()

    def _send(self, pieces: Sequence[bytes | memoryview]) -> None:
        self.is_in_step = False
        self._stream.send(pieces)

    def _reply(self) -> Reply:
        line = self._line(_AHEAD_BYTES)
        kind = line[:1]
        if kind == b"+":
            return line[1:]
        if kind == b"-":
            return _refusal(line)
        if kind == b":":
            return _number(line[1:])
        length = _length(line, b"*" if kind == b"*" else b"$")
        if length < 0:
            return None
        if kind == b"*":
            return [self._reply() for _ in range(length)]
        if length > _MAX_SMALL_BYTES:
            raise StreamError(f"an answer has a value of {length} bytes: is this a Redis server?")
        value = bytearray(length)
        self._value(memoryview(value))
        return bytes(value)

    def _value(self, into: memoryview) -> None:
        """Fills it, and reads the line's end behind it."""
        num_here = min(len(into), self._end - self._start)
        into[:num_here] = self._view[self._start : self._start + num_here]
        self._start += num_here
        end = bytearray(2)
        end_here = min(2, self._end - self._start)
        end[:end_here] = self._view[self._start : self._start + end_here]
        self._start += end_here
        self._stream.receive([into[num_here:], memoryview(end)[end_here:]])
        if end != b"\r\n":
            raise StreamError("a value does not end where it should: is this a Redis server?")

    def _line(self, step_bytes: int) -> bytes:
        """The next one, without its end; reads no more than `step_bytes` beyond what is here."""
        while (end := self._room.find(b"\r\n", self._start, self._end)) < 0:
            self._read_ahead(step_bytes)
        line = bytes(self._view[self._start : end])
        self._start = end + 2
        return line

    def _read_ahead(self, most_bytes: int) -> None:
        num_kept = self._end - self._start
        if num_kept == len(self._room):
            raise StreamError("an answer has a line that is too long: is this a Redis server?")
        self._view[:num_kept] = bytes(self._view[self._start : self._end])
        self._start, self._end = 0, num_kept
        self._end += self._stream.receive_some(self._view[num_kept : num_kept + most_bytes])


def command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def _refusal(line: bytes) -> RefusedError:
    return RefusedError(line[1:].decode(errors="replace"))


def _length(line: bytes, kind: bytes) -> int:
    """That a line of this kind says; negative for none."""
    if line[:1] != kind:
        raise StreamError(f"cannot read an answer that starts with {line[:1]!r}: is this a Redis server?")
    return _number(line[1:])


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise StreamError(f"{text[:20]!r} is no number: is this a Redis server?") from error
